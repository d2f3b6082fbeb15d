"""Two registries on one ledger: conflicts, refresh, and remote events."""

from __future__ import annotations

import pytest

from taskstore import (
    ConflictError,
    Deleted,
    InvalidTransition,
    StoreUnavailableError,
    TaskNotFound,
    TaskRegistry,
    Upserted,
)
from taskstore.stores.memory import MemoryStorage, MemoryStore


def test_refresh_applies_commits_of_another_writer(open_ledger):
    events = []
    one, two = open_ledger(), open_ledger(hooks=[events.append])
    task = one.create(runtime="cli", task="x")
    running = one.mark_running(task.task_id)
    assert two.summary().total == 0
    assert two.refresh() == 2
    assert two.get(task.task_id) == running
    assert [type(event) for event in events[1:]] == [Upserted, Upserted]
    assert [event.local for event in events[1:]] == [False, False]
    assert events[2].previous == task


def test_other_commits_are_applied_and_delivered_before_our_own(open_ledger):
    events = []
    one, two = open_ledger(), open_ledger(hooks=[events.append])
    theirs = one.create(runtime="cli", task="theirs")
    ours = two.create(runtime="cli", task="ours")
    assert two.get(theirs.task_id) == theirs
    assert [(event.seq, event.local) for event in events[1:]] == [(1, False), (2, True)]
    assert events[2].record == ours


def test_a_committed_change_returns_though_the_read_after_it_raises(open_ledger, monkeypatch):
    events = []
    one, two = open_ledger(), open_ledger(hooks=[events.append])

    def broken(*_):
        raise ValueError("an error of a third-party backend")

    one.create(runtime="cli", task="theirs")
    with monkeypatch.context() as patch:
        patch.setattr(two.store, "read_journal", broken)
        patch.setattr("taskstore.stores.memory.check_base", lambda *_: None)
        ours = two.create(runtime="cli", task="ours")
    assert two.get(ours.task_id) == ours
    two.refresh()
    assert {record.task for record in two.list()} == {"theirs", "ours"}
    assert [event.kind for event in events] == ["restored", "restored"]


def test_a_mutation_runs_again_on_the_fresh_record(open_ledger):
    one, two = open_ledger(), open_ledger()
    task = one.create(runtime="cli", task="x")
    two.refresh()
    one.update_metadata(task.task_id, {"one": 1})
    assert two.update_metadata(task.task_id, {"two": 2}).metadata == {"one": 1, "two": 2}


def test_a_cancel_is_not_overwritten_by_a_late_success(open_ledger):
    one, two = open_ledger(), open_ledger()
    task = one.create(runtime="cli", task="x", status="running")
    two.refresh()
    one.cancel(task.task_id, "enough")
    with pytest.raises(InvalidTransition):
        two.finish(task.task_id, "succeeded")
    assert two.get(task.task_id).status == "cancelled"


def test_another_revision_than_expected_is_a_conflict(open_ledger):
    one, two = open_ledger(), open_ledger()
    task = one.create(runtime="cli", task="x")
    two.refresh()
    one.update_metadata(task.task_id, {"a": 1})
    with pytest.raises(ConflictError) as raised:
        two.mark_running(task.task_id, if_revision=1)
    (conflict,) = raised.value.conflicts
    assert (conflict.expected, conflict.found) == (1, 2)
    with pytest.raises(ConflictError):
        two.delete(task.task_id, if_revision=1)
    assert two.mark_running(task.task_id, if_revision=2).revision == 3


def test_a_task_created_elsewhere_is_found_when_it_is_changed(open_ledger):
    one, two = open_ledger(), open_ledger()
    task = one.create(runtime="cli", task="x")
    assert two.mark_running(task.task_id).revision == 2


def test_a_task_deleted_elsewhere_stays_deleted(open_ledger):
    events = []
    one, two = open_ledger(), open_ledger(hooks=[events.append])
    task = one.create(runtime="cli", task="x")
    two.refresh()
    one.delete(task.task_id)
    with pytest.raises(TaskNotFound):
        two.mark_running(task.task_id)
    assert events[-1] == Deleted(2, events[-1].at, task.task_id, task, local=False)


def test_a_cache_behind_the_floor_is_reloaded(open_ledger):
    from taskstore import CompactionPolicy, compact

    events = []
    one, two = open_ledger(), open_ledger(hooks=[events.append])
    task = one.create(runtime="cli", task="x")
    one.mark_running(task.task_id)
    compact(one.store, CompactionPolicy(), erase_deleted=True)
    two.refresh()
    assert [event.kind for event in events] == ["restored", "restored"]
    assert (events[-1].seq, events[-1].count) == (2, 1)
    assert two.get(task.task_id).status == "running"
    ours = two.create(runtime="cli", task="y")
    assert (two.seq, events[-1].record) == (3, ours)


def test_no_verb_returns_an_outdated_result(open_ledger):
    one, two = open_ledger(), open_ledger()
    task = one.create(runtime="cli", task="x", run_id="r", owner_key="me")
    assert two.delete(task.task_id) is True

    task = one.create(runtime="cli", task="y", run_id="s", owner_key="me")
    assert len(two.run("s").mark_running()) == 1

    one.record_progress(task.task_id, "first")
    two.refresh()
    one.record_progress(task.task_id, "second")
    assert two.record_progress(task.task_id, "first").progress_summary == "first"
    assert two.store.load_snapshot().records[task.task_id].progress_summary == "first"

    one.update_metadata(task.task_id, {"k": 2})
    two.refresh()
    revision = two.get(task.task_id).revision
    one.update_metadata(task.task_id, {"k": 3})
    with pytest.raises(ConflictError):
        two.update_metadata(task.task_id, {"k": 2}, if_revision=revision)

    one.refresh()
    two.delete(task.task_id)
    again = one.create(runtime="cli", task="y", run_id="s", owner_key="me")
    assert again.task_id != task.task_id
    assert one.store.load_snapshot().records[again.task_id] == again


def test_a_cache_of_a_ledger_that_lost_commits_is_reloaded():
    storage, events = MemoryStorage(), []
    one = TaskRegistry(MemoryStore(storage))
    kept = one.create(runtime="cli", task="kept")
    registry = TaskRegistry(MemoryStore(storage), hooks=[events.append])
    lost = one.create(runtime="cli", task="lost")
    registry.refresh()
    # A standby takes over without the last commit, and commits further changes.
    storage.journal.pop()
    del storage.current[lost.task_id]
    storage.head -= 1
    other = TaskRegistry(MemoryStore(storage)).create(runtime="cli", task="other")
    registry.refresh()
    assert {record.task_id for record in registry.list()} == {kept.task_id, other.task_id}
    assert [event.kind for event in events] == ["restored", "upserted", "restored"]
    storage.journal.pop()
    del storage.current[other.task_id]
    storage.head -= 1
    registry.refresh()
    assert [record.task_id for record in registry.list()] == [kept.task_id]


def test_a_caller_sees_its_commit_though_the_commits_before_it_cannot_be_read(caplog):
    class Unreadable(MemoryStore):
        broken = False

        def read_journal(self, after, limit):
            if self.broken:
                raise StoreUnavailableError("the line is down")
            return super().read_journal(after, limit)

    storage, events = MemoryStorage(), []
    registry = TaskRegistry(Unreadable(storage), hooks=[events.append])
    theirs = TaskRegistry(MemoryStore(storage)).create(runtime="cli", task="theirs")
    registry.store.broken = True
    ours = registry.create(runtime="cli", task="ours")
    assert registry.get(ours.task_id) == ours
    registry.store.broken = False
    registry.refresh()
    assert registry.get(theirs.task_id) == theirs
    assert [event.kind for event in events] == ["restored", "restored"]
    assert "cannot read the commits before" in caplog.text


def test_a_journal_without_entries_does_not_block_a_caller():
    class Silent(MemoryStore):
        def read_journal(self, after, limit):
            return ()

    storage = MemoryStorage()
    registry = TaskRegistry(Silent(storage))
    theirs = TaskRegistry(MemoryStore(storage)).create(runtime="cli", task="theirs")
    ours = registry.create(runtime="cli", task="ours")
    assert {r.task_id for r in registry.list()} == {ours.task_id, theirs.task_id}
