"""No call of a store runs on the event loop's thread, on asyncio and uvloop."""

from __future__ import annotations

import asyncio
import threading

import pytest
import uvloop

from taskstore import Compactor, RunScope, StoreClosedError, open_store
from taskstore.aio import AsyncTaskRegistry
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.stores.memory import MemoryStorage, MemoryStore

NOT_A_STORE_CALL = {"clock"}  # read on the loop's thread
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=LOOPS)
def run(request):
    def run(main):
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            return runner.run(main)

    return run


def watched(store, called):
    """The same store; each call of a method is recorded with its thread."""

    def wrap(name, method):
        def call(*args, **kwargs):
            called.append((name, threading.current_thread()))
            return method(*args, **kwargs)

        return call

    for name in dir(store):
        if (
            not name.startswith("_")
            and name not in NOT_A_STORE_CALL
            and callable(getattr(store, name))
        ):
            setattr(store, name, wrap(name, getattr(store, name)))
    return store


async def events_of(registry):
    return [entry async for entry in registry.changes(wait=0.01)]


async def batch_of(registry):
    async with registry.batch():
        await registry.create(runtime="cli", task="batched")


async def following_of(registry):
    follower = registry.follow()
    await registry.create(runtime="cli", task="followed")
    await asyncio.to_thread(follower.stop)


async def lease_of(registry, task_id):
    fence = await registry.take_lease(task_id)
    await registry.renew_lease(task_id, fence=fence)
    await registry.release_lease(task_id, fence=fence)


async def recovery_of(registry, task_id):
    await registry.mark_lost(task_id)
    await registry.recover(task_id)


USES = {
    "create": lambda r, t: r.create(runtime="cli", task="x", run_id="another"),
    "mark_running": lambda r, t: r.mark_running(t),
    "record_progress": lambda r, t: r.record_progress(t, "half"),
    "finish": lambda r, t: r.finish(t, "succeeded"),
    "mark_lost": lambda r, t: r.mark_lost(t),
    "recover": recovery_of,
    "cancel": lambda r, t: r.cancel(t),
    "set_delivery_status": lambda r, t: r.set_delivery_status(t, "delivered"),
    "set_notify_policy": lambda r, t: r.set_notify_policy(t, "silent"),
    "set_cleanup_after": lambda r, t: r.set_cleanup_after(t, 2**41),
    "link_flow": lambda r, t: r.link_flow(t, "flow"),
    "update_metadata": lambda r, t: r.update_metadata(t, {"a": 1}),
    "delete": lambda r, t: r.delete(t),
    "take_lease": lease_of,
    "batch": lambda r, t: batch_of(r),
    "refresh": lambda r, t: r.refresh(),
    "changes": lambda r, t: events_of(r),
    "follow": lambda r, t: following_of(r),
    "history": lambda r, t: r.history(t),
    "as_of": lambda r, t: r.as_of(1),
    "close": lambda r, t: r.close(),
}
"""Each awaitable method by name, and a use of it on a new task."""
FROM_MEMORY = {
    "active": lambda r, t: r.active(),
    "children": lambda r, t: r.children(t),
    "find": lambda r, t: r.find(t),
    "find_by_run": lambda r, t: r.find_by_run("run"),
    "get": lambda r, t: r.get(t),
    "hooks": lambda r, t: r.hooks,
    "list": lambda r, t: r.list(),
    "run": lambda r, t: r.run("run"),
    "seq": lambda r, t: r.seq,
    "store": lambda r, t: r.store,
    "summary": lambda r, t: r.summary(),
}
"""The other methods: they call no store."""
ELSEWHERE = {"open", "over", "renew_lease", "release_lease"}
"""The methods that the tests below, or the uses above, call themselves."""


def test_no_public_name_is_left_out():
    public = {name for name in dir(AsyncTaskRegistry) if not name.startswith("_")}
    assert public == {*USES, *FROM_MEMORY, *ELSEWHERE}
    verbs = {name for name in dir(RunScope) if not name.startswith("_")}
    assert verbs <= set(USES)


async def use_everything(store, called):
    registry = await AsyncTaskRegistry.over(store)
    hears = []
    registry.hooks.add(hears.append)
    scope_verbs = {name for name in dir(RunScope) if not name.startswith("_")}
    try:
        for name, use in USES.items():
            if name == "close":
                continue
            task = await registry.create(runtime="cli", task=name, run_id=f"run-{name}")
            before = len(called)
            try:
                await use(registry, task.task_id)
            finally:
                assert len(called) > before, f"{name} does not reach the store"
            if name in scope_verbs:
                task = await registry.create(runtime="cli", task=name, run_id=f"scope-{name}")
                await use(ScopeAsRegistry(registry.run(f"scope-{name}")), task.task_id)
        before = len(called)
        task_id = next(iter(registry.list())).task_id
        for use in FROM_MEMORY.values():
            use(registry, task_id)
        assert len(called) == before
        assert hears
    finally:
        await registry.close()
    with pytest.raises(StoreClosedError):
        registry.get("x")


class ScopeAsRegistry:
    """The verbs of a run scope, called with a task id, which is dropped."""

    def __init__(self, scope):
        self._scope = scope

    def __getattr__(self, name):
        return lambda task_id, *args: getattr(self._scope, name)(*args)


def test_no_store_is_called_on_the_loops_thread(run, ledger_url):
    called = []

    async def main():
        store = await asyncio.to_thread(open_store, ledger_url)
        try:
            await use_everything(watched(store, called), called)
        finally:
            await asyncio.to_thread(store.close)

    run(main())
    mine = [name for name, thread in called if thread is threading.main_thread()]
    assert mine == []
    assert {"load_snapshot", "apply", "read_journal", "close"} <= {name for name, _ in called}


def test_opening_and_closing_by_url_does_not_run_on_the_loop(run, ledger_url, monkeypatch):
    called = []

    def opening(*args, **kwargs):
        called.append(("open", threading.current_thread()))
        return watched(open_store(*args, **kwargs), called)

    monkeypatch.setattr("taskstore.aio.registry.open_store", opening)

    async def main():
        async with await AsyncTaskRegistry.open(ledger_url) as registry:
            await registry.create(runtime="cli", task="x")

    run(main())
    names = [name for name, _ in called]
    assert (names[0], names[-1]) == ("open", "close")
    assert threading.main_thread() not in {thread for _, thread in called}


def test_a_compactor_does_not_run_on_the_loop(run):
    called = []

    async def main():
        store = watched(MemoryStore(), called)
        compactor = Compactor(store, CompactionPolicy(force=True))
        registry = await AsyncTaskRegistry.over(store, hooks=[compactor])
        for _ in range(20):
            await registry.create(runtime="cli", task="x")
        await registry.close()
        await asyncio.to_thread(compactor.close)
        assert compactor.runs

    run(main())
    assert "compact" in {name for name, _ in called}
    assert threading.main_thread() not in {thread for _, thread in called}


def test_coroutines_share_commits_and_may_be_cancelled(run):
    storage = MemoryStorage()

    class Slow(MemoryStore):
        commits = 0

        def apply(self, changes):
            self.commits += 1
            threading.Event().wait(0.002)
            return super().apply(changes)

    store = Slow(storage)

    async def main():
        registry = await AsyncTaskRegistry.over(store)
        waiting = []
        for wave in range(30):
            for number in range(wave * 10, wave * 10 + 10):
                creating = registry.create(runtime="cli", task="x", task_id=f"t{number}")
                waiting.append(asyncio.create_task(creating))
            await asyncio.sleep(0)
            for task in waiting[-3:]:
                task.cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        await registry.close()
        return registry, results

    registry, results = run(main())
    stored = MemoryStore(storage).load_snapshot().records
    assert dict(stored) == registry._cache.records
    assert all(
        stored[f"t{number}"] == result
        for number, result in enumerate(results)
        if not isinstance(result, asyncio.CancelledError)
    )
    assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 90
    assert store.commits < 100
