"""Two registries on one ledger: conflicts, refresh, and events from elsewhere."""

from __future__ import annotations

import pytest

from taskstore import ConflictError, Deleted, InvalidTransition, TaskNotFound, Upserted


def test_refresh_brings_in_what_another_wrote(open_ledger):
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


def test_what_came_in_between_is_mirrored_and_told_before_our_own(open_ledger):
    events = []
    one, two = open_ledger(), open_ledger(hooks=[events.append])
    theirs = one.create(runtime="cli", task="theirs")
    ours = two.create(runtime="cli", task="ours")
    assert two.get(theirs.task_id) == theirs
    assert [(event.seq, event.local) for event in events[1:]] == [(1, False), (2, True)]
    assert events[2].record == ours


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


def test_an_expected_revision_that_does_not_hold_is_a_conflict(open_ledger):
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


def test_a_mirror_that_fell_behind_the_floor_is_restored(open_ledger):
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
