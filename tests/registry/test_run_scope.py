"""registry.run(): the verbs for every task of a run."""

from __future__ import annotations


def test_every_task_of_a_run_is_addressed_as_one_commit(registry):
    one = registry.create(runtime="cli", task="1", run_id="r")
    two = registry.create(runtime="cli", task="2", run_id="r")
    registry.create(runtime="cli", task="3", run_id="other")
    run = registry.run("r")
    assert [record.task_id for record in run.mark_running()] == [one.task_id, two.task_id]
    assert run.mark_running() == []
    assert len(run.record_progress("half")) == 2
    assert len({entry.commit_id for entry in registry.changes(after=3)}) == 2
    registry.finish(one.task_id, "succeeded")
    assert [record.task_id for record in run.finish("failed", error="e")] == [two.task_id]
    assert registry.get(one.task_id).status == "succeeded"
    assert len(run.set_delivery_status("delivered")) == 2
    assert len(run.set_notify_policy("silent")) == 2
    assert len(run.set_cleanup_after(None)) == 2
    assert len(run.link_flow("f")) == 2
    assert len(run.update_metadata({"a": 1})) == 2
    assert run.cancel() == run.mark_lost() == run.recover() == []
    assert len(run.delete()) == 2
    assert run.delete() == []


def test_lost_tasks_of_a_run_recover(registry):
    registry.create(runtime="cli", task="1", run_id="r")
    assert registry.run("r").mark_lost(error="silence")[0].status == "lost"
    assert registry.run("r").recover()[0].status == "running"
    assert registry.run("r").cancel("enough")[0].error == "enough"


def test_an_ambiguous_run_matches_nothing(registry):
    mine = registry.create(runtime="cli", task="1", run_id="r", child_session_key="a")
    registry.create(runtime="cli", task="1", run_id="r", child_session_key="b")
    registry.create(runtime="acp", task="1", run_id="r", child_session_key="a")
    assert registry.run("r").mark_running() == []
    assert registry.run("r", runtime="cli").mark_running() == []
    assert registry.run("r", session_key="a").mark_running() == []
    changed = registry.run("r", runtime="cli", session_key="a").mark_running()
    assert [record.task_id for record in changed] == [mine.task_id]


def test_an_unknown_run_matches_nothing(registry):
    assert registry.run("nothing").finish("failed") == []
    assert registry.seq == 0
