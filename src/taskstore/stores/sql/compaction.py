"""Compaction: publish a snapshot of the rows, move the floor, trim.

Nothing here holds the head lock for longer than one small transaction.  The
rows are read in one read transaction into a temporary file, and written to
the database from there: a read transaction that lasted as long as the writing
would keep SQLite's log from being emptied and PostgreSQL's dead rows from
being vacuumed, and would need a second connection, which a host's pool may
not have.

A lease on the head row keeps other compactors away.  It is renewed with every
transaction, each of which fails once another has taken it over; so one that
was stopped for too long does no harm when it wakes.

No entry is trimmed that is all there is of a task, and of those that do not
decode the bytes are kept in ``task_set_aside`` [12].
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, NamedTuple

import msgspec
import sqlalchemy as sa

from taskstore.errors import CorruptStoreError, StoreUnavailableError
from taskstore.model.codec import checksum
from taskstore.model.ids import Clock
from taskstore.model.journal import Quarantined
from taskstore.model.policies import CompactionPolicy, CompactionReport, JournalStats, SnapshotInfo
from taskstore.stores.common import compaction
from taskstore.stores.common.compaction import CompactionPoint, CompactionSteps, Retained
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import Session
from taskstore.stores.sql.lease import Lease
from taskstore.stores.sql.rows import SnapshotRow, as_bytes, entry_of, line_of, quarantined_line
from taskstore.stores.sql.snapshots import (
    chunks_of,
    insert,
    newest_snapshot_row,
    quarantined_rows,
    read_head,
    read_quarantined,
    read_snapshot_rows,
    scan_tasks,
    with_chunk,
)
from taskstore.stores.sql.statements import ENTRY, Statements, stored_bytes
from taskstore.stores.sql.tables import (
    task_journal,
    task_set_aside,
    task_snapshot_chunks,
    task_snapshots,
    tasks,
    taskstore_head,
)
from taskstore.stores.sql.transactions import Transactions

STEP = 1000
"""How many journal rows are read at a time, and deleted by one transaction."""
CHUNK_STEP = 8
"""How many chunks of a dropped snapshot one transaction deletes."""
SHOWN = 3
"""How many tasks one error names."""


def compact(
    transactions: Transactions,
    policy: CompactionPolicy,
    clock: Clock,
    on_kept: Callable[[Quarantined], object],
) -> CompactionReport:
    """Compact when the policy says so; see ``SupportsCompaction.compact``.

    ``on_kept`` is called with what was set aside of entries that were trimmed.
    """
    report = compaction.compact(Steps(transactions, on_kept), policy, clock)
    if policy.erase_deleted:
        transactions.erase()
    return report


class Steps(CompactionSteps):
    """The steps of one compaction, in small transactions under the lease."""

    def __init__(
        self,
        transactions: Transactions,
        on_kept: Callable[[Quarantined], object] = lambda _: None,
    ) -> None:
        self._transactions = transactions
        self._location = transactions.database.location
        self._sql = transactions.database.sql
        self._on_kept = on_kept
        self._lease = Lease(transactions)
        self._spool: IO[bytes]
        # The snapshot that is written, and the length of each of its chunks in the spool,
        # in bytes.
        self._building = SnapshotRow(0, 0)
        self._sizes: list[int] = []

    def stats(self, now: int) -> JournalStats:
        look = partial(self._stats, now=now)
        return self._transactions.read(look, one_moment=True)

    def _stats(self, session: Session, now: int) -> JournalStats:
        head = read_head(session, self._sql)
        mark = newest_snapshot_row(session, head.head_seq)
        newest = 0 if mark is None else mark.seq
        first = max(newest + 1, head.floor)
        return JournalStats(
            now=now,
            newest=newest,
            floor=head.floor,
            entries=head.head_seq - newest,
            records=session.scalar(sa.select(sa.func.count()).select_from(tasks)),
            oldest_at=session.scalar(
                sa.select(task_journal.c.at).where(task_journal.c.seq == first)
            ),
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        with self._lease.held(), _spool(self._transactions.database) as self._spool:
            yield

    def begin(self) -> CompactionPoint:
        self._clear_leftovers()
        return self._transactions.read(self._begin, one_moment=True)

    def _begin(self, session: Session) -> CompactionPoint:
        """Read everything of one moment into the spool."""
        self._spool.seek(0)
        self._spool.truncate()
        head = read_head(session, self._sql)
        mark = SnapshotRow(head.head_seq, head.last_at)
        self._sizes = []
        for chunk in chunks_of(self._lines(session)):
            mark = with_chunk(mark, chunk)
            self._sizes.append(len(chunk))
            self._spool.write(chunk)
        self._spool.flush()
        self._building = mark
        marks = tuple(SnapshotInfo(mark.seq, mark.at) for mark in read_snapshot_rows(session))
        return CompactionPoint(head.head_seq, head.last_at, head.floor, marks)

    def _lines(self, session: Session) -> Iterator[bytes]:
        yield from map(line_of, scan_tasks(session, self._sql))
        yield from map(quarantined_line, read_quarantined(session, self._sql))

    def publish(self, point: CompactionPoint, retained: Retained) -> int:
        self._transactions.read(
            lambda session: check_rows(session, point.floor, retained.floor, self._location)
        )
        if point.seq not in [mark.seq for mark in point.marks]:
            self._write_chunks(point.seq)
            there = task_snapshots.c.seq == point.seq
            self._lease.run(partial(self._put, task_snapshots, there, self._building))
        self._move_floor(retained)
        return self._building.records + self._building.quarantined

    def _write_chunks(self, seq: int) -> None:
        chunks = task_snapshot_chunks.c
        self._spool.seek(0)
        for number, size in enumerate(self._sizes):
            chunk = self._spool.read(size)
            there = sa.and_(chunks.seq == seq, chunks.chunk == number)
            row = (seq, number, chunk, checksum(chunk))
            self._lease.run(partial(self._put, task_snapshot_chunks, there, row))

    def _put(
        self, table: sa.Table, there: sa.ColumnElement[bool], row: tuple[Any, ...], tx: Session
    ) -> None:
        """Write a row in place of the one that is there: repeating it is the same."""
        tx.change(sa.delete(table).where(there))
        insert(tx, self._transactions.database, table, [row])

    def _move_floor(self, retained: Retained) -> None:
        """Move the floor and drop snapshots, in one transaction: after it no reader sees
        what is then deleted in steps."""
        dropped = task_snapshots.c.seq.not_in(sorted(retained.seqs))

        def work(tx: Session) -> None:
            tx.change(sa.delete(task_snapshots).where(dropped))
            tx.change(sa.update(taskstore_head).values(floor=retained.floor))

        self._lease.run(work)

    def trim(self, point: CompactionPoint, retained: Retained) -> None:
        del point, retained  # what no reader sees, and what earlier compactions left of it
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        """Delete, in small steps, what no reader sees: entries below the floor, and
        snapshots that were dropped or never finished."""
        while self._lease.run(_drop_some):
            pass
        database = self._transactions.database
        look = partial(examine, sql=self._sql, step=STEP)
        while (found := self._transactions.read(look)) is not None:
            self._lease.run(partial(trim_entries, database=database, found=found))
            for item in found.kept:
                self._on_kept(item)


def _drop_some(tx: Session) -> bool:
    """Delete some chunks of a snapshot that was dropped or never finished; whether there
    was one."""
    seq, chunk = task_snapshot_chunks.c.seq, task_snapshot_chunks.c.chunk
    dead = ~sa.exists().where(task_snapshots.c.seq == seq)
    found = tx.ask(sa.select(seq, chunk).where(dead).order_by(seq, chunk).limit(1))
    for victim, first in found:
        some = sa.and_(seq == victim, chunk < first + CHUNK_STEP)
        tx.change(sa.delete(task_snapshot_chunks).where(some))
    return bool(found)


@contextmanager
def _spool(database: Database) -> Iterator[IO[bytes]]:
    """A file without a name, in the database's ``scratch`` directory or the system's."""
    place = database.scratch or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            yield file
    except OSError as error:
        raise StoreUnavailableError(
            f"{database.location} cannot be compacted: a temporary file in {place} fails: {error}",
            hint="free some space there and try again",
        ) from error


# -- trimming -----------------------------------------------------------------


def check_rows(session: Session, low: int, high: int, location: str) -> None:
    """Refuse to trim the entries in ``[low, high)`` where one is all that is left of a task.

    Raises :class:`~taskstore.CorruptStoreError` for a task whose last change is one of
    these, is no deletion, and has no row.
    """
    entry, later = task_journal.c, task_journal.alias("later")
    lost = (
        sa.select(entry.task_id, entry.seq)
        .where(entry.seq >= low, entry.seq < high, entry.kind != "deleted")
        .where(~sa.exists().where(tasks.c.task_id == entry.task_id))
        .where(~sa.exists().where(later.c.task_id == entry.task_id, later.c.seq > entry.seq))
    )
    found = session.ask(lost.limit(SHOWN))
    if found:
        named = ", ".join(f"task {task_id!r} (seq {seq})" for task_id, seq in found)
        raise CorruptStoreError(
            f"{location}: tasks",
            f"there is no row of {named}, whose last image is in the journal",
            hint="nothing was trimmed; put the row back from task_journal or restore a backup, "
            "then compact again",
        )


class Findings(NamedTuple):
    """The next entries that are trimmed, and what is to be done besides deleting them."""

    end: int
    """The seq below which they lie."""
    forgotten: Sequence[int]
    """The rows of ``task_set_aside`` that keep something of a task that they delete."""
    kept: Sequence[Quarantined]
    """What of them does not decode, and is kept nowhere else."""
    last_row: int
    """The highest id in ``task_set_aside``, before anything is added for them."""


def examine(session: Session, sql: Statements, step: int) -> Findings | None:
    """Look through the next ``step`` entries below the floor; ``None`` if there is none.

    What lies below the floor changes no more: this needs no lock.
    """
    floor = read_head(session, sql).floor
    low = session.scalar(sa.select(sa.func.min(task_journal.c.seq)))
    if low is None or low >= floor:
        return None
    end = min(floor, low + step)
    rows, last_row = _rows_by_task(session, sql)
    forgotten: list[int] = []
    kept: list[Quarantined] = []
    seq = task_journal.c.seq
    for row in session.ask(sa.select(*ENTRY).where(seq >= low, seq < end).order_by(seq)):
        if row[2] == "deleted":
            forgotten += rows.pop(row[3], ())
            continue
        item = _damage_of(row)
        if item is not None and not _is_gone_or_stored(session, row):
            kept.append(item)
    return Findings(end, forgotten, kept, last_row)


def trim_entries(tx: Session, database: Database, found: Findings) -> None:
    """Delete entries that were examined, keeping what is to be kept of them.

    Doing it twice is the same: rows that were added lie behind the last one.
    """
    aside = task_set_aside.c.id
    if found.forgotten:
        tx.change(sa.delete(task_set_aside).where(aside.in_(found.forgotten)))
    if found.kept:
        tx.change(sa.delete(task_set_aside).where(aside > found.last_row))
        payloads = enumerate(map(msgspec.json.encode, found.kept), found.last_row + 1)
        rows = [(number, payload, checksum(payload)) for number, payload in payloads]
        insert(tx, database, task_set_aside, rows)
    tx.change(sa.delete(task_journal).where(task_journal.c.seq < found.end))


def _damage_of(row: Any) -> Quarantined | None:
    """What is to be kept of an entry; ``None`` when it is sound."""
    seq, _, _, task_id, revision, _, payload, _ = row
    try:
        found = entry_of(row, "task_journal").quarantined
    except CorruptStoreError as error:
        reason = error.reason
    else:
        if found is None:
            return None
        reason = found.reason
    where = f"task_journal, seq {seq}"
    return Quarantined(as_bytes(payload), where, reason, task_id, revision, superseded=True)


def _is_gone_or_stored(session: Session, row: Any) -> bool:
    """Whether a later entry deletes the task, whose record then goes as every deleted one
    does; or the entry is still the task's row, byte by byte, which keeps it."""
    seq, _, _, task_id, revision, _, payload, _ = row
    entry = task_journal.c
    deletion = sa.select(entry.seq).where(
        entry.task_id == task_id, entry.seq > seq, entry.kind == "deleted"
    )
    if session.scalar(deletion.limit(1)) is not None:
        return True
    stored = session.ask(
        sa.select(tasks.c.revision, stored_bytes(tasks.c.payload)).where(tasks.c.task_id == task_id)
    )
    return [(found, as_bytes(data)) for found, data in stored] == [(revision, as_bytes(payload))]


def _rows_by_task(session: Session, sql: Statements) -> tuple[dict[str, list[int]], int]:
    """Which rows of ``task_set_aside`` keep something of which task, and the highest id."""
    rows: dict[str, list[int]] = {}
    last = 0
    for last, item in quarantined_rows(session, sql):
        if item.superseded and item.task_id is not None:
            rows.setdefault(item.task_id, []).append(last)
    return rows, last
