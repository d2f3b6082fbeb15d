"""Servers that tests may kill, places where nothing lasts, and figures that tests found."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taskstore.testing.replication import PostgresNode, url_of

_found = pytest.StashKey[list[tuple[str, str]]]()


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


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[[str, object], None]:
    """Show something under a heading in the terminal summary."""

    def show(heading: str, text: object) -> None:
        pytestconfig.stash.setdefault(_found, []).append((heading, str(text)))

    return show


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for heading, text in config.stash.get(_found, []):
        terminalreporter.section(heading)
        terminalreporter.line(text)
