"""All tasks of one run, addressed together: an event stream knows runs, not ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from taskstore import leases, lifecycle
from taskstore.clock import Clock
from taskstore.groupcommit import Operation
from taskstore.lifecycle import Mutation
from taskstore.mirror import Staging
from taskstore.records import TaskRecord, TaskStatus
from taskstore.validation import plain_metadata

Records = list[TaskRecord]


class RunScope:
    """The verbs of the registry for every task of a run, as one commit.

    Each returns the records that it changed, oldest first: none when the run
    is unknown or ambiguous.  What the verb does not apply to (mostly tasks
    that have ended) is skipped.  ``fence`` is the token of the lease that has
    to be on every other one: else :class:`ConflictError`, and nothing is written.
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

    def mark_running(self, *, started_at: int | None = None, fence: str | None = None) -> Records:
        """Note that the queued tasks have started, at ``started_at`` (Unix ms, default now)."""
        return self._active(
            lambda record, now: lifecycle.start(record, now, started_at=started_at), fence
        )

    def record_progress(self, summary: str, *, fence: str | None = None) -> Records:
        """Note how far the active tasks have come."""
        return self._active(lambda record, now: lifecycle.progress(record, now, summary), fence)

    def finish(
        self,
        status: str,
        *,
        error: str | None = None,
        summary: str | None = None,
        outcome: str | None = None,
        ended_at: int | None = None,
        fence: str | None = None,
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
            ),
            fence,
        )

    def mark_lost(self, *, error: str | None = None, fence: str | None = None) -> Records:
        """Note that nobody can tell any more what became of the active tasks."""
        return self._active(lambda record, now: lifecycle.lose(record, now, error=error), fence)

    def cancel(self, reason: str | None = None, *, fence: str | None = None) -> Records:
        """End the active tasks as cancelled."""
        return self._active(lambda record, now: lifecycle.cancel(record, now, reason=reason), fence)

    def recover(
        self,
        status: str = "running",
        *,
        error: str | None = None,
        summary: str | None = None,
        outcome: str | None = None,
        ended_at: int | None = None,
        fence: str | None = None,
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
            fence,
        )

    def set_delivery_status(
        self, status: str, *, last_notified_event_at: int | None = None, fence: str | None = None
    ) -> Records:
        """Note how far the answer got, for ended tasks too."""
        return self._all(
            lambda record, _: lifecycle.deliver(
                record, status, last_notified_event_at=last_notified_event_at
            ),
            fence,
        )

    def set_notify_policy(self, policy: str, *, fence: str | None = None) -> Records:
        """Set what the owner wants to hear of, for ended tasks too."""
        return self._all(lambda record, _: lifecycle.notify(record, policy), fence)

    def set_cleanup_after(self, cleanup_after: int | None, *, fence: str | None = None) -> Records:
        """Set from when on the records may be removed (Unix ms), for ended tasks too."""
        return self._all(lambda record, _: lifecycle.retain(record, cleanup_after), fence)

    def link_flow(self, parent_flow_id: str | None, *, fence: str | None = None) -> Records:
        """Set the flow that the tasks belong to, for ended tasks too."""
        return self._all(lambda record, _: lifecycle.link_flow(record, parent_flow_id), fence)

    def update_metadata(self, changes: Mapping[str, Any], *, fence: str | None = None) -> Records:
        """Merge a mapping into the tasks' metadata, for ended tasks too."""
        copied = plain_metadata(changes)
        return self._all(lambda record, _: lifecycle.merge_metadata(record, copied), fence)

    def delete(self, *, fence: str | None = None) -> Records:
        """Remove the records of the run's tasks; returns what they were."""
        leases.check_fence(fence)

        def operation(staging: Staging) -> Records:
            records = self._tasks(staging)
            for record in records:
                leases.guard(record, fence)
                staging.delete(record)
            return records

        return self._run(operation)

    def _active(self, mutation: Mutation, fence: str | None) -> Records:
        return self._change(lambda record: not record.is_terminal, mutation, fence)

    def _all(self, mutation: Mutation, fence: str | None) -> Records:
        return self._change(lambda _: True, mutation, fence)

    def _change(
        self,
        applies: Callable[[TaskRecord], bool],
        mutation: Mutation,
        fence: str | None,
    ) -> Records:
        leases.check_fence(fence)
        lifecycle.rehearse(mutation)
        now = self._now()

        def operation(staging: Staging) -> Records:
            changed = []
            for record in self._tasks(staging):
                if applies(record):
                    leases.guard(record, fence)
                    after = staging.update(record, mutation(record, now))
                    if after is not record:
                        changed.append(after)
            return changed

        return self._run(operation)
