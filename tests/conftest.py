"""What tests of every kind share: the PostgreSQL server of this session."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from taskstore.testing.servers import PostgresServer

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
