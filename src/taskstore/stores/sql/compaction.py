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

import os
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa

from taskstore.clock import Clock, system_clock
from taskstore.errors import OutcomeUnknownError, StoreBusyError, StoreUnavailableError
from taskstore.journal import SetAside
from taskstore.policy import CompactionPolicy, CompactionReport, JournalStats, SnapshotMark
from taskstore.stores.sql.connections import Connections
from taskstore.stores.sql.rows import Head, Tally, aside_line, chunks_of, line_of
from taskstore.stores.sql.session import Session
from taskstore.stores.sql.snapshots import chunk_row, read_head, read_set_aside, scan_tasks
from taskstore.stores.sql.spool import Spool
from taskstore.stores.sql.tables import (
    task_journal,
    task_snapshot_chunks,
    task_snapshots,
    tasks,
    taskstore_head,
)
from taskstore.stores.sql.trimming import Findings, check_rows, examine, set_aside_entries

LEASE_MS = 20_000
"""How long a compactor that fell silent on another machine keeps others away, in milliseconds."""
STEP = 2000
"""How many journal rows one transaction deletes."""
PAUSE_S = 0.02
"""The longest pause between two steps, in seconds."""
CHUNK_STEP = 8
"""How many chunks of a dropped snapshot one transaction deletes."""

_T = TypeVar("_T")


class _Picture(NamedTuple):
    """What was read in one moment: the head row, and the chunks of its snapshot."""

    head: Head
    tally: Tally
    sizes: list[int]


def compact(
    connections: Connections,
    policy: CompactionPolicy,
    clock: Clock,
    on_kept: Callable[[SetAside], object],
) -> CompactionReport:
    """Compact when the policy says so; see ``SupportsCompaction.compact``.

    ``on_kept`` is called with what was set aside of entries that were trimmed.
    """
    started = time.monotonic()
    now = clock()
    head, newest, reason = connections.read(
        lambda session: _due(session, connections, policy, now), one_moment=True
    )
    if reason is None:
        return CompactionReport(compacted=False, reason="not due", seq=newest, floor=head.floor)
    lease = _Lease(connections)
    try:
        lease.take()
        _clear_leftovers(lease, on_kept)
        plan = _Plan(policy, clock())
        seq, records = _publish(connections, lease, plan)
        floor, kept, before = _move_floor(lease, plan)
        _clear_leftovers(lease, on_kept)
    finally:
        lease.give_back()
    if policy.erase_deleted:
        connections.erase()
    return CompactionReport(
        compacted=True,
        reason=reason,
        seq=seq,
        floor=floor,
        records=records,
        trimmed=floor - before,
        snapshots=tuple(sorted(kept)),
        duration_s=time.monotonic() - started,
    )


def _due(
    session: Session, connections: Connections, policy: CompactionPolicy, now: int
) -> tuple[Head, int, str | None]:
    """The head row, the newest snapshot's seq, and why compaction is due."""
    head = read_head(session, connections.database.sql)
    row = session.row(connections.database.sql.snapshot_at, (head.head_seq,))
    newest = 0 if row is None else int(row[0])
    records = session.scalar(sa.select(sa.func.count()).select_from(tasks))
    oldest = session.scalar(
        sa.select(task_journal.c.at).where(task_journal.c.seq == max(newest + 1, head.floor))
    )
    stats = JournalStats(entries=head.head_seq - newest, records=records, now=now, oldest_at=oldest)
    return head, newest, policy.due(stats)


class _Plan:
    """Which snapshots are to be kept, as of the moment that the new one is of."""

    def __init__(self, policy: CompactionPolicy, now: int) -> None:
        self._policy = policy
        self._now = now
        self._head = 0
        self._at = 0

    def at(self, session: Session, head: Head, location: str) -> None:
        """Note the moment, and refuse a plan by which something would be lost."""
        self._head, self._at = head.head_seq, head.last_at
        _, floor = self.retained(_marks(session), head.floor)
        check_rows(session, head.floor, floor, location)

    def retained(self, marks: Sequence[SnapshotMark], floor: int) -> tuple[frozenset[int], int]:
        """The seqs of the snapshots to keep, and the new floor."""
        older = [mark for mark in marks if mark.seq != self._head]
        mine = SnapshotMark(self._head, self._at)
        kept, new = self._policy.retained(
            [*older, mine], head=self._head, floor=floor, now=self._now
        )
        return frozenset(kept), new


def _marks(session: Session) -> list[SnapshotMark]:
    seq, state = task_snapshots.c.seq, task_snapshots.c.state
    published = sa.select(seq, task_snapshots.c.at).where(state == "published")
    return [SnapshotMark(*row) for row in session.ask(published.order_by(seq))]


class _Lease:
    """The right to compact, noted on the head row."""

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self._owner = f"{_MACHINE}{os.getpid():08x}{secrets.token_hex(8)}"

    def take(self) -> None:
        """Take the lease if it is free, its holder's time is up, or its holder is dead.

        Raises :class:`~taskstore.StoreBusyError` otherwise.
        """
        head = taskstore_head.c
        now = system_clock()

        def work(session: Session) -> bool:
            holder = session.scalar(sa.select(head.lease_owner))
            free = sa.or_(head.lease_owner.is_(None), head.lease_until < now)
            if holder is not None and _is_dead(holder):
                # Mistaken or not, this is safe: each step of the other is fenced.
                free = sa.or_(free, head.lease_owner == holder)
            return self._set(session, self._owner, now + LEASE_MS, free)

        _held_here.add(self._owner)
        if not self.connections.write(work):
            raise StoreBusyError(
                f"{self.connections.database.location} is being compacted by another process",
                hint="a compactor that was killed keeps others away for a short while",
            )

    def give_back(self) -> None:
        """Let others compact.

        Where that fails, our process knows it all the same; for others it runs out.
        """
        mine = taskstore_head.c.lease_owner == self._owner
        try:
            with suppress(StoreBusyError, StoreUnavailableError, OutcomeUnknownError):
                self.connections.write(lambda session: self._set(session, None, None, mine))
        finally:
            _held_here.discard(self._owner)

    def step(self, work: Callable[[Session], _T]) -> _T:
        """Run one small write transaction, under the lease, which it renews."""

        def renewed(session: Session) -> _T:
            mine = taskstore_head.c.lease_owner == self._owner
            if not self._set(session, self._owner, system_clock() + LEASE_MS, mine):
                raise StoreBusyError(
                    f"{self.connections.database.location}: another process has taken over the "
                    "compaction or replaced the content"
                )
            return work(session)

        started = time.monotonic()
        result = self.connections.write(renewed)
        # As long again for others: who waits for SQLite's lock does so asleep,
        # and would not be awake in the moment between two of our steps.
        time.sleep(min(time.monotonic() - started, PAUSE_S))
        return result

    @staticmethod
    def _set(
        session: Session, owner: str | None, until: int | None, where: sa.ColumnElement[bool]
    ) -> bool:
        lease = {"lease_owner": owner, "lease_until": until}
        return session.change(sa.update(taskstore_head).where(where).values(lease)) == 1


def _machine() -> str:
    """Where our process ids mean something, as 8 hexadecimal digits."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return f"{zlib.crc32(f'{socket.gethostname()} {namespace}'.encode()):08x}"


_MACHINE = _machine()


_held_here: set[str] = set()
"""The leases that compactions of this process hold, or try to take."""


def _is_dead(owner: str) -> bool:
    """Whether a lease's holder is gone: its process, or in ours, its compaction."""
    if not owner.startswith(_MACHINE):
        return False
    try:
        pid = int(owner[8:16], 16)
        if pid == os.getpid():
            return owner not in _held_here
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        pass
    return False


def _publish(connections: Connections, lease: _Lease, plan: _Plan) -> tuple[int, int]:
    """Write and publish a snapshot of this moment: (its seq, how many records it holds)."""
    database = connections.database
    sql = database.sql
    with closing(Spool(database)) as spool:
        picture = connections.read(
            lambda session: _read_all(session, connections, spool, plan), one_moment=True
        )
        head, tally = picture.head, Tally()
        seq = head.head_seq
        there = connections.read(lambda session: session.row(sql.snapshot_at, (seq,)))
        if there is None or there[0] != seq:
            lease.step(lambda session: _mark(session, picture, "building"))
            spool.rewind()
            for size in picture.sizes:
                row = chunk_row(seq, tally, spool.read(size))
                lease.step(_insert_chunk(sql.insert_rows(task_snapshot_chunks, 1), row))
            lease.step(lambda session: _mark(session, picture, "published"))
    return seq, picture.tally.records + picture.tally.aside


def _read_all(session: Session, connections: Connections, spool: Spool, plan: _Plan) -> _Picture:
    sql = connections.database.sql
    spool.clear()
    head = read_head(session, sql)
    plan.at(session, head, connections.database.location)
    tally, sizes = Tally(), []
    for chunk in chunks_of(_lines(session, connections)):
        tally.add(chunk)
        sizes.append(len(chunk))
        spool.write(chunk)
    return _Picture(head, tally, sizes)


def _lines(session: Session, connections: Connections) -> Iterator[bytes]:
    sql = connections.database.sql
    yield from map(line_of, scan_tasks(session, sql))
    yield from map(aside_line, read_set_aside(session, sql))


def _mark(session: Session, picture: _Picture, state: str) -> None:
    """Note a snapshot as being built, or publish it.  Repeating it is the same."""
    seq, at = picture.head.head_seq, picture.head.last_at
    values = picture.tally.mark(seq, at, state)._asdict()
    session.change(sa.delete(task_snapshots).where(task_snapshots.c.seq == seq))
    session.change(sa.insert(task_snapshots).values(values))


def _insert_chunk(sql: str, row: tuple[Any, ...]) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        chunks = task_snapshot_chunks.c
        # Doing it twice is the same, should the first answer have been lost.
        session.change(
            sa.delete(task_snapshot_chunks).where(chunks.seq == row[0], chunks.chunk == row[1])
        )
        session.execute(sql, row)

    return work


def _move_floor(lease: _Lease, plan: _Plan) -> tuple[int, frozenset[int], int]:
    """Move the floor and drop snapshots: (the new floor, seqs retained, the old floor).

    One transaction, after which no reader sees what is then deleted in steps.
    """
    sql = lease.connections.database.sql
    floors: list[int] = []

    def work(session: Session) -> tuple[int, frozenset[int], int]:
        head = read_head(session, sql, lock=True)
        floors.append(head.floor)
        marks = _marks(session)
        kept, floor = plan.retained(marks, head.floor)
        gone = [mark.seq for mark in marks if mark.seq not in kept]
        session.change(
            sa.update(task_snapshots).where(task_snapshots.c.seq.in_(gone)).values(state="dropped")
        )
        session.change(sa.update(taskstore_head).values(floor=floor))
        retained = frozenset(mark.seq for mark in marks if mark.seq in kept)
        # Should the transaction run twice, the first floor is the old one.
        return floor, retained, floors[0]

    return lease.step(work)


def _clear_leftovers(lease: _Lease, on_kept: Callable[[SetAside], object]) -> None:
    """Delete, in small steps, what no reader sees: entries below the floor, and
    snapshots that were dropped or never finished."""
    sql = lease.connections.database.sql
    seq, chunk = task_snapshot_chunks.c.seq, task_snapshot_chunks.c.chunk
    entry = task_journal.c.seq

    def look(session: Session) -> tuple[int, Findings] | None:
        floor = read_head(session, sql).floor
        lowest = session.scalar(sa.select(sa.func.min(entry)))
        if lowest is None or lowest >= floor:
            return None
        end = min(floor, lowest + STEP)
        return end, examine(session, sql, lowest, end)

    def trim(session: Session, end: int, findings: Findings) -> list[SetAside]:
        moved = set_aside_entries(session, sql, findings)
        session.change(sa.delete(task_journal).where(entry < end))
        return moved

    def drop(session: Session) -> bool:
        dead = sa.select(task_snapshots.c.seq).where(task_snapshots.c.state != "published")
        victim = session.scalar(dead.limit(1))
        if victim is None:
            return False
        last = session.scalar(sa.select(sa.func.max(chunk)).where(seq == victim))
        if last is None:
            session.change(sa.delete(task_snapshots).where(task_snapshots.c.seq == victim))
        else:
            last_ones = sa.delete(task_snapshot_chunks).where(chunk > last - CHUNK_STEP)
            session.change(last_ones.where(seq == victim))
        return True

    while lease.step(drop):
        pass
    # What lies below the floor changes no more: it is read before the lock is taken.
    while (found := lease.connections.read(look)) is not None:
        for item in lease.step(partial(trim, end=found[0], findings=found[1])):
            on_kept(item)
