"""Servers that tests may kill, and places where nothing lasts."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskstore.testing.crash.replication import PostgresNode, url_of


@pytest.fixture
def quiet() -> Iterator[None]:
    """Nothing is logged: what goes wrong does so on purpose."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A directory where syncing takes no time, for what is not about the disk itself."""
    shared = Path("/dev/shm")  # a directory of the test's own is made in it
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="taskstore-") as directory:
        yield Path(directory)


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
