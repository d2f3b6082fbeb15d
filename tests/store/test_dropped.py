"""Stores and registries that a program drops without close() give everything back."""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
import weakref
from contextlib import contextmanager

import pytest

from taskstore import TaskRegistry, TaskStoreError, open_store
from taskstore.aio import AsyncTaskRegistry
from taskstore.stores.sql import sqlite_library
from taskstore.testing.contract.core import open_descriptors
from taskstore.testing.crash.processes import Child
from taskstore.testing.factories import create
from taskstore.testing.threads import TIMEOUT_S


@contextmanager
def resource_warnings():
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", ResourceWarning)
        yield given


def collect(dropped):
    """Collect garbage until an object is gone, also if a thread uses it for a moment."""
    deadline = time.monotonic() + TIMEOUT_S
    while dropped() is not None:
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.01)


@pytest.fixture
def keeps_descriptors():
    """Call a function several times; then as many descriptors are open as after the first."""

    def check(work):
        counts = []
        for _ in range(4):
            work()
            gc.collect()
            counts.append(open_descriptors())
        assert counts[-1] <= counts[0], counts

    return check


def drop_registry(url):
    registry = TaskRegistry.open(url)
    registry.create(runtime="cli", task="x")
    store = weakref.ref(registry.store)
    del registry
    return store


def drop_async_registry(url):
    async def use():
        registry = await AsyncTaskRegistry.open(url)
        await registry.create(runtime="cli", task="x")
        return weakref.ref(registry.store)

    return asyncio.run(use())


def drop_waiting_store(url):
    store = open_store(url)
    assert not store.wait_for(store.head(), 0.001)  # starts the thread that watches for commits
    return weakref.ref(store)


@pytest.mark.parametrize("drop", [drop_registry, drop_async_registry, drop_waiting_store])
def test_a_dropped_registry_closes_its_store(
    backend, ledger_url, keeps_descriptors, drop, monkeypatch
):
    # An idle writer thread does not keep a registry alive.
    monkeypatch.setattr("taskstore.registry.commit.IDLE_TIMEOUT_S", 10 * TIMEOUT_S)
    with resource_warnings() as given:
        keeps_descriptors(lambda: collect(drop(ledger_url)))
    assert len([item for item in given if "without close()" in str(item.message)]) == (
        0 if backend == "memory" else 4
    )
    for item in given:
        assert "password" not in str(item.message)


def test_a_closed_store_gives_no_warning(backend, ledger_url):
    with resource_warnings() as given:
        store = open_store(ledger_url)
        create(store)
        store.close()
        del store
        with TaskRegistry.open(ledger_url) as registry:
            registry.create(runtime="cli", task="x")
        del registry
        gc.collect()
    assert given == []


def damaged_json(path):
    url = f"json:///{path}/ledger"
    open_store(url).close()
    [segment] = (path / "ledger").glob("journal-*")
    segment.write_bytes(b"foreign bytes\n" * 99)
    return url


def lost_json(path):
    url = f"json:///{path}/ledger"
    open_store(url).close()
    [segment] = (path / "ledger").glob("journal-*")
    segment.unlink()
    return url


def foreign_sqlite(path):
    (path / "t.db").write_bytes(b"foreign bytes\n" * 999)
    return f"sqlite:///{path}/t.db"


def missing_server(_):
    return "postgresql+psycopg://nobody@127.0.0.1:1/nothing"


@pytest.mark.parametrize("make", [damaged_json, lost_json, foreign_sqlite, missing_server])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_failed_opening_leaves_nothing_open(tmp_path, keeps_descriptors, make, read_only):
    url = make(tmp_path)

    async def open_async():
        with pytest.raises(TaskStoreError):
            await AsyncTaskRegistry.open(url, read_only=read_only)

    def work():
        with pytest.raises(TaskStoreError):
            TaskRegistry.open(url, read_only=read_only)
        asyncio.run(open_async())

    with resource_warnings() as given:
        keeps_descriptors(work)
    assert given == []


@pytest.mark.parametrize("backend", ["json", "sqlite", "postgresql", "mariadb"], indirect=True)
def test_a_forked_child_that_drops_a_store_does_not_disturb_its_parent(ledger_url):
    opened = [open_store(ledger_url)]
    for _ in range(3):
        create(opened[0])

    def drop(report):
        with resource_warnings() as given:
            opened.clear()
            gc.collect()
        report(str(len([item for item in given if "without close()" in str(item.message)])))

    with opened[0].exclusive():
        assert Child(drop).finish() == ["0"]
        create(opened[0])
    assert opened[0].head() == 4
    with open_store(ledger_url) as other:
        assert other.head() == 4
        create(other)
    create(opened[0])
    assert opened[0].verify().ok
    opened[0].close()


def test_a_garbage_collection_at_any_moment_is_safe(tmp_path):
    """The collector runs while this thread registers another SQLite file."""
    url = f"sqlite:///{tmp_path}/t.db"
    dropped = weakref.ref(store := open_store(url))
    cycle = [store]
    cycle.append(cycle)
    del store, cycle
    with resource_warnings() as given, sqlite_library._open_files_lock:
        gc.collect()
        assert dropped() is None
    assert len([item for item in given if str(tmp_path) in str(item.message)]) == 1
    with open_store(url) as again:
        assert again.report().notices == ()
