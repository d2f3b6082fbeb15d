"""The verbs: what can be done to a task, each defined once for everybody who offers it.

A verb checks its arguments and makes an operation of them: a value that says
what is to be done, and does it over a :class:`~taskstore.registry.cache.Staging`.  A
registry has the operation committed, an asyncio registry has that awaited,
and a run scope does the same to every task of a run.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from msgspec import Struct

from taskstore.errors import Conflict, ConflictError, TaskNotFound
from taskstore.model import leases, lifecycle
from taskstore.model.ids import Clock, new_task_id
from taskstore.model.journal import dedup_key
from taskstore.model.lifecycle import Mutation
from taskstore.model.records import ACTIVE_STATUSES, TaskRecord, TaskStatus
from taskstore.model.validation import check_int, check_key
from taskstore.registry.cache import Staging

_P = ParamSpec("_P")
RecordT = TypeVar("RecordT")
"""What a verb gives that changes a task: the record, or what is awaited for it."""
FlagT = TypeVar("FlagT")
"""What a verb gives that answers yes or no."""
TokenT = TypeVar("TokenT")
"""What a verb gives that takes a lease."""
RecordsT = TypeVar("RecordsT")
"""What a verb of a run scope gives: the records that it changed, or what is awaited for them."""

EVERY_STATUS = frozenset(TaskStatus)
LOST = frozenset({TaskStatus.LOST})


# -- operations ---------------------------------------------------------------


class CreateTask(Struct, frozen=True):
    """Store a new record, or fill in the task that has its dedup key."""

    record: TaskRecord

    def __call__(self, staging: Staging) -> TaskRecord:
        """Give the record that stands afterwards."""
        record = self.record
        key = dedup_key(record)
        holder = None if key is None else staging.by_dedup_key(key)
        if holder is None:
            return staging.create(record, key)
        return staging.update(holder, lifecycle.attach(holder, record))


class ChangeTask(Struct, frozen=True):
    """Store what a mutation makes of a task at ``now`` (Unix milliseconds).

    ``if_revision`` and ``fence`` have to hold for the task, where they are
    given.  Of a run, the tasks in ``statuses`` are changed.
    """

    task_id: str
    mutation: Mutation
    now: int
    if_revision: int | None
    fence: str | None
    statuses: AbstractSet[TaskStatus]

    def __call__(self, staging: Staging) -> TaskRecord:
        """Give the record that stands afterwards."""
        record = staging.get(self.task_id)
        if record is None:
            raise TaskNotFound(check_key("task_id", self.task_id))
        return self.of(record, staging)

    def of(self, record: TaskRecord, staging: Staging) -> TaskRecord:
        """Stage what becomes of this record."""
        if self.if_revision is not None or self.fence is not None:
            _check_conditions(record, self.if_revision, self.fence)
        return staging.update(record, self.mutation(record, self.now))


class ChangeLease(Struct, frozen=True):
    """Change the lease of a task; gives its token."""

    change: ChangeTask
    token: str

    def __call__(self, staging: Staging) -> str:
        """Give the token of the lease."""
        self.change(staging)
        return self.token


class DeleteTask(Struct, frozen=True):
    """Delete a task."""

    task_id: str
    if_revision: int | None
    fence: str | None

    def __call__(self, staging: Staging) -> bool:
        """Give whether there was one."""
        record = staging.get(self.task_id)
        if record is None:
            staging.in_doubt = True
            return False
        self.of(record, staging)
        return True

    def of(self, record: TaskRecord, staging: Staging) -> None:
        """Stage the deletion of this record."""
        _check_conditions(record, self.if_revision, self.fence)
        staging.delete(record)


TaskOperation = CreateTask | ChangeTask | DeleteTask
"""What a verb makes of its arguments, but for leases."""


class TaskRun(Struct, frozen=True):
    """Which run: its id, and what narrows it down to one scope."""

    run_id: str
    runtime: str | None
    session_key: str | None

    def tasks(self, staging: Staging) -> list[TaskRecord]:
        """The tasks of the run, oldest first; none when it is unknown or ambiguous."""
        return staging.run_scope(self.run_id, self.runtime, self.session_key)


class ChangeRun(Struct, frozen=True):
    """Do to every task of a run what an operation does to one."""

    run: TaskRun
    each: TaskOperation

    def __call__(self, staging: Staging) -> list[TaskRecord]:
        """Give the records that were changed, or what they were before they were deleted."""
        changed = []
        for record in self.run.tasks(staging):
            if isinstance(self.each, DeleteTask):
                self.each.of(record, staging)
                changed.append(record)
            elif isinstance(self.each, ChangeTask) and record.status in self.each.statuses:
                after = self.each.of(record, staging)
                if after is not record:
                    changed.append(after)
        return changed


def _check_conditions(record: TaskRecord, if_revision: int | None, fence: str | None) -> None:
    """Raise :class:`ConflictError` unless the task is as the caller expects."""
    if if_revision is not None and record.revision != if_revision:
        raise ConflictError([Conflict(record.task_id, if_revision, record.revision)])
    leases.guard(record, fence)


def _check_expected(task_id: str, if_revision: int | None, fence: str | None) -> None:
    """Raise :class:`ValidationError` for what cannot be an id, a revision or a token."""
    check_key("task_id", task_id)
    if if_revision is not None:
        check_int("if_revision", if_revision, 1)
    leases.check_fence(fence)


# -- verbs --------------------------------------------------------------------


class Verbs(ABC, Generic[RecordT, FlagT, TokenT]):
    """What can be done to a task.  A subclass says what it gives: a record, or what is awaited
    for one, or the operation."""

    @abstractmethod
    def _now(self) -> int:
        """The time in Unix milliseconds; raises :class:`ValidationError` if a clock tells none."""

    @abstractmethod
    def _create(self, create: CreateTask, /) -> RecordT:
        """Have a task created."""

    @abstractmethod
    def _change(self, change: ChangeTask, /) -> RecordT:
        """Have a change done."""

    @abstractmethod
    def _delete(self, delete: DeleteTask, /) -> FlagT:
        """Have a task deleted."""

    @abstractmethod
    def _lease(self, lease: ChangeLease, /) -> TokenT:
        """Have a lease changed."""

    def _mutate(
        self,
        task_id: str,
        mutation: Mutation,
        if_revision: int | None,
        fence: str | None,
        statuses: AbstractSet[TaskStatus] = EVERY_STATUS,
    ) -> RecordT:
        if type(task_id) is not str or if_revision is not None or fence is not None:
            _check_expected(task_id, if_revision, fence)
        return self._change(
            ChangeTask(task_id, mutation, self._now(), if_revision, fence, statuses)
        )

    def mark_running(
        self,
        task_id: str,
        *,
        started_at: int | None = None,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """Note that a queued task has started, at ``started_at`` (Unix ms, default now).

        A running task is returned as it is.  Raises :class:`TaskNotFound`,
        :class:`InvalidTransition` for an ended one, and
        :class:`ConflictError` if ``if_revision`` is given and not its
        revision, or ``fence`` and not the token of its lease.
        """
        return self._mutate(
            task_id, lifecycle.start(started_at=started_at), if_revision, fence, ACTIVE_STATUSES
        )

    def record_progress(
        self,
        task_id: str,
        summary: str,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """Note how far an active task has come; white space in ``summary`` is folded.

        The same summary again writes nothing.  Errors as in :meth:`mark_running`.
        """
        return self._mutate(
            task_id, lifecycle.progress(summary), if_revision, fence, ACTIVE_STATUSES
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
    ) -> RecordT:
        """End a task: succeeded, failed, timed_out, cancelled or lost.

        ``error`` is free text, ``summary`` one line, ``outcome`` succeeded or
        blocked, ``ended_at`` Unix milliseconds (default now).  The end is
        final: only ``succeeded`` may be corrected, to failed, timed_out or
        cancelled.  Repeating what holds writes nothing.  Errors as in
        :meth:`mark_running`.
        """
        ending = lifecycle.finish(
            status, error=error, summary=summary, outcome=outcome, ended_at=ended_at
        )
        return self._mutate(task_id, ending, if_revision, fence, ACTIVE_STATUSES)

    def mark_lost(
        self,
        task_id: str,
        *,
        error: str | None = None,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """Note that nobody can tell any more what became of an active task.

        A lost task is returned as it is.  Errors as in :meth:`mark_running`.
        """
        return self._mutate(
            task_id, lifecycle.lose(error=error), if_revision, fence, ACTIVE_STATUSES
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
    ) -> RecordT:
        """Correct a lost task to what it really is: active, or how it really ended.

        Facts as in :meth:`finish`, for an ended status only.  Errors as in
        :meth:`mark_running`; a task that is not lost raises
        :class:`InvalidTransition` unless ``status`` already holds.
        """
        recovering = lifecycle.recover(
            status, error=error, summary=summary, outcome=outcome, ended_at=ended_at
        )
        return self._mutate(task_id, recovering, if_revision, fence, LOST)

    def cancel(
        self,
        task_id: str,
        reason: str | None = None,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """End an active task as cancelled, ``reason`` kept as its error.

        A cancelled task is returned as it is.  Errors as in :meth:`mark_running`.
        """
        return self._mutate(task_id, lifecycle.cancel(reason), if_revision, fence, ACTIVE_STATUSES)

    def set_delivery_status(
        self,
        task_id: str,
        status: str,
        *,
        last_notified_event_at: int | None = None,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """Note how far the answer got on its way to whoever asked.

        ``delivered`` also sets ``last_notified_event_at`` (Unix milliseconds)
        to the task's last event, unless another is given.  Allowed after the
        end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        delivering = lifecycle.deliver(status, last_notified_event_at=last_notified_event_at)
        return self._mutate(task_id, delivering, if_revision, fence)

    def set_notify_policy(
        self, task_id: str, policy: str, *, if_revision: int | None = None, fence: str | None = None
    ) -> RecordT:
        """Set what the owner wants to hear of: done_only, state_changes or silent.

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._mutate(task_id, lifecycle.notify(policy), if_revision, fence)

    def set_cleanup_after(
        self,
        task_id: str,
        cleanup_after: int | None,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """Set from when on the record may be removed (Unix ms; ``None``: never).

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._mutate(task_id, lifecycle.retain(cleanup_after), if_revision, fence)

    def link_flow(
        self,
        task_id: str,
        parent_flow_id: str | None,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """Set the flow that the task belongs to, or ``None`` for none.

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._mutate(task_id, lifecycle.link_flow(parent_flow_id), if_revision, fence)

    def update_metadata(
        self,
        task_id: str,
        changes: Mapping[str, Any],
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """Merge a mapping into the task's metadata, key by key at the top level.

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._mutate(task_id, lifecycle.merge_metadata(changes), if_revision, fence)

    def delete(
        self, task_id: str, *, if_revision: int | None = None, fence: str | None = None
    ) -> FlagT:
        """Remove a task's record; returns whether there was one.

        Its text stays in journal and snapshots until compaction passes it.
        Raises :class:`ConflictError` for another revision than ``if_revision``
        or another lease than that of ``fence``.
        """
        _check_expected(task_id, if_revision, fence)
        return self._delete(DeleteTask(task_id, if_revision, fence))

    def create(
        self,
        /,
        *,
        runtime: str,
        task: str,
        status: str = "queued",
        task_id: str | None = None,
        **fields: Any,
    ) -> RecordT:
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
        record = lifecycle.new_record(
            now=self._now(),
            task_id=new_task_id() if task_id is None else task_id,
            runtime=runtime,
            task=task,
            status=status,
            fields=fields,
        )
        return self._create(CreateTask(record))

    # -- leases -------------------------------------------------------------

    def take_lease(
        self,
        task_id: str,
        lease_s: float = leases.LEASE_S,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TokenT:
        """Take the lease of an active task for ``lease_s`` seconds; returns its token.

        The token is what :meth:`renew_lease` and the ``fence`` of every verb
        want.  With the ``fence`` of the lease that stands, that one is
        replaced: a way to hand the task to somebody else.  Raises
        :class:`ConflictError` while somebody else's lease runs; otherwise
        errors as in :meth:`mark_running`.
        """
        _check_expected(task_id, if_revision, fence)
        token = new_task_id()
        taking = leases.take(token, lease_s, fence=fence)
        change = ChangeTask(task_id, taking, self._now(), if_revision, fence, ACTIVE_STATUSES)
        return self._lease(ChangeLease(change, token))

    def renew_lease(
        self,
        task_id: str,
        lease_s: float = leases.LEASE_S,
        *,
        fence: str,
        if_revision: int | None = None,
    ) -> TokenT:
        """Tell that the holder of a lease is alive; returns the token, ``fence``, again.

        It then runs for ``lease_s`` seconds from now.  Written only once less
        than half of that is left, so call it as often as you like.  Raises
        :class:`ConflictError` when the lease is not yours any more and
        :class:`InvalidTransition` when the task has ended: stop working on it.
        """
        check_key("fence", fence)
        _check_expected(task_id, if_revision, fence)
        renewing = leases.renew(lease_s)
        change = ChangeTask(task_id, renewing, self._now(), if_revision, fence, ACTIVE_STATUSES)
        return self._lease(ChangeLease(change, fence))

    def release_lease(self, task_id: str, *, fence: str, if_revision: int | None = None) -> RecordT:
        """Give a lease back before it runs out, so that others need not wait for that.

        Errors as in :meth:`renew_lease`, but an ended task's is given back too.
        """
        check_key("fence", fence)
        return self._mutate(task_id, leases.release(), if_revision, fence)


class OperationFactory(Verbs[CreateTask | ChangeTask, DeleteTask, ChangeLease]):
    """The verbs, giving the operation that each makes."""

    def __init__(self, now: Clock) -> None:
        self._clock = now

    def _now(self) -> int:
        return self._clock()

    def _create(self, create: CreateTask, /) -> CreateTask:
        return create

    def _change(self, change: ChangeTask, /) -> ChangeTask:
        return change

    def _delete(self, delete: DeleteTask, /) -> DeleteTask:
        return delete

    def _lease(self, lease: ChangeLease, /) -> ChangeLease:
        return lease


# -- runs ---------------------------------------------------------------------


def _for_run(
    verb: Callable[Concatenate[OperationFactory, str, _P], TaskOperation],
) -> Callable[Concatenate[RunScope[RecordsT], _P], RecordsT]:
    """The same verb for every task of a run: without the task's id."""

    @wraps(verb)
    def of_run(self: RunScope[RecordsT], /, *args: _P.args, **kwargs: _P.kwargs) -> RecordsT:
        plan = partial(verb, self._planner, self._run.run_id, *args, **kwargs)
        return self._commit(self._run, plan)

    shown = inspect.signature(verb)
    parameters = [shown.parameters[name] for name in shown.parameters if name != "task_id"]
    of_run.__dict__["__signature__"] = shown.replace(parameters=parameters)
    return of_run


class RunScope(Generic[RecordsT]):
    """The verbs of the registry for every task of a run, as one commit.

    Each gives the records that it changed, oldest first: none when the run
    is unknown or ambiguous.  What a verb does not apply to (mostly tasks that
    have ended) is skipped.  ``fence`` and ``if_revision``, where given, have
    to hold for every other one: else :class:`ConflictError`, and nothing is
    written.  ``delete`` gives the records as they were.
    """

    def __init__(
        self,
        run: TaskRun,
        now: Clock,
        commit: Callable[[TaskRun, Callable[[], TaskOperation]], RecordsT],
    ) -> None:
        """``commit`` makes the plan that it is given, and commits it for the run."""
        check_key("run_id", run.run_id)
        self._run = run
        self._planner = OperationFactory(now)
        self._commit = commit

    mark_running = _for_run(OperationFactory.mark_running)
    record_progress = _for_run(OperationFactory.record_progress)
    finish = _for_run(OperationFactory.finish)
    mark_lost = _for_run(OperationFactory.mark_lost)
    recover = _for_run(OperationFactory.recover)
    cancel = _for_run(OperationFactory.cancel)
    set_delivery_status = _for_run(OperationFactory.set_delivery_status)
    set_notify_policy = _for_run(OperationFactory.set_notify_policy)
    set_cleanup_after = _for_run(OperationFactory.set_cleanup_after)
    link_flow = _for_run(OperationFactory.link_flow)
    update_metadata = _for_run(OperationFactory.update_metadata)
    delete = _for_run(OperationFactory.delete)
