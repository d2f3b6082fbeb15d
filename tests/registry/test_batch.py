"""batch(): all or nothing, one commit, invisible to others until then."""

from __future__ import annotations

import threading

import pytest

from taskstore import ConflictError, InvalidTransition, ReadOnlyError, TaskNotFound


def test_a_batch_is_one_commit(open_ledger):
    events = []
    registry = open_ledger(hooks=[events.append])
    with registry.batch() as same:
        assert same is registry
        one = registry.create(runtime="cli", task="1")
        registry.mark_running(one.task_id)
        two = registry.create(runtime="cli", task="2", parent_task_id=one.task_id)
        assert len(events) == 1
    entries = list(registry.changes())
    assert [(entry.task_id, entry.revision) for entry in entries] == [
        (one.task_id, 1),
        (one.task_id, 2),
        (two.task_id, 1),
    ]
    assert len({entry.commit_id for entry in entries}) == 1
    assert [event.seq for event in events] == [0, 1, 2, 3]
    assert open_ledger().summary().total == 2


def test_only_reads_in_the_body_see_staged_changes(registry):
    before = registry.create(runtime="cli", task="0", owner_key="me", run_id="r")
    gone = registry.create(runtime="cli", task="gone")
    outside = {}

    def look():
        outside["ids"] = {record.task_id for record in registry.list()}
        outside["status"] = registry.get(before.task_id).status

    with registry.batch():
        registry.finish(before.task_id, "failed")
        new = registry.create(runtime="cron", task="1", owner_key="me", parent_task_id="p")
        registry.delete(gone.task_id)
        assert registry.get(before.task_id).status == "failed"
        assert [record.task_id for record in registry.list(owner_key="me")] == [
            new.task_id,
            before.task_id,
        ]
        assert [record.task_id for record in registry.active()] == [new.task_id]
        assert [record.task_id for record in registry.children("p")] == [new.task_id]
        assert registry.find("r").status == "failed"
        assert registry.find_by_run("r").task_id == before.task_id
        summary = registry.summary()
        assert (summary.total, summary.active) == (2, 1)
        assert summary.by_runtime == {"cli": 1, "cron": 1}
        with pytest.raises(TaskNotFound):
            registry.get(gone.task_id)
        page = registry.list(limit=1)
        assert registry.list(limit=1, after=page.next_cursor)[0].task_id == before.task_id
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert outside == {"ids": {before.task_id, gone.task_id}, "status": "queued"}
    assert registry.get(new.task_id).runtime == "cron"


def test_an_exception_in_the_body_writes_nothing(registry):
    with pytest.raises(RuntimeError), registry.batch():
        registry.create(runtime="cli", task="1")
        raise RuntimeError
    assert registry.seq == 0
    assert registry.summary().total == 0
    assert registry.create(runtime="cli", task="2").revision == 1


def test_a_refused_change_in_the_body_discards_only_itself(registry):
    with registry.batch():
        task = registry.create(runtime="cli", task="1")
        registry.finish(task.task_id, "succeeded")
        with pytest.raises(InvalidTransition):
            registry.mark_running(task.task_id)
    assert registry.get(task.task_id).status == "succeeded"
    assert registry.seq == 2


def test_inner_batches_join_the_outer_one(registry):
    with registry.batch():
        registry.create(runtime="cli", task="1")
        with registry.batch():
            registry.create(runtime="cli", task="2")
        assert registry.seq == 0
    assert registry.seq == 2
    assert len({entry.commit_id for entry in registry.changes()}) == 1


def test_an_empty_batch_writes_nothing(registry):
    with registry.batch():
        pass
    assert registry.seq == 0


def test_a_batch_that_conflicts_runs_again_over_the_stored_records(open_ledger):
    one, two = open_ledger(), open_ledger()
    task = one.create(runtime="cli", task="x")
    with one.batch():
        one.mark_running(task.task_id)
        one.update_metadata(task.task_id, {"mine": 1})
        two.refresh()
        two.update_metadata(task.task_id, {"theirs": 2})
    final = one.get(task.task_id)
    assert final.metadata == {"mine": 1, "theirs": 2}
    assert (final.revision, final.status) == (4, "running")
    two.refresh()
    assert two.get(task.task_id) == final


def test_a_batch_that_another_writer_made_impossible_writes_nothing(open_ledger):
    one, two = open_ledger(), open_ledger()
    task = one.create(runtime="cli", task="x")
    with pytest.raises(InvalidTransition), one.batch():
        one.create(runtime="cli", task="companion")
        one.mark_running(task.task_id)
        two.refresh()
        two.cancel(task.task_id)
    assert one.get(task.task_id).status == "cancelled"
    assert one.summary().total == 1


def test_a_run_verb_inside_a_batch_joins_it(registry):
    registry.create(runtime="cli", task="1", run_id="r")
    with registry.batch():
        assert [record.status for record in registry.run("r").finish("failed")] == ["failed"]
        assert registry.seq == 1
    assert registry.seq == 2


def test_a_read_only_registry_opens_no_batch(open_ledger):
    open_ledger().create(runtime="cli", task="x")
    reader = open_ledger(read_only=True)
    with pytest.raises(ReadOnlyError), reader.batch():
        pass


def test_a_failed_inner_batch_adds_nothing_to_the_outer_one(registry):
    with registry.batch():
        outer = registry.create(runtime="cli", task="outer")
        with pytest.raises(RuntimeError), registry.batch():
            registry.create(runtime="cli", task="inner")
            registry.mark_running(outer.task_id)
            raise RuntimeError
        assert registry.get(outer.task_id).status == "queued"
    assert [record.task for record in registry.list()] == ["outer"]


def test_changes_of_a_hook_during_refresh_are_not_part_of_the_batch(open_ledger):
    one, two = open_ledger(), open_ledger()

    def note(event):
        if event.kind == "upserted" and not event.local:
            two.create(runtime="cli", task="noted")

    two.hooks.add(note)
    one.create(runtime="cli", task="theirs")
    with pytest.raises(RuntimeError), two.batch():
        two.create(runtime="cli", task="mine")
        two.refresh()
        raise RuntimeError
    assert sorted(record.task for record in two.list()) == ["noted", "theirs"]


def test_what_was_handed_over_is_the_callers_again(registry):
    mine = {"a": [1]}
    with registry.batch():
        task = registry.create(runtime="cli", task="x", metadata=mine)
        registry.update_metadata(task.task_id, mine)
        mine["a"].append(float("nan"))
        mine["b"] = 2
    assert registry.get(task.task_id).metadata == {"a": [1]}


def test_a_run_created_elsewhere_during_a_batch_leaves_no_dangling_child(open_ledger):
    here, there = open_ledger(), open_ledger()
    existing = there.create(runtime="cli", task="x", run_id="r")

    def once():
        with here.batch():
            parent = here.create(runtime="cli", task="x", run_id="r")
            here.create(runtime="cli", task="child", parent_task_id=parent.task_id)

    with pytest.raises(ConflictError, match=existing.task_id) as caught:
        once()
    [conflict] = caught.value.conflicts
    assert conflict.existing_task_id == existing.task_id
    assert open_ledger().summary().total == 1
    once()  # the registry has caught up
    [child] = open_ledger().children(existing.task_id)
    assert child.task == "child"


def test_using_a_task_whose_run_was_created_elsewhere_is_a_conflict(open_ledger):
    here, there = open_ledger(), open_ledger()
    existing = there.create(runtime="cli", task="x", run_id="r")
    with pytest.raises(ConflictError, match=existing.task_id), here.batch():
        mine = here.create(runtime="cli", task="x", run_id="r")
        here.mark_running(mine.task_id)
    with here.batch():
        assert here.create(runtime="cli", task="x", run_id="r") == existing
    assert here.get(existing.task_id).revision == 1


def test_a_run_created_elsewhere_that_the_batch_does_not_use_is_no_conflict(open_ledger):
    here, there = open_ledger(), open_ledger()
    existing = there.create(runtime="cli", task="x", run_id="r")
    with here.batch():
        here.create(runtime="cli", task="x", run_id="r")
        other = here.create(runtime="cli", task="y")
    assert here.get(existing.task_id) == existing
    assert here.get(other.task_id).revision == 1


def test_deleting_a_task_whose_run_was_created_elsewhere_is_a_conflict(open_ledger):
    here, there = open_ledger(), open_ledger()
    existing = there.create(runtime="cli", task="x", run_id="r")
    there.create(runtime="cli", task="y", run_id="r")
    with pytest.raises(ConflictError, match=existing.task_id), here.batch():
        mine = here.create(runtime="cli", task="x", run_id="r")
        assert here.delete(mine.task_id)
        here.create(runtime="cli", task="y", run_id="r")  # the commit detects the conflict
    assert here.get(existing.task_id) == existing


def test_a_task_deleted_elsewhere_frees_its_dedup_key(open_ledger):
    here, there = open_ledger(), open_ledger()
    gone = here.create(runtime="cli", task="x", run_id="r")
    child = here.create(runtime="cli", task="child", parent_task_id=gone.task_id)
    there.delete(gone.task_id)
    with pytest.raises(TaskNotFound, match=gone.task_id), here.batch():
        same = here.create(runtime="cli", task="x", run_id="r")
        assert same.task_id == gone.task_id
        here.mark_running(same.task_id)
    there.refresh()
    assert there.find_by_run("r") is None
    here, there = open_ledger(), here
    again = here.create(runtime="cli", task="x", run_id="r")
    there.refresh()
    here.delete(again.task_id)
    with there.batch():
        assert there.create(runtime="cli", task="x", run_id="r").task_id == again.task_id
        there.mark_running(child.task_id)
    assert there.get(child.task_id).status == "running"
    assert there.find_by_run("r").task_id not in (gone.task_id, again.task_id)


def test_reads_of_a_batch_are_verified_against_the_store(open_ledger):
    """One operation has a change to commit; the result of another one is outdated by then."""
    here, there = open_ledger(), open_ledger()
    found = here.create(runtime="cli", task="x", run_id="r")
    other = here.create(runtime="cli", task="other")
    there.delete(found.task_id)
    with here.batch():
        assert here.create(runtime="cli", task="x", run_id="r").task_id == found.task_id
        here.mark_running(other.task_id)
    made = here.find_by_run("r")
    assert made is not None
    assert made.task_id != found.task_id
    there.refresh()
    assert there.find_by_run("r") == made
