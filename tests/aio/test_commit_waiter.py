"""The commit waiter: many coroutines, one waiting thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from taskstore import StoreClosedError, StoreUnavailableError
from taskstore.aio import AsyncTaskRegistry
from taskstore.aio import registry as aio
from taskstore.registry import history
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.threads import until

FOLLOWERS = 50


@pytest.fixture(autouse=True)
def no_polling(monkeypatch):
    """No reader polls: only a reported commit wakes a waiter in time."""
    monkeypatch.setattr(aio, "POLL_INTERVAL_S", 60.0)
    monkeypatch.setattr(history, "WAIT_SLICE_S", 60.0)


async def first_of(registry, after):
    """The seq of the next entry that reaches a follower."""
    async for entry in registry.changes(after=after, wait=30.0):
        return entry.seq
    return None


async def waiting(registry, number):
    """Return when ``number`` coroutines wait, and their thread has started to wait."""
    await asyncio.to_thread(until, lambda: len(registry._commit_waiter._waiters) >= number)
    await asyncio.sleep(0.02)


def test_one_commit_wakes_all_waiters():
    storage = MemoryStorage()

    async def main():
        one = await AsyncTaskRegistry.over(MemoryStore(storage))
        two = await AsyncTaskRegistry.over(MemoryStore(storage))
        for seq in range(1, 4):
            followers = [asyncio.create_task(first_of(two, seq - 1)) for _ in range(FOLLOWERS)]
            await waiting(two, FOLLOWERS)
            await one.create(runtime="cli", task="x")
            assert set(await asyncio.gather(*followers)) == {seq}
        names = [thread.name for thread in threading.enumerate()]
        assert sum(name.startswith("taskstore-commit-waiter") for name in names) == 1
        await one.close()
        await two.close()
        two.store.close()

    asyncio.run(main())


def test_a_waiter_with_a_lower_seq_is_woken():
    """One coroutine waits beyond the head, another one has read less than the head."""

    async def main():
        registry = await AsyncTaskRegistry.over(MemoryStore())
        ahead = asyncio.create_task(registry._commit_waiter.wait_for(registry.store, 7, 30))
        for _ in range(3):
            await registry.create(runtime="cli", task="x")
        await waiting(registry, 1)
        assert await registry._commit_waiter.wait_for(registry.store, 1, 30)
        assert not ahead.done()
        for _ in range(5):
            await registry.create(runtime="cli", task="x")
        assert await asyncio.wait_for(ahead, 30)
        await registry.close()
        registry.store.close()

    asyncio.run(main())


def test_closing_ends_every_wait_at_once():
    async def main():
        registry = await AsyncTaskRegistry.over(MemoryStore())
        followers = [asyncio.create_task(first_of(registry, 0)) for _ in range(3)]
        await waiting(registry, 3)
        await registry.close()
        for follower in followers:
            with pytest.raises(StoreClosedError):
                await follower
        registry.store.close()

    asyncio.run(main())


def test_a_failing_store_raises_in_every_waiter_and_the_next_wait_works():
    class Failing(MemoryStore):
        broken = False

        def wait_for(self, after, timeout):
            if self.broken:
                raise StoreUnavailableError("gone")
            return super().wait_for(after, timeout)

    async def main():
        store = Failing()
        registry = await AsyncTaskRegistry.over(store)
        store.broken = True
        followers = [asyncio.create_task(first_of(registry, 0)) for _ in range(3)]
        for follower in followers:
            with pytest.raises(StoreUnavailableError):
                await follower
        store.broken = False
        follower = asyncio.create_task(first_of(registry, 0))
        await waiting(registry, 1)
        await registry.create(runtime="cli", task="x")
        assert await follower == 1
        await registry.close()
        registry.store.close()

    asyncio.run(main())
