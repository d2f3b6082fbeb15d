"""Fixtures: servers that tests may kill, a directory in memory, no logging."""

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
    """Disable logging, because the failures are intended."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where fsync is fast, for tests that do not need a disk."""
    shared = Path("/dev/shm")  # the fixture creates a directory in it
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="taskstore-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresNode]:
    """A server that the tests of a module share."""
    with PostgresNode.create() as node:
        yield node


@pytest.fixture
def server_url(server: PostgresNode) -> str:
    """The URL of an empty database on that server."""
    return url_of(server, database=server.new_database())


@pytest.fixture
def primary() -> Iterator[PostgresNode]:
    """A server of one test, which a standby may replace."""
    with PostgresNode.create() as node:
        yield node


@pytest.fixture
def standby(primary: PostgresNode) -> PostgresNode:
    """A synchronous standby of that server."""
    return primary.standby()
