"""Followers among coroutines: any number of them, one thread that waits."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from taskstore import StoreClosedError, StoreUnavailableError
from taskstore.aio import AsyncTaskRegistry
from taskstore.stores.memory import MemoryStorage, MemoryStore

FOLLOWERS = 50


async def first_of(registry, after, wait=30.0):
    """When the next entry reached a follower, and its seq."""
    async for entry in registry.changes(after=after, wait=wait):
        return time.monotonic(), entry.seq
    return None


def test_everybody_hears_at_once():
    storage = MemoryStorage()

    async def main():
        one = await AsyncTaskRegistry.over(MemoryStore(storage))
        two = await AsyncTaskRegistry.over(MemoryStore(storage))
        for seq in range(1, 4):
            followers = [asyncio.create_task(first_of(two, seq - 1)) for _ in range(FOLLOWERS)]
            await asyncio.sleep(0.05)
            started = time.monotonic()
            await one.create(runtime="cli", task="news")
            heard = await asyncio.gather(*followers)
            assert {entry for _, entry in heard} == {seq}
            assert max(when for when, _ in heard) - started < 0.4
        names = [thread.name for thread in threading.enumerate()]
        assert sum(name.startswith("taskstore-news") for name in names) == 1
        await one.close()
        await two.close()

    asyncio.run(main())


def test_who_has_read_less_is_not_forgotten():
    """One waits for what comes after the head, another comes who has not read that far."""

    async def main():
        registry = await AsyncTaskRegistry.over(MemoryStore())
        ahead = asyncio.create_task(registry._news.wait_for(registry.store, 7, 30))
        for _ in range(3):
            await registry.create(runtime="cli", task="news")
        await asyncio.sleep(0.05)
        started = time.monotonic()
        assert await registry._news.wait_for(registry.store, 1, 30)
        assert time.monotonic() - started < 0.3
        assert not ahead.done()
        for _ in range(5):
            await registry.create(runtime="cli", task="news")
        assert await asyncio.wait_for(ahead, 5)
        await registry.close()

    asyncio.run(main())


def test_closing_ends_every_wait_at_once():
    async def main():
        registry = await AsyncTaskRegistry.over(MemoryStore())
        followers = [asyncio.create_task(first_of(registry, 0)) for _ in range(3)]
        await asyncio.sleep(0.05)
        started = time.monotonic()
        await registry.close()
        for follower in followers:
            with pytest.raises(StoreClosedError):
                await follower
        assert time.monotonic() - started < 0.3

    asyncio.run(main())


def test_a_store_that_fails_tells_every_follower_and_the_next_one_begins_anew():
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
        await asyncio.sleep(0.05)
        await registry.create(runtime="cli", task="news")
        assert (await follower)[1] == 1
        await registry.close()

    asyncio.run(main())
