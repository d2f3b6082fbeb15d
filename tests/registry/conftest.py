"""One ledger per test, on every backend: what the registry promises holds on all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from taskstore import TaskRegistry
from taskstore.stores.memory import MemoryStorage, MemoryStore

OpenLedger = Callable[..., TaskRegistry]


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
    """Open a registry on the test's ledger; each call is another one, as in another process."""
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
    """A clock that a test sets: Unix ms, ``step`` further at each look."""

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
    """Let Python change threads a thousand times as often: a race comes up at once."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
