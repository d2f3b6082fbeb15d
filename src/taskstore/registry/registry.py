"""The registry: the task ledger as the embedding program sees it."""

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
from taskstore.registry.verbs import ChangeRun, RunScope, TaskOperation, TaskRun, Verbs
from taskstore.store.interface import TaskRegistryStore, forked_error
from taskstore.store.opening import default_url, open_store

T = TypeVar("T")
FollowerT = TypeVar("FollowerT", bound=Follower)


class LedgerReader(ABC):
    """The lookups of a registry.  None of them waits for a commit or the store."""

    def __init__(self, store: TaskRegistryStore, hooks: Hooks) -> None:
        self._store = store
        self._hooks = hooks
        self._cache = ReplicatedCache(store, hooks)
        self._committer = Committer(store, self._cache, hooks)
        self._owns_store = False
        self._follower: Follower | None = None
        # Two that come together start one thread, and close() misses none.
        self._following = threading.Lock()
        self._closed = False
        self._opened_by = os.getpid()

    @property
    def store(self) -> TaskRegistryStore:
        """The store underneath."""
        return self._store

    @property
    def hooks(self) -> Hooks:
        """The registry's hooks: ``hooks.add(fn)`` returns a function that removes it."""
        return self._hooks

    @property
    def seq(self) -> int:
        """The last seq mirrored (``int``, 0 before the first)."""
        return self._cache.seq

    # -- looking up ---------------------------------------------------------

    def get(self, task_id: str) -> TaskRecord:
        """Return the task with this id; raises :class:`TaskNotFound`."""
        check_key("task_id", task_id)
        with self._reading() as records:
            return records.require(task_id)

    def find(self, token: str) -> TaskRecord | None:
        """Return the task with this id, or else of this run, or else of this session.

        Of a run's or session's tasks the newest active one, or the newest; or ``None``.
        """
        check_text("token", token, KEY_BYTES)
        with self._reading() as records:
            return records.find(token)

    def find_by_run(self, run_id: str) -> TaskRecord | None:
        """Return the run's newest active task, or its newest, or ``None``."""
        check_text("run_id", run_id, KEY_BYTES)
        with self._reading() as records:
            return records.find_by_run(run_id)

    def list(self, query: TaskQuery | None = None, /, **filters: Any) -> Page:
        """Return the tasks that match, newest first.

        Takes a :class:`TaskQuery` or its arguments: record field names,
        ``since``, ``limit`` (default: no limit) and ``after`` (a cursor).
        Raises :class:`ValidationError` for what is not one of them.
        """
        if query is None:
            query = TaskQuery(**filters)
        elif filters:
            raise ValidationError(next(iter(filters)), "give a query or filters, not both")
        elif not isinstance(query, TaskQuery):
            raise ValidationError("query", f"must be a TaskQuery, not {type(query).__name__}")
        with self._reading() as records:
            return records.page(query, self._cache.seq)

    def active(self) -> Page:
        """Return the tasks that have not ended, newest first."""
        return self.list(status=ACTIVE_STATUSES)

    def children(self, task_id: str) -> Page:
        """Return the tasks whose ``parent_task_id`` is this id, newest first."""
        return self.list(parent_task_id=check_key("task_id", task_id))

    def summary(self) -> Summary:
        """Return how many tasks there are, by status and by runtime."""
        with self._reading() as records:
            return records.summary()

    def _cursor(self, after: int | str) -> int | str | Position:
        """The same cursor, with the history to it where it is the seq that memory is at."""
        position = self._cache.position
        return position if type(after) is int and after == position.seq else after

    @abstractmethod
    def _records(self) -> Lookups:
        """What the calling thread sees: the mirror, or its batch laid over it."""

    @contextmanager
    def _reading(self) -> Iterator[Lookups]:
        """Keep what the calling thread sees as it is while it looks something up."""
        self._check_open()
        if self._cache.interrupted:
            self._reload()
        with self._cache.lock:
            yield self._records()

    def _now(self) -> int:
        now = self._store.clock()
        return now if type(now) is int and 0 <= now <= MAX_INT else check_int("clock", now)

    @abstractmethod
    def _reload(self) -> None:
        """Load memory anew before it is used, after an interrupt, if this thread may wait."""

    def _new_batch(self, outer: Batch | None) -> Batch:
        self._check_open()
        if outer is not None:
            return Batch(outer.staging)
        self._committer.check_writable()
        return Batch(self._cache)

    def _follow(self, kind: type[FollowerT]) -> FollowerT:
        with self._following:
            self._check_open()
            follower = self._follower
            if not isinstance(follower, kind) or not follower.alive:
                journal = history.journal_of(self._store, "follow")
                follower = kind(journal, lambda: self._cache.seq, self._committer.refresh)
                self._follower = follower
            return follower

    def _finish(self) -> None:
        """Commit and deliver what is under way, follow no longer, and close the store if it
        is ours.

        In a forked child nothing: all that is under way is the parent's.
        """
        if self._opened_by != os.getpid():
            return
        follower = self._follower
        if follower is not None:
            follower.ask_to_stop()
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
            raise forked_error(f"the registry over {self._store.location}")


class TaskRegistry(LedgerReader, Verbs[TaskRecord, bool, str]):
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
        super().__init__(store, Hooks(hooks))
        self._local = _Local()
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

    # -- committing -----------------------------------------------------------

    @contextmanager
    def batch(self) -> Iterator[Self]:
        """Make all changes in the ``with`` body one commit: all or nothing.

        For the calling thread only.  Reads in the body see what it has
        staged, and nobody else does; the records returned in it are
        provisional, made over memory as it is.  An exception in the body
        writes nothing of it.  A batch within a batch joins it when it ends well.

        At the end everything is made again over what is stored by then; raises
        what the verbs raise, and :class:`ConflictError` if the body went on
        with a task whose run another process has booked under another id.
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
            self._committer.run(batch.replay)

    def run(
        self, run_id: str, *, runtime: str | None = None, session_key: str | None = None
    ) -> RunScope[list[TaskRecord]]:
        """Address every task of a run with the same verbs.

        ``runtime`` and ``session_key`` (the child's session) narrow it down;
        a run whose tasks belong to several scopes matches nothing.
        """
        return RunScope(TaskRun(run_id, runtime, session_key), self._now, self._commit_run)

    # -- the journal --------------------------------------------------------

    def changes(self, after: int | str = 0, wait: float | None = None) -> Iterator[JournalEntry]:
        """Iterate the journal entries after a seq, or an entry's ``cursor``, and end.

        With ``wait`` it goes on until none has come for so many seconds.
        Raises :class:`CursorExpiredError` for entries that are no longer
        kept, also while it follows, and for a position that the journal does
        not hold: keep a ``cursor`` rather than a seq across restarts, because
        it knows its history when a backup is restored.
        :class:`UnsupportedError` for a store without a journal.
        """
        self._check_open()
        return history.changes(self._store, self._cursor(after), wait, self._check_open)

    def history(self, task_id: str) -> Sequence[JournalEntry]:
        """Return a task's journal entries while they are kept, oldest first.

        Of a deleted task too; none for an id that never was.  Raises
        :class:`UnsupportedError` for a store without a journal.
        """
        self._check_open()
        return history.history(self._store, check_key("task_id", task_id))

    def as_of(self, moment: int | datetime) -> Snapshot:
        """Return every record as it stood at a seq or time.

        ``moment`` is a seq from floor - 1 to the head, Unix milliseconds
        (from 10**11 on) or an aware datetime.  Raises
        :class:`CursorExpiredError` for what lies further back,
        :class:`ValidationError` for a seq beyond the head, and
        :class:`UnsupportedError` for a store without a journal.
        """
        self._check_open()
        return history.as_of(self._store, moment)

    # -- keeping up and the end -------------------------------------------

    def refresh(self) -> int:
        """Bring in what other processes committed; returns the last seq mirrored.

        Hooks hear of it with ``local`` false.  A store without a journal is loaded anew.
        """
        self._check_open()
        # What hooks do about it is no part of a batch that we may be in.
        outer, self._local.batch = self._local.batch, None
        try:
            self._committer.refresh()
        finally:
            self._local.batch = outer
        return self._cache.seq

    def follow(self) -> Follower:
        """Keep up with other processes from a thread in the background.

        What they commit reaches memory, and the hooks with ``local`` false,
        as soon as the store tells of it.  It ends with ``stop()`` of what is
        returned (also a context manager), or when the registry is closed; a
        second call gives the one that follows already.  Raises
        :class:`UnsupportedError` for a store without a journal.
        """
        return self._follow(Follower)

    def close(self) -> None:
        """Close the registry, and the store if :meth:`open` made it.

        Twice is fine: it does what an interrupted one has left, and returns
        when all that was under way is committed and delivered; a hook that
        itself waits for that holds it up for five seconds.  Not to be called
        from a signal handler, which may have interrupted what it would wait
        for: where that is noticed it raises :class:`TaskStoreError`.
        """
        with self._following:
            self._closed = True
        self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TaskRegistry {self._store.location} at seq {self._cache.seq}>"

    # -- within -------------------------------------------------------------

    def _commit(self, operation: Operation[T], /) -> T:
        """Have an operation committed, or add it to the batch that this thread is in."""
        if self._closed or self._opened_by != os.getpid():
            self._check_open()
        batch = self._local.batch
        if batch is None:
            return self._committer.run(operation)
        with self._cache.lock:
            return batch.add(operation)

    _create = _commit
    _change = _commit
    _delete = _commit
    _lease = _commit

    def _commit_run(self, run: TaskRun, plan: Callable[[], TaskOperation]) -> list[TaskRecord]:
        return self._commit(ChangeRun(run, plan()))

    def _reload(self) -> None:
        self._committer.refresh()

    def _records(self) -> Lookups:
        batch = self._local.batch
        return self._cache if batch is None else batch.staging


class _Local(threading.local):
    """What each thread has of its own: the batch that it is in."""

    batch: Batch | None = None
