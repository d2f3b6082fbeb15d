"""Opening and closing an asyncio registry, also when that is cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest

from taskstore import StoreClosedError, TaskStoreError, open_store
from taskstore.aio import AsyncTaskRegistry
from taskstore.stores.memory import MemoryStore


def test_every_way_to_open_one(ledger_url):
    async def main():
        async with AsyncTaskRegistry.open(ledger_url) as registry:
            task = await registry.create(runtime="cli", task="x")
        with pytest.raises(StoreClosedError):
            registry.get(task.task_id)
        opened = await AsyncTaskRegistry.open(ledger_url)
        await opened.close()
        started = await asyncio.create_task(AsyncTaskRegistry.open(ledger_url))
        await started.close()
        store = await asyncio.to_thread(open_store, ledger_url)
        async with AsyncTaskRegistry(store) as made:
            assert len(made.list()) == (0 if ledger_url == "memory:" else 1)
            await made.create(runtime="cli", task="y")
        async with AsyncTaskRegistry.over(store) as over:
            assert over.summary().total == len(made._cache.records)
        store.close()
        given_up = AsyncTaskRegistry.open(ledger_url)
        given_up.close()

    asyncio.run(main())


def test_a_failed_open_raises(tmp_path):
    async def main():
        with pytest.raises(TaskStoreError):
            async with AsyncTaskRegistry.open(f"nowhere:///{tmp_path}"):
                raise AssertionError

    asyncio.run(main())


class SlowToCloseStore(MemoryStore):
    """A store that reports its close."""

    def __init__(self):
        super().__init__()
        self.may_close = threading.Event()
        self.was_closed = threading.Event()

    def close(self):
        assert self.may_close.wait(60)
        super().close()
        self.was_closed.set()


def test_a_cancelled_close_goes_on_in_the_background(monkeypatch):
    store = SlowToCloseStore()
    monkeypatch.setattr("taskstore.aio.registry.open_store", lambda *_, **__: store)

    async def main():
        registry = await AsyncTaskRegistry.open("any:")
        closing = asyncio.create_task(registry.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert not store.was_closed.is_set()
        store.may_close.set()
        await registry.close()  # waits for the same close
        assert store.was_closed.is_set()

    asyncio.run(main())


def test_a_store_opened_after_a_cancelled_open_is_closed(monkeypatch):
    store, go_on = SlowToCloseStore(), threading.Event()

    def slow(*_, **__):
        assert go_on.wait(10)
        return store

    monkeypatch.setattr("taskstore.aio.registry.open_store", slow)

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(AsyncTaskRegistry.open("any:"), 0.01)
        store.may_close.set()
        go_on.set()
        assert await asyncio.to_thread(store.was_closed.wait, 10)

    asyncio.run(main())


def test_changes_of_a_closed_registry_raise():
    async def main():
        registry = await AsyncTaskRegistry.open("memory:")
        for number in range(3):
            await registry.create(runtime="cli", task=str(number))
        seen = []
        with pytest.raises(StoreClosedError):
            async for entry in registry.changes():
                seen.append(entry.seq)
                await registry.close()
        assert seen == [1]

    asyncio.run(main())
