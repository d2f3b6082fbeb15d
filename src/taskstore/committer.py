"""The commit protocol: store, then memory, then hooks.

An operation is a function over a :class:`~taskstore.mirror.Staging`: it
looks records up and stages changes.  It holds no state of its own, so that
it can run again over fresher records when another writer was faster.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

from taskstore.batch import Batch
from taskstore.errors import (
    ConflictError,
    CursorExpiredError,
    InvalidTransition,
    OutcomeUnknownError,
    ReadOnlyError,
    StoreBusyError,
    TaskNotFound,
    TaskStoreError,
)
from taskstore.groupcommit import CommitQueue, Operation, Request
from taskstore.hooks import Hooks
from taskstore.journal import Change, ChangeSet
from taskstore.mirror import Mirror, Staging
from taskstore.replica import Replica
from taskstore.store import SupportsExclusive, SupportsJournal, TaskRegistryStore

T = TypeVar("T")

ATTEMPTS = 64
"""How often an operation runs when other writers keep being faster."""

GROUP_ATTEMPTS = 4
"""How often a group of operations does, before each goes by itself."""

EAGER_ATTEMPTS = 2
"""How many of these follow at once; later ones wait a little first."""

CONTENDED_S = 1.0
"""How long after a conflict the others are kept out while an operation runs, in seconds."""

_NOBODY_ELSE: AbstractContextManager[AbstractSet[str]] = nullcontext(frozenset())


class Committer:
    """Runs operations against one store, one at a time, and mirrors what is committed."""

    def __init__(self, store: TaskRegistryStore, mirror: Mirror, hooks: Hooks) -> None:
        self._store = store
        self._mirror = mirror
        self._hooks = hooks
        self._lock = threading.Lock()
        self._replica = Replica(store, mirror, hooks)
        self._queue = CommitQueue(self._commit_one, self._commit_all)
        # Until when others are taken to be changing the same tasks (monotonic seconds, 0: nobody).
        self._contended_until = 0.0

    @property
    def loaded(self) -> bool:
        """Whether memory has been loaded, and nothing is known against it (``bool``)."""
        return not self._replica.stale

    def load(self) -> None:
        """Load everything from the store, and deliver that."""
        with self._changing_memory():
            self._replica.load()
        self._hooks.deliver()

    def run(self, operation: Operation[T]) -> T:
        """Run an operation, commit what it staged, mirror it, and deliver its events."""
        self._queue.check_process()  # in a forked child nothing is delivered either
        if self._store.read_only:
            self._check_writable()
        try:
            return self._queue.run(operation)
        finally:
            self._hooks.deliver()

    def post(self, request: Request[Any]) -> None:
        """Have a request committed by the writer thread; delivering is left to the caller."""
        if self._store.read_only:
            self._check_writable()
        self._queue.post(request)

    def withdraw(self, request: Request[Any]) -> bool:
        """Take a posted request back, if it has not begun; returns whether that succeeded."""
        return self._queue.withdraw(request)

    def close(self) -> bool:
        """Commit what is under way, and take nothing more; whether its events are ours to
        deliver, which they are not in a forked child."""
        return self._queue.close()

    def refresh(self) -> None:
        """Bring in what other writers committed."""
        try:
            with self._changing_memory():
                self._replica.refresh()
        finally:
            self._hooks.deliver()

    def batch(self) -> Batch:
        """Begin to collect operations that are committed together."""
        self._check_writable()
        return Batch(self._mirror)

    def _check_writable(self) -> None:
        self._queue.check_process()
        if self._store.read_only:
            raise ReadOnlyError(f"{self._store.location} was opened read-only")

    def _commit_one(self, operation: Operation[T]) -> T:
        """Commit an operation by itself."""
        with self._lock:  # as _changing_memory does, without what a generator costs
            try:
                result = self._commit(operation)
            except Exception:
                raise
            except BaseException:  # interrupted: who knows what memory lacks
                self._replica.stale = True
                raise
        return result

    def _commit_all(self, requests: Sequence[Request[Any]]) -> None:
        """Commit what has come together: as one, or each by itself where that fails."""
        with self._changing_memory():
            if len(requests) == 1 or not self._together(requests):
                for request in requests:
                    self._alone(request)

    @contextmanager
    def _changing_memory(self) -> Iterator[None]:
        """Hold the commit lock; after an interrupt, who knows what memory lacks."""
        with self._lock:
            try:
                yield
            except Exception:
                raise
            except BaseException:
                self._replica.stale = True
                raise

    def _together(self, requests: Sequence[Request[Any]]) -> bool:
        """Commit requests as one, in order; returns whether that was possible.

        One that raises leaves nothing of itself.  What it says, or that there
        is nothing to do, may only seem so because memory is behind the store:
        then all are run again.
        """
        for attempt in range(1, GROUP_ATTEMPTS + 1):
            if self._replica.stale:
                self._replica.load()
            with self._keeping_others_out() if self._contended_until else _NOBODY_ELSE as news:
                staging, in_doubt = self._stage(requests)
                if news:
                    self._look_out(news, staging.changes)
                if in_doubt:
                    try:
                        if self._replica.behind():
                            continue
                    except TaskStoreError:  # only they are to hear of that
                        return False
                if not staging.changes:
                    return True
                try:
                    commit = self._store.apply(ChangeSet(staging.changes, self._mirror.position))
                except ConflictError:
                    pass
                except OutcomeUnknownError:
                    self._replica.stale = True
                    raise
                except StoreBusyError:  # nobody is to wait for that once more
                    raise
                except Exception:  # noqa: BLE001 (whose fault it is shows when each goes alone)
                    return False
                else:
                    self._replica.publish(commit, staging.changes)
                    return True
            if not self._conflicted(attempt):
                return False
        return False

    def _stage(self, requests: Sequence[Request[Any]]) -> tuple[Staging, bool]:
        """Run requests over memory, one on top of the other; and whether memory has to be
        up to date for what some of them found."""
        staging = Staging(self._mirror)
        in_doubt = False
        for request in requests:
            trial = Staging(staging)
            try:
                request.succeed(request.operation(trial))
            except (TaskNotFound, InvalidTransition, ConflictError) as error:
                request.fail(error)
                in_doubt = True
            except Exception as error:  # noqa: BLE001 (it is raised in the caller's thread)
                request.fail(error)
            else:
                staging.absorb(trial)
                in_doubt = in_doubt or not trial.changes
        return staging, in_doubt

    def _alone(self, request: Request[Any]) -> None:
        try:
            request.succeed(self._commit(request.operation))
        except Exception as error:  # noqa: BLE001 (it is raised in the caller's thread)
            request.fail(error)

    def _commit(self, operation: Operation[T]) -> T:
        """Run until the store takes it.  The caller holds the commit lock."""
        attempt = 0
        while True:
            attempt += 1
            if self._replica.stale:
                self._replica.load()
            with self._keeping_others_out() if self._contended_until else _NOBODY_ELSE as news:
                staging = Staging(self._mirror)
                try:
                    result = operation(staging)
                except (TaskNotFound, InvalidTransition, ConflictError):
                    # It may only look so because memory is behind the store.
                    if attempt < ATTEMPTS and self._replica.behind():
                        continue
                    raise
                if not staging.changes:
                    # Nothing to do, as far as memory knows: is that so?
                    if attempt < ATTEMPTS and self._replica.behind():
                        continue
                    return result
                if news:
                    self._look_out(news, staging.changes)
                try:
                    commit = self._store.apply(ChangeSet(staging.changes, self._mirror.position))
                except ConflictError as error:
                    conflict = error
                except OutcomeUnknownError:
                    self._replica.stale = True
                    raise
                else:
                    self._replica.publish(commit, staging.changes)
                    return result
            if attempt == ATTEMPTS or not self._conflicted(attempt):
                raise conflict

    def _keeping_others_out(self) -> AbstractContextManager[AbstractSet[str]]:
        """Where others change the same tasks, let them wait from here until we have committed.

        Nobody comes in between what is read and what is committed then, so
        that everybody gets on, in turn.  As long as nobody conflicts, nobody
        waits for more than the commit itself.  Gives the ids of the tasks
        that others had changed.
        """
        store = self._store
        if time.monotonic() >= self._contended_until:
            self._contended_until = 0.0
        elif isinstance(store, SupportsExclusive) and isinstance(store, SupportsJournal):
            return self._alone_with(store, store)
        return _NOBODY_ELSE

    @contextmanager
    def _alone_with(
        self, store: SupportsExclusive, journal: SupportsJournal
    ) -> Iterator[AbstractSet[str]]:
        news = set[str]()
        with store.exclusive():
            with suppress(CursorExpiredError):  # then what is committed conflicts or reloads
                news = self._replica.read_on(journal)
            yield news

    def _look_out(self, news: AbstractSet[str], changes: Sequence[Change]) -> None:
        """Go on keeping others out if that has just prevented a conflict."""
        if any(change.task_id in news for change in changes):
            self._contended_until = time.monotonic() + CONTENDED_S

    def _conflicted(self, attempt: int) -> bool:
        """Prepare to run again after a conflict; returns whether that makes sense."""
        if not self._replica.behind(reload=True):
            return False
        self._contended_until = time.monotonic() + CONTENDED_S
        if not isinstance(self._store, SupportsExclusive):
            _pause(attempt)
        return True


def _pause(attempt: int) -> None:
    """Let the others get on: nothing at first, then up to a few milliseconds, jittered."""
    if attempt > EAGER_ATTEMPTS:
        time.sleep(random.uniform(0, min(0.0005 * 2**attempt, 0.01)))  # noqa: S311 (jitter)
