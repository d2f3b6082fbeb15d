"""The verbs on tasks, each defined once for every kind of registry.

A verb checks its arguments and makes an operation: a callable that stages the
change in a :class:`~taskstore.registry.cache.Staging`.  A registry commits the
operation.  An asyncio registry awaits the commit of the operation.  A run scope
applies the operation to every task of a run.
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
"""The result of a verb that changes a task: the record, or a coroutine that returns the record."""
FlagT = TypeVar("FlagT")
"""The result of a verb that returns a boolean."""
TokenT = TypeVar("TokenT")
"""The result of a verb that takes a lease: the token of the lease."""
RecordsT = TypeVar("RecordsT")
"""The result of a run scope's verb: the changed records, or a coroutine that returns the
records."""

ALL_STATUSES = frozenset(TaskStatus)
LOST = frozenset({TaskStatus.LOST})


# -- operations ---------------------------------------------------------------


class CreateTask(Struct, frozen=True):
    """Create a task, or fill empty fields of the task that has the same dedup key.

    The dedup key makes ``create`` idempotent: :func:`taskstore.model.lifecycle.run_digest`
    defines which calls have the same key, and
    :func:`taskstore.model.lifecycle.fill_missing` defines the result of a repeated call.
    """

    record: TaskRecord

    def __call__(self, staging: Staging) -> TaskRecord:
        """Return the record after the change."""
        record = self.record
        key = dedup_key(record)
        existing = None if key is None else staging.by_dedup_key(key)
        if existing is None:
            return staging.create(record, key)
        return staging.update(existing, lifecycle.fill_missing(existing, record))


class ChangeTask(Struct, frozen=True):
    """Apply a mutation to a task; ``now`` is the current time (Unix milliseconds).

    If ``if_revision`` is given, the task must have this revision.  If ``fence`` is given, ``fence``
    must be the token of the task's lease.  A run scope changes only tasks whose status is in
    ``statuses``.
    """

    task_id: str
    mutation: Mutation
    now: int
    if_revision: int | None
    fence: str | None
    statuses: AbstractSet[TaskStatus]

    def __call__(self, staging: Staging) -> TaskRecord:
        """Return the record after the change."""
        record = staging.get(self.task_id)
        if record is None:
            raise TaskNotFound(check_key("task_id", self.task_id))
        return self.stage(record, staging)

    def stage(self, record: TaskRecord, staging: Staging) -> TaskRecord:
        """Stage the mutation of ``record``, and return the new record."""
        if self.if_revision is not None or self.fence is not None:
            _check_preconditions(record, self.if_revision, self.fence)
        return staging.update(record, self.mutation(record, self.now))


class ChangeLease(Struct, frozen=True):
    """Change the lease of a task."""

    change: ChangeTask
    token: str

    def __call__(self, staging: Staging) -> str:
        """Stage the change, and return the token of the lease."""
        self.change(staging)
        return self.token


class DeleteTask(Struct, frozen=True):
    """Delete a task."""

    task_id: str
    if_revision: int | None
    fence: str | None

    def __call__(self, staging: Staging) -> bool:
        """Stage the deletion, and return whether the task existed."""
        record = staging.get(self.task_id)
        if record is None:
            staging.unverified = True
            return False
        self.stage(record, staging)
        return True

    def stage(self, record: TaskRecord, staging: Staging) -> None:
        """Stage the deletion of this record."""
        _check_preconditions(record, self.if_revision, self.fence)
        staging.delete(record)


TaskOperation = CreateTask | ChangeTask | DeleteTask
"""The operations of all verbs except the lease verbs."""


class RunSelector(Struct, frozen=True):
    """The id of a run, and optional filters by which only some tasks of the run are selected."""

    run_id: str
    runtime: str | None
    session_key: str | None

    def tasks(self, staging: Staging) -> list[TaskRecord]:
        """Return the run's tasks, oldest first; an empty list for an unknown or ambiguous run."""
        return staging.run_scope(self.run_id, self.runtime, self.session_key)


class ChangeRun(Struct, frozen=True):
    """Apply an operation to every task of a run."""

    run: RunSelector
    operation: TaskOperation

    def __call__(self, staging: Staging) -> list[TaskRecord]:
        """Return the changed records; for a deletion, the deleted records."""
        changed = []
        for record in self.run.tasks(staging):
            if isinstance(self.operation, DeleteTask):
                self.operation.stage(record, staging)
                changed.append(record)
            elif (
                isinstance(self.operation, ChangeTask) and record.status in self.operation.statuses
            ):
                after = self.operation.stage(record, staging)
                if after is not record:
                    changed.append(after)
        return changed


def _check_preconditions(record: TaskRecord, if_revision: int | None, fence: str | None) -> None:
    """Raise :class:`ConflictError` unless the task has the given revision and lease token."""
    if if_revision is not None and record.revision != if_revision:
        raise ConflictError([Conflict(record.task_id, if_revision, record.revision)])
    leases.require_fence(record, fence)


def _check_arguments(task_id: str, if_revision: int | None, fence: str | None) -> None:
    """Raise :class:`ValidationError` for an invalid id, revision or token."""
    check_key("task_id", task_id)
    if if_revision is not None:
        check_int("if_revision", if_revision, 1)
    leases.validate_fence(fence)


# -- verbs --------------------------------------------------------------------


class Verbs(ABC, Generic[RecordT, FlagT, TokenT]):
    """The verbs on a task.  A subclass decides whether a verb commits its operation and returns
    the result, or returns the operation."""

    @abstractmethod
    def _now(self) -> int:
        """Return the time in Unix milliseconds; an invalid time raises :class:`ValidationError`."""

    @abstractmethod
    def _create(self, create: CreateTask, /) -> RecordT:
        """Commit or return the operation that creates a task."""

    @abstractmethod
    def _change(self, change: ChangeTask, /) -> RecordT:
        """Commit or return the operation that changes a task."""

    @abstractmethod
    def _delete(self, delete: DeleteTask, /) -> FlagT:
        """Commit or return the operation that deletes a task."""

    @abstractmethod
    def _lease(self, lease: ChangeLease, /) -> TokenT:
        """Commit or return the operation that changes a lease."""

    def _mutate(
        self,
        task_id: str,
        mutation: Mutation,
        if_revision: int | None,
        fence: str | None,
        statuses: AbstractSet[TaskStatus] = ALL_STATUSES,
    ) -> RecordT:
        if type(task_id) is not str or if_revision is not None or fence is not None:
            _check_arguments(task_id, if_revision, fence)
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
        """Mark a queued task as started at ``started_at`` (Unix ms, default now).

        A running task is returned unchanged.  Raises :class:`TaskNotFound` for an unknown
        id, :class:`InvalidTransition` for an ended task, and :class:`ConflictError` if
        the task's revision is not ``if_revision``, or its lease token is not ``fence``.
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
        """Set the progress summary of an active task; each sequence of white space becomes one
        space.

        The text is cleaned and cut as in :meth:`finish`.  A repeat of the same summary
        writes nothing.  The errors are as in :meth:`mark_running`.
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
        """End a task with the status succeeded, failed, timed_out, cancelled or lost.

        ``error`` is free text, ``summary`` is one line, ``outcome`` is succeeded or blocked, and
        ``ended_at`` is in Unix milliseconds (default now).  No text is refused for its content: NUL
        and lone surrogates become U+FFFD, and a text that is too long loses its middle, with a mark
        such as ``…[4,096 bytes cut]…``.  This verb cannot change a final status, with one
        exception: the verb can change ``succeeded`` to failed, timed_out or cancelled.  A repeat of
        the same call writes nothing.  The errors are as in :meth:`mark_running`.
        """
        mutation = lifecycle.finish(
            status, error=error, summary=summary, outcome=outcome, ended_at=ended_at
        )
        return self._mutate(task_id, mutation, if_revision, fence, ACTIVE_STATUSES)

    def mark_lost(
        self,
        task_id: str,
        *,
        error: str | None = None,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """Mark an active task as lost: its outcome is unknown.

        ``error`` is as in :meth:`finish`.  A lost task is returned unchanged.  The errors
        are as in :meth:`mark_running`.
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
        """Correct the status of a lost task to an active status or to its actual final status.

        The parameters from ``error`` to ``ended_at`` have the same meaning as in :meth:`finish`.
        These parameters are allowed only if ``status`` is a final status.  The errors are as in
        :meth:`mark_running`.  Raises :class:`InvalidTransition` if the task is not lost, unless the
        task already has ``status``.
        """
        mutation = lifecycle.recover(
            status, error=error, summary=summary, outcome=outcome, ended_at=ended_at
        )
        return self._mutate(task_id, mutation, if_revision, fence, LOST)

    def cancel(
        self,
        task_id: str,
        reason: str | None = None,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """End an active task as cancelled; ``reason`` becomes the error of the task.

        ``reason`` is as ``error`` in :meth:`finish`.  A cancelled task is returned
        unchanged.  The errors are as in :meth:`mark_running`.
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
        """Set the delivery status: whether the requester has received the task's result.

        The status ``delivered`` also sets ``last_notified_event_at`` (Unix milliseconds), by
        default to the time of the task's last event.  The verb is allowed on an ended task too.
        Raises :class:`TaskNotFound` and :class:`ConflictError` as in :meth:`mark_running`.
        """
        mutation = lifecycle.set_delivery_status(
            status, last_notified_event_at=last_notified_event_at
        )
        return self._mutate(task_id, mutation, if_revision, fence)

    def set_notify_policy(
        self, task_id: str, policy: str, *, if_revision: int | None = None, fence: str | None = None
    ) -> RecordT:
        """Set the notify policy, that is, when the owner is notified: ``done_only``,
        ``state_changes`` or ``silent``.

        If the task has an owner or a requester, ``silent`` changes the delivery status from
        ``pending`` to ``not_applicable``, and a change from ``silent`` to another policy
        changes ``not_applicable`` to ``pending``.

        The verb is allowed on an ended task too.  Raises :class:`TaskNotFound` and
        :class:`ConflictError` as in :meth:`mark_running`.
        """
        return self._mutate(task_id, lifecycle.set_notify_policy(policy), if_revision, fence)

    def set_cleanup_after(
        self,
        task_id: str,
        cleanup_after: int | None,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """Set the time after which removal of the record is allowed (Unix ms; ``None``: never).

        The verb is allowed on an ended task too.  Raises :class:`TaskNotFound` and
        :class:`ConflictError` as in :meth:`mark_running`.
        """
        return self._mutate(task_id, lifecycle.set_cleanup_after(cleanup_after), if_revision, fence)

    def link_flow(
        self,
        task_id: str,
        parent_flow_id: str | None,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> RecordT:
        """Set the flow to which the task belongs; ``None`` means no flow.

        The verb is allowed on an ended task too.  Raises :class:`TaskNotFound` and
        :class:`ConflictError` as in :meth:`mark_running`.
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

        The verb is allowed on an ended task too.  Raises :class:`TaskNotFound` and
        :class:`ConflictError` as in :meth:`mark_running`.
        """
        return self._mutate(task_id, lifecycle.merge_metadata(changes), if_revision, fence)

    def delete(
        self, task_id: str, *, if_revision: int | None = None, fence: str | None = None
    ) -> FlagT:
        """Delete a task's record; returns whether the record existed.

        The record's text stays in the journal and the snapshots until a compaction
        removes the text.  Raises :class:`ConflictError` if the task's revision is
        not ``if_revision``, or its lease token is not ``fence``.
        """
        _check_arguments(task_id, if_revision, fence)
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
        """Create a task, or return the existing task of the same run.

        ``runtime`` is a lower-case token (``subagent``, ``acp``, ``cron``,
        ``cli`` or your own), ``task`` is the text of the request, and ``status`` is
        queued or running.  ``fields`` are further record fields: ``metadata`` is a
        mapping, and times are Unix milliseconds.

        Without ``run_id`` every call creates a task.  With ``run_id``, a repeated call with
        the same (run_id, runtime, scope kind, owner, child session, flow, label, task)
        returns the first task and fills its empty fields; an ended task is returned
        unchanged.  This rule also applies to calls in different processes.

        Raises :class:`ValidationError` for an invalid argument, and
        :class:`ConflictError` if ``task_id`` is or was in use.
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
        lease_s: float = leases.DEFAULT_LEASE_S,
        *,
        if_revision: int | None = None,
        fence: str | None = None,
    ) -> TokenT:
        """Take the lease of an active task for ``lease_s`` seconds; returns the lease token.

        Pass this token as ``fence`` to :meth:`renew_lease` and to the other verbs.  If ``fence`` is
        the token of the current lease, the new lease replaces the current lease.  In this way a
        caller can give the task to another worker.  Raises :class:`ConflictError` if the task has
        another lease that has not expired.  Other errors are as in :meth:`mark_running`.
        """
        _check_arguments(task_id, if_revision, fence)
        token = new_task_id()
        mutation = leases.take(token, lease_s, fence=fence)
        change = ChangeTask(task_id, mutation, self._now(), if_revision, fence, ACTIVE_STATUSES)
        return self._lease(ChangeLease(change, token))

    def renew_lease(
        self,
        task_id: str,
        lease_s: float = leases.DEFAULT_LEASE_S,
        *,
        fence: str,
        if_revision: int | None = None,
    ) -> TokenT:
        """Extend a lease to ``lease_s`` seconds from now; return the lease token (``fence``).

        The method writes only if less than half of ``lease_s`` is left, so frequent calls
        are cheap.  Raises :class:`ConflictError` if the lease has another token, and
        :class:`InvalidTransition` if the task has ended.  After one of these errors the
        worker must stop work on the task.
        """
        check_key("fence", fence)
        _check_arguments(task_id, if_revision, fence)
        mutation = leases.renew(lease_s)
        change = ChangeTask(task_id, mutation, self._now(), if_revision, fence, ACTIVE_STATUSES)
        return self._lease(ChangeLease(change, fence))

    def release_lease(self, task_id: str, *, fence: str, if_revision: int | None = None) -> RecordT:
        """Release a lease before it expires, so that other workers do not have to wait.

        The errors are as in :meth:`renew_lease`, but the lease of an ended task can be
        released too.
        """
        check_key("fence", fence)
        return self._mutate(task_id, leases.release(), if_revision, fence)


class OperationFactory(Verbs[CreateTask | ChangeTask, DeleteTask, ChangeLease]):
    """The verbs on a task; each verb returns its operation and commits nothing."""

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


def _run_verb(
    verb: Callable[Concatenate[OperationFactory, str, _P], TaskOperation],
) -> Callable[Concatenate[RunScope[RecordsT], _P], RecordsT]:
    """Return a method of :class:`RunScope` for a verb, without the parameter ``task_id``."""

    @wraps(verb)
    def call(self: RunScope[RecordsT], /, *args: _P.args, **kwargs: _P.kwargs) -> RecordsT:
        make_operation = partial(verb, self._factory, self._run.run_id, *args, **kwargs)
        return self._commit(self._run, make_operation)

    signature = inspect.signature(verb)
    parameters = [signature.parameters[name] for name in signature.parameters if name != "task_id"]
    call.__dict__["__signature__"] = signature.replace(parameters=parameters)
    return call


class RunScope(Generic[RecordsT]):
    """The verbs of the registry; each verb changes every task of a run in one commit.

    Each verb returns the changed records, oldest first, or no records if the run is unknown or
    ambiguous.  A verb skips each task with a status that does not allow the verb; most skipped
    tasks have ended.  The tasks that are not skipped must have the given ``fence`` and
    ``if_revision``; otherwise the verb raises :class:`ConflictError` and writes nothing.
    ``delete`` returns the deleted records.
    """

    def __init__(
        self,
        run: RunSelector,
        now: Clock,
        commit: Callable[[RunSelector, Callable[[], TaskOperation]], RecordsT],
    ) -> None:
        """``commit`` is called as ``commit(run, make_operation)``; it must call
        ``make_operation()`` and commit the returned operation for all tasks of the run."""
        check_key("run_id", run.run_id)
        self._run = run
        self._factory = OperationFactory(now)
        self._commit = commit

    mark_running = _run_verb(OperationFactory.mark_running)
    record_progress = _run_verb(OperationFactory.record_progress)
    finish = _run_verb(OperationFactory.finish)
    mark_lost = _run_verb(OperationFactory.mark_lost)
    recover = _run_verb(OperationFactory.recover)
    cancel = _run_verb(OperationFactory.cancel)
    set_delivery_status = _run_verb(OperationFactory.set_delivery_status)
    set_notify_policy = _run_verb(OperationFactory.set_notify_policy)
    set_cleanup_after = _run_verb(OperationFactory.set_cleanup_after)
    link_flow = _run_verb(OperationFactory.link_flow)
    update_metadata = _run_verb(OperationFactory.update_metadata)
    delete = _run_verb(OperationFactory.delete)
