"""Many callers share commits; each gets its own answer, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from taskstore import InvalidTransition, StoreClosedError, TaskRegistry, TaskStoreError
from taskstore.stores.memory import MemoryStorage, MemoryStore


class SlowStore(MemoryStore):
    """A store whose commits take as long as a disk's."""

    def __init__(self, storage=None, seconds=0.002):
        super().__init__(storage)
        self.seconds = seconds
        self.commits = []

    def apply(self, changes):
        time.sleep(self.seconds)
        self.commits.append(len(changes))
        return super().apply(changes)


def in_threads(count, work):
    errors = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 (the test raises it again)
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a caller was left behind"
    assert errors == []


def test_a_lone_caller_commits_in_its_own_thread():
    committing = []

    class Watched(MemoryStore):
        def apply(self, changes):
            committing.append(threading.current_thread())
            return super().apply(changes)

    registry = TaskRegistry(Watched())
    for _ in range(5):
        registry.create(runtime="cli", task="x")
    assert set(committing) == {threading.current_thread()}


def test_many_callers_share_commits_and_read_their_own_writes():
    store = SlowStore()
    registry = TaskRegistry(store)

    def work(number):
        for _ in range(10):
            task = registry.create(runtime="cli", task=str(number))
            assert registry.get(task.task_id) == task
            assert registry.mark_running(task.task_id).revision == 2

    in_threads(32, work)
    registry.close()
    assert sum(store.commits) == 640
    assert len(store.commits) < 200
    assert [entry.seq for entry in store.read_journal(0, 1000)] == list(range(1, 641))


def test_one_bad_mutation_harms_only_its_own_caller():
    registry = TaskRegistry(SlowStore())
    ended = registry.create(runtime="cli", task="x")
    registry.finish(ended.task_id, "failed")
    refused = []

    def work(number):
        for _ in range(10):
            if number % 2:
                registry.create(runtime="cli", task="x")
            else:
                with pytest.raises(InvalidTransition):
                    registry.mark_running(ended.task_id)
                refused.append(number)

    in_threads(8, work)
    assert len(refused) == 40
    assert registry.summary().total == 41


def test_a_batch_is_never_split_nor_mixed_up_with_others():
    registry = TaskRegistry(SlowStore())

    def work(number):
        for _ in range(5):
            with registry.batch():
                for part in range(3):
                    registry.create(runtime="cli", task=f"{number}.{part}")

    in_threads(16, work)
    entries = list(registry.changes())
    assert len(entries) == 240
    for start in range(0, 240, 3):
        commit = {entry.commit_id for entry in entries[start : start + 3]}
        assert len(commit) == 1


def test_two_registries_with_many_callers_each_lose_no_update():
    storage = MemoryStorage()
    registries = [TaskRegistry(SlowStore(storage, 0.0005)) for _ in range(2)]
    task = registries[0].create(runtime="cli", task="x")

    def work(number):
        for turn in range(10):
            registries[number % 2].update_metadata(task.task_id, {f"{number}.{turn}": True})

    in_threads(8, work)
    registries[0].refresh()
    final = registries[0].get(task.task_id)
    assert len(final.metadata) == 80
    assert final.revision == 81


def test_a_store_that_fails_tells_each_caller_and_memory_stays():
    class Failing(SlowStore):
        broken = False

        def apply(self, changes):
            if self.broken:
                time.sleep(self.seconds)
                raise TaskStoreError("the disk is gone")
            return super().apply(changes)

    store = Failing()
    registry = TaskRegistry(store)
    task = registry.create(runtime="cli", task="x")
    store.broken = True
    failed = []

    def work(number):
        with pytest.raises(TaskStoreError, match="the disk is gone"):
            registry.update_metadata(task.task_id, {str(number): 1})
        failed.append(number)

    in_threads(8, work)
    store.broken = False
    assert len(failed) == 8
    assert registry.get(task.task_id) == task
    assert registry.mark_running(task.task_id).revision == 2


def test_close_commits_what_is_under_way_and_takes_nothing_more():
    store = SlowStore(seconds=0.01)
    registry = TaskRegistry(store)
    done, refused = [], []

    def work(number):
        for _ in range(1000):
            try:
                done.append(registry.create(runtime="cli", task=str(number)))
            except StoreClosedError:
                refused.append(number)
                return

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    registry.close()
    for thread in threads:
        thread.join(10)
    assert sorted(refused) == list(range(8))
    assert {record.task_id for record in done} == set(store.load_snapshot().records)


def test_the_writer_thread_ends_when_there_is_no_company_and_comes_back(monkeypatch):
    monkeypatch.setattr("taskstore.groupcommit.IDLE_S", 0.01)
    before = set(threading.enumerate())

    def writers():
        return [t for t in set(threading.enumerate()) - before if t.name == "taskstore-writer"]

    registry = TaskRegistry(SlowStore())
    for _ in range(3):
        in_threads(8, lambda _: registry.create(runtime="cli", task="x"))
        time.sleep(0.1)
        assert writers() == []
    assert registry.summary().total == 24
    in_threads(8, lambda _: registry.create(runtime="cli", task="x"))
    registry.close()
    assert writers() == []


def test_a_forked_child_is_refused():
    registry = TaskRegistry(MemoryStore())
    registry.create(runtime="cli", task="x")
    child = os.fork()
    if child == 0:
        try:
            registry.create(runtime="cli", task="y")
        except TaskStoreError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_interrupted_caller_leaves_its_change_done_or_not_done():
    registry = TaskRegistry(SlowStore(seconds=0.02))
    stop = threading.Event()

    def work():
        while not stop.is_set():
            registry.create(runtime="cli", task="company")

    company = [threading.Thread(target=work) for _ in range(4)]
    for thread in company:
        thread.start()
    outcomes = []
    for turn in range(10):
        timer = threading.Timer(0.005 * turn, signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            registry.create(runtime="cli", task="x", task_id=f"mine-{turn}")
            timer.join()
            time.sleep(0.001)
        except KeyboardInterrupt:
            outcomes.append(turn)
    stop.set()
    for thread in company:
        thread.join(10)
        assert not thread.is_alive()
    registry.create(runtime="cli", task="afterwards")
    assert outcomes
    stored = registry.store.load_snapshot().records
    assert stored == {record.task_id: record for record in registry.list()}


def test_without_threads_to_be_had_everybody_is_served_all_the_same(monkeypatch):
    registry = TaskRegistry(SlowStore())
    starting = threading.Thread.start

    def start(thread):
        if thread.name == "taskstore-writer":
            raise RuntimeError("can't start new thread")
        starting(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    in_threads(8, lambda _: [registry.create(runtime="cli", task="x") for _ in range(5)])
    assert registry.summary().total == 40
    monkeypatch.undo()
    in_threads(8, lambda _: registry.create(runtime="cli", task="x"))
    registry.close()
