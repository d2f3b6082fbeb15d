"""Hooks observe: [8] order, re-entrance, raising; [9] restored always."""

from __future__ import annotations

import logging
import threading

import pytest

from taskstore import Deleted, Restored, TaskRegistry, Upserted
from taskstore.stores.memory import MemoryStore


def test_an_empty_ledger_is_restored_too(open_ledger):
    events = []
    open_ledger(hooks=[events.append])
    assert events == [Restored(seq=0, count=0, records={})]
    assert events[0].kind == "restored"


def test_a_reopened_ledger_is_restored_with_its_records(open_ledger):
    with open_ledger() as registry:
        task = registry.create(runtime="cli", task="x")
    events = []
    open_ledger(hooks=[events.append])
    (restored,) = events
    assert (restored.seq, restored.count) == (1, 1)
    assert restored.records[task.task_id] == task
    with pytest.raises(TypeError):
        restored.records["other"] = task


def test_events_come_in_the_order_of_the_journal_with_their_previous_record(open_ledger):
    events = []
    registry = open_ledger(hooks=[events.append])
    task = registry.create(runtime="cli", task="x")
    running = registry.mark_running(task.task_id)
    registry.delete(task.task_id)
    created, changed, deleted = events[1:]
    assert created == Upserted(1, created.at, task, None)
    assert changed == Upserted(2, changed.at, running, task)
    assert deleted == Deleted(3, deleted.at, task.task_id, running)
    assert [event.kind for event in events[1:]] == ["upserted", "upserted", "deleted"]
    assert all(event.local for event in events)
    assert [entry.at for entry in registry.changes()] == [event.at for event in events[1:]]


def test_a_call_without_a_change_makes_no_event(open_ledger):
    events = []
    registry = open_ledger(hooks=[events.append])
    task = registry.create(runtime="cli", task="x", status="running")
    registry.mark_running(task.task_id)
    registry.delete("nobody")
    assert len(events) == 2


def test_a_hook_sees_the_change_in_memory_and_in_the_store(open_ledger):
    seen = []

    def look(event):
        if event.kind == "upserted":
            seen.append(registry.get(event.record.task_id) == event.record)
            seen.append(
                registry.store.load_snapshot().records[event.record.task_id] == event.record
            )

    registry = open_ledger()
    registry.hooks.add(look)
    registry.create(runtime="cli", task="x")
    assert seen == [True, True]


def test_a_raising_hook_is_logged_and_counted_and_stops_no_other(open_ledger, caplog):
    after = []
    registry = open_ledger()

    def broken(event):
        raise RuntimeError("hook failure")

    registry.hooks.add(broken)
    registry.hooks.add(after.append)
    with caplog.at_level(logging.ERROR, logger="taskstore.hooks"):
        task = registry.create(runtime="cli", task="x")
    assert registry.get(task.task_id) == task
    assert [event.seq for event in after] == [1]
    assert registry.hooks.errors == 1
    assert "hook failure" in caplog.text


def test_an_interrupted_hook_does_not_stop_the_others(open_ledger):
    heard = []
    registry = open_ledger()

    def interrupted(event):
        if event.seq == 1:
            raise KeyboardInterrupt

    registry.hooks.add(interrupted)
    registry.hooks.add(lambda event: heard.append(event.seq))
    with pytest.raises(KeyboardInterrupt):
        registry.create(runtime="cli", task="x")
    assert heard == [1]
    registry.create(runtime="cli", task="y")
    assert heard == [1, 2]


def test_a_hook_may_change_the_registry(open_ledger):
    order = []

    def start_at_once(event):
        order.append(("first", event.seq))
        if event.kind == "upserted" and event.record.status == "queued":
            started = registry.mark_running(event.record.task_id)
            assert registry.get(started.task_id).status == "running"

    registry = open_ledger()
    registry.hooks.add(start_at_once)
    registry.hooks.add(lambda event: order.append(("second", event.seq)))
    task = registry.create(runtime="cli", task="x")
    # One event at a time: the second hook gets seq 1 before any hook gets seq 2.
    assert order == [("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    assert registry.get(task.task_id).revision == 2


def test_a_removed_hook_gets_no_more_events(open_ledger):
    events = []
    registry = open_ledger()
    remove = registry.hooks.add(events.append)
    registry.create(runtime="cli", task="x")
    remove()
    remove()
    registry.create(runtime="cli", task="y")
    assert [event.seq for event in events] == [1]


def test_a_hook_must_be_callable(open_ledger):
    with pytest.raises(TypeError, match="not callable"):
        open_ledger().hooks.add("nonsense")


def test_a_failed_commit_changes_nothing_and_makes_no_event(open_ledger, monkeypatch):
    events = []
    registry = open_ledger(hooks=[events.append])
    task = registry.create(runtime="cli", task="x")

    def refuse(changes):
        raise OSError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(registry.store, "apply", refuse)
        with pytest.raises(OSError, match="no more"):
            registry.mark_running(task.task_id)
    assert registry.get(task.task_id) == task
    assert registry.seq == 1
    assert len(events) == 2
    assert registry.mark_running(task.task_id).revision == 2


def test_events_of_many_threads_come_one_at_a_time_and_in_order():
    seqs, inside = [], threading.Lock()

    def watch(event):
        assert inside.acquire(blocking=False), "two events at once"
        seqs.append(event.seq)
        inside.release()

    registry = TaskRegistry(MemoryStore(), hooks=[watch])

    def work():
        for _ in range(200):
            registry.create(runtime="cli", task="x")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.hooks.errors == 0
    assert seqs == list(range(801))


def test_a_hook_added_during_a_commit_misses_nothing(monkeypatch):
    """Either the lookup after ``add`` sees the change, or the hook gets its event."""
    registry, heard, seen = TaskRegistry(MemoryStore()), [], []
    publish, listening = registry._cache._apply_entries, threading.Event()

    def listen():
        registry.hooks.add(heard.append)
        listening.set()
        seen.append(registry.find("a"))

    def listening_first(entries, *, local):
        other.start()
        assert listening.wait(30)
        return publish(entries, local=local)

    other = threading.Thread(target=listen)
    monkeypatch.setattr(registry._cache, "_apply_entries", listening_first)
    task = registry.create(runtime="cli", task="x", task_id="a")
    other.join()
    assert seen in ([None], [task])
    assert [event.record for event in heard] == [task]
