"""The verbs: what can be done to a task, as operations for whoever commits them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

from taskstore import creation, leases, lifecycle
from taskstore.clock import new_task_id
from taskstore.groupcommit import Operation
from taskstore.lifecycle import Mutation
from taskstore.operations import changing, check_expected, creating, deleting, giving
from taskstore.records import TaskRecord
from taskstore.runs import RunScope
from taskstore.store import TaskRegistryStore
from taskstore.validation import check_int, check_key, plain_metadata

T = TypeVar("T")


class Verbs(ABC):
    """Each verb checks its arguments, makes an operation of them and hands it to ``_run``."""

    _store: TaskRegistryStore

    @abstractmethod
    def _run(self, operation: Operation[T]) -> T:
        """Have an operation committed; returns its result."""

    def _now(self) -> int:
        """The time in Unix milliseconds; raises :class:`ValidationError` if a clock tells none."""
        return check_int("clock", self._store.clock())

    def create(
        self,
        /,
        *,
        runtime: str,
        task: str,
        status: str = "queued",
        task_id: str | None = None,
        **fields: Any,
    ) -> TaskRecord:
        """Record a new task, or find the one that is already booked for this run.

        ``runtime`` is a lower-case token (``subagent``, ``acp``, ``cron``,
        ``cli`` or your own), ``task`` what was asked, ``status`` queued or
        running.  ``fields`` are further record fields, ``metadata`` a
        mapping; times are Unix milliseconds.

        Without ``run_id`` every call makes a new task.  With it, the same
        (run_id, runtime, scope kind, owner, child session, flow, label, task)
        again returns the first task, filled in where it lacked something; an
        ended one is returned as it is.  That holds across processes.

        Raises :class:`ValidationError`, and :class:`ConflictError` if
        ``task_id`` is or was in use.
        """
        record = creation.new_record(
            now=self._now(),
            task_id=new_task_id() if task_id is None else task_id,
            runtime=runtime,
            task=task,
            status=status,
            fields=fields,
        )
        return self._run(creating(record))

    def mark_running(
        self,
        task_id: str,
        *,
        started_at: int | None = None,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TaskRecord:
        """Note that a queued task has started, at ``started_at`` (Unix ms, default now).

        A running task is returned as it is.  Raises :class:`TaskNotFound`,
        :class:`InvalidTransition` for an ended one, and
        :class:`ConflictError` if ``if_revision`` is given and not its
        revision, or ``fence`` and not the token of its lease.
        """
        return self._change(
            task_id,
            lambda record, now: lifecycle.start(record, now, started_at=started_at),
            if_revision,
            fence,
        )

    def record_progress(
        self,
        task_id: str,
        summary: str,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TaskRecord:
        """Note how far an active task has come; white space in ``summary`` is folded.

        The same summary again writes nothing.  Errors as in :meth:`mark_running`.
        """
        return self._change(
            task_id,
            lambda record, now: lifecycle.progress(record, now, summary),
            if_revision,
            fence,
        )

    def finish(
        self,
        task_id: str,
        status: str,
        *,
        error: str | None = None,
        summary: str | None = None,
        outcome: str | None = None,
        ended_at: int | None = None,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TaskRecord:
        """End a task: succeeded, failed, timed_out, cancelled or lost.

        ``error`` is free text, ``summary`` one line, ``outcome`` succeeded or
        blocked, ``ended_at`` Unix milliseconds (default now).  The end is
        final: only ``succeeded`` may be corrected, to failed, timed_out or
        cancelled.  Repeating what holds writes nothing.  Errors as in
        :meth:`mark_running`.
        """
        return self._change(
            task_id,
            lambda record, now: lifecycle.finish(
                record,
                now,
                status,
                error=error,
                summary=summary,
                outcome=outcome,
                ended_at=ended_at,
            ),
            if_revision,
            fence,
        )

    def mark_lost(
        self,
        task_id: str,
        *,
        error: str | None = None,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TaskRecord:
        """Note that nobody can tell any more what became of an active task.

        A lost task is returned as it is.  Errors as in :meth:`mark_running`.
        """
        return self._change(
            task_id,
            lambda record, now: lifecycle.lose(record, now, error=error),
            if_revision,
            fence,
        )

    def recover(
        self,
        task_id: str,
        status: str = "running",
        *,
        error: str | None = None,
        summary: str | None = None,
        outcome: str | None = None,
        ended_at: int | None = None,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TaskRecord:
        """Correct a lost task to what it really is: active, or how it really ended.

        Facts as in :meth:`finish`, for an ended status only.  Errors as in
        :meth:`mark_running`; a task that is not lost raises
        :class:`InvalidTransition` unless ``status`` already holds.
        """
        return self._change(
            task_id,
            lambda record, now: lifecycle.recover(
                record,
                now,
                status,
                error=error,
                summary=summary,
                outcome=outcome,
                ended_at=ended_at,
            ),
            if_revision,
            fence,
        )

    def cancel(
        self,
        task_id: str,
        reason: str | None = None,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TaskRecord:
        """End an active task as cancelled, ``reason`` kept as its error.

        A cancelled task is returned as it is.  Errors as in :meth:`mark_running`.
        """
        return self._change(
            task_id,
            lambda record, now: lifecycle.cancel(record, now, reason=reason),
            if_revision,
            fence,
        )

    def set_delivery_status(
        self,
        task_id: str,
        status: str,
        *,
        last_notified_event_at: int | None = None,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TaskRecord:
        """Note how far the answer got on its way to whoever asked.

        ``delivered`` also sets ``last_notified_event_at`` (Unix milliseconds)
        to the task's last event, unless another is given.  Allowed after the
        end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._change(
            task_id,
            lambda record, _: lifecycle.deliver(
                record, status, last_notified_event_at=last_notified_event_at
            ),
            if_revision,
            fence,
        )

    def set_notify_policy(
        self, task_id: str, policy: str, *, if_revision: int | None = None, fence: str | None = None
    ) -> TaskRecord:
        """Set what the owner wants to hear of: done_only, state_changes or silent.

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._change(
            task_id, lambda record, _: lifecycle.notify(record, policy), if_revision, fence
        )

    def set_cleanup_after(
        self,
        task_id: str,
        cleanup_after: int | None,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TaskRecord:
        """Set from when on the record may be removed (Unix ms; ``None``: never).

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._change(
            task_id, lambda record, _: lifecycle.retain(record, cleanup_after), if_revision, fence
        )

    def link_flow(
        self,
        task_id: str,
        parent_flow_id: str | None,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TaskRecord:
        """Set the flow that the task belongs to, or ``None`` for none.

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._change(
            task_id,
            lambda record, _: lifecycle.link_flow(record, parent_flow_id),
            if_revision,
            fence,
        )

    def update_metadata(
        self,
        task_id: str,
        changes: Mapping[str, Any],
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TaskRecord:
        """Merge a mapping into the task's metadata, key by key at the top level.

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        copied = plain_metadata(changes)
        return self._change(
            task_id, lambda record, _: lifecycle.merge_metadata(record, copied), if_revision, fence
        )

    def delete(
        self, task_id: str, *, if_revision: int | None = None, fence: str | None = None
    ) -> bool:
        """Remove a task's record; returns whether there was one.

        Its text stays in journal and snapshots until compaction passes it.
        Raises :class:`ConflictError` for another revision than ``if_revision``
        or another lease than that of ``fence``.
        """
        check_expected(task_id, if_revision, fence)
        return self._run(deleting(task_id, if_revision, fence))

    # -- leases -------------------------------------------------------------

    def take_lease(
        self,
        task_id: str,
        lease_s: float = leases.LEASE_S,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> str:
        """Take the lease of an active task for ``lease_s`` seconds; returns its token.

        The token is what :meth:`renew_lease` and the ``fence`` of every verb
        want.  With the ``fence`` of the lease that stands, that one is
        replaced: a way to hand the task to somebody else.  Raises
        :class:`ConflictError` while somebody else's lease runs; otherwise
        errors as in :meth:`mark_running`.
        """
        lease_ms = leases.check_lease(lease_s)
        token = new_task_id()
        taking = changing(
            task_id,
            lambda record, now: leases.take(record, now, token, lease_ms, fence=fence),
            self._now(),
            if_revision,
            fence,
        )
        return self._run(giving(token, taking))

    def renew_lease(
        self,
        task_id: str,
        lease_s: float = leases.LEASE_S,
        *,
        fence: str,
        if_revision: int | None = None,
    ) -> str:
        """Tell that the holder of a lease is alive; returns the token, ``fence``, again.

        It then runs for ``lease_s`` seconds from now.  Written only once less
        than half of that is left, so call it as often as you like.  Raises
        :class:`ConflictError` when the lease is not yours any more and
        :class:`InvalidTransition` when the task has ended: stop working on it.
        """
        check_key("fence", fence)
        lease_ms = leases.check_lease(lease_s)
        renewing = changing(
            task_id,
            lambda record, now: leases.renew(record, now, lease_ms),
            self._now(),
            if_revision,
            fence,
        )
        return self._run(giving(fence, renewing))

    def release_lease(
        self, task_id: str, *, fence: str, if_revision: int | None = None
    ) -> TaskRecord:
        """Give a lease back before it runs out, so that others need not wait for that.

        Errors as in :meth:`renew_lease`, but an ended task's is given back too.
        """
        check_key("fence", fence)
        return self._change(task_id, lambda record, _: leases.release(record), if_revision, fence)

    def run(
        self, run_id: str, *, runtime: str | None = None, session_key: str | None = None
    ) -> RunScope:
        """Address every task of a run with the same verbs.

        ``runtime`` and ``session_key`` (the child's session) narrow it down;
        a run whose tasks belong to several scopes matches nothing.
        """
        check_key("run_id", run_id)
        return RunScope(
            lambda staging: staging.run_scope(run_id, runtime, session_key), self._run, self._now
        )

    def _change(
        self, task_id: str, mutation: Mutation, if_revision: int | None, fence: str | None
    ) -> TaskRecord:
        """Run a pure function over one record and store what comes out."""
        now = check_int("clock", self._store.clock())
        return self._run(changing(task_id, mutation, now, if_revision, fence))
