"""Databases of each kind, and tools that observe a store from outside."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlkit import Spy, reap

from taskstore import TaskRegistry
from taskstore.stores.sql import SQLStore, open_sql
from taskstore.testing.servers import PostgresServer

ENGINES = ("sqlite", "postgresql")


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    reap()


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Path:
    return tmp_path / "tasks.db"


@pytest.fixture(params=ENGINES)
def empty_url(request: pytest.FixtureRequest, sqlite_path: Path) -> str:
    """The URL of an empty database without a ledger, on each engine."""
    if request.param == "sqlite":
        return f"sqlite:///{sqlite_path}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.new_database()


@pytest.fixture(params=ENGINES)
def url(request: pytest.FixtureRequest, sqlite_path: Path) -> str:
    """The URL of an empty ledger, on each engine."""
    if request.param == "sqlite":
        return f"sqlite:///{sqlite_path}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def open_() -> Iterator[Callable[..., SQLStore]]:
    """Open a URL; the fixture closes all stores at the end."""
    opened: list[SQLStore] = []

    def once(url: str, **options: Any) -> SQLStore:
        opened.append(open_sql(url, **options))
        return opened[-1]

    yield once
    for store in opened:
        store.close()


@pytest.fixture
def store(url: str, open_: Callable[..., SQLStore]) -> SQLStore:
    return open_(url)


@pytest.fixture
def spy(store: SQLStore) -> Spy:
    return Spy(store)


@pytest.fixture
def open_registry(sqlite_path):
    opened = []

    def once(**options):
        opened.append(TaskRegistry.open(f"sqlite:///{sqlite_path}", **options))
        return opened[-1]

    yield once
    for registry in opened:
        registry.close()


@pytest.fixture
def backup(sqlite_path):
    """The backup of a ledger at seq 2: one task, at revision 2."""
    with TaskRegistry.open(f"sqlite:///{sqlite_path}") as registry:
        task = registry.create(runtime="cli", task="x", status="running", task_id="kept")
        registry.record_progress(task.task_id, "saved")
    return Path(shutil.copy(sqlite_path, sqlite_path.with_name("backup.db")))


@pytest.fixture
def live(backup, open_registry):
    """A registry that has continued to seq 4, and the events of its hooks after that."""
    heard = []
    registry = open_registry(hooks=[heard.append])
    for step in ("lost 1", "lost 2"):
        registry.record_progress("kept", step)
    heard.clear()
    return registry, heard
