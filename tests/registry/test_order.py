"""What comes together is done in the order in which it came, and seen as the commits that it is."""

from __future__ import annotations

import asyncio
import threading

import pytest

from taskstore import InvalidTransition, TaskRegistry
from taskstore.aio import AsyncTaskRegistry
from taskstore.replica import PAGE_ENTRIES
from taskstore.stores.memory import MemoryStorage, MemoryStore


def together(ledger_url, *verbs, prepare):
    """Have coroutines come together behind another one; returns what they gave, and the end."""

    async def main():
        async with AsyncTaskRegistry.open(ledger_url) as registry:
            await prepare(registry)
            other = registry.create(runtime="cli", task="so that the writer is at work")
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


def test_what_changes_nothing_is_not_done_later_than_it_came(ledger_url):
    given, [task] = together(
        ledger_url,
        lambda registry: registry.record_progress("kept", "a"),
        lambda registry: registry.record_progress("kept", "b"),
        prepare=running,
    )
    assert [record.progress_summary for record in given] == ["a", "b"]
    assert (task.progress_summary, task.revision) == ("b", 3)


def test_what_fails_is_not_tried_again_after_what_came_later(ledger_url):
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


def test_a_deletion_that_finds_nothing_does_not_delete_what_comes_later(ledger_url):
    async def nothing(_):
        pass

    given, [task] = together(
        ledger_url,
        lambda registry: registry.delete("kept"),
        lambda registry: registry.create(runtime="cli", task="x", task_id="kept", task_kind="kept"),
        prepare=nothing,
    )
    assert given == [False, task]


def test_who_comes_together_looks_once_whether_memory_is_behind():
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


class Looking:
    """A thread that counts the tasks all the time; no count is to be that of half a commit."""

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
def test_nobody_sees_half_a_commit(open_ledger, local):
    size = 300  # two of which do not end where a page of the journal does
    registry = open_ledger()
    writer = registry if local else open_ledger()
    with Looking(registry, size):
        for _ in range(2 * PAGE_ENTRIES // size + 1):
            with writer.batch():
                for number in range(size):
                    writer.create(runtime="cli", task=str(number))
        registry.refresh()
    assert registry.summary().total == size * (2 * PAGE_ENTRIES // size + 1)


def test_a_commit_of_more_than_a_page_arrives_too(open_ledger):
    registry, writer = open_ledger(), open_ledger()
    count = 2 * PAGE_ENTRIES + 7
    with writer.batch():
        for number in range(count):
            writer.create(runtime="cli", task=str(number))
    own = registry.create(runtime="cli", task="which finds all that in its gap")
    assert registry.seq == count + 1
    assert registry.summary().total == count + 1
    assert registry.get(own.task_id) == own
