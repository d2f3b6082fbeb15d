"""The seam: what a store promises the registry.

A store is the durable side of a ledger.  It knows nothing of lifecycles,
indexes or hooks; it keeps a gap-free journal of changes and the records that
follow from it.  To write one, subclass :class:`TaskRegistryStore`, implement
``load_snapshot`` and ``save_snapshot``, and prove it with
``taskstore.testing.StoreContract``.  Everything else is an optional ability:
a ``Supports…`` protocol whose methods the store simply has.

The numbers in brackets are the invariants of ``docs/concepts.md``.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Protocol, Self, runtime_checkable

from msgspec import Struct

from taskstore.errors import (
    ConflictError,
    CursorExpiredError,
    ReadOnlyError,
    StoreClosedError,
)
from taskstore.model.ids import Clock, system_clock
from taskstore.model.journal import (
    Change,
    ChangeSet,
    Commit,
    JournalEntry,
    Position,
    Quarantined,
    Snapshot,
    Step,
    dedup_key,
    entries_of,
    find_conflicts,
    fold,
    plan,
    quarantined_revisions,
)
from taskstore.model.policies import CompactionPolicy, CompactionReport
from taskstore.model.query import Page, TaskQuery


class StoreReport(Struct, frozen=True):
    """What a store has to tell its operator.

    ``quarantined`` are the records that do not decode, as found by the last
    load [12].  ``notices`` are sentences: a torn line that was cut, an
    affected SQLite library, a durability that the server decides.
    """

    quarantined: tuple[Quarantined, ...] = ()
    notices: tuple[str, ...] = ()


class VerifyReport(Struct, frozen=True):
    """What :meth:`SupportsIntegrity.verify` found.

    ``problems`` are sentences, none when the ledger is whole; ``records`` and
    ``entries`` say how much was checked, ``seq`` up to which commit.
    """

    seq: int
    records: int
    entries: int
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong (``bool``)."""
        return not self.problems


class TaskRegistryStore(ABC):
    """The durable side of a ledger: one open instance of a backend.

    Instances are used from several threads at once, but the registry never
    calls :meth:`apply` from two at a time.  A store that implements only the
    two abstract methods serves one process.
    """

    clock: Clock = staticmethod(system_clock)
    """Where commit times come from; a registry with a clock of its own sets it."""

    location: str = ""
    """Where the data lies, for messages: a path or URL without its password."""

    durability: str = "full"
    """What an acknowledged change survives [4]: ``full`` (power loss) or ``process`` (kill -9)."""

    unsupported_guarantees: Mapping[str, str] = MappingProxyType({})
    """What this store does not promise, with the reason: ``processes`` (several
    processes on one storage) and ``crash-safe`` (the writer killed at any
    instruction).  The contract suite skips those clauses and says why."""

    def __init__(self, *, read_only: bool = False) -> None:
        self.read_only = read_only
        self._closed = False
        self._opened_by = os.getpid()

    @abstractmethod
    def load_snapshot(self) -> Snapshot:
        """Return every live record as of one seq, head and records from one moment [5].

        A new store gives ``Snapshot(0, {})``.  Records that do not decode are
        in the snapshot's ``quarantined`` [12].  Raises
        :class:`~taskstore.CorruptStoreError` when the storage is damaged.
        """

    @abstractmethod
    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Atomically make ``snapshot`` the whole content.

        Afterwards head = ``snapshot.seq``, the journal is empty and floor =
        ``snapshot.seq`` + 1.  On a store whose head is not 0, ``snapshot.seq``
        must exceed it, else :class:`~taskstore.ConflictError`.  Durable when
        it returns [4]; killed half-way, the old content is still there.
        """

    def apply(self, changes: Sequence[Change]) -> Commit:
        """Commit a batch of changes: all of it or nothing [3].

        Each change gets the next seq, in order.  A change to revision r + 1
        applies over stored revision r; revision 1 over absence, when the
        journal holds no deletion of that id and nobody else holds the
        record's (run_id, run_digest).  Otherwise
        :class:`~taskstore.ConflictError` names every task in the way and
        nothing is written, not even a seq.  Durable when it returns [4].
        A batch is validated first: :class:`~taskstore.ValidationError`.

        ``changes`` may be a :class:`~taskstore.ChangeSet`: a store that keeps
        commit ids then raises :class:`~taskstore.ConflictError` when its journal
        does not hold the commit over which they were worked out.

        Note for implementers: this default loads and saves everything, which
        is right but slow, and safe for one process only.
        """
        self._check_writable()
        steps = plan(changes)
        stored = self.load_snapshot()
        check_steps(steps, stored)
        commit = Commit(stored.seq + 1, stored.seq + len(changes), max(self.clock(), stored.at))
        self.save_snapshot(fold(stored, entries_of(changes, commit)))
        return commit

    def report(self) -> StoreReport:
        """Say what the operator should know.  Never raises, reads nothing new."""
        return StoreReport()

    def close(self) -> None:
        """Release everything.  Closing twice is fine; any other call afterwards
        raises :class:`~taskstore.StoreClosedError`.

        In a forked child it releases nothing: locks, connections and threads
        belong to the parent.
        """
        self._closed = True

    @property
    def _in_forked_child(self) -> bool:
        """Whether another process than the one that opened the store asks (``bool``)."""
        return self._opened_by != os.getpid()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError(f"the store {self.location or type(self).__name__} is closed")
        if self._opened_by != os.getpid():
            raise forked_error(f"the store {self.location or type(self).__name__}")

    def _check_writable(self) -> None:
        if self._closed or self._opened_by != os.getpid():
            self._check_open()
        if self.read_only:
            raise ReadOnlyError(
                f"the store {self.location or type(self).__name__} was opened read-only"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.location}>"


@runtime_checkable
class SupportsJournal(Protocol):
    """Keeps the entries behind the records: history, change feeds, several processes."""

    def head(self) -> int:
        """Return the last seq, 0 before the first."""
        ...

    def floor(self) -> int:
        """Return the first seq kept; head + 1 when the journal is empty, 1 when it is new."""
        ...

    def read_journal(self, after: int, limit: int) -> Sequence[JournalEntry]:
        """Return the entries after seq ``after``, in order, at most ``limit``.

        Empty when there are none.  Who sees seq n can see everything from the
        floor to n [2].  Raises :class:`~taskstore.CursorExpiredError` when
        ``after`` < floor - 1.
        """
        ...

    def read_snapshot(self, at: int) -> Snapshot | None:
        """Return the newest retained snapshot whose seq is at most ``at``, or ``None``.

        When the floor is above 1, the snapshot at floor - 1 is retained.
        """
        ...

    def wait_for(self, after: int, timeout: float) -> bool:
        """Wait until the head exceeds ``after``, at most ``timeout`` seconds.

        Returns whether it does, of whatever process the commit is; ``timeout``
        may be 0 and may be years.  Never misses a commit: set up whatever tells
        of commits first, then look at the head, then wait.  Never spins: a
        waiting thread, and any that works for it, computes next to nothing.
        Any number of threads may wait; they hold up no other call, and
        :meth:`~TaskRegistryStore.close` ends every wait at once, with
        :class:`~taskstore.StoreClosedError`.
        """
        ...


@runtime_checkable
class SupportsExclusive(Protocol):
    """Lets a writer look and decide while the others wait."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other writers out from here to the first ``apply``, or to the end of the body.

        Others are all other instances on the same storage, in any process:
        their ``apply`` waits as for a commit.  In the body the calling thread
        sees with ``read_journal`` whatever is committed, and what it applies
        conflicts with nobody who came in between.  Entering, leaving and
        raising write nothing; leaving lets the others in, whether anything was
        applied or not.  The body is short, reads, and applies at most once.
        Raises :class:`~taskstore.StoreBusyError` when another writer holds on,
        and :class:`~taskstore.ReadOnlyError`.
        """
        ...


@runtime_checkable
class SupportsHistory(Protocol):
    """Finds one task's entries without reading the whole journal."""

    def read_history(self, task_id: str) -> Sequence[JournalEntry]:
        """Return the entries of one task that are kept, oldest first.

        Of a deleted task too; none for an id that never was.
        """
        ...


@runtime_checkable
class SupportsCompaction(Protocol):
    """Folds its journal into snapshots."""

    def compact(self, policy: CompactionPolicy) -> CompactionReport:
        """Publish a snapshot and trim the journal as far as ``policy`` says.

        Changes no answer but how far back history reaches, and may be killed
        at any instruction [7].  Does nothing, and says so, when the policy
        finds that it is not due.  One compactor at a time:
        :class:`~taskstore.StoreBusyError` for the second.
        """
        ...


@runtime_checkable
class SupportsQuery(Protocol):
    """Answers queries itself, without loading the ledger."""

    def query(self, query: TaskQuery) -> Page:
        """Return one page, newest first, of one moment: its ``seq`` is that commit.

        The answer is that of ``taskstore.model.query.evaluate``.
        """
        ...


@runtime_checkable
class SupportsIntegrity(Protocol):
    """Checks itself."""

    def verify(self) -> VerifyReport:
        """Check contiguity, checksums, revisions, and that folding the journal
        gives the records [5].  Reads only; memory may grow with the ledger."""
        ...


def entries_after_position(
    journal: SupportsJournal, position: Position, limit: int
) -> Sequence[JournalEntry]:
    """Return the entries after a position of this history, at most ``limit``.

    Raises :class:`~taskstore.CursorExpiredError` when they are no longer
    complete, or when the journal holds another commit there, or none yet.
    A position whose own entry was trimmed, and nothing more, is believed.
    """
    seq, commit_id = position.seq, position.commit_id
    if not seq:
        return journal.read_journal(0, limit)
    try:
        entries = journal.read_journal(seq - 1, limit + 1)
    except CursorExpiredError:
        return journal.read_journal(seq, limit)
    if not entries or (commit_id and entries[0].commit_id != commit_id):
        raise CursorExpiredError(seq, journal.floor(), replaced=True)
    return entries[1:]


def commit_id_at(journal: SupportsJournal, seq: int) -> str:
    """Return the id of the commit that has ``seq``; empty where that cannot be told."""
    if not seq:
        return ""
    try:
        entries = journal.read_journal(seq - 1, 1)
    except CursorExpiredError:
        return ""
    return entries[0].commit_id if entries and entries[0].seq == seq else ""


def check_base(journal: SupportsJournal, changes: Sequence[Change]) -> None:
    """Raise :class:`~taskstore.ConflictError` for a :class:`ChangeSet` over another history.

    A store calls it under its lock, unless it has a faster way.
    """
    if isinstance(changes, ChangeSet) and changes.base.seq:
        try:
            entries_after_position(journal, changes.base, 0)
        except CursorExpiredError as error:
            raise base_not_found(changes.base) from error


def base_not_found(position: Position) -> ConflictError:
    """The error of changes over a position that the journal does not hold."""
    return ConflictError(
        [],
        f"the journal does not hold the commit at seq {position.seq} over which this was made: "
        "a backup was restored, a standby took over, or the journal was trimmed since",
    )


def forked_error(what: str) -> StoreClosedError:
    """The error of ``what``, used in a child that was forked after it was opened."""
    return StoreClosedError(
        f"{what} was opened before the process forked",
        hint="open one of its own in each process",
    )


def check_steps(steps: Sequence[Step], stored: Snapshot) -> None:
    """Raise :class:`~taskstore.ConflictError` unless the steps apply over ``stored``.

    For stores that keep no journal: deletions of the past are not known.
    """
    revisions = quarantined_revisions(stored.quarantined)
    revisions |= {task_id: record.revision for task_id, record in stored.records.items()}
    holders = {
        key: record.task_id
        for record in stored.records.values()
        if (key := dedup_key(record)) is not None
    }
    conflicts = find_conflicts(steps, revisions, (), holders)
    if conflicts:
        raise ConflictError(conflicts)
