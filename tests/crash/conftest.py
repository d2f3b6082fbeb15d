"""Servers that tests may kill."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from taskstore.testing.replication import PostgresNode, url_of


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresNode]:
    """A server for those who leave it running."""
    with PostgresNode.create() as node:
        yield node


@pytest.fixture
def server_url(server: PostgresNode) -> str:
    """The URL of an empty database on that server."""
    return url_of(server, database=server.new_database())


@pytest.fixture
def primary() -> Iterator[PostgresNode]:
    """A server of one's own, to be replaced by its standby."""
    with PostgresNode.create() as node:
        yield node


@pytest.fixture
def standby(primary: PostgresNode) -> PostgresNode:
    """A synchronous standby of that server."""
    return primary.standby()
