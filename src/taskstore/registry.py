"""The registry: the task ledger as the embedding program sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from taskstore import lifecycle
from taskstore.backends import default_url, open_store
from taskstore.clock import Clock, new_task_id
from taskstore.committer import Batch, Committer
from taskstore.errors import (
    Conflict,
    ConflictError,
    ReadOnlyError,
)
from taskstore.groupcommit import Operation
from taskstore.hooks import Hook, Hooks
from taskstore.mirror import Lookups, Staging, booking_of
from taskstore.reader import LedgerReader
from taskstore.records import TaskRecord, check_int, check_key
from taskstore.runs import RunScope
from taskstore.store import TaskRegistryStore

T = TypeVar("T")

Mutation = Callable[[TaskRecord, int], TaskRecord]
"""From a record and now (Unix milliseconds) to what should stand: pure."""


class TaskRegistry(LedgerReader):
    """Every task of one ledger: the rules of their lives, on top of one store.

    Safe to use from several threads.  A change is committed by the store
    first, then seen in memory, then told to the hooks; one that fails
    changes nothing anywhere.  Lookups are answered from memory.

    Made over a ``store``, it leaves closing that to whoever made it;
    :meth:`open` makes one and closes it.  ``hooks`` are callables that take
    an event, ``clock`` returns Unix milliseconds.
    """

    def __init__(
        self,
        store: TaskRegistryStore,
        *,
        hooks: Iterable[Hook] = (),
        clock: Clock | None = None,
    ) -> None:
        if clock is not None:
            store.clock = clock
        super().__init__(store)
        self._hooks = Hooks(hooks)
        self._local = threading.local()
        self._owns_store = False
        self._committer = Committer(store, self._mirror, self._hooks)

    @classmethod
    def open(
        cls,
        url: str | None = None,
        *,
        hooks: Iterable[Hook] = (),
        durability: str = "full",
        migrate: str = "auto",
        read_only: bool = False,
        clock: Clock | None = None,
        **options: Any,
    ) -> Self:
        """Open the ledger at a URL, such as ``sqlite:///tasks.db``, and load it.

        ``url=None`` is an SQLite file in the platform's user state directory.
        The other arguments and errors are those of :func:`taskstore.open_store`
        and of the constructor.
        """
        store = open_store(
            default_url() if url is None else url,
            durability=durability,
            migrate=migrate,
            read_only=read_only,
            **options,
        )
        try:
            registry = cls(store, hooks=hooks, clock=clock)
        except BaseException:
            store.close()
            raise
        registry._owns_store = True
        return registry

    @property
    def hooks(self) -> Hooks:
        """The registry's hooks: ``hooks.add(fn)`` returns a function that removes it."""
        return self._hooks

    # -- creating and changing ----------------------------------------------

    def create(
        self,
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
        record = lifecycle.new_record(
            now=self._now(),
            task_id=new_task_id() if task_id is None else task_id,
            runtime=runtime,
            task=task,
            status=status,
            fields=fields,
        )
        booking = booking_of(record)

        def operation(staging: Staging) -> TaskRecord:
            holder = None if booking is None else staging.booked(booking)
            if holder is None:
                return staging.create(record)
            standing = staging.require(holder)
            return staging.update(standing, lifecycle.attach(standing, record))

        return self._run(operation)

    def mark_running(
        self, task_id: str, *, started_at: int | None = None, if_revision: int | None = None
    ) -> TaskRecord:
        """Note that a queued task has started, at ``started_at`` (Unix ms, default now).

        A running task is returned as it is.  Raises :class:`TaskNotFound`,
        :class:`InvalidTransition` for an ended one, and
        :class:`ConflictError` if ``if_revision`` is given and not its revision.
        """
        return self._change(
            task_id,
            lambda record, now: lifecycle.start(record, now, started_at=started_at),
            if_revision,
        )

    def record_progress(
        self, task_id: str, summary: str, *, if_revision: int | None = None
    ) -> TaskRecord:
        """Note how far an active task has come; white space in ``summary`` is folded.

        The same summary again writes nothing.  Errors as in :meth:`mark_running`.
        """
        return self._change(
            task_id, lambda record, now: lifecycle.progress(record, now, summary), if_revision
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
        )

    def mark_lost(
        self, task_id: str, *, error: str | None = None, if_revision: int | None = None
    ) -> TaskRecord:
        """Note that nobody can tell any more what became of an active task.

        A lost task is returned as it is.  Errors as in :meth:`mark_running`.
        """
        return self._change(
            task_id, lambda record, now: lifecycle.lose(record, now, error=error), if_revision
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
        )

    def cancel(
        self, task_id: str, reason: str | None = None, *, if_revision: int | None = None
    ) -> TaskRecord:
        """End an active task as cancelled, ``reason`` kept as its error.

        A cancelled task is returned as it is.  Errors as in :meth:`mark_running`.
        """
        return self._change(
            task_id, lambda record, now: lifecycle.cancel(record, now, reason=reason), if_revision
        )

    def set_delivery_status(
        self,
        task_id: str,
        status: str,
        *,
        last_notified_event_at: int | None = None,
        if_revision: int | None = None,
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
        )

    def set_notify_policy(
        self, task_id: str, policy: str, *, if_revision: int | None = None
    ) -> TaskRecord:
        """Set what the owner wants to hear of: done_only, state_changes or silent.

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._change(
            task_id, lambda record, _: lifecycle.notify(record, policy), if_revision
        )

    def set_cleanup_after(
        self, task_id: str, cleanup_after: int | None, *, if_revision: int | None = None
    ) -> TaskRecord:
        """Set from when on the record may be removed (Unix ms; ``None``: never).

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._change(
            task_id, lambda record, _: lifecycle.retain(record, cleanup_after), if_revision
        )

    def link_flow(
        self, task_id: str, parent_flow_id: str | None, *, if_revision: int | None = None
    ) -> TaskRecord:
        """Set the flow that the task belongs to, or ``None`` for none.

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._change(
            task_id, lambda record, _: lifecycle.link_flow(record, parent_flow_id), if_revision
        )

    def update_metadata(
        self, task_id: str, changes: Mapping[str, Any], *, if_revision: int | None = None
    ) -> TaskRecord:
        """Merge a mapping into the task's metadata, key by key at the top level.

        Allowed after the end.  Raises :class:`TaskNotFound` and :class:`ConflictError`.
        """
        return self._change(
            task_id, lambda record, _: lifecycle.merge_metadata(record, changes), if_revision
        )

    def delete(self, task_id: str, *, if_revision: int | None = None) -> bool:
        """Remove a task's record; returns whether there was one.

        Its text stays in journal and snapshots until compaction passes it.
        Raises :class:`ConflictError` for another revision than ``if_revision``.
        """
        check_key("task_id", task_id)
        _check_revision(if_revision)
        return self._run(lambda staging: _delete(staging, task_id, if_revision))

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

    @contextmanager
    def batch(self) -> Iterator[Self]:
        """Make all changes in the ``with`` body one commit: all or nothing.

        For the calling thread only.  Reads in the body see what it has
        staged, and nobody else does; the records returned in it are
        provisional.  An exception in the body writes nothing.  A batch
        within a batch joins it.
        """
        self._check_open()
        if self._batch is not None:
            yield self
            return
        if self._store.read_only:
            raise ReadOnlyError(f"{self._store.location} was opened read-only")
        batch = Batch(self._mirror)
        self._local.batch = batch
        try:
            yield self
        finally:
            self._local.batch = None
        if batch.operations:
            self._committer.run(batch.replay)

    # -- keeping up and the end -------------------------------------------

    def refresh(self) -> int:
        """Bring in what other processes committed; returns the last seq mirrored.

        Hooks hear of it with ``local`` false.  A store without a journal is loaded anew.
        """
        self._check_open()
        self._committer.refresh()
        return self._mirror.seq

    def close(self) -> None:
        """Close the registry, and the store if :meth:`open` made it.  Twice is fine."""
        if not self._closed:
            self._closed = True
            self._committer.close()
            if self._owns_store:
                self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TaskRegistry {self._store.location} at seq {self._mirror.seq}>"

    # -- within -------------------------------------------------------------

    @property
    def _batch(self) -> Batch | None:
        """The batch that the calling thread is in."""
        batch: Batch | None = getattr(self._local, "batch", None)
        return batch

    def _now(self) -> int:
        return self._store.clock()

    def _run(self, operation: Operation[T]) -> T:
        self._check_open()
        batch = self._batch
        if batch is not None:
            with self._mirror.lock:
                return batch.add(operation)
        return self._committer.run(operation)

    def _records(self) -> Lookups:
        batch = self._batch
        return self._mirror if batch is None else batch.staging

    def _change(self, task_id: str, mutation: Mutation, if_revision: int | None) -> TaskRecord:
        """Run a pure function over one record and store what comes out."""
        check_key("task_id", task_id)
        _check_revision(if_revision)
        now = self._now()

        def operation(staging: Staging) -> TaskRecord:
            record = staging.require(task_id)
            _expect(record, if_revision)
            return staging.update(record, mutation(record, now))

        return self._run(operation)


def _expect(record: TaskRecord, revision: int | None) -> None:
    if revision is not None and record.revision != revision:
        raise ConflictError([Conflict(record.task_id, revision, record.revision)])


def _check_revision(revision: int | None) -> None:
    if revision is not None:
        check_int("if_revision", revision, 1)


def _delete(staging: Staging, task_id: str, if_revision: int | None) -> bool:
    record = staging.get(task_id)
    if record is None:
        return False
    _expect(record, if_revision)
    staging.delete(record)
    return True
