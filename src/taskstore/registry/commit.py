"""The commit protocol: stage, have the store apply it, publish it to memory; then hooks.

A caller that is alone commits its own request: no other thread is woken.
While it does, other callers put theirs into a queue, and a writer thread
commits what has come together, all at once.

An operation is a function over a :class:`~taskstore.registry.cache.Staging`: it
looks records up and stages changes.  It holds no state of its own, so that
it can run again over fresher records when another writer was faster; a batch is several as one.

One rule for interrupts, such as Ctrl-C: the change of an interrupted caller
is done or not done, and memory is loaded anew before its next use.
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

ATTEMPTS = 64
"""How often a request runs when other writers keep being faster."""

GROUP_ATTEMPTS = 4
"""How often several requests run together, before each goes by itself."""

CONTENDED_S = 1.0
"""How long after a conflict other writers are kept out while a request runs, in seconds."""

FIRST_PAUSE_S = 0.0005
LONGEST_PAUSE_S = 0.01
"""How long a request waits after a conflict, in seconds, on a store without
:class:`~taskstore.SupportsExclusive`: twice as long each time, at most this."""

IDLE_S = 5.0
"""How long the writer thread waits for another request before it ends, in seconds."""

INTERRUPTED_S = 1.0
"""How long an interrupted caller waits for a commit that has begun, in seconds."""

Operation = Callable[[Staging], T]
"""Looks records up, stages changes, returns what the caller gets."""

_task_id_of = attrgetter("task_id")
_NOT_CONTENDED: AbstractContextManager[AbstractSet[str]] = nullcontext(frozenset())


class Request(Struct, Generic[T]):
    """One caller's operation, and in the end its result or error."""

    operation: Operation[T]
    result: Any = None
    error: BaseException | None = None

    def outcome(self) -> T:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        result: T = self.result
        return result


class Ticket(Request[T], Generic[T], kw_only=True):
    """A request that waits for the writer thread.

    ``settle`` is called by that thread when the outcome is there.
    """

    settle: Callable[[], object]
    # Taken once and never given back: by the writer thread, which begins the
    # request, or by the caller, which withdraws it.
    turn: Any

    def withdraw(self) -> bool:
        """Take the request back unless it has begun; returns whether that succeeded."""
        withdrawn: bool = self.turn.acquire(blocking=False)
        return withdrawn


class CommitQueue:
    """Tickets, taken in the order in which they came.

    ``busy`` tells whether there are tickets whose outcome is not there yet.
    """

    def __init__(self) -> None:
        self.busy = False
        self._tickets: SimpleQueue[Ticket[Any] | None] = SimpleQueue()
        self._gate = threading.Lock()
        self._attended = False
        self._closed = False

    def put(self, operation: Operation[T], settle: Callable[[], object]) -> tuple[Ticket[T], bool]:
        """Queue an operation; returns its ticket, and whether a writer thread has to be started.

        Raises :class:`~taskstore.StoreClosedError` after :meth:`close`.
        """
        ticket = Ticket(operation, settle=settle, turn=threading.Lock())
        with self._gate:
            if self._closed:
                raise StoreClosedError("the registry is closed")
            start = not self._attended
            self._attended = self.busy = True
            self._tickets.put(ticket)
        return ticket, start

    def take(self, idle_s: float) -> list[Ticket[Any]]:
        """Wait for tickets and begin all that are there.

        An empty list says that none came for ``idle_s`` seconds, or that the
        queue was closed: then its writer thread ends.
        """
        while True:
            try:
                found = [self._tickets.get(timeout=idle_s)]
            except Empty:
                found = []
            while not self._tickets.empty():
                found.append(self._tickets.get())
            begun = [t for t in found if t is not None and t.turn.acquire(blocking=False)]
            if None in found and len(found) > 1:
                self._tickets.put(None)  # what came before the end is done first
            if begun:
                return begun
            with self._gate:
                if self._tickets.empty():
                    self.busy = False
                    if not found or None in found:
                        self._attended = False
                        return []

    def settle(self, tickets: Sequence[Ticket[Any]]) -> None:
        """Tell the callers of tickets that their outcome is there."""
        with self._gate:
            self.busy = not self._tickets.empty()
        for ticket in tickets:
            ticket.settle()

    def close(self) -> None:
        """Take no more tickets, and let the writer thread end after those that are there."""
        with self._gate:
            self._closed = True
            if self._attended:
                self._tickets.put(None)


def wait(ticket: Ticket[T], settled: threading.Lock) -> None:
    """Wait until the outcome of a ticket is there: until ``settled`` is released.

    Interrupted, it withdraws a request that has not begun, and waits a moment
    for one that has, since that is usually done soon.
    """
    try:
        settled.acquire()
    except BaseException:
        if not ticket.withdraw():
            settled.acquire(timeout=INTERRUPTED_S)
        raise


class Committer:
    """Commits operations to one store, one commit at a time, and keeps memory like it."""

    def __init__(self, store: TaskRegistryStore, replica: ReplicatedCache, hooks: Hooks) -> None:
        self._store = store
        self._cache = replica
        self._hooks = hooks
        self._queue = CommitQueue()
        self._writer: threading.Thread | None = None
        # Held by the thread that changes memory.  Unlike a plain lock it tells a call
        # that interrupts another one of the same thread, as a signal handler does.
        self._lock = threading.RLock()
        self._inside = False
        # Whether a caller, or the writer thread, is committing.
        self._committing = False
        # Until when other writers are taken to be changing the same tasks (monotonic
        # seconds, 0: none are).
        self._contended_until = 0.0

    def load(self) -> None:
        """Load everything from the store, and deliver that."""
        self._locked(self._cache.load)
        self._hooks.deliver()

    def refresh(self) -> None:
        """Bring in what other writers committed."""
        try:
            self._locked(self._cache.refresh)
        finally:
            self._hooks.deliver()

    # -- callers --------------------------------------------------------------

    def run(self, operation: Operation[T]) -> T:
        """Commit an operation, in this thread or together with those of others; deliver events."""
        if self._store.read_only:
            self.check_writable()
        try:
            if self._committing or self._queue.busy:
                return self._run_together(operation)
            request = Request(operation)
            self._locked(self._commit, (request,))
        finally:
            if self._hooks.events:
                self._hooks.deliver()
        if request.error is not None:
            raise request.error
        result: T = request.result
        return result

    def _run_together(self, operation: Operation[T]) -> T:
        settled = threading.Lock()
        settled.acquire()
        ticket = self.post(operation, settled.release, serve_without_thread=True)
        wait(ticket, settled)
        return ticket.outcome()

    def post(
        self,
        operation: Operation[T],
        settle: Callable[[], object],
        *,
        serve_without_thread: bool = False,
    ) -> Ticket[T]:
        """Have an operation committed by the writer thread, which calls ``settle`` in the end.

        Delivering events is left to the caller.  Where no thread can be
        started, this one commits if ``serve_without_thread`` is set; else
        that is a :class:`TaskStoreError`, as the outcome of the ticket.
        """
        self.check_writable()
        ticket, start = self._queue.put(operation, settle)
        if start:
            writer = threading.Thread(target=self._write, name="taskstore-writer", daemon=True)
            try:
                writer.start()
            except RuntimeError:  # the system gives no more threads
                self._write(0.0, refused=not serve_without_thread)
            else:
                self._writer = writer
        return ticket

    def check_writable(self) -> None:
        """Raise :class:`ReadOnlyError` for a store that was opened read-only."""
        if self._store.read_only:
            raise ReadOnlyError(f"{self._store.location} was opened read-only")

    def close(self) -> None:
        """Take nothing more, and return when everything that was taken is committed."""
        self._locked(lambda: None)  # or the writer thread would wait for the call we interrupt
        self._queue.close()
        writer = self._writer
        if writer is not None:
            writer.join()

    # -- one at a time ----------------------------------------------------------

    def _locked(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do ``work``, which changes memory, while no other thread does."""
        with self._lock:
            if self._inside:
                raise TaskStoreError(
                    "this thread is in the middle of another call to the registry, as it may be "
                    "when a signal handler runs",
                    hint="let the handler set a flag or raise SystemExit, and go on from there",
                )
            self._inside = True
            try:
                work(*arguments)
            except Exception:
                raise
            except BaseException:  # interrupted: what memory lacks is not known
                self._cache.stale = self._cache.interrupted = True
                raise
            finally:
                self._inside = self._committing = False

    def _write(self, idle_s: float | None = None, *, refused: bool = False) -> None:
        """The writer thread: commit what has come together, until nothing comes any more."""
        while tickets := self._queue.take(IDLE_S if idle_s is None else idle_s):
            try:
                if refused:
                    raise TaskStoreError("no thread can be started to commit this")  # noqa: TRY301
                self._locked(self._commit_together, tickets)
            except Exception as error:  # noqa: BLE001 (it is raised in the callers' threads)
                _fail(tickets, error)
            except BaseException:  # noqa: BLE001 (later callers need the thread)
                _fail(tickets, OutcomeUnknownError("the thread that committed was interrupted"))
            self._queue.settle(tickets)

    # -- the commit ---------------------------------------------------------------

    def _commit_together(self, requests: Sequence[Request[Any]]) -> None:
        """Commit requests as one; where that fails, each by itself: it shows whose fault it is."""
        try:
            self._commit(requests)
        except Exception as error:  # noqa: BLE001 (it is raised in the callers' threads)
            # None is to wait once more for a store that is busy, or that does not answer.
            if len(requests) == 1 or isinstance(error, StoreBusyError | OutcomeUnknownError):
                _fail(requests, error)
                return
            for request in requests:
                self._commit_together((request,))

    def _commit(self, requests: Sequence[Request[Any]]) -> None:
        """Commit requests as one, in order: again while other writers are faster.

        One that fails stages nothing.  That it fails, or finds nothing to do, may only
        be so because memory is behind the store: then all are staged again.
        """
        self._committing = True
        alone = len(requests) == 1
        conflict: ConflictError | None = None
        for attempt in range(ATTEMPTS if alone else GROUP_ATTEMPTS):
            if self._cache.stale:
                self._cache.load()
            if self._contended_until and time.monotonic() >= self._contended_until:
                self._contended_until = 0.0
            with self._others_kept_out() if self._contended_until else _NOT_CONTENDED as changed:
                staging = Staging(self._cache)
                in_doubt = self._stage(requests, staging)
                if in_doubt and attempt < ATTEMPTS - 1 and self._was_behind(alone=alone):
                    continue
                if not staging.changes:
                    return
                if changed and not changed.isdisjoint(map(_task_id_of, staging.changes)):
                    # Keeping others out has just prevented a conflict.
                    self._contended_until = time.monotonic() + CONTENDED_S
                try:
                    commit = self._store.apply(ChangeSet(staging.changes, self._cache.position))
                except ConflictError as error:
                    conflict = error
                except OutcomeUnknownError:
                    self._cache.stale = True
                    raise
                else:
                    self._cache.publish(commit, staging.changes)
                    return
            if not self._cache.behind(reload=True):
                break
            self._contended_until = time.monotonic() + CONTENDED_S
            if not isinstance(self._store, SupportsExclusive):
                pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
                time.sleep(random.uniform(pause_s / 2, pause_s))  # noqa: S311 (jitter)
        raise conflict or ConflictError([], "other writers were faster each time")

    def _was_behind(self, *, alone: bool) -> bool:
        """Bring memory up to the store; returns whether it was behind."""
        try:
            return self._cache.behind()
        except TaskStoreError as error:
            if alone:
                raise
            # Only those in doubt are to hear of that, when each goes by itself.
            raise TaskStoreError("memory cannot be compared with the store") from error

    def _stage(self, requests: Sequence[Request[Any]], staging: Staging) -> bool:
        """Run requests, one on top of the other; returns whether what some of them found has
        to be compared with the store."""
        in_doubt = False
        for request in requests:
            mark = len(staging.changes)
            try:
                request.result = request.operation(staging)
                request.error = None
                in_doubt = in_doubt or staging.in_doubt or len(staging.changes) == mark
            except Exception as error:  # noqa: BLE001 (it is raised in the caller's thread)
                request.error = error
                staging.undo(mark)
                doubtful = (TaskNotFound, InvalidTransition, ConflictError)
                in_doubt = in_doubt or isinstance(error, doubtful)
        return in_doubt

    # -- contention -----------------------------------------------------------------

    @contextmanager
    def _others_kept_out(self) -> Iterator[AbstractSet[str]]:
        """Where others change the same tasks, let them wait from here until we have committed.

        No other commit comes in between what is read and what is committed
        then, so that all writers get on, in turn.  As long as none conflict,
        none wait for more than the commit itself.  Gives the ids of the tasks
        that others had changed.
        """
        store = self._store
        changed: AbstractSet[str] = frozenset()
        if not (isinstance(store, SupportsExclusive) and isinstance(store, SupportsJournal)):
            yield changed
            return
        with store.exclusive():
            with suppress(CursorExpiredError):  # then what is committed conflicts or reloads
                changed = self._cache.apply_remote(store)
            yield changed


def _fail(requests: Sequence[Request[Any]], error: BaseException) -> None:
    for request in requests:
        request.error = error


class Batch:
    """The operations of one ``with registry.batch()``, and what they would make.

    ``closed`` is set when the body has ended: whoever still holds it, such as
    an asyncio task that was started in the body, is on its own from then on.
    """

    def __init__(self, under: Lookups) -> None:
        self.staging = Staging(under)
        # Each with what it gave in the body.
        self.operations: list[tuple[Operation[Any], Any]] = []
        self.closed = False

    def add(self, operation: Operation[T]) -> T:
        """Run an operation provisionally; one that raises leaves no trace."""
        mark = len(self.staging.changes)
        try:
            result = operation(self.staging)
        except BaseException:
            self.staging.undo(mark)
            raise
        self.operations.append((operation, result))
        return result

    def join(self, inner: Batch) -> None:
        """Take over a batch that ended well inside this one."""
        self.staging.absorb(inner.staging)
        self.operations += inner.operations

    def replay(self, staging: Staging) -> None:
        """Run everything again over what is committed by now.

        Raises :class:`ConflictError` where the body went on with a task that
        another writer has booked first, under another id.
        """
        elsewhere: dict[str, Conflict] = {}
        for operation, result in self.operations:
            try:
                again = operation(staging)
            except TaskNotFound as error:
                if error.task_id in elsewhere:
                    raise ConflictError([elsewhere[error.task_id]]) from error
                raise
            if isinstance(result, TaskRecord) and again.task_id != result.task_id:
                if not staging.creates(again.task_id):
                    taken = Conflict(result.task_id, 0, 0, existing_task_id=again.task_id)
                    elsewhere[result.task_id] = taken
            elif elsewhere and result is True and again is False:
                raise ConflictError(elsewhere.values())  # deleted in the body, and not here
        for change in staging.changes if elsewhere else ():
            if isinstance(change, Put) and change.record.parent_task_id in elsewhere:
                raise ConflictError([elsewhere[change.record.parent_task_id]])
