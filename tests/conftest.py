"""Shared fixtures: servers, a ledger on every backend, a clock, reports."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from taskstore import TaskRegistry
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.servers import MARIADB_MISSING, MariaDBServer, PostgresServer

OpenLedger = Callable[..., TaskRegistry]

# A process that a shell starts in the background ignores SIGINT, and so do its children.
# Some tests interrupt their children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine must not fail a test.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server, started at first use; without one the tests fail."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty, migrated ledger."""
    with postgres_server.ledger() as url:
        yield url


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDBServer]:
    """A MariaDB server: the running one, or one started at first use.

    No wheel contains MariaDB.  On a machine without it the tests skip and name
    what is missing; in CI they fail.
    """
    server = MariaDBServer()
    try:
        server.start()
    except RuntimeError as error:
        if str(error) != MARIADB_MISSING or os.environ.get("CI"):
            raise
        pytest.skip(MARIADB_MISSING)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def mariadb_url(mariadb_server: MariaDBServer) -> Iterator[str]:
    """The URL of an empty, migrated ledger."""
    with mariadb_server.ledger() as url:
        yield url


@pytest.fixture(params=["memory", "json", "sqlite", "postgresql", "mariadb"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ledger_url(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if backend == "memory":
        return "memory:"
    if backend == "json":
        return f"json:///{tmp_path / 'ledger'}"
    if backend == "sqlite":
        return f"sqlite:///{tmp_path / 'tasks.db'}"
    server = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}[backend]
    return str(request.getfixturevalue(server))


@pytest.fixture
def open_ledger(ledger_url: str) -> Iterator[OpenLedger]:
    """Open a registry on the ledger of the test; each call opens another registry."""
    storage = MemoryStorage()
    opened: list[TaskRegistry] = []

    def open_one(**options: Any) -> TaskRegistry:
        if ledger_url == "memory:":
            store = MemoryStore(storage, read_only=options.pop("read_only", False))
            registry = TaskRegistry(store, **options)
        else:
            registry = TaskRegistry.open(ledger_url, **options)
        opened.append(registry)
        return registry

    yield open_one
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_ledger: OpenLedger) -> TaskRegistry:
    return open_ledger()


class Ticker:
    """A clock for tests: Unix ms, ``step`` later at each call."""

    def __init__(self, now: int = 1_700_000_000_000) -> None:
        self.now = now
        self.step = 1000

    def __call__(self) -> int:
        self.now += self.step
        return self.now


@pytest.fixture
def ticker() -> Ticker:
    return Ticker()


@pytest.fixture
def threads_change_often() -> Iterator[None]:
    """Make Python switch threads a thousand times as often, to provoke races."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """Return a function that shows a text under a heading in the terminal summary."""
    return lambda heading, text: record_property(heading, str(text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for outcome in ("passed", "failed"):
        for done in terminalreporter.getreports(outcome):
            for heading, text in done.user_properties:
                terminalreporter.section(heading)
                terminalreporter.line(text)
