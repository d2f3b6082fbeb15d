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
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import sqlalchemy as sa

from taskstore.clock import Clock
from taskstore.errors import StoreUnavailableError
from taskstore.journal import SetAside
from taskstore.policy import CompactionPolicy, CompactionReport, SnapshotMark
from taskstore.stores import compaction
from taskstore.stores.compaction import CompactionSteps, Cut, Retained, Standing
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.lease import Lease
from taskstore.stores.sql.rows import Tally, aside_line, chunks_of, line_of
from taskstore.stores.sql.session import Session
from taskstore.stores.sql.snapshots import chunk_row, read_head, read_set_aside, scan_tasks
from taskstore.stores.sql.tables import (
    task_journal,
    task_snapshot_chunks,
    task_snapshots,
    tasks,
    taskstore_head,
)
from taskstore.stores.sql.transactions import Transactions
from taskstore.stores.sql.trimming import Findings, check_rows, examine, set_aside_entries

STEP = 2000
"""How many journal rows one transaction deletes."""
CHUNK_STEP = 8
"""How many chunks of a dropped snapshot one transaction deletes."""


def compact(
    transactions: Transactions,
    policy: CompactionPolicy,
    clock: Clock,
    on_kept: Callable[[SetAside], object],
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
        self, transactions: Transactions, on_kept: Callable[[SetAside], object] = lambda _: None
    ) -> None:
        self._transactions = transactions
        self._location = transactions.database.location
        self._sql = transactions.database.sql
        self._on_kept = on_kept
        self._lease = Lease(transactions)
        self._spool: IO[bytes]
        self._tally = Tally()
        # The length of each chunk in the spool, in bytes.
        self._sizes: list[int] = []

    def standing(self) -> Standing:
        return self._transactions.read(self._standing, one_moment=True)

    def _standing(self, session: Session) -> Standing:
        head = read_head(session, self._sql)
        row = session.row(self._sql.snapshot_at, (head.head_seq,))
        newest = 0 if row is None else int(row[0])
        first = max(newest + 1, head.floor)
        return Standing(
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

    def cut(self) -> Cut:
        self._clear_leftovers()
        return self._transactions.read(self._cut, one_moment=True)

    def _cut(self, session: Session) -> Cut:
        """Read everything of one moment into the spool."""
        self._spool.seek(0)
        self._spool.truncate()
        self._tally, self._sizes = Tally(), []
        head = read_head(session, self._sql)
        for chunk in chunks_of(self._lines(session)):
            self._tally.add(chunk)
            self._sizes.append(len(chunk))
            self._spool.write(chunk)
        self._spool.flush()
        return Cut(head.head_seq, head.last_at, head.floor, _marks(session))

    def _lines(self, session: Session) -> Iterator[bytes]:
        yield from map(line_of, scan_tasks(session, self._sql))
        yield from map(aside_line, read_set_aside(session, self._sql))

    def publish(self, cut: Cut, retained: Retained) -> int:
        self._transactions.read(
            lambda session: check_rows(session, cut.floor, retained.floor, self._location)
        )
        if cut.seq not in [mark.seq for mark in cut.marks]:
            self._mark(cut, "building")
            self._write_chunks(cut.seq)
            self._mark(cut, "published")
        self._move_floor(retained)
        return self._tally.records + self._tally.aside

    def _write_chunks(self, seq: int) -> None:
        chunks = task_snapshot_chunks.c
        insert = self._sql.insert[task_snapshot_chunks][1]
        counted = Tally()
        self._spool.seek(0)
        for size in self._sizes:
            row = chunk_row(seq, counted, self._spool.read(size))
            for attempt in self._transactions.attempts():
                with attempt, self._lease.step() as tx:
                    # Doing it twice is the same, should the first answer have been lost.
                    there = sa.and_(chunks.seq == row[0], chunks.chunk == row[1])
                    tx.change(sa.delete(task_snapshot_chunks).where(there))
                    tx.execute(insert, row)
                    break

    def _mark(self, cut: Cut, state: str) -> None:
        """Note a snapshot as being built, or publish it.  Repeating it is the same."""
        values = self._tally.mark(cut.seq, cut.at, state)._asdict()
        for attempt in self._transactions.attempts():
            with attempt, self._lease.step() as tx:
                tx.change(sa.delete(task_snapshots).where(task_snapshots.c.seq == cut.seq))
                tx.change(sa.insert(task_snapshots).values(values))
                break

    def _move_floor(self, retained: Retained) -> None:
        """Move the floor and drop snapshots, in one transaction: after it no reader sees
        what is then deleted in steps."""
        seq, state = task_snapshots.c.seq, task_snapshots.c.state
        gone = sa.and_(state == "published", seq.not_in(sorted(retained.seqs)))
        for attempt in self._transactions.attempts():
            with attempt, self._lease.step() as tx:
                tx.change(sa.update(task_snapshots).where(gone).values(state="dropped"))
                tx.change(sa.update(taskstore_head).values(floor=retained.floor))
                break

    def trim(self, cut: Cut, retained: Retained) -> None:
        del cut, retained  # what no reader sees, and what earlier compactions left of it
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        """Delete, in small steps, what no reader sees: entries below the floor, and
        snapshots that were dropped or never finished."""
        while self._drop_some():
            pass
        # What lies below the floor changes no more: it is read before the lock is taken.
        while (found := self._transactions.read(self._below_the_floor)) is not None:
            for item in self._trim_some(*found):
                self._on_kept(item)

    def _below_the_floor(self, session: Session) -> tuple[int, Findings] | None:
        """Up to which seq the next entries are trimmed, and what is in them."""
        floor = read_head(session, self._sql).floor
        lowest = session.scalar(sa.select(sa.func.min(task_journal.c.seq)))
        if lowest is None or lowest >= floor:
            return None
        end = min(floor, lowest + STEP)
        return end, examine(session, self._sql, lowest, end)

    def _trim_some(self, end: int, findings: Findings) -> list[SetAside]:
        for attempt in self._transactions.attempts():
            with attempt, self._lease.step() as tx:
                moved = set_aside_entries(tx, self._sql, findings)
                tx.change(sa.delete(task_journal).where(task_journal.c.seq < end))
                return moved
        raise AssertionError("attempts end by raising")

    def _drop_some(self) -> bool:
        """Delete some chunks of a snapshot that no reader sees; whether there was one."""
        seq, chunk = task_snapshot_chunks.c.seq, task_snapshot_chunks.c.chunk
        dead = sa.select(task_snapshots.c.seq).where(task_snapshots.c.state != "published")
        for attempt in self._transactions.attempts():
            with attempt, self._lease.step() as tx:
                victim = tx.scalar(dead.limit(1))
                if victim is None:
                    return False
                last = tx.scalar(sa.select(sa.func.max(chunk)).where(seq == victim))
                if last is None:
                    tx.change(sa.delete(task_snapshots).where(task_snapshots.c.seq == victim))
                else:
                    last_ones = sa.delete(task_snapshot_chunks).where(chunk > last - CHUNK_STEP)
                    tx.change(last_ones.where(seq == victim))
                return True
        raise AssertionError("attempts end by raising")


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


def _marks(session: Session) -> tuple[SnapshotMark, ...]:
    seq, state = task_snapshots.c.seq, task_snapshots.c.state
    published = sa.select(seq, task_snapshots.c.at).where(state == "published")
    return tuple(SnapshotMark(*row) for row in session.ask(published.order_by(seq)))
