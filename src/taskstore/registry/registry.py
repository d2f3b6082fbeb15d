"""The registry: the task ledger's interface for the embedding program."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Self, TypeVar

from taskstore.errors import StoreClosedError, ValidationError
from taskstore.model.ids import Clock
from taskstore.model.journal import JournalEntry, Position, Snapshot
from taskstore.model.query import Page, Summary, TaskQuery
from taskstore.model.records import ACTIVE_STATUSES, KEY_BYTES, MAX_INT, TaskRecord
from taskstore.model.validation import check_int, check_key, check_text
from taskstore.registry import history
from taskstore.registry.cache import Lookups, ReplicatedCache
from taskstore.registry.commit import Batch, Committer, Operation
from taskstore.registry.follower import Follower
from taskstore.registry.hooks import Hook, Hooks
from taskstore.registry.verbs import ChangeRun, RunScope, RunSelector, TaskOperation, Verbs
from taskstore.store.interface import TaskRegistryStore, used_after_fork_error
from taskstore.store.opening import default_url, open_store

T = TypeVar("T")
FollowerT = TypeVar("FollowerT", bound=Follower)


class RegistryBase(ABC):
    """The lookups that every kind of registry has; no lookup waits for a commit or for the
    store."""

    def __init__(self, store: TaskRegistryStore, hooks: Hooks) -> None:
        self._store = store
        self._hooks = hooks
        self._cache = ReplicatedCache(store, hooks)
        self._committer = Committer(store, self._cache, hooks)
        self._owns_store = False
        self._follower: Follower | None = None
        # This lock ensures that concurrent calls start one follower, and that close() stops it.
        self._follower_lock = threading.Lock()
        self._closed = False
        self._opened_by = os.getpid()

    @property
    def store(self) -> TaskRegistryStore:
        """The store of this registry."""
        return self._store

    @property
    def hooks(self) -> Hooks:
        """The registry's hooks: ``hooks.add(hook)`` returns a function that removes the hook."""
        return self._hooks

    @property
    def seq(self) -> int:
        """The seq of the last entry in memory (``int``, 0 before the first entry)."""
        return self._cache.seq

    # -- lookups ------------------------------------------------------------

    def get(self, task_id: str) -> TaskRecord:
        """Return the task with this id; raise :class:`TaskNotFound` if there is no such task."""
        check_key("task_id", task_id)
        with self._locked_lookups() as lookups:
            return lookups.require(task_id)

    def find(self, reference: str) -> TaskRecord | None:
        """Return the task with this id, else a task of this run, else a task of this session.

        If a run or session has several tasks, returns the newest active task, else
        the newest task.  Returns ``None`` if no task matches.
        """
        check_text("reference", reference, KEY_BYTES)
        with self._locked_lookups() as lookups:
            return lookups.find(reference)

    def find_by_run(self, run_id: str) -> TaskRecord | None:
        """Return the newest active task of a run, else the run's newest task, else ``None``."""
        check_text("run_id", run_id, KEY_BYTES)
        with self._locked_lookups() as lookups:
            return lookups.find_by_run(run_id)

    def list(self, query: TaskQuery | None = None, /, **filters: Any) -> Page:
        """Return the tasks that match, newest first.

        Takes a :class:`TaskQuery` or its arguments: record field names,
        ``since``, ``limit`` (default: no limit) and ``after`` (a cursor).
        Raises :class:`ValidationError` for any other argument.
        """
        if query is None:
            query = TaskQuery(**filters)
        elif filters:
            raise ValidationError(next(iter(filters)), "pass a query or filters, not both")
        elif not isinstance(query, TaskQuery):
            raise ValidationError("query", f"must be a TaskQuery, not {type(query).__name__}")
        with self._locked_lookups() as lookups:
            return lookups.page(query, self._cache.seq)

    def active(self) -> Page:
        """Return the tasks that have not ended, newest first."""
        return self.list(status=ACTIVE_STATUSES)

    def children(self, task_id: str) -> Page:
        """Return the tasks whose ``parent_task_id`` is this id, newest first."""
        return self.list(parent_task_id=check_key("task_id", task_id))

    def summary(self) -> Summary:
        """Return the number of tasks, by status and by runtime."""
        with self._locked_lookups() as lookups:
            return lookups.summary()

    def _with_commit_id(self, after: int | str) -> int | str | Position:
        """If ``after`` is the seq of the last entry in memory, return the position of this entry,
        else ``after``."""
        position = self._cache.position
        return position if type(after) is int and after == position.seq else after

    @abstractmethod
    def _lookups(self) -> Lookups:
        """Return the object that answers lookups of the caller.  If the caller has an open batch,
        this object is the staging of the batch, otherwise the record cache."""

    @contextmanager
    def _locked_lookups(self) -> Iterator[Lookups]:
        """Lock the cache during the ``with`` body; yield the object that answers lookups of the
        caller."""
        self._check_open()
        if self._cache.interrupted:
            self._reload()
        with self._cache.lock:
            yield self._lookups()

    def _now(self) -> int:
        now = self._store.clock()
        return now if type(now) is int and 0 <= now <= MAX_INT else check_int("clock", now)

    @abstractmethod
    def _reload(self) -> None:
        """Reload the record cache after an interrupt, if this thread is allowed to wait for the
        store."""

    def _new_batch(self, outer: Batch | None) -> Batch:
        self._check_open()
        if outer is not None:
            return Batch(outer.staging)
        self._committer.check_writable()
        return Batch(self._cache)

    def _start_follower(self, kind: type[FollowerT]) -> FollowerT:
        with self._follower_lock:
            self._check_open()
            follower = self._follower
            if not isinstance(follower, kind) or not follower.alive:
                journal = history.require_journal(self._store, "follow")
                follower = kind(journal, lambda: self._cache.seq, self._committer.refresh)
                self._follower = follower
            return follower

    def _shut_down(self) -> None:
        """Finish commits and events in progress, stop the follower, and close the store if the
        registry opened the store.

        In a forked child this method does nothing, because all work in progress belongs to the
        parent.
        """
        if self._opened_by != os.getpid():
            return
        follower = self._follower
        if follower is not None:
            follower.request_stop()
        try:
            self._committer.close()
            try:
                self._hooks.drain()
            finally:
                if self._owns_store:
                    self._store.close()
        finally:
            if follower is not None:
                follower.wait()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError(f"the registry over {self._store.location} is closed")
        if self._opened_by != os.getpid():
            raise used_after_fork_error(f"the registry over {self._store.location}")


class TaskRegistry(RegistryBase, Verbs[TaskRecord, bool, str]):
    """The tasks of one ledger, with lifecycle rules, lookups and hooks, on top of one store.

    Several threads can use one registry.  First the store commits a change, then the records in
    memory are updated, then the hooks are called.  A change that fails has no effect.  Lookups read
    from memory.

    The constructor takes a ``store`` that the caller closes; :meth:`open` opens a store that the
    registry closes.  ``hooks`` are callables that take an event, and ``clock`` is a callable that
    returns Unix milliseconds.
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
        super().__init__(store, Hooks(hooks))
        self._local = _ThreadState()
        self._committer.load()

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
        """Open the ledger at a URL, such as ``sqlite:///tasks.db``, and load its records.

        ``url=None`` opens an SQLite file in the platform's user state directory.
        The other arguments and the errors are those of :func:`taskstore.open_store` and
        the constructor.
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

    # -- committing -----------------------------------------------------------

    @contextmanager
    def batch(self) -> Iterator[Self]:
        """Commit all changes of the ``with`` body as one commit, or none of them.

        A batch belongs to the calling thread: only reads of this thread see the staged changes.
        The records that verbs return in the ``with`` body are provisional: they are computed from
        the records in memory.  If the ``with`` body raises an exception, nothing is written.  An
        inner batch that ends without an error becomes part of the outer batch.

        At the end of the ``with`` body the verbs in the body run again over the current
        records, and can raise their errors.  Raises :class:`ConflictError` if both
        conditions are true: (a) the body created a task, and then used its id; (b) another
        process had already created the task of the same run, under another id.
        """
        outer = self._local.batch
        self._local.batch = batch = self._new_batch(outer)
        try:
            yield self
        finally:
            batch.closed = True
            self._local.batch = outer
        if outer is not None:
            outer.join(batch)
        elif batch.operations:
            self._committer.commit(batch.replay)

    def run(
        self, run_id: str, *, runtime: str | None = None, session_key: str | None = None
    ) -> RunScope[list[TaskRecord]]:
        """Return the verbs for all tasks of a run.

        If ``runtime`` or ``session_key`` (the child's session) is given, the verbs change only the
        matching tasks of the run.  If the selected tasks differ in runtime, scope kind, owner or
        child session, the verbs change no task.
        """
        return RunScope(RunSelector(run_id, runtime, session_key), self._now, self._commit_run)

    # -- the journal --------------------------------------------------------

    def changes(self, after: int | str = 0, wait: float | None = None) -> Iterator[JournalEntry]:
        """Yield the journal entries after ``after``, up to the head.  ``after`` is a seq, or the
        ``cursor`` of an entry.

        With ``wait``, the iterator waits for new entries, and ends after ``wait`` seconds
        without an entry.  Raises :class:`CursorExpiredError`, even during a wait, if the
        next entries were trimmed, or if the journal does not contain the position of
        ``after``.  A program that restarts must keep a ``cursor`` instead of a seq: with a
        seq, this method cannot detect that a backup was restored.  Raises
        :class:`UnsupportedError` for a store without a journal.
        """
        self._check_open()
        return history.changes(self._store, self._with_commit_id(after), wait, self._check_open)

    def history(self, task_id: str) -> Sequence[JournalEntry]:
        """Return the retained journal entries of a task, oldest first.

        A deleted task has entries too; an unknown id has no entries.  Raises
        :class:`UnsupportedError` for a store without a journal.
        """
        self._check_open()
        return history.history(self._store, check_key("task_id", task_id))

    def as_of(self, moment: int | datetime) -> Snapshot:
        """Return all records as of a seq or time.

        ``moment`` is a seq from floor - 1 to the head, a time in Unix milliseconds (10**11 or
        later), or an aware datetime.  Raises :class:`CursorExpiredError` for a seq below floor - 1
        or a time before the commit at floor - 1, :class:`ValidationError` for a seq beyond the
        head, and :class:`UnsupportedError` for a store without a journal.
        """
        self._check_open()
        return history.as_of(self._store, moment)

    # -- other processes, and closing -------------------------------------

    def refresh(self) -> int:
        """Apply the commits of other processes to the records in memory; return the last seq in
        memory.

        Hooks receive the events of the applied commits with ``local`` false.  If the store
        has no journal, all records are loaded anew.
        """
        self._check_open()
        # Changes that hooks make are not part of this thread's batch.
        outer, self._local.batch = self._local.batch, None
        try:
            self._committer.refresh()
        finally:
            self._local.batch = outer
        return self._cache.seq

    def follow(self) -> Follower:
        """Start a background thread that applies the commits of other processes.

        The follower applies a commit to memory as soon as the store reports the commit, and calls
        the hooks with ``local`` false.  The follower ends after a call of its ``stop()``, at the
        end of a ``with`` block over the follower, or when the registry is closed.  A second call of
        ``follow`` returns the running follower.  Until it ends, the follower keeps the registry
        and the store open, even if the program drops both.  Raises :class:`UnsupportedError` for a
        store without a journal.
        """
        return self._start_follower(Follower)

    def close(self) -> None:
        """Close the registry, and the store if :meth:`open` opened the store.

        Returns when all changes in progress are committed and their events are delivered.  Repeated
        calls are allowed; a repeated call completes an interrupted close.  If a hook waits for
        ``close``, the call of ``close`` takes up to five seconds longer.  A signal handler must not
        call ``close``, because ``close`` can wait for the call that the handler interrupted.  If
        ``close`` detects that it interrupted another call, it raises :class:`TaskStoreError`.
        """
        with self._follower_lock:
            self._closed = True
        self._shut_down()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TaskRegistry {self._store.location} at seq {self._cache.seq}>"

    # -- internal -----------------------------------------------------------

    def _commit(self, operation: Operation[T], /) -> T:
        """Commit an operation, or add it to the batch of this thread."""
        if self._closed or self._opened_by != os.getpid():
            self._check_open()
        batch = self._local.batch
        if batch is None:
            return self._committer.commit(operation)
        with self._cache.lock:
            return batch.add(operation)

    _create = _commit
    _change = _commit
    _delete = _commit
    _lease = _commit

    def _commit_run(
        self, run: RunSelector, make_operation: Callable[[], TaskOperation]
    ) -> list[TaskRecord]:
        return self._commit(ChangeRun(run, make_operation()))

    def _reload(self) -> None:
        self._committer.refresh()

    def _lookups(self) -> Lookups:
        batch = self._local.batch
        return self._cache if batch is None else batch.staging


class _ThreadState(threading.local):
    """The state of each thread: the open batch, or ``None``."""

    batch: Batch | None = None
