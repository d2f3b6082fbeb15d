"""Group commit: callers share commits, and each gets its own result or error."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import pytest

from taskstore import (
    InvalidTransition,
    StoreBusyError,
    StoreClosedError,
    TaskRegistry,
    TaskStoreError,
)
from taskstore.model.ids import new_task_id
from taskstore.model.lifecycle import new_record
from taskstore.registry.cache import gc_paused
from taskstore.registry.commit import CommitQueue
from taskstore.registry.verbs import CreateTask
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.threads import run_together, until


class SlowStore(MemoryStore):
    """A store whose commits take as long as on a disk."""

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
        assert not thread.is_alive(), "a caller did not return"
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
    assert len(store.commits) < 500
    assert [entry.seq for entry in store.read_journal(0, 1000)] == list(range(1, 641))


def test_one_bad_mutation_fails_only_its_own_caller():
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


def test_a_batch_is_never_split_nor_mixed_with_others():
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


def test_a_failing_store_raises_in_each_caller_and_memory_stays():
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


def test_a_group_waits_once_for_a_busy_store():
    class Busy(SlowStore):
        tried = 0

        def apply(self, changes):
            self.tried += 1
            time.sleep(self.seconds)
            raise StoreBusyError("another writer holds the lock")

    store = Busy(seconds=0.2)
    registry = TaskRegistry(store)

    def work(_):
        with pytest.raises(StoreBusyError):
            registry.create(runtime="cli", task="x")

    in_threads(12, work)
    # The first request is committed alone, the others as one or few groups.
    assert store.tried <= 5
    assert registry.seq == 0
    assert not registry._cache.stale


def test_close_commits_accepted_requests_and_refuses_new_ones():
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


def test_a_second_close_completes_an_interrupted_one():
    store, begun, go_on = MemoryStore(), threading.Event(), threading.Event()
    registry, apply = TaskRegistry(store), store.apply
    registry._owns_store = True

    def slowly(changes):
        begun.set()
        go_on.wait(20)
        return apply(changes)

    store.apply = slowly
    caller = threading.Thread(target=registry.create, kwargs={"runtime": "cli", "task": "x"})
    caller.start()
    assert begun.wait(20)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            registry.close()
    finally:
        signal.signal(signal.SIGALRM, handler)
    again = threading.Thread(target=registry.close)
    again.start()
    again.join(0.2)
    assert again.is_alive(), "it does not wait for what is under way"
    go_on.set()
    again.join(20)
    caller.join(20)
    assert store.storage.head == 1
    with pytest.raises(StoreClosedError, match="the store"):
        store.head()


def test_the_idle_writer_thread_ends_and_starts_again(monkeypatch):
    monkeypatch.setattr("taskstore.registry.commit.IDLE_TIMEOUT_S", 0.01)
    before = set(threading.enumerate())

    def writers():
        return [t for t in set(threading.enumerate()) - before if t.name == "taskstore-writer"]

    registry = TaskRegistry(SlowStore())
    for _ in range(3):
        in_threads(8, lambda _: registry.create(runtime="cli", task="x"))
        until(lambda: writers() == [])
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


def status_of_child(work):
    """Fork; return the exit status of the child, which calls ``work`` within ten seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_child_forked_while_an_id_is_generated_generates_its_own():
    def work():
        return TaskRegistry(MemoryStore()).create(runtime="cli", task="x").revision - 1

    with new_task_id._lock:  # as another thread of the parent would hold it
        assert status_of_child(work) == 0


def test_a_child_forked_during_a_gc_pause_has_gc_enabled():
    def pausing():
        with gc_paused():
            return int(gc.isenabled())

    with gc_paused():
        assert not gc.isenabled()
        assert status_of_child(lambda: 0 if gc.isenabled() else 1) == 0
        assert status_of_child(pausing) == 0
    assert gc.isenabled()


def test_gc_pauses_of_several_threads_leave_gc_enabled(threads_change_often):
    def pause(pauses):
        for _ in range(pauses):
            with gc_paused():
                pass

    with gc_paused():
        pause(1)
        assert not gc.isenabled()
    assert gc.isenabled()
    run_together(*[lambda: pause(20_000)] * 4)
    assert gc.isenabled()


def test_the_change_of_an_interrupted_caller_is_committed_or_not():
    registry = TaskRegistry(SlowStore(seconds=0.02))
    stop = threading.Event()

    def work():
        while not stop.is_set():
            registry.create(runtime="cli", task="other")

    others = [threading.Thread(target=work) for _ in range(4)]
    for thread in others:
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
    for thread in others:
        thread.join(10)
        assert not thread.is_alive()
    registry.create(runtime="cli", task="afterwards")
    assert outcomes
    stored = registry.store.load_snapshot().records
    assert stored == {record.task_id: record for record in registry.list()}


def test_without_a_writer_thread_callers_commit_themselves(monkeypatch):
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


def test_a_request_after_the_writer_ends_starts_another_writer():
    queue = CommitQueue()
    first, start = queue.put(None, lambda _: 1, lambda: None)
    assert start
    assert queue.take(0) == [first]
    second, start = queue.put(None, lambda _: 2, lambda: None)
    assert not start, "the writer thread looks once more before it ends"
    assert queue.take(0) == [second]
    assert queue.take(0) == []
    _, start = queue.put(None, lambda _: 3, lambda: None)
    assert start
    assert queue.busy


def test_closing_ends_the_writer_after_the_queued_requests():
    queue = CommitQueue()
    ticket, _ = queue.put(None, lambda _: None, lambda: None)
    queue.close()
    with pytest.raises(StoreClosedError):
        queue.put(None, lambda _: None, lambda: None)
    assert queue.take(60) == [ticket]
    assert queue.take(60) == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_deliver_events_of_its_parent():
    heard = []
    registry = TaskRegistry(MemoryStore(), hooks=[heard.append])
    heard.clear()
    done = threading.Event()
    record = new_record(now=1, task_id="a", runtime="cli", task="x", status="queued", fields={})
    registry._committer.submit(CreateTask(record), done.set)
    assert done.wait(10)
    child = os.fork()
    if child == 0:
        try:
            registry.create(runtime="cli", task="y")
        except TaskStoreError:
            os._exit(len(heard))
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    registry.close()
    assert [event.record for event in heard] == [record]
