"""The store interface: what a backend must implement and guarantee.

A store is the durable side of a ledger.  A store keeps a gap-free journal of changes and the
records that result from the changes.  A store does not implement lifecycle rules, indexes or hooks.
To write a store, subclass :class:`TaskRegistryStore`, implement ``load_snapshot`` and
``save_snapshot``, and test the store with ``taskstore.testing.StoreContract``.  Every ability
beyond ``load_snapshot`` and ``save_snapshot`` is optional; each ``Supports…`` protocol defines the
methods of one ability.

The numbers in brackets are the numbers of the promises in ``docs/concepts.md``.
"""

from __future__ import annotations

import os
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from taskstore.model.compaction_policy import CompactionPolicy, CompactionReport
from taskstore.model.ids import CLOCK_TOLERANCE_MS, Clock, system_clock
from taskstore.model.journal import (
    Change,
    ChangeSet,
    Commit,
    EntryKind,
    JournalEntry,
    NetChange,
    Position,
    Quarantined,
    Snapshot,
    dedup_key,
    entries_of,
    find_conflicts,
    fold,
    plan,
    quarantined_revisions,
)
from taskstore.model.query import (
    Page,
    Summary,
    TaskQuery,
    evaluate,
    ids_with_ending,
    newest_first,
    split_page,
)


class StoreReport(Struct, frozen=True):
    """The facts that a store reports to its operator.

    ``quarantined`` lists the records that the last load could not decode [12].  ``notices`` are
    sentences about the store.  For example, a notice says that a torn line was truncated, that the
    SQLite library has a known bug, or that the server decides the durability.
    """

    quarantined: tuple[Quarantined, ...] = ()
    notices: tuple[str, ...] = ()


class VerifyReport(Struct, frozen=True):
    """The result of :meth:`SupportsIntegrity.verify`.

    ``problems`` has one sentence for each problem, and is empty for an intact ledger.  ``records``
    and ``entries`` are the numbers of checked records and entries, as of ``seq``.
    """

    seq: int
    records: int
    entries: int
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if there are no problems (``bool``)."""
        return not self.problems


class TaskRegistryStore(ABC):
    """The durable side of a ledger: one open instance of a backend.

    Several threads can use one instance at once, but the registry never calls :meth:`apply` from
    two threads at a time.  A store that implements only the two abstract methods supports the use
    by one process only.
    """

    clock: Clock = staticmethod(system_clock)
    """The function that returns commit times.  A registry with a ``clock`` argument replaces this
    function by the argument."""

    location: str = ""
    """The path of the storage, or the URL of the storage without the password; used in messages."""

    durability: str = "full"
    """The worst failure that an acknowledged change survives [4]: ``full`` means power loss,
    ``process`` means a kill of the writer."""

    unsupported_guarantees: Mapping[str, str] = MappingProxyType({})
    """The guarantees that this store does not give, each with the reason: ``processes``
    (several processes on one storage), ``crash-safe`` (a kill of the writer at any
    instruction is safe) and ``exact-history`` (compaction trims exactly the history that the
    policy does not retain).  The contract suite skips each clause that needs an unsupported
    guarantee, and reports the reason."""

    def __init__(self, *, read_only: bool = False) -> None:
        self.read_only = read_only
        self._closed = False
        self._opened_by = os.getpid()
        self._finalizer: weakref.finalize[..., TaskRegistryStore] | None = None

    @abstractmethod
    def load_snapshot(self) -> Snapshot:
        """Return all records as of the current head [5].

        A new store returns ``Snapshot(0, {})``.  Records that cannot be decoded are
        in the snapshot's ``quarantined`` [12].  Raises
        :class:`~taskstore.CorruptStoreError` when the storage is damaged.
        """

    @abstractmethod
    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Atomically replace the whole content with ``snapshot``.

        After the call, the head is ``snapshot.seq``, the journal is empty and the floor is
        ``snapshot.seq`` + 1.  Raises :class:`~taskstore.ConflictError` if the head is not 0 and
        ``snapshot.seq`` does not exceed the head.  The snapshot is durable when the method returns
        [4].  If the writer is killed before the replacement is complete, the old content remains.
        """

    def apply(self, changes: Sequence[Change]) -> Commit:
        """Commit a batch of changes atomically: all of them or none [3].

        Each change of the batch gets the next seq, in the order of the batch.  A change to
        revision r + 1 applies only if the task's stored revision is r.  A change to revision 1
        applies only if the task is not stored, the journal contains no deletion of its id, and
        no other task has its dedup key (run_id, run_digest).  If a change does not apply,
        :class:`~taskstore.ConflictError` names every conflicting task, nothing is written
        and no seq is used.  The commit is durable when the method returns [4].  Raises
        :class:`~taskstore.ValidationError`, before any write, for an invalid batch.

        A store that keeps commit ids also checks the base position of a
        :class:`~taskstore.ChangeSet`.  If the store's journal does not contain the commit at the
        base position, the store raises :class:`~taskstore.ConflictError`.

        Note for implementers: the default implementation of ``apply`` loads and saves the
        whole ledger.  The default implementation is correct but slow, and only one process
        can use it safely.
        """
        self._check_writable()
        net_changes = plan(changes)
        stored = self.load_snapshot()
        check_net_changes(net_changes, stored)
        commit = Commit(stored.seq + 1, stored.seq + len(changes), max(self.clock(), stored.at))
        self.save_snapshot(fold(stored, entries_of(changes, commit)))
        return commit

    def report(self) -> StoreReport:
        """Return the report for the operator; never raise an error, and never read or lock stored
        data.

        A store with a journal must give a notice if the time of the last known commit is more than
        an hour later than the clock; :func:`clock_notices` returns this notice.
        """
        return StoreReport()

    def close(self) -> None:
        """Release all resources.  A second ``close`` does nothing.  After ``close``, every
        other call raises :class:`~taskstore.StoreClosedError`.

        In a forked child, ``close`` releases no resources, because the locks, connections
        and threads belong to the parent process.

        If the program drops the store without ``close``, the garbage collector releases the
        resources.  If the dropped store has open descriptors, a ``ResourceWarning`` is given too:
        see :meth:`_release_when_dropped`.
        """
        self._closed = True
        if self._finalizer is not None:
            self._finalizer.detach()

    def _release_when_dropped(self, release: Callable[[], object]) -> None:
        """If the store is dropped without ``close``, call ``release`` and give a
        ``ResourceWarning``.

        A store with open descriptors calls this method at the end of its ``__init__``.  ``release``
        must not refer to the store.  The garbage collector calls ``release`` at any moment and in
        any thread, so ``release`` must not wait for another thread, for a server, or for a lock
        that the same thread possibly owns already.  In a forked child, ``release`` is not called.
        """
        self._finalizer = weakref.finalize(self, _release_dropped, repr(self), os.getpid(), release)
        self._finalizer.atexit = False  # the operating system releases everything at the exit

    @property
    def _in_forked_child(self) -> bool:
        """True if this process was forked after the store was opened (``bool``)."""
        return self._opened_by != os.getpid()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError(f"the store {self.location or type(self).__name__} is closed")
        if self._opened_by != os.getpid():
            raise used_after_fork_error(f"the store {self.location or type(self).__name__}")

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


class LoadedRecordsStore(TaskRegistryStore):
    """A base class for a store that keeps all records in memory, or loads all records for each
    query.

    The methods implement :class:`SupportsQuery`, :class:`SupportsStreaming`,
    :class:`SupportsSummary` and :class:`SupportsIdSearch` on the result of ``load_snapshot``.
    """

    def query(self, query: TaskQuery) -> Page:
        """Implement :meth:`SupportsQuery.query`."""
        loaded = self.load_snapshot()
        return evaluate(query, loaded.records.values(), loaded.seq)

    def stream(self, query: TaskQuery, batch_size: int) -> Iterator[Page]:
        """Implement :meth:`SupportsStreaming.stream`."""
        loaded = self.load_snapshot()
        matching = newest_first(query, loaded.records.values())
        return split_page(matching, query, batch_size, loaded.seq)

    def summary(self) -> Summary:
        """Implement :meth:`SupportsSummary.summary`."""
        loaded = self.load_snapshot()
        return Summary.from_records(loaded.records.values(), loaded.seq)

    def find_ids(
        self, endings: Collection[str], limit: int, *, deleted: bool = False
    ) -> Sequence[str]:
        """Implement :meth:`SupportsIdSearch.find_ids`."""
        ids = self._deleted_ids() if deleted else self.load_snapshot().records
        return ids_with_ending(ids, endings, limit)

    def _deleted_ids(self) -> set[str]:
        """Return the ids of the tasks whose deletion is in the journal."""
        self._check_open()
        if not isinstance(self, SupportsJournal):
            return set()
        entries = self.read_journal(self.floor() - 1, self.head())
        return {entry.task_id for entry in entries if entry.kind is EntryKind.DELETED}


def _release_dropped(what: str, opened_by: int, release: Callable[[], object]) -> None:
    if opened_by == os.getpid():
        try:
            release()
        finally:
            warnings.warn(f"{what} was dropped without close()", ResourceWarning, stacklevel=1)


@runtime_checkable
class SupportsJournal(Protocol):
    """A store that keeps a journal, for history, change feeds and several processes."""

    def head(self) -> int:
        """Return the last assigned seq, or 0 before the first commit."""
        ...

    def floor(self) -> int:
        """Return the seq of the first retained entry: head + 1 for an empty journal, 1 for a new
        journal."""
        ...

    def read_journal(self, after: int, limit: int) -> Sequence[JournalEntry]:
        """Return at most ``limit`` entries after seq ``after``, in order.

        Returns an empty sequence if there are no entries after ``after``.  A reader that
        sees seq n can read every entry from the floor to n [2].  Raises
        :class:`~taskstore.CursorExpiredError` when ``after`` < floor - 1.
        """
        ...

    def read_snapshot(self, at: int) -> Snapshot | None:
        """Return the newest retained snapshot whose seq is at most ``at``, or ``None``.

        If the floor is above 1, the store retains the snapshot at floor - 1.
        """
        ...

    def wait_for(self, after: int, timeout: float) -> bool:
        """Wait until the head exceeds ``after``, at most ``timeout`` seconds.

        Returns whether the head exceeds ``after``.  Commits of every process count.  ``timeout``
        can be any time from 0 to several years.  An implementation must not miss a commit: it
        starts its notification source, then reads the head, then waits.  An implementation must not
        spin: a waiting thread and its helper thread use almost no CPU time.  Any number of threads
        can wait, and waiting threads must not block other calls.  :meth:`~TaskRegistryStore.close`
        ends every wait at once: each waiting call raises :class:`~taskstore.StoreClosedError`.
        """
        ...


@runtime_checkable
class SupportsCommitIds(Protocol):
    """A store with a journal that finds the commit id of an entry, even of the newest trimmed
    entry."""

    def commit_id(self, seq: int) -> str:
        """Return the id of the commit that contains the entry ``seq``.

        The store knows the ids from seq floor - 1 on: a trim keeps the commit id of the newest
        trimmed entry.  If :meth:`~TaskRegistryStore.save_snapshot` set the floor, the id at
        floor - 1 is unknown.  The result is empty if the id is unknown or there is no such entry.
        """
        ...


@runtime_checkable
class SupportsExclusive(Protocol):
    """A store in which one writer can read and decide while all other writers wait."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the writer lock until the first ``apply`` or the end of the ``with`` body.

        While the lock is held, a call of ``apply`` on any other instance with the same storage, in
        any process, waits for the lock.  This wait is the same as the wait for another commit.  In
        the ``with`` body, ``read_journal`` returns all committed entries to the calling thread, and
        no other instance commits before the ``apply`` in the body.  The context manager itself
        writes nothing, even after an exception.  At the end of the ``with`` body the lock is always
        released, even without an ``apply``.  The ``with`` body must be short, and is allowed to
        read and to call ``apply`` once.  Raises :class:`~taskstore.StoreBusyError` if another
        writer holds the lock longer than the timeout, and :class:`~taskstore.ReadOnlyError` if the
        store is read-only.
        """
        ...


@runtime_checkable
class SupportsHistory(Protocol):
    """A store that finds one task's entries without reading the whole journal."""

    def read_history(self, task_id: str) -> Sequence[JournalEntry]:
        """Return the retained entries of one task, oldest first.

        A deleted task has retained entries too; the result for an unknown id is empty.
        """
        ...


@runtime_checkable
class SupportsCompaction(Protocol):
    """A store that folds its journal into snapshots."""

    def compact(self, policy: CompactionPolicy) -> CompactionReport:
        """Publish a snapshot and trim the journal as far as ``policy`` allows.

        Compaction changes no result of a read, except that older history is removed.  If
        compaction is killed at any instruction, the ledger stays intact [7].  If compaction
        is not due, the call does nothing, and the report contains the reason.  If another
        compactor is active, the call raises :class:`~taskstore.StoreBusyError`.
        """
        ...


@runtime_checkable
class SupportsQuery(Protocol):
    """A store that answers queries without loading the ledger."""

    def query(self, query: TaskQuery) -> Page:
        """Return one page of the matching records, newest first, as of the page's ``seq``.

        The page equals the result of ``taskstore.model.query.evaluate``.
        """
        ...


@runtime_checkable
class SupportsStreaming(Protocol):
    """A store that answers a large query in parts; all parts show the records as of the same
    seq."""

    def stream(self, query: TaskQuery, batch_size: int) -> Iterator[Page]:
        """Yield the page of a query in parts of at most ``batch_size`` records, in order.

        All parts show the records as of one ``seq``, even if other writers commit between two steps
        of the iteration.  The parts together are the page that ``query`` returns, and the last part
        has the ``next_cursor`` of this page.  There is at least one part, which can be empty.  The
        memory use does not depend on the number of parts.  The exception is a store that keeps all
        records in memory, or loads all records for each query.  A store can hold a read transaction
        until the iterator ends or is closed, so the caller must not pause the iteration.
        """
        ...


@runtime_checkable
class SupportsSummary(Protocol):
    """A store that counts its tasks without reading every record."""

    def summary(self) -> Summary:
        """Return the number of records in total, by status and by runtime, as of the summary's
        ``seq``.

        The result equals the count of the records of ``load_snapshot``.  A quarantined record of a
        saved snapshot is not counted.  A stored record that was damaged later can be counted by the
        status and the runtime that are stored beside the record.
        """
        ...


@runtime_checkable
class SupportsIdSearch(Protocol):
    """A store that finds task ids by their endings without reading every record."""

    def find_ids(
        self, endings: Collection[str], limit: int, *, deleted: bool = False
    ) -> Sequence[str]:
        """Return the first ``limit`` task ids, in order, that end with one of ``endings``.

        If ``deleted`` is false, the method searches the ids of stored tasks.  If ``deleted`` is
        true, the method searches instead the ids of deleted tasks whose deletion is in the journal.
        Endings are compared exactly: case matters, and no character is a wildcard.  An ending can
        be a whole id; an empty text is the ending of no id.
        """
        ...


@runtime_checkable
class SupportsIntegrity(Protocol):
    """A store that checks its stored data."""

    def verify(self) -> VerifyReport:
        """Check contiguity, checksums and revisions, and compare the stored records with the fold
        of the journal [5].

        The method also compares every index, and every stored copy of a value, with the records and
        entries.  Each damage that changes the result of a lookup, a query or a read of the journal
        must be detected, either by this method or when the store is opened.  The report lists at
        most 100 problems, and the number of further problems.  The method writes nothing and takes
        no write lock.  The memory use of the method can grow with the ledger.
        """
        ...


def entries_after_position(
    journal: SupportsJournal, position: Position, limit: int
) -> Sequence[JournalEntry]:
    """Return at most ``limit`` entries after a position.

    Raises :class:`~taskstore.CursorExpiredError` in two cases: (a) entries after the position were
    trimmed; (b) the commit of the position is not in the journal at the position's seq.  If the
    entry at the position was trimmed, but no later entry was trimmed, the commit id of the position
    is compared with the result of the store's ``commit_id``.
    """
    seq, commit_id = position.seq, position.commit_id
    if not seq:
        return journal.read_journal(0, limit)
    try:
        entries = journal.read_journal(seq - 1, limit + 1)
    except CursorExpiredError as error:
        # The id is read first: if a trim removes it meanwhile, the read of the entries raises.
        known = journal.commit_id(seq) if isinstance(journal, SupportsCommitIds) else ""
        if known and commit_id not in ("", known):
            raise CursorExpiredError(seq, error.floor, replaced=True) from None
        return journal.read_journal(seq, limit)
    if not entries or (commit_id and entries[0].commit_id != commit_id):
        head = None if commit_id else journal.head()
        raise CursorExpiredError(seq, journal.floor(), replaced=True, head=head)
    return entries[1:]


def commit_id_at(journal: SupportsJournal, seq: int) -> str:
    """Return the id of the commit that contains the entry ``seq``; empty if the id is unknown."""
    if not seq:
        return ""
    if isinstance(journal, SupportsCommitIds):
        return journal.commit_id(seq)
    try:
        entries = journal.read_journal(seq - 1, 1)
    except CursorExpiredError:
        return ""
    return entries[0].commit_id if entries and entries[0].seq == seq else ""


def check_base(journal: SupportsJournal, changes: Sequence[Change]) -> None:
    """Raise :class:`~taskstore.ConflictError` if the base position is not in the journal.

    Only a :class:`ChangeSet` has a base position.  A store calls this function while the store
    holds its writer lock.  A store with its own, faster check does not need this function.
    """
    if isinstance(changes, ChangeSet) and changes.base.seq:
        try:
            entries_after_position(journal, changes.base, 0)
        except CursorExpiredError as error:
            raise base_not_found_error(changes.base) from error


def clock_notices(last_at: int, clock: Clock) -> tuple[str, ...]:
    """If the time of the last commit is over an hour later than the clock, return a notice about
    it.

    ``last_at`` is the time of the last commit (Unix milliseconds, 0 if unknown)."""
    try:
        now = clock()
    except Exception:  # noqa: BLE001 (a report never raises, whatever the host's clock raises)
        return ()
    if last_at <= now + CLOCK_TOLERANCE_MS:
        return ()
    hours = (last_at - now) / 3_600_000
    notice = (
        f"the time of the last commit is {hours:,.1f} hours later than the clock of this machine, "
        "so a clock is or was wrong: until the clock reaches this time, all commits get this time, "
        "compaction keeps them by number and size instead of age, and as_of needs a seq; check the "
        "clocks of all machines that write to the ledger"
    )
    return (notice,)


def base_not_found_error(position: Position) -> ConflictError:
    """Return the error for changes whose base position is not in the journal."""
    return ConflictError(
        [],
        f"the changes are based on a commit at seq {position.seq} that is not in the journal: "
        "a backup was restored, a standby took over, or the journal was trimmed",
    )


def used_after_fork_error(what: str) -> StoreClosedError:
    """Return the error for the use of ``what`` in a forked child, after the parent opened
    ``what``."""
    return StoreClosedError(
        f"{what} was opened before the process forked",
        hint="open a separate instance in each process",
    )


def check_net_changes(net_changes: Sequence[NetChange], stored: Snapshot) -> None:
    """Raise :class:`~taskstore.ConflictError` unless all net changes apply to the snapshot
    ``stored``.

    This function is for stores without a journal, which do not know earlier deletions.
    """
    revisions = quarantined_revisions(stored.quarantined)
    revisions |= {task_id: record.revision for task_id, record in stored.records.items()}
    ids_by_key = {
        key: record.task_id
        for record in stored.records.values()
        if (key := dedup_key(record)) is not None
    }
    conflicts = find_conflicts(net_changes, revisions, (), ids_by_key)
    if conflicts:
        raise ConflictError(conflicts)
