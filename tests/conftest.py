"""What tests of every kind share: the servers of this session, and how to show figures."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from taskstore.testing.servers import MARIADB_MISSING, MariaDBServer, PostgresServer

# Who is started in the background by a shell ignores Ctrl-C, and so does what he starts
# in turn: but some of that is to be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real server, started at first use; it fails, and says what to install, without one."""
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
    """A real server: the one that runs here, or one started at first use.

    There is none in a wheel.  A machine without one skips, saying what is
    missing; where everything has to be tested, that is a failure.
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


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """Show something under a heading in the terminal summary, from whatever process."""
    return lambda heading, text: record_property(heading, str(text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for outcome in ("passed", "failed"):
        for done in terminalreporter.getreports(outcome):
            for heading, text in done.user_properties:
                terminalreporter.section(heading)
                terminalreporter.line(text)
