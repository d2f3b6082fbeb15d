"""Endings: close, hooks that raise an interrupt, signals, forks."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time

import pytest

from taskstore import (
    OutcomeUnknownError,
    Restored,
    StoreClosedError,
    TaskRegistry,
    TaskStoreError,
)
from taskstore.aio import AsyncTaskRegistry
from taskstore.registry import commit
from taskstore.registry.commit import INTERRUPT_TIMEOUT_S, CommitQueue, wait
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.threads import until


def exiting(heard):
    """A hook that records each event and raises ``SystemExit``."""

    def hook(event):
        heard.append(event.seq)
        raise SystemExit

    return hook


def test_closing_waits_for_hooks_that_run_in_another_thread():
    heard, at_work = [], threading.Event()

    def slow(event):
        at_work.set()
        time.sleep(0.01)
        heard.append(event.seq)

    registry = TaskRegistry(MemoryStore())
    registry.hooks.add(slow)

    def work():
        for _ in range(5):
            registry.create(runtime="cli", task="x")

    thread = threading.Thread(target=work)
    thread.start()
    assert at_work.wait(30)
    with registry.batch():
        for _ in range(5):
            registry.create(runtime="cli", task="y")
    until(lambda: registry.seq == 10)
    registry.close()
    assert heard == list(range(1, 11))
    thread.join()


def test_a_hook_may_close():
    registry = TaskRegistry(MemoryStore())
    registry.hooks.add(lambda _event: registry.close())
    started = time.monotonic()
    registry.create(runtime="cli", task="x")
    assert time.monotonic() - started < 5
    with pytest.raises(StoreClosedError):
        registry.summary()


def test_a_hook_that_exits_does_not_end_following():
    storage, heard = MemoryStorage(), []
    here, there = TaskRegistry(MemoryStore(storage)), TaskRegistry(MemoryStore(storage))
    here.hooks.add(exiting(heard))
    with here.follow() as follower:
        for seq in (1, 2, 3):
            there.create(runtime="cli", task="x")
            until(lambda seq=seq: seq in heard)
        assert follower.alive
    assert here.hooks.errors == 3


def test_a_hook_that_exits_is_counted_and_the_verb_returns():
    async def main():
        heard, complaints = [], []
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: complaints.append(context)
        )
        registry = await AsyncTaskRegistry.over(MemoryStore())
        registry.hooks.add(exiting(heard))
        for _ in range(3):
            await registry.create(runtime="cli", task="x")
        assert heard == [1, 2, 3]
        assert registry.hooks.errors == 3
        await registry.close()
        return complaints

    assert asyncio.run(main()) == []


def test_the_writer_thread_survives_an_interrupt():
    class Exiting(MemoryStore):
        exits = True

        def apply(self, changes):
            if self.exits:
                self.exits = False
                raise SystemExit
            return super().apply(changes)

    async def main():
        registry = await AsyncTaskRegistry.over(Exiting())
        with pytest.raises(OutcomeUnknownError):
            await registry.create(runtime="cli", task="x")
        await asyncio.wait_for(registry.create(runtime="cli", task="y"), 30)
        assert registry.summary().total == 1
        await registry.close()

    asyncio.run(main())


def test_changes_during_close_raise_store_closed():
    async def main():
        registry = await AsyncTaskRegistry.over(MemoryStore())
        await registry.create(runtime="cli", task="x")
        following = registry.changes(wait=30)
        assert (await anext(following)).seq == 1
        ends = asyncio.create_task(anext(following))
        await asyncio.sleep(0)  # the next page is read in a thread
        await registry.close()
        with pytest.raises(StoreClosedError):
            await ends

    asyncio.run(main())


def test_the_end_of_a_follower_does_not_block_the_loop():
    async def main():
        storage = MemoryStorage()
        registry = await AsyncTaskRegistry.over(MemoryStore(storage))
        there = TaskRegistry(MemoryStore(storage))
        loop, hooked = asyncio.get_running_loop(), threading.Event()

        def hook(event):
            if not event.local:
                hooked.set()
                created = registry.create(runtime="cli", task="from a hook")
                asyncio.run_coroutine_threadsafe(created, loop).result(60)

        registry.hooks.add(hook)
        async with registry.follow() as follower:
            there.create(runtime="cli", task="x")
            await asyncio.to_thread(hooked.wait)
        assert not follower.alive
        assert registry.summary().total == 2
        with registry.follow() as follower:
            pass  # asks the thread to end, and does not wait for it
        await registry.close()

    asyncio.run(main())


def test_closing_in_a_signal_handler_in_the_middle_of_a_call_is_refused():
    registry = TaskRegistry(MemoryStore())
    refused = []

    def handler(*_):
        for call in (registry.close, lambda: registry.create(runtime="cli", task="y")):
            try:
                call()
            except TaskStoreError as error:
                refused.append(str(error))

    task = registry.create(runtime="cli", task="x")
    apply = registry.store.apply

    def signalling(changes):
        signal.raise_signal(signal.SIGUSR1)
        return apply(changes)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        registry.store.apply = signalling
        assert registry.mark_running(task.task_id).revision == 2
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(refused) == 2
    assert "middle of another call" in refused[0]
    registry.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_lookups_in_a_forked_child_are_refused_and_do_not_hang(open_ledger):
    registry = open_ledger()
    task = registry.create(runtime="cli", task="x")
    calls = (
        registry.summary,
        registry.list,
        lambda: registry.get(task.task_id),
        lambda: registry.find("x"),
        lambda: list(registry.changes()),
        lambda: registry.history(task.task_id),
        lambda: registry.as_of(1),
    )
    held, go = threading.Event(), threading.Event()

    def look():
        with registry._cache.lock:
            held.set()
            go.wait(30)

    thread = threading.Thread(target=look)
    thread.start()
    assert held.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        refused = 0
        for call in calls:
            try:
                call()
            except TaskStoreError as error:
                refused += "forked" in str(error)
        os._exit(0 if refused == len(calls) else 1)
    status = os.waitpid(child, 0)[1]
    go.set()
    thread.join()
    assert status == 0


def test_the_events_of_an_interrupted_caller_reach_the_hooks(monkeypatch):
    monkeypatch.setattr(commit, "INTERRUPT_TIMEOUT_S", 30.0)
    at_work, gates, heard = threading.Event(), [threading.Event(), threading.Event()], []
    struck = threading.Event()

    class Gated(MemoryStore):
        def apply(self, changes):
            at_work.set()
            assert gates[self.head()].wait(30)
            return super().apply(changes)

    registry = TaskRegistry(Gated(), hooks=[lambda event: heard.append(event.seq)])
    queue, main = registry._committer._queue, threading.get_ident()
    first = threading.Thread(target=registry.create, kwargs={"runtime": "cli", "task": "x"})
    first.start()
    assert at_work.wait(30)
    at_work.clear()

    def main_waits():
        frame = sys._current_frames()[main]
        return frame.f_code is commit.wait.__code__ and frame.f_lineno > frame.f_code.co_firstlineno

    def interrupt():
        until(lambda: queue.busy)  # with the request of the main thread
        gates[0].set()
        assert at_work.wait(30)
        until(main_waits)
        signal.pthread_kill(main, signal.SIGUSR1)
        assert struck.wait(30)
        gates[1].set()

    def interrupted(*_):
        struck.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupted)
    other = threading.Thread(target=interrupt)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            registry.create(runtime="cli", task="y")
    finally:
        signal.signal(signal.SIGUSR1, before)
        first.join()
        other.join()
    assert heard == [0, 1, 2]


def test_an_interrupted_caller_does_not_wait_for_a_withdrawn_request():
    """It waits only for a started request, up to the timeout."""

    class Interrupting:
        def acquire(self, *, timeout=None):
            if timeout is None:
                raise KeyboardInterrupt
            waited.append(timeout)

    waited, queue = [], CommitQueue()
    request, _ = queue.put(None, lambda _: None, lambda: None)
    with pytest.raises(KeyboardInterrupt):
        wait(request, Interrupting())
    assert waited == []
    assert queue.take(0) == []
    assert not queue.busy
    request, _ = queue.put(None, lambda _: None, lambda: None)
    assert queue.take(0) == [request]
    with pytest.raises(KeyboardInterrupt):
        wait(request, Interrupting())
    assert waited == [INTERRUPT_TIMEOUT_S]


def test_a_hook_that_exits_during_close_does_not_keep_the_store_open():
    closed = []

    class Recording(MemoryStore):
        def close(self):
            closed.append(True)
            super().close()

    registry = TaskRegistry(Recording())
    registry._owns_store = True
    registry._hooks.add(exiting([]))
    registry._hooks.enqueue([Restored(0, 0, {})])
    with pytest.raises(SystemExit):
        registry.close()
    assert closed == [True]


def test_a_hook_that_exits_does_not_end_a_loop_that_refreshes():
    async def main():
        storage, heard = MemoryStorage(), []
        there = TaskRegistry(MemoryStore(storage))
        registry = await AsyncTaskRegistry.over(MemoryStore(storage), hooks=[exiting(heard)])
        there.create(runtime="cli", task="x")
        await registry.refresh()
        await registry.close()
        return heard, registry.hooks.errors

    assert asyncio.run(main()) == ([0, 1], 2)
