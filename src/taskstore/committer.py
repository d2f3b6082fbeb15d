"""The commit protocol: store, then memory, then hooks.

An operation is a function over a :class:`~taskstore.mirror.Staging`: it
looks records up and stages changes.  It holds no state of its own, so that
it can run again over fresher records when another writer was faster.
"""

from __future__ import annotations

import logging
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
    TaskNotFound,
    TaskStoreError,
)
from taskstore.groupcommit import CommitQueue, Operation, Request
from taskstore.hooks import Event, Hooks, Restored
from taskstore.journal import Change, ChangeSet, Commit, JournalEntry, entries_of
from taskstore.mirror import Mirror, Staging
from taskstore.store import (
    SupportsExclusive,
    SupportsJournal,
    TaskRegistryStore,
    commit_id_at,
    entries_beyond,
)
from taskstore.yielding import collector

logger = logging.getLogger("taskstore")

T = TypeVar("T")

ATTEMPTS = 64
"""How often an operation runs when other writers keep being faster."""

GROUP_ATTEMPTS = 4
"""How often a group of operations does, before each goes by itself."""

EAGER_ATTEMPTS = 2
"""How many of these follow at once; later ones wait a little first."""

CONTENDED_S = 1.0
"""How long after a conflict the others are kept out while an operation runs, in seconds."""

PAGE_ENTRIES = 1000
"""How many journal entries are read at a time."""

_NOBODY_ELSE: AbstractContextManager[AbstractSet[str]] = nullcontext(frozenset())


class Committer:
    """Runs operations against one store, one at a time, and mirrors what is committed."""

    def __init__(self, store: TaskRegistryStore, mirror: Mirror, hooks: Hooks) -> None:
        self._store = store
        self._mirror = mirror
        self._hooks = hooks
        self._lock = threading.Lock()
        self._queue = CommitQueue(self._serve)
        # Set when memory may not be what the store has: reload before the next use.
        self._stale = True
        # Until when others are taken to be changing the same tasks (monotonic seconds).
        self._contended_until = 0.0

    @property
    def loaded(self) -> bool:
        """Whether memory has been loaded, and nothing is known against it (``bool``)."""
        return not self._stale

    def load(self) -> None:
        """Load everything from the store, and deliver that."""
        with self._lock:
            self._load()
        self._hooks.deliver()

    def run(self, operation: Operation[T]) -> T:
        """Run an operation, commit what it staged, mirror it, and deliver its events."""
        self._check_writable()
        try:
            return self._queue.run(operation)
        finally:
            self._hooks.deliver()

    def post(self, request: Request[Any]) -> None:
        """Have a request committed by the writer thread; delivering is left to the caller."""
        self._check_writable()
        self._queue.post(request)

    def withdraw(self, request: Request[Any]) -> bool:
        """Take a posted request back, if it has not begun; returns whether that succeeded."""
        return self._queue.withdraw(request)

    def close(self) -> None:
        """Commit what is under way, deliver its events, and take nothing more."""
        if self._queue.close():
            self._hooks.deliver()

    def check_process(self) -> None:
        """Raise :class:`TaskStoreError` in a process that was forked from the one that loaded."""
        self._queue.check_process()

    def refresh(self) -> None:
        """Bring in what other writers committed."""
        self.check_process()
        try:
            with self._lock:
                if self._stale or not isinstance(self._store, SupportsJournal):
                    self._load()
                else:
                    self._catch_up(self._store)
        finally:
            self._hooks.deliver()

    def batch(self) -> Batch:
        """Begin to collect operations that are committed together."""
        self._check_writable()
        return Batch(self._mirror)

    def _check_writable(self) -> None:
        self.check_process()
        if self._store.read_only:
            raise ReadOnlyError(f"{self._store.location} was opened read-only")

    def _serve(self, requests: Sequence[Request[Any]]) -> None:
        """Commit what has come together: as one, or each by itself where that fails."""
        with self._lock:
            try:
                alone = requests if len(requests) == 1 else self._together(requests)
                for request in alone:
                    self._alone(request)
            except BaseException:
                self._stale = True
                raise

    def _together(self, requests: Sequence[Request[Any]]) -> Sequence[Request[Any]]:
        """Commit requests as one; returns those that have to go by themselves.

        One that raises, or finds nothing to do, goes alone, where memory is
        brought up to date first: it harms nobody, and nobody is told what is
        no longer so.
        """
        for attempt in range(1, GROUP_ATTEMPTS + 1):
            if self._stale:
                self._load()
            with self._keeping_others_out() as news:
                staging, alone = self._stage(requests)
                if not staging.changes:
                    return alone
                self._look_out(news, staging.changes)
                try:
                    commit = self._store.apply(self._made_over_memory(staging.changes))
                except ConflictError:
                    pass
                except OutcomeUnknownError:
                    raise
                except Exception:  # noqa: BLE001 (whose fault it is shows when each goes alone)
                    return requests
                else:
                    self._publish(commit, staging.changes)
                    return alone
            if not self._conflicted(attempt):
                return requests
        return requests

    def _stage(self, requests: Sequence[Request[Any]]) -> tuple[Staging, list[Request[Any]]]:
        """Run requests over memory, one on top of the other; and which have to go alone."""
        staging = Staging(self._mirror)
        alone = []
        for request in requests:
            trial = Staging(staging)
            try:
                request.succeed(request.operation(trial))
            except Exception:  # noqa: BLE001 (it comes again when the request goes alone)
                alone.append(request)
            else:
                staging.absorb(trial)
                if not trial.changes:
                    alone.append(request)
        return staging, alone

    def _alone(self, request: Request[Any]) -> None:
        try:
            request.succeed(self._commit(request.operation))
        except Exception as error:  # noqa: BLE001 (it is raised in the caller's thread)
            request.fail(error)

    def _commit(self, operation: Operation[T]) -> T:
        """Run until the store takes it.  The caller holds the commit lock."""
        for attempt in range(1, ATTEMPTS + 1):
            if self._stale:
                self._load()
            with self._keeping_others_out() as news:
                staging = Staging(self._mirror)
                try:
                    result = operation(staging)
                except (TaskNotFound, InvalidTransition, ConflictError):
                    # It may only look so because memory is behind the store.
                    if attempt < ATTEMPTS and self._behind():
                        continue
                    raise
                if not staging.changes:
                    # Nothing to do, as far as memory knows: is that so?
                    if attempt < ATTEMPTS and self._behind():
                        continue
                    return result
                self._look_out(news, staging.changes)
                try:
                    commit = self._store.apply(self._made_over_memory(staging.changes))
                except ConflictError as error:
                    conflict = error
                except OutcomeUnknownError:
                    self._stale = True
                    raise
                else:
                    self._publish(commit, staging.changes)
                    return result
            if attempt == ATTEMPTS or not self._conflicted(attempt):
                raise conflict
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _keeping_others_out(self) -> AbstractContextManager[AbstractSet[str]]:
        """Where others change the same tasks, let them wait from here until we have committed.

        Nobody comes in between what is read and what is committed then, so
        that everybody gets on, in turn.  As long as nobody conflicts, nobody
        waits for more than the commit itself.  Gives the ids of the tasks
        that others had changed.
        """
        store = self._store
        if (
            time.monotonic() < self._contended_until
            and isinstance(store, SupportsExclusive)
            and isinstance(store, SupportsJournal)
        ):
            return self._alone_with(store, store)
        return _NOBODY_ELSE

    @contextmanager
    def _alone_with(
        self, store: SupportsExclusive, journal: SupportsJournal
    ) -> Iterator[AbstractSet[str]]:
        news = set[str]()
        with store.exclusive():
            with suppress(CursorExpiredError):  # then what is committed conflicts or reloads
                news = self._read_on(journal)
            yield news

    def _made_over_memory(self, changes: Sequence[Change]) -> ChangeSet:
        """The changes, and what they were worked out from."""
        return ChangeSet(changes, self._mirror.position)

    def _look_out(self, news: AbstractSet[str], changes: Sequence[Change]) -> None:
        """Go on keeping others out if that has just prevented a conflict."""
        if news and any(change.task_id in news for change in changes):
            self._contended_until = time.monotonic() + CONTENDED_S

    def _conflicted(self, attempt: int) -> bool:
        """Prepare to run again after a conflict; returns whether that makes sense."""
        if not self._behind(reload=True):
            return False
        self._contended_until = time.monotonic() + CONTENDED_S
        if not isinstance(self._store, SupportsExclusive):
            _pause(attempt)
        return True

    def _behind(self, *, reload: bool = False) -> bool:
        """Catch up with the store; returns whether there was anything to catch up with."""
        if isinstance(self._store, SupportsJournal):
            return self._catch_up(self._store)
        if reload:
            # Without a journal there is one writer, and only a lost outcome
            # explains that memory differs.
            before = self._mirror.seq
            self._load()
            return before != self._mirror.seq
        return False

    def _publish(self, commit: Commit, changes: Sequence[Change]) -> None:
        """Mirror a commit, and before it what others committed in between."""
        gap = commit.first_seq - self._mirror.seq - 1
        if gap:
            try:
                self._fill(gap)
            except TaskStoreError:
                # The change is committed: that must not look like a failure.
                logger.exception("cannot read what was committed before seq %d", commit.first_seq)
                self._stale = True
        entries = entries_of(changes, commit)
        if self._mirror.seq == commit.first_seq - 1:
            self._mirror_entries(entries, local=True)
        elif self._stale:
            # Who wrote it can read it; the hooks hear of everything when it is reloaded.
            for entry in entries:
                self._mirror.publish(entry, local=True)

    def _fill(self, gap: int) -> None:
        """Mirror the entries between memory and our own commit."""
        store = self._store
        if gap < 0 or not isinstance(store, SupportsJournal):
            self._load()
            return
        try:
            while gap > 0:
                entries = entries_beyond(store, self._mirror.position, min(gap, PAGE_ENTRIES))
                if not entries:
                    self._load()
                    return
                self._mirror_entries(entries, local=False)
                gap -= len(entries)
        except CursorExpiredError:
            self._load()

    def _catch_up(self, store: SupportsJournal) -> bool:
        """Mirror everything that is in the journal and not in memory.

        When the journal does not hold what was mirrored last, or no longer, it
        is loaded anew: going on from there would mix two histories.
        """
        try:
            return bool(self._read_on(store))
        except CursorExpiredError:
            self._load()
            return True

    def _read_on(self, store: SupportsJournal) -> set[str]:
        """Mirror what comes after memory in the journal; returns which tasks that concerns."""
        news = set[str]()
        with collector.paused():
            while True:
                entries = entries_beyond(store, self._mirror.position, PAGE_ENTRIES)
                self._mirror_entries(entries, local=False)
                news.update(entry.task_id for entry in entries)
                if len(entries) < PAGE_ENTRIES:
                    return news

    def _mirror_entries(self, entries: Sequence[JournalEntry], *, local: bool) -> None:
        events: list[Event] = []
        for entry in entries:
            event = self._mirror.publish(entry, local=local)
            if event is not None:
                events.append(event)
        self._hooks.emit(events)

    def _load(self) -> None:
        """Start over from the store, and say so to the hooks."""
        snapshot = self._store.load_snapshot()
        self._mirror.reset(snapshot)
        if isinstance(self._store, SupportsJournal):
            self._mirror.commit_id = commit_id_at(self._store, snapshot.seq)
        self._stale = False
        self._hooks.emit([Restored(snapshot.seq, len(snapshot.records), snapshot.records)])


def _pause(attempt: int) -> None:
    """Let the others get on: nothing at first, then up to a few milliseconds, jittered."""
    if attempt > EAGER_ATTEMPTS:
        time.sleep(random.uniform(0, min(0.0005 * 2**attempt, 0.01)))  # noqa: S311 (jitter)
