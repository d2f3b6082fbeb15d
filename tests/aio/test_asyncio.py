"""The asyncio registry: the same ledger, and an event loop that never waits."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from taskstore import (
    InvalidTransition,
    ReadOnlyError,
    StoreClosedError,
    TaskNotFound,
    TaskRegistry,
    TaskStoreError,
    ValidationError,
)
from taskstore.aio import AsyncTaskRegistry
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.threads import TIMEOUT_S


class SlowStore(MemoryStore):
    """A store whose commits take as long as on a disk, and that records the calling threads."""

    def __init__(self, storage=None, seconds=0.002):
        super().__init__(storage)
        self.seconds = seconds
        self.commits = []
        self.callers = set()

    def apply(self, changes):
        self.callers.add(threading.current_thread().name)
        time.sleep(self.seconds)
        self.commits.append(len(changes))
        return super().apply(changes)

    def load_snapshot(self):
        self.callers.add(threading.current_thread().name)
        return super().load_snapshot()


def test_the_ten_lines_work_with_await(ledger_url):
    async def main():
        async with await AsyncTaskRegistry.open(ledger_url) as registry:
            task = await registry.create(
                runtime="subagent", owner_key="me", run_id="r", task="Summarise the inbox"
            )
            await registry.mark_running(task.task_id)
            await registry.record_progress(task.task_id, "3 of 10")
            await registry.run("r").finish("succeeded", summary="done")
            assert registry.get(task.task_id).status == "succeeded"
            assert registry.find("r").terminal_summary == "done"
            assert [entry.seq async for entry in registry.changes()] == [1, 2, 3, 4]
            assert [entry.revision for entry in await registry.history(task.task_id)] == [
                1,
                2,
                3,
                4,
            ]
            assert (await registry.as_of(2)).records[task.task_id].status == "running"
            assert await registry.refresh() == 4
            return registry.get(task.task_id)

    record = asyncio.run(main())
    if ledger_url != "memory:":
        with TaskRegistry.open(ledger_url) as registry:
            assert registry.get(record.task_id) == record


def test_an_end_is_recorded_whatever_its_text_is():
    async def main():
        async with AsyncTaskRegistry.open("memory:") as registry:
            task = await registry.create(runtime="cli", task="x", run_id="r")
            await registry.record_progress(task.task_id, "3 \0 10" * 5000)
            (ended,) = await registry.run("r").finish("failed", error="\ud800" * 70_000)
            assert ended.progress_summary.startswith("3 \ufffd 103")
            assert ended.error.startswith("\ufffd")
            assert "bytes cut]" in ended.error
            again = await registry.finish(task.task_id, "failed", error="\ud800" * 70_000)
            assert again == ended

    asyncio.run(main())


def test_coroutines_share_commits_and_none_runs_on_the_loops_thread():
    store = SlowStore()

    async def main():
        registry = await AsyncTaskRegistry.over(store)

        async def work(number):
            for _ in range(10):
                task = await registry.create(runtime="cli", task=str(number))
                assert registry.get(task.task_id) == task

        await asyncio.gather(*(work(number) for number in range(64)))
        await registry.close()

    asyncio.run(main())
    assert sum(store.commits) == 640
    assert len(store.commits) < 320
    assert threading.main_thread().name not in store.callers


def test_another_event_loop_is_refused_before_anything_is_written():
    async def main():
        async with AsyncTaskRegistry.over(MemoryStore()) as registry:

            async def elsewhere():
                with pytest.raises(TaskStoreError, match="another event loop"):
                    await registry.create(runtime="cli", task="x")

            await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
            assert registry.store.head() == 0

    asyncio.run(main())


def test_each_error_is_raised_in_its_own_caller(ledger_url):
    async def main():
        async with await AsyncTaskRegistry.open(ledger_url) as registry:
            task = await registry.create(runtime="cli", task="x")
            await registry.finish(task.task_id, "failed")
            results = await asyncio.gather(
                registry.mark_running(task.task_id),
                registry.create(runtime="cli", task="fine"),
                registry.mark_running("nobody"),
                registry.create(runtime="cli", task="a\0"),
                return_exceptions=True,
            )
            kinds = [type(result).__name__ for result in results]
            assert kinds == [
                InvalidTransition.__name__,
                "TaskRecord",
                TaskNotFound.__name__,
                ValidationError.__name__,
            ]

    asyncio.run(main())


def test_a_batch_belongs_to_its_asyncio_task(ledger_url):
    async def main():
        async with await AsyncTaskRegistry.open(ledger_url) as registry:

            async def outsider():
                await asyncio.sleep(0)
                return len(registry.list())

            watcher = asyncio.create_task(outsider())
            async with registry.batch():
                task = await registry.create(runtime="cli", task="1")
                await registry.mark_running(task.task_id)
                assert registry.get(task.task_id).status == "running"
                assert await watcher == 0
            assert registry.seq == 2
            with pytest.raises(RuntimeError):
                async with registry.batch():
                    await registry.create(runtime="cli", task="2")
                    raise RuntimeError
            assert registry.seq == 2
            commits = {entry.commit_id async for entry in registry.changes()}
            assert len(commits) == 1

    asyncio.run(main())


def test_hooks_get_an_event_before_its_verb_returns(ledger_url):
    async def main():
        events = []
        async with await AsyncTaskRegistry.open(ledger_url, hooks=[events.append]) as registry:
            assert [event.kind for event in events] == ["restored"]
            for number in range(5):
                await registry.create(runtime="cli", task=str(number))
                assert events[-1].seq == number + 1

    asyncio.run(main())


def test_the_change_of_a_cancelled_wait_is_committed_or_not():
    store = SlowStore(seconds=0.02)

    async def main():
        registry = await AsyncTaskRegistry.over(store)
        others = [
            asyncio.create_task(registry.create(runtime="cli", task="other")) for _ in range(3)
        ]
        await asyncio.sleep(0.005)
        cancellable = [
            asyncio.create_task(registry.create(runtime="cli", task="x", task_id=f"mine-{n}"))
            for n in range(20)
        ]
        for number, waiting in enumerate(cancellable):
            await asyncio.sleep(0.003)
            if number % 2:
                waiting.cancel()
        results = await asyncio.gather(*cancellable, return_exceptions=True)
        await asyncio.gather(*others)
        await registry.close()
        return registry, results

    registry, results = asyncio.run(main())
    stored = store.load_snapshot().records
    assert stored == registry._cache.records
    for number, result in enumerate(results):
        if not isinstance(result, asyncio.CancelledError):
            assert stored[f"mine-{number}"] == result


def test_changes_with_wait():
    storage = MemoryStorage()

    async def main():
        one = await AsyncTaskRegistry.over(MemoryStore(storage))
        two = await AsyncTaskRegistry.over(MemoryStore(storage))

        async def follow():
            seen = []
            async for entry in two.changes(wait=60):
                seen.append(entry.seq)
                if entry.seq == 3:
                    break
            return seen

        following = asyncio.create_task(follow())
        for number in range(3):
            await asyncio.sleep(0.05)
            await one.create(runtime="cli", task=str(number))
        assert await following == [1, 2, 3]
        assert [entry.seq async for entry in two.changes(after=3, wait=0.01)] == []
        await two.refresh()
        assert two.summary().total == 3
        await one.close()
        await two.close()

    asyncio.run(main())


def test_closed_and_read_only_registries_raise():
    async def main():
        store = MemoryStore(read_only=True)
        reader = await AsyncTaskRegistry.over(store)
        with pytest.raises(ReadOnlyError):
            await reader.create(runtime="cli", task="x")
        with pytest.raises(ReadOnlyError):
            async with reader.batch():
                pass
        await reader.close()
        await reader.close()
        for use in (reader.summary, reader.active):
            with pytest.raises(StoreClosedError):
                use()
        for wait in (
            reader.create(runtime="cli", task="x"),
            reader.refresh(),
            reader.history("x"),
            reader.as_of(0),
            reader.run("r").cancel(),
        ):
            with pytest.raises(StoreClosedError):
                await wait

    asyncio.run(main())


def test_the_loop_runs_while_the_store_is_slow():
    go_on = threading.Event()

    class Standing(MemoryStore):
        def apply(self, changes):
            assert go_on.wait(60)
            return super().apply(changes)

    async def main():
        registry = await AsyncTaskRegistry.over(Standing())
        creating = asyncio.create_task(registry.create(runtime="cli", task="x"))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not creating.done()
        go_on.set()
        await creating
        await registry.close()

    asyncio.run(main())


def test_a_task_that_outlives_its_batch_commits_by_itself():
    async def main():
        registry = await AsyncTaskRegistry.over(MemoryStore())
        go = asyncio.Event()

        async def worker():
            await go.wait()
            return await registry.create(runtime="cli", task="from worker")

        async with registry.batch():
            await registry.create(runtime="cli", task="in batch")
            child = asyncio.create_task(worker())
            await asyncio.sleep(0)
        go.set()
        record = await child
        assert registry.store.load_snapshot().records[record.task_id] == record
        await registry.close()

    asyncio.run(main())


def test_no_event_waits_for_the_next_change():
    async def main():
        events = []
        registry = await AsyncTaskRegistry.over(MemoryStore(), hooks=[events.append])
        for _ in range(200):
            await asyncio.gather(*(registry.create(runtime="cli", task="x") for _ in range(3)))
            await asyncio.sleep(0.001)
            for _ in range(4000):
                if not registry.hooks.events:
                    break
                await asyncio.sleep(0.005)
            assert not registry.hooks.events
        await registry.close()
        assert [event.seq for event in events] == list(range(601))

    asyncio.run(main())


def test_waiting_readers_block_no_other_call():
    begun, over = threading.Event(), threading.Event()

    class Waits(MemoryStore):
        def wait_for(self, after, timeout):
            begun.set()
            assert over.wait(TIMEOUT_S)
            return False

    async def main():
        registry = await AsyncTaskRegistry.over(Waits())

        async def follow():
            return [entry async for entry in registry.changes(wait=TIMEOUT_S)]

        followers = [asyncio.create_task(follow()) for _ in range(20)]
        await asyncio.to_thread(begun.wait, TIMEOUT_S)
        await asyncio.wait_for(registry.refresh(), TIMEOUT_S / 2)
        over.set()
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        await registry.close()

    asyncio.run(main())


@pytest.mark.parametrize("outer_fails", [False, True])
def test_a_batch_that_outlives_its_outer_batch_commits_by_itself(ledger_url, outer_fails):
    async def main():
        async with AsyncTaskRegistry.open(ledger_url) as registry:
            begun, over = asyncio.Event(), asyncio.Event()

            async def child():
                async with registry.batch():
                    task = await registry.create(runtime="cli", task="inner")
                    begun.set()
                    await over.wait()
                return task

            async def parent():
                async with registry.batch():
                    await registry.create(runtime="cli", task="outer")
                    task = asyncio.create_task(child())
                    await begun.wait()
                    if outer_fails:
                        raise LookupError
                return task

            started = asyncio.create_task(parent())
            await asyncio.wait([started])
            over.set()
            [still] = [t for t in asyncio.all_tasks() if t.get_coro().__name__ == "child"]
            task = await still
            assert registry.get(task.task_id) == task
            assert registry.summary().total == (1 if outer_fails else 2)
            assert isinstance(started.exception(), LookupError) is outer_fails

    asyncio.run(main())
