"""All tasks of one run, addressed together: an event stream knows runs, not ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from taskstore import lifecycle
from taskstore.clock import Clock
from taskstore.groupcommit import Operation
from taskstore.mirror import Staging
from taskstore.records import TaskRecord, TaskStatus, plain_metadata

Records = list[TaskRecord]


class RunScope:
    """The verbs of the registry for every task of a run, as one commit.

    Each returns the records that it changed, oldest first: none when the run
    is unknown or ambiguous.  What the verb does not apply to (mostly tasks
    that have ended) is skipped.
    """

    def __init__(
        self,
        tasks: Callable[[Staging], Records],
        run: Callable[[Operation[Records]], Records],
        now: Clock,
    ) -> None:
        self._tasks = tasks
        self._run = run
        self._now = now

    def mark_running(self, *, started_at: int | None = None) -> Records:
        """Note that the queued tasks have started, at ``started_at`` (Unix ms, default now)."""
        return self._active(lambda record, now: lifecycle.start(record, now, started_at=started_at))

    def record_progress(self, summary: str) -> Records:
        """Note how far the active tasks have come."""
        return self._active(lambda record, now: lifecycle.progress(record, now, summary))

    def finish(
        self,
        status: str,
        *,
        error: str | None = None,
        summary: str | None = None,
        outcome: str | None = None,
        ended_at: int | None = None,
    ) -> Records:
        """End the active tasks; arguments as in :meth:`taskstore.TaskRegistry.finish`."""
        return self._active(
            lambda record, now: lifecycle.finish(
                record,
                now,
                status,
                error=error,
                summary=summary,
                outcome=outcome,
                ended_at=ended_at,
            )
        )

    def mark_lost(self, *, error: str | None = None) -> Records:
        """Note that nobody can tell any more what became of the active tasks."""
        return self._active(lambda record, now: lifecycle.lose(record, now, error=error))

    def cancel(self, reason: str | None = None) -> Records:
        """End the active tasks as cancelled."""
        return self._active(lambda record, now: lifecycle.cancel(record, now, reason=reason))

    def recover(
        self,
        status: str = "running",
        *,
        error: str | None = None,
        summary: str | None = None,
        outcome: str | None = None,
        ended_at: int | None = None,
    ) -> Records:
        """Correct the lost tasks; arguments as in :meth:`taskstore.TaskRegistry.recover`."""
        return self._change(
            lambda record: record.status is TaskStatus.LOST,
            lambda record, now: lifecycle.recover(
                record,
                now,
                status,
                error=error,
                summary=summary,
                outcome=outcome,
                ended_at=ended_at,
            ),
        )

    def set_delivery_status(
        self, status: str, *, last_notified_event_at: int | None = None
    ) -> Records:
        """Note how far the answer got, for ended tasks too."""
        return self._all(
            lambda record, _: lifecycle.deliver(
                record, status, last_notified_event_at=last_notified_event_at
            )
        )

    def set_notify_policy(self, policy: str) -> Records:
        """Set what the owner wants to hear of, for ended tasks too."""
        return self._all(lambda record, _: lifecycle.notify(record, policy))

    def set_cleanup_after(self, cleanup_after: int | None) -> Records:
        """Set from when on the records may be removed (Unix ms), for ended tasks too."""
        return self._all(lambda record, _: lifecycle.retain(record, cleanup_after))

    def link_flow(self, parent_flow_id: str | None) -> Records:
        """Set the flow that the tasks belong to, for ended tasks too."""
        return self._all(lambda record, _: lifecycle.link_flow(record, parent_flow_id))

    def update_metadata(self, changes: Mapping[str, Any]) -> Records:
        """Merge a mapping into the tasks' metadata, for ended tasks too."""
        copied = plain_metadata(changes)
        return self._all(lambda record, _: lifecycle.merge_metadata(record, copied))

    def delete(self) -> Records:
        """Remove the records of the run's tasks; returns what they were."""

        def operation(staging: Staging) -> Records:
            records = self._tasks(staging)
            for record in records:
                staging.delete(record)
            return records

        return self._run(operation)

    def _active(self, mutation: Callable[[TaskRecord, int], TaskRecord]) -> Records:
        return self._change(lambda record: not record.is_terminal, mutation)

    def _all(self, mutation: Callable[[TaskRecord, int], TaskRecord]) -> Records:
        return self._change(lambda _: True, mutation)

    def _change(
        self,
        applies: Callable[[TaskRecord], bool],
        mutation: Callable[[TaskRecord, int], TaskRecord],
    ) -> Records:
        lifecycle.rehearse(mutation)
        now = self._now()

        def operation(staging: Staging) -> Records:
            changed = []
            for record in self._tasks(staging):
                if applies(record):
                    after = staging.update(record, mutation(record, now))
                    if after is not record:
                        changed.append(after)
            return changed

        return self._run(operation)
