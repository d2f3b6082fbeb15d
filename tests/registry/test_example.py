"""The ten lines of the README, on every backend."""

from __future__ import annotations

from taskstore import TaskStatus


def test_a_task_is_recorded_from_creation_to_end(open_ledger):
    with open_ledger() as registry:
        task = registry.create(
            runtime="subagent", owner_key="agent:main", run_id="run-1", task="Summarise the inbox"
        )
        registry.mark_running(task.task_id)
        registry.record_progress(task.task_id, "3 of 10 mails read")
        registry.finish(task.task_id, "succeeded", summary="10 mails read")
        assert registry.get(task.task_id).status is TaskStatus.SUCCEEDED
    again = open_ledger().get(task.task_id)
    assert again.revision == 4
    assert again.progress_summary == "3 of 10 mails read"
    assert again.terminal_summary == "10 mails read"
    assert again.created_at <= again.started_at <= again.ended_at
    assert again.cleanup_after == again.ended_at + 7 * 86_400_000
