"""The follower: commits of other processes reach memory and hooks."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time

import pytest

from taskstore import (
    Snapshot,
    StoreUnavailableError,
    TaskRegistry,
    TaskRegistryStore,
    TaskStoreError,
    UnsupportedError,
    Upserted,
)
from taskstore.aio import AsyncTaskRegistry
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.threads import run_together, until

PATIENCE_S = 10.0


def test_commits_of_other_processes_arrive(open_ledger):
    events = []
    here, there = open_ledger(hooks=[events.append]), open_ledger()
    with here.follow() as follower:
        assert follower is here.follow()
        for number in range(20):
            there.create(runtime="cli", task=f"task {number}")
        until(lambda: here.seq == 20 and len(events) == 21)
    assert [event.seq for event in events[1:]] == list(range(1, 21))
    assert not any(event.local for event in events[1:])
    assert list(here.list()) == list(there.list())


def test_events_come_once_and_in_order_beside_local_changes(open_ledger):
    events = []
    here, there = open_ledger(hooks=[events.append]), open_ledger()
    here.follow()

    def write(registry):
        for _ in range(100):
            registry.create(runtime="cli", task="x")

    writers = [threading.Thread(target=write, args=(registry,)) for registry in (here, there)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    until(lambda: len(events) == 201)
    assert [event.seq for event in events[1:]] == list(range(1, 201))
    assert sum(event.local for event in events[1:]) == 100
    assert all(isinstance(event, Upserted) for event in events[1:])


def test_a_stopped_follower_applies_nothing(open_ledger):
    here, there = open_ledger(), open_ledger()
    follower = here.follow()
    follower.stop()
    follower.stop()
    there.create(runtime="cli", task="x")
    time.sleep(0.1)
    assert here.seq == 0
    assert not follower.alive
    assert here.follow() is not follower
    until(lambda: here.seq == 1)


def test_closing_the_registry_ends_the_follower(open_ledger):
    registry = open_ledger()
    follower = registry.follow()
    time.sleep(0.05)
    registry.close()
    until(lambda: not follower._thread.is_alive())
    assert not follower.alive


def test_a_hook_may_close_the_registry(open_ledger):
    here, there = open_ledger(), open_ledger()
    closed = threading.Event()

    def close(event):
        if isinstance(event, Upserted):
            here.close()
            closed.set()

    here.hooks.add(close)
    follower = here.follow()
    there.create(runtime="cli", task="x")
    assert closed.wait(PATIENCE_S)
    until(lambda: not follower.alive)


def test_a_read_only_registry_follows_too(open_ledger):
    there = open_ledger()
    with open_ledger(read_only=True) as here:
        here.follow()
        there.create(runtime="cli", task="x")
        until(lambda: here.seq == 1)


def test_a_failing_store_is_retried(caplog):
    class Failing(MemoryStore):
        failing = False

        def read_journal(self, after, limit):
            if self.failing:
                raise StoreUnavailableError("the cable is out")
            return super().read_journal(after, limit)

    storage = MemoryStorage()
    store, other = Failing(storage), TaskRegistry(MemoryStore(storage))
    with caplog.at_level(logging.WARNING, "taskstore"), TaskRegistry(store) as registry:
        other.create(runtime="cli", task="x")
        store.failing = True
        registry.follow()
        until(lambda: "the cable is out" in caplog.text)
        time.sleep(0.3)
        store.failing = False
        until(lambda: registry.seq == 1)
    assert caplog.text.count("the cable is out") == 1


def test_a_store_without_a_journal_is_not_followed():
    class Minimal(TaskRegistryStore):
        def load_snapshot(self):
            return Snapshot(0)

        def save_snapshot(self, snapshot):
            raise AssertionError

    with TaskRegistry(Minimal()) as registry, pytest.raises(UnsupportedError, match="follow"):
        registry.follow()


def test_following_in_asyncio(open_ledger):
    there = open_ledger()

    async def main():
        events = []
        async with await AsyncTaskRegistry.over(there.store, hooks=[events.append]) as here:
            follower = here.follow()
            await asyncio.to_thread(there.create, runtime="cli", task="x")
            await asyncio.to_thread(until, lambda: len(events) == 2)
            assert (here.seq, events[1].local) == (1, False)
        assert not follower.alive

    asyncio.run(main())


def test_concurrent_calls_of_follow_start_one_thread(open_ledger, threads_change_often):
    registry, followers = open_ledger(), []
    run_together(*[lambda: followers.append(registry.follow())] * 8)
    assert len(set(map(id, followers))) == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_neither_follows_nor_waits_for_threads_of_its_parent(open_ledger):
    registry = open_ledger()
    with registry._committer._lock:  # as a thread of the parent may
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            refused = 0
            for call in (registry.refresh, registry.follow):
                try:
                    call()
                except TaskStoreError as error:
                    refused += "forked" in str(error)
            registry.close()
            os._exit(0 if refused == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
