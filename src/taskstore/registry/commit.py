"""The commit protocol: stage, apply, publish to the cache, deliver events.

If no commit is in progress, the calling thread commits its own request and wakes no other
thread.  While a commit is in progress, the requests of other callers wait in a queue.
After the commit, a writer thread commits all queued requests as one group.

An operation is a function that uses a :class:`~taskstore.registry.cache.Staging`: it looks records
up and stages changes.  An operation keeps no data between two runs.  After a conflict, the
committer can therefore run the operation again over newer records.  All operations of a batch are
committed as one operation.

If the outcome of a commit is unknown, the caller gets an :class:`OutcomeUnknownError`, and all
records are loaded into memory anew before the next commit.  If the connection is lost during a
commit, the SQL store first reads back whether the commit was stored (see
``stores/sql/transactions.py``).

If a caller is interrupted, for example by Ctrl-C, the caller's change is committed
completely or not at all, and the record cache is loaded anew before the next use of the
cache.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from msgspec import Struct

from taskstore.errors import (
    Conflict,
    ConflictError,
    CursorExpiredError,
    InvalidTransition,
    OutcomeUnknownError,
    ReadOnlyError,
    StoreBusyError,
    StoreClosedError,
    TaskNotFound,
    TaskStoreError,
)
from taskstore.model.journal import ChangeSet, Put
from taskstore.model.records import TaskRecord
from taskstore.registry.cache import Lookups, ReplicatedCache, Staging
from taskstore.registry.hooks import Hooks
from taskstore.store.interface import SupportsExclusive, SupportsJournal, TaskRegistryStore

T = TypeVar("T")

MAX_ATTEMPTS = 64
"""The maximum number of attempts to commit one request if other writers commit first."""

MAX_GROUP_ATTEMPTS = 4
"""The maximum number of attempts to commit a group of requests before each request is committed
alone."""

CONTENTION_S = 1.0
"""How long after a conflict each commit takes the store's exclusive lock, in seconds."""

MIN_BACKOFF_S = 0.0005
MAX_BACKOFF_S = 0.01
"""The maximum backoff after a conflict, in seconds, on a store without
:class:`~taskstore.SupportsExclusive`.  The backoff begins at ``MIN_BACKOFF_S`` and doubles with
each attempt up to this maximum."""

IDLE_TIMEOUT_S = 5.0
"""How long the writer thread waits for another request before it ends, in seconds."""

INTERRUPT_TIMEOUT_S = 1.0
"""How long an interrupted caller waits for a commit that has started, in seconds."""

Operation = Callable[[Staging], T]
"""A function that looks records up, stages changes, and returns the result of the call."""

_task_id_of = attrgetter("task_id")
_NO_CONTENTION: AbstractContextManager[AbstractSet[str]] = nullcontext(frozenset())


class Request(Struct, Generic[T]):
    """The operation of one caller, and its result or error.  The commit sets the result or
    error."""

    operation: Operation[T]
    result: Any = None
    error: BaseException | None = None

    def outcome(self) -> T:
        """Return the result of the operation, or raise its error."""
        if self.error is not None:
            raise self.error
        result: T = self.result
        return result


class QueuedRequest(Request[T], Generic[T], kw_only=True):
    """A request that waits for the writer thread.

    The writer thread calls ``on_done`` when the result or error is set.
    """

    committer: Committer
    on_done: Callable[[], object]
    # This lock is acquired once and never released.  Either the writer thread acquires the lock and
    # starts the request, or the caller acquires the lock and withdraws the request.
    claim: Any

    def withdraw(self) -> bool:
        """Cancel the request unless it has started; returns whether the request was cancelled."""
        withdrawn: bool = self.claim.acquire(blocking=False)
        return withdrawn


class CommitQueue:
    """The queue of requests that wait for the writer thread, first in, first out.

    ``busy`` is true while a queued request has neither a result nor an error.
    """

    def __init__(self) -> None:
        self.busy = False
        self._requests: SimpleQueue[QueuedRequest[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._has_writer = False
        self._closed = False

    def put(
        self, committer: Committer, operation: Operation[T], on_done: Callable[[], object]
    ) -> tuple[QueuedRequest[T], bool]:
        """Queue an operation; return its request, and whether the caller must start the writer
        thread.

        Raises :class:`~taskstore.StoreClosedError` after :meth:`close`.
        """
        request = QueuedRequest(
            operation, committer=committer, on_done=on_done, claim=threading.Lock()
        )
        with self._lock:
            if self._closed:
                raise StoreClosedError("the registry is closed")
            start = not self._has_writer
            self._has_writer = self.busy = True
            self._requests.put(request)
        return request, start

    def take(self, idle_s: float) -> list[QueuedRequest[Any]]:
        """Wait until a request is queued; mark all queued requests as started, and return the
        requests.

        Returns an empty list if no request came for ``idle_s`` seconds, or if the queue is closed.
        After an empty list, the writer thread must end.
        """
        while True:
            try:
                taken = [self._requests.get(timeout=idle_s)]
            except Empty:
                taken = []
            while not self._requests.empty():
                taken.append(self._requests.get())
            started = [r for r in taken if r is not None and r.claim.acquire(blocking=False)]
            if None in taken and len(taken) > 1:
                self._requests.put(None)  # requests queued before close() are committed first
            if started:
                return started
            with self._lock:
                if self._requests.empty():
                    self.busy = False
                    if not taken or None in taken:
                        self._has_writer = False
                        return []

    def finish(self, requests: Sequence[QueuedRequest[Any]]) -> None:
        """Call ``on_done`` of each request that now has a result or an error."""
        with self._lock:
            self.busy = not self._requests.empty()
        for request in requests:
            request.on_done()

    def wake(self) -> None:
        """End the writer thread if no request is queued; can be called by a garbage collection."""
        self._requests.put(None)

    def close(self) -> None:
        """Refuse new requests.  The writer thread ends when all queued requests have a result or an
        error."""
        with self._lock:
            self._closed = True
            if self._has_writer:
                self._requests.put(None)


def wait(request: QueuedRequest[T], done: threading.Lock) -> None:
    """Wait until the lock ``done`` is released: the request then has a result or an error.

    If an interrupt ends the wait, a request that has not started is withdrawn.  If the request has
    started, the interrupted caller waits briefly for the commit, because most commits end soon.
    """
    try:
        done.acquire()
    except BaseException:
        if not request.withdraw():
            done.acquire(timeout=INTERRUPT_TIMEOUT_S)
        raise


class Committer:
    """Commits operations to one store, one commit at a time, and updates the record cache."""

    def __init__(self, store: TaskRegistryStore, cache: ReplicatedCache, hooks: Hooks) -> None:
        self._store = store
        self._cache = cache
        self._hooks = hooks
        self._queue = CommitQueue()
        self._writer: threading.Thread | None = None
        # The commit lock: only the lock owner is allowed to change the cache.  The lock is
        # reentrant: if a signal handler interrupts a call and makes another call in the
        # same thread, the second call raises an error instead of a deadlock.
        self._lock = threading.RLock()
        self._locked = False
        # True while a caller or the writer thread commits.
        self._committing = False
        # The time at which the contention ends (monotonic seconds; 0 without contention).  Until
        # then, each commit takes the store's exclusive lock.
        self._contended_until = 0.0

    def load(self) -> None:
        """Load all records from the store, and deliver the event ``Restored``."""
        self._with_lock(self._cache.load)
        self._hooks.deliver()

    def refresh(self) -> None:
        """Apply the commits of other writers to the cache, and deliver their events."""
        try:
            self._with_lock(self._cache.refresh)
        finally:
            self._hooks.deliver()

    # -- callers --------------------------------------------------------------

    def commit(self, operation: Operation[T]) -> T:
        """Commit an operation, in this thread or in the writer thread; then deliver the events."""
        if self._store.read_only:
            self.check_writable()
        try:
            if self._committing or self._queue.busy:
                return self._commit_queued(operation)
            request = Request(operation)
            self._with_lock(self._commit_requests, (request,))
        finally:
            if self._hooks.events:
                self._hooks.deliver()
        if request.error is not None:
            raise request.error
        result: T = request.result
        return result

    def _commit_queued(self, operation: Operation[T]) -> T:
        done = threading.Lock()
        done.acquire()
        request = self.submit(operation, done.release, commit_without_thread=True)
        wait(request, done)
        return request.outcome()

    def submit(
        self,
        operation: Operation[T],
        on_done: Callable[[], object],
        *,
        commit_without_thread: bool = False,
    ) -> QueuedRequest[T]:
        """Queue an operation for the writer thread, which calls ``on_done`` after the commit.

        The caller of ``submit`` must deliver the events.  If no thread can be started, the effect
        depends on ``commit_without_thread``.  If it is true, the calling thread commits the
        request; otherwise the request fails with a :class:`TaskStoreError`.
        """
        self.check_writable()
        request, start = self._queue.put(self, operation, on_done)
        if start:
            writer = threading.Thread(
                target=self._run_writer, args=(self._queue,), name="taskstore-writer", daemon=True
            )
            try:
                writer.start()
            except RuntimeError:  # the system cannot create another thread
                self._run_writer(self._queue, 0.0, fail=not commit_without_thread)
            else:
                self._writer = writer
        return request

    def check_writable(self) -> None:
        """Raise :class:`ReadOnlyError` for a store that was opened read-only."""
        if self._store.read_only:
            raise ReadOnlyError(
                f"{self._store.location} was opened read-only", hint="open the store for writing"
            )

    def close(self) -> None:
        """Refuse new requests, and return when all accepted requests are committed."""
        self._with_lock(lambda: None)  # raises an error if close() interrupted another call
        self._queue.close()
        writer = self._writer
        if writer is not None:
            writer.join()

    # -- the commit lock --------------------------------------------------------

    def _with_lock(self, work: Callable[..., None], *arguments: Any) -> None:
        """Take the commit lock, and call ``work``; ``work`` is allowed to change the cache."""
        with self._lock:
            if self._locked:
                raise TaskStoreError(
                    "this thread is in the middle of another call to the registry; a signal "
                    "handler has probably interrupted that call",
                    hint="in the signal handler, only set a flag or raise SystemExit",
                )
            self._locked = True
            try:
                work(*arguments)
            except Exception:
                raise
            except BaseException:  # interrupted: the cache can be incomplete
                self._cache.stale = self._cache.interrupted = True
                raise
            finally:
                self._locked = self._committing = False

    def _commit_taken(self, requests: Sequence[QueuedRequest[Any]], *, fail: bool) -> None:
        """Commit the requests that the writer thread took from the queue."""
        try:
            if fail:
                raise TaskStoreError(  # noqa: TRY301
                    "cannot start a thread to commit this change: nothing was written",
                    hint="raise the thread limit or end other threads, then retry",
                )
            self._with_lock(self._commit_group, requests)
        except Exception as error:  # noqa: BLE001 (raised in the callers' threads)
            _fail(requests, error)
        except BaseException:  # noqa: BLE001 (later callers need this thread)
            _fail(requests, OutcomeUnknownError("the writer was interrupted during a commit"))
        self._queue.finish(requests)

    @staticmethod
    def _run_writer(queue: CommitQueue, idle_s: float | None = None, *, fail: bool = False) -> None:
        """Commit groups of requests in the writer thread until the idle timeout or ``close()``.

        While the thread waits, the thread refers to the queue only.  Therefore a registry that the
        program drops is collected at once.
        """
        while requests := queue.take(IDLE_TIMEOUT_S if idle_s is None else idle_s):
            requests[0].committer._commit_taken(requests, fail=fail)  # noqa: SLF001 - same class
            del requests

    def __del__(self) -> None:
        self._queue.wake()

    # -- the commit ---------------------------------------------------------------

    def _commit_group(self, requests: Sequence[Request[Any]]) -> None:
        """Commit requests together; after a failure, commit each request alone."""
        try:
            self._commit_requests(requests)
        except Exception as error:  # noqa: BLE001 (raised in the callers' threads)
            # If the store is busy or unreachable, each single request would wait again.
            if len(requests) == 1 or isinstance(error, StoreBusyError | OutcomeUnknownError):
                _fail(requests, error)
                return
            for request in requests:
                self._commit_group((request,))

    def _commit_requests(self, requests: Sequence[Request[Any]]) -> None:
        """Commit requests together, in order; if another writer commits first, retry.

        A request that fails stages nothing.  If a request fails or changes nothing, the cache
        catches up with the store; if the cache was outdated, all requests are staged
        again.
        """
        self._committing = True
        single = len(requests) == 1
        conflict: ConflictError | None = None
        for attempt in range(MAX_ATTEMPTS if single else MAX_GROUP_ATTEMPTS):
            if self._cache.stale:
                self._cache.load()
            if self._contended_until and time.monotonic() >= self._contended_until:
                self._contended_until = 0.0
            with self._exclusive() if self._contended_until else _NO_CONTENTION as remote_ids:
                staging = Staging(self._cache)
                unverified = self._stage(requests, staging)
                if unverified and attempt < MAX_ATTEMPTS - 1 and self._catch_up(single=single):
                    continue
                if not staging.changes:
                    return
                if remote_ids and not remote_ids.isdisjoint(map(_task_id_of, staging.changes)):
                    # The exclusive lock has just prevented a conflict: the contention continues.
                    self._contended_until = time.monotonic() + CONTENTION_S
                try:
                    commit = self._store.apply(ChangeSet(staging.changes, self._cache.position))
                except ConflictError as error:
                    conflict = error
                except OutcomeUnknownError:
                    self._cache.stale = True
                    raise
                else:
                    self._cache.apply_local(commit, staging.changes)
                    return
            if not self._cache.catch_up(reload=True):
                break
            self._contended_until = time.monotonic() + CONTENTION_S
            if not isinstance(self._store, SupportsExclusive):
                backoff_s = min(MIN_BACKOFF_S * 2**attempt, MAX_BACKOFF_S)
                time.sleep(random.uniform(backoff_s / 2, backoff_s))  # noqa: S311 (jitter)
        raise conflict or ConflictError(
            [], "other writers committed first in each attempt: nothing was written; retry"
        )

    def _catch_up(self, *, single: bool) -> bool:
        """Bring the cache up to date with the store; return whether the cache was outdated
        before."""
        try:
            return self._cache.catch_up()
        except TaskStoreError as error:
            if single:
                raise
            # After this error, each request is committed alone; only unverified requests get the
            # error.
            raise TaskStoreError(
                "cannot bring the record cache up to date with the store"
            ) from error

    def _stage(self, requests: Sequence[Request[Any]], staging: Staging) -> bool:
        """Run requests in order; each request sees the staged changes of the earlier requests.
        Returns true if a result or error is unverified, that is, possibly wrong because the cache
        was possibly outdated."""
        unverified = False
        for request in requests:
            savepoint = len(staging.changes)
            try:
                request.result = request.operation(staging)
                request.error = None
                unverified = unverified or staging.unverified or len(staging.changes) == savepoint
            except Exception as error:  # noqa: BLE001 (raised in the caller's thread)
                request.error = error
                staging.rollback(savepoint)
                outdated = (TaskNotFound, InvalidTransition, ConflictError)
                unverified = unverified or isinstance(error, outdated)
        return unverified

    # -- contention -----------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[AbstractSet[str]]:
        """Take the store's exclusive lock until the local commit, and catch up with the store.

        No other writer can commit between the catch-up and the local commit, so all contending
        writers make progress in turn.  Without contention, commits do not use this method and do
        not take the exclusive lock.  A writer then waits only while another writer commits.  Yields
        the ids of the tasks that other writers changed before the catch-up.
        """
        store = self._store
        remote_ids: AbstractSet[str] = frozenset()
        if not (isinstance(store, SupportsExclusive) and isinstance(store, SupportsJournal)):
            yield remote_ids
            return
        with store.exclusive():
            with suppress(CursorExpiredError):  # the commit then conflicts, or the cache reloads
                remote_ids = self._cache.apply_remote(store)
            yield remote_ids


def _fail(requests: Sequence[Request[Any]], error: BaseException) -> None:
    for request in requests:
        request.error = error


class Batch:
    """The operations in one ``with registry.batch()`` body, and their staged changes.

    ``closed`` is set at the end of the ``with`` body.  If the body started an asyncio task that
    runs longer than the body, the changes that this asyncio task makes later are committed without
    the batch.
    """

    def __init__(self, base: Lookups) -> None:
        self.staging = Staging(base)
        # Each operation, with its provisional result.
        self.operations: list[tuple[Operation[Any], Any]] = []
        self.closed = False

    def add(self, operation: Operation[T]) -> T:
        """Run an operation and return its provisional result.  If the operation raises an error,
        discard its changes."""
        savepoint = len(self.staging.changes)
        try:
            result = operation(self.staging)
        except BaseException:
            self.staging.rollback(savepoint)
            raise
        self.operations.append((operation, result))
        return result

    def join(self, inner: Batch) -> None:
        """Add the operations of an inner batch that ended without an error."""
        self.staging.merge(inner.staging)
        self.operations += inner.operations

    def replay(self, staging: Staging) -> None:
        """Run all operations of the batch again over the current records.

        Raises :class:`ConflictError` if both conditions are true: (a) the batch created a
        task, and then used its id; (b) another writer had already created the task of the
        same run, under another id.
        """
        conflicts: dict[str, Conflict] = {}
        for operation, result in self.operations:
            try:
                again = operation(staging)
            except TaskNotFound as error:
                if error.task_id in conflicts:
                    raise ConflictError([conflicts[error.task_id]]) from error
                raise
            if isinstance(result, TaskRecord) and again.task_id != result.task_id:
                if not staging.creates(again.task_id):
                    conflict = Conflict(result.task_id, 0, 0, existing_task_id=again.task_id)
                    conflicts[result.task_id] = conflict
            elif conflicts and result is True and again is False:
                raise ConflictError(
                    conflicts.values()
                )  # deleted in the body, but not in this replay
        for change in staging.changes if conflicts else ():
            if isinstance(change, Put) and change.record.parent_task_id in conflicts:
                raise ConflictError([conflicts[change.record.parent_task_id]])
