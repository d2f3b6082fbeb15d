"""The order of requests in a group, and the visibility of whole commits."""

from __future__ import annotations

import asyncio
import threading

import pytest

from taskstore import InvalidTransition, StoreBusyError, TaskRecord, TaskRegistry
from taskstore.aio import AsyncTaskRegistry
from taskstore.registry.cache import PAGE_ENTRIES
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.threads import until


def together(ledger_url, *verbs, prepare):
    """Queue the verbs behind another commit; return their results and the final tasks."""

    async def main():
        async with AsyncTaskRegistry.open(ledger_url) as registry:
            await prepare(registry)
            other = registry.create(runtime="cli", task="the first commit")
            given = await asyncio.gather(
                other, *(verb(registry) for verb in verbs), return_exceptions=True
            )
            return given[1:], list(registry.list(task_kind="kept"))

    return asyncio.run(main())


async def running(registry):
    await registry.create(
        runtime="cli", task="x", task_id="kept", status="running", task_kind="kept"
    )
    await registry.record_progress("kept", "a")


def test_a_request_without_a_change_keeps_its_order(ledger_url):
    given, [task] = together(
        ledger_url,
        lambda registry: registry.record_progress("kept", "a"),
        lambda registry: registry.record_progress("kept", "b"),
        prepare=running,
    )
    assert [record.progress_summary for record in given] == ["a", "b"]
    assert (task.progress_summary, task.revision) == ("b", 3)


def test_a_failed_request_is_not_retried_after_later_ones(ledger_url):
    given, [task] = together(
        ledger_url,
        lambda registry: registry.mark_running("kept"),
        lambda registry: registry.finish("kept", "succeeded"),
        lambda registry: registry.mark_running("kept"),
        prepare=running,
    )
    assert given[0].status == "running"
    assert given[1] == task
    assert isinstance(given[2], InvalidTransition)


def test_a_deletion_of_nothing_does_not_delete_a_later_task(ledger_url):
    async def nothing(_):
        pass

    given, [task] = together(
        ledger_url,
        lambda registry: registry.delete("kept"),
        lambda registry: registry.create(runtime="cli", task="x", task_id="kept", task_kind="kept"),
        prepare=nothing,
    )
    assert given == [False, task]


def test_a_group_catches_up_once():
    class Counting(MemoryStore):
        looks = 0

        def read_journal(self, after, limit):
            self.looks += 1
            return super().read_journal(after, limit)

    storage = MemoryStorage()
    store = Counting(storage)
    there = TaskRegistry(MemoryStore(storage))

    async def main():
        registry = await AsyncTaskRegistry.over(store)
        await registry.create(runtime="cli", task="x", task_id="t")
        there.mark_running("t")
        store.looks = 0
        given = await asyncio.gather(
            registry.create(runtime="cli", task="y"),
            *(registry.mark_running("t") for _ in range(20)),
        )
        assert {record.revision for record in given[1:]} == {2}
        assert store.looks < 10
        await registry.close()

    asyncio.run(main())


def test_a_group_finds_a_task_just_created_elsewhere(open_ledger):
    """Nothing else in the commit would conflict with it."""
    registry, other = open_ledger(), open_ledger()
    committer = registry._committer
    commit_group, given, threads = committer._commit_group, [], []

    def after_another(requests):
        if len(requests) == 2:
            other.create(runtime="cli", task="theirs", task_id="theirs")
        commit_group(requests)

    committer._commit_group = after_another

    def work(verb):
        threads.append(threading.Thread(target=lambda: given.append(verb())))
        threads[-1].start()

    with committer._lock:
        committer._committing = True  # as if another caller were committing
        work(lambda: registry.create(runtime="cli", task="1"))
        until(lambda: committer._queue.busy and committer._queue._requests.empty())
        work(lambda: registry.create(runtime="cli", task="2"))
        work(lambda: registry.mark_running("theirs"))
        until(lambda: committer._queue._requests.qsize() == 2)
    for thread in threads:
        thread.join(30)
    assert len(given) == 3
    assert registry.get("theirs").status == "running"


def test_an_unverified_request_on_a_busy_store_fails_alone():
    class Busy(MemoryStore):
        busy = False

        def read_journal(self, after, limit):
            if self.busy:
                raise StoreBusyError("busy")
            return super().read_journal(after, limit)

        def apply(self, changes):  # which reads the journal
            self.busy, was = False, self.busy
            commit = super().apply(changes)
            self.busy = was
            return commit

    async def main():
        store = Busy()
        registry = await AsyncTaskRegistry.over(store)
        store.busy = True
        given = await asyncio.gather(
            *(registry.create(runtime="cli", task=str(number)) for number in range(3)),
            registry.mark_running("nowhere"),
            return_exceptions=True,
        )
        assert [type(each) for each in given] == [TaskRecord] * 3 + [StoreBusyError]
        await registry.close()

    asyncio.run(main())


class Looking:
    """A thread that counts the tasks in a loop; no count may be that of half a commit."""

    def __init__(self, registry, size):
        self._registry, self._size = registry, size
        self.halves = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._done.is_set():
            total = self._registry.summary().total
            if total % self._size:
                self.halves.append(total)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        assert self.halves == []


@pytest.mark.parametrize("local", [True, False], ids=["our own", "another's"])
def test_no_lookup_sees_half_a_commit(open_ledger, local):
    size = 300  # a commit does not end where a page of the journal ends
    registry = open_ledger()
    writer = registry if local else open_ledger()
    with Looking(registry, size):
        for _ in range(2 * PAGE_ENTRIES // size + 1):
            with writer.batch():
                for number in range(size):
                    writer.create(runtime="cli", task=str(number))
        registry.refresh()
    assert registry.summary().total == size * (2 * PAGE_ENTRIES // size + 1)


class NotingLock:
    """The lock of a cache, which records the number of records at each acquisition."""

    def __init__(self, cache):
        self._cache, self._lock, self._depth = cache, cache.lock, 0
        self.totals = []

    def __enter__(self):
        self._lock.acquire()
        if not self._depth:
            self.totals.append(len(self._cache.records))
        self._depth += 1

    def __exit__(self, *_):
        self._depth -= 1
        self._lock.release()


def test_no_lookup_sees_half_of_a_commit_before_our_own(open_ledger):
    size, commits = 300, 2 * PAGE_ENTRIES // 300 + 1
    registry, writer = open_ledger(), open_ledger()
    for _ in range(commits):
        with writer.batch():
            for number in range(size):
                writer.create(runtime="cli", task=str(number))
    registry._cache.lock = noting = NotingLock(registry._cache)
    registry.create(runtime="cli", task="mine")
    assert noting.totals == [number * size for number in range(commits + 1)]


def test_a_commit_of_more_than_a_page_is_applied_completely(open_ledger):
    registry, writer = open_ledger(), open_ledger()
    count = 2 * PAGE_ENTRIES + 7
    with writer.batch():
        for number in range(count):
            writer.create(runtime="cli", task=str(number))
    own = registry.create(runtime="cli", task="after the others")
    assert registry.seq == count + 1
    assert registry.summary().total == count + 1
    assert registry.get(own.task_id) == own
