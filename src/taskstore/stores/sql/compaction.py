"""Compaction publishes a snapshot, moves the floor, and trims the journal.

No step locks the head row for longer than one small transaction.  One read transaction copies the
rows of the tasks to a temporary file.  When this read transaction has ended, small transactions
write the copied rows to the database.  A read transaction that stayed open for the whole compaction
would block SQLite's checkpoints and PostgreSQL's vacuum.  The writes would also need a second
connection beside this read transaction, but a host's pool can be limited to one connection.

A lease in the head row keeps other compactors out.  Every write transaction of the compaction
renews the lease, and fails if another compactor has taken over the lease.  If a compactor was
suspended and has lost the lease, the compactor therefore changes nothing when it resumes.

If the journal contains the only copy of a record because the task has no row in ``tasks``,
compaction fails and does not trim the journal.  If a trimmed entry cannot be decoded, compaction
keeps the bytes of the entry in ``task_set_aside`` [12].
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, NamedTuple

import msgspec
import sqlalchemy as sa

from taskstore.errors import CorruptStoreError, StoreUnavailableError
from taskstore.model.codec import checksum, encode_record
from taskstore.model.compaction_policy import (
    CompactionPolicy,
    CompactionReport,
    JournalStats,
    SnapshotInfo,
)
from taskstore.model.ids import Clock
from taskstore.model.journal import EntryKind, Quarantined
from taskstore.stores.common import compaction
from taskstore.stores.common.compaction import (
    CompactionPoint,
    CompactionSteps,
    EntryCommit,
    Retained,
)
from taskstore.stores.sql.compaction_lease import CompactionLease
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import DriverSession
from taskstore.stores.sql.rows import SnapshotRow, as_bytes, entry_of, line_of, quarantined_line
from taskstore.stores.sql.snapshots import (
    chunks_of,
    insert,
    newest_snapshot_row,
    quarantined_rows,
    read_chunk,
    read_head,
    read_lines,
    read_quarantined,
    read_snapshot_rows,
    scan_tasks,
    with_chunk,
)
from taskstore.stores.sql.statements import ENTRY_COLUMNS, Statements, stored_bytes
from taskstore.stores.sql.tables import (
    task_journal,
    task_set_aside,
    task_snapshot_chunks,
    task_snapshots,
    tasks,
    taskstore_head,
)
from taskstore.stores.sql.transactions import Transactions

ENTRIES_PER_STEP = 1000
"""The maximum number of journal entries that one transaction reads or deletes."""
ROWS_PER_STEP = 64
"""The maximum number of payloads that one read transaction reads."""
SIZES_PER_STEP = 10_000
"""The maximum number of entries whose sizes one read transaction adds up."""
CHUNKS_PER_STEP = 8
"""The maximum number of chunks of a dropped snapshot that one transaction deletes."""
TRIMMED_REVISION = 0
"""The revision that a trim writes to the row at floor - 1.  Every other entry has a higher
revision."""
TRIMMED_ENTRY = {
    "kind": "deleted",  # the only kind without a payload, also for earlier versions of taskstore
    "task_id": "",
    "revision": TRIMMED_REVISION,
    "payload": None,
    "checksum": None,
}
"""The values that a trim writes to the row at floor - 1.  This row keeps only its seq, its time and
its commit id."""
MAX_NAMED = 3
"""The maximum number of task ids in one error message."""


def compact(
    transactions: Transactions,
    policy: CompactionPolicy,
    clock: Clock,
    on_quarantined: Callable[[Quarantined], object],
) -> CompactionReport:
    """Compact the ledger if the policy requires it, and return a report; see
    ``SupportsCompaction.compact``.

    The function calls ``on_quarantined`` with each quarantined payload of a trimmed entry.
    """
    report = compaction.compact(SQLCompactionSteps(transactions, on_quarantined), policy, clock)
    if policy.erase_deleted:
        transactions.scrub_deleted()
    return report


class SQLCompactionSteps(CompactionSteps):
    """The steps of one compaction: small transactions that each renew the lease."""

    def __init__(
        self,
        transactions: Transactions,
        on_quarantined: Callable[[Quarantined], object] = lambda _: None,
    ) -> None:
        self._transactions = transactions
        self._location = transactions.database.location
        self._sql = transactions.database.sql
        self._on_quarantined = on_quarantined
        self._lease = CompactionLease(transactions)
        self._buffer: IO[bytes]
        # The row of the new snapshot in task_snapshots, and the size of each chunk in bytes.
        self._snapshot_row = SnapshotRow(0, 0)
        self._chunk_sizes: list[int] = []

    def stats(self, now: int, most_bytes: int) -> JournalStats:
        stats = self._transactions.read(partial(self._stats, now=now), in_transaction=True)
        head = stats.newest_snapshot_seq + stats.entries
        _, size = self._measure(most_bytes, stats.floor, head)
        return msgspec.structs.replace(stats, history_bytes=size)

    def _stats(self, session: DriverSession, now: int) -> JournalStats:
        head = read_head(session, self._sql)
        row = newest_snapshot_row(session, head.head_seq)
        newest = 0 if row is None else row.seq
        first = max(newest + 1, head.floor)
        return JournalStats(
            now=now,
            newest_snapshot_seq=newest,
            floor=head.floor,
            entries=head.head_seq - newest,
            records=session.scalar(sa.select(sa.func.count()).select_from(tasks)),
            oldest_at=session.scalar(
                sa.select(task_journal.c.at).where(task_journal.c.seq == first)
            ),
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        with self._lease.hold(), _temporary_file(self._transactions.database) as self._buffer:
            yield

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        rows = self._transactions.read(read_snapshot_rows)
        return tuple(SnapshotInfo(row.seq, row.at) for row in rows)

    def begin(self) -> CompactionPoint:
        self._delete_leftovers()
        return self._transactions.read(self._begin, in_transaction=True)

    def _begin(self, session: DriverSession) -> CompactionPoint:
        """Copy the lines of the new snapshot to the temporary file; return the compaction point."""
        self._buffer.seek(0)
        self._buffer.truncate()
        head = read_head(session, self._sql)
        published = read_snapshot_rows(session)
        row = next((row for row in published if row.seq == head.head_seq), None)
        self._chunk_sizes = []
        if row is None:
            row = SnapshotRow(head.head_seq, head.last_at)
            for chunk in chunks_of(self._lines(session)):
                row = with_chunk(row, chunk)
                self._chunk_sizes.append(len(chunk))
                self._buffer.write(chunk)
            self._buffer.flush()
        self._snapshot_row = row
        snapshots = tuple(SnapshotInfo(row.seq, row.at) for row in published)
        return CompactionPoint(head.head_seq, head.last_at, head.floor, snapshots)

    def _lines(self, session: DriverSession) -> Iterator[bytes]:
        yield from map(line_of, scan_tasks(session, self._sql))
        yield from map(quarantined_line, read_quarantined(session, self._sql))

    def commit_of(self, seq: int) -> EntryCommit:
        entry = task_journal.c
        query = sa.select(entry.at, entry.commit_id).where(entry.seq == seq)
        rows = self._transactions.read(lambda session: session.select(query))
        if not rows:
            raise CorruptStoreError(f"{self._location}: task_journal", f"seq {seq} is missing")
        return EntryCommit(*rows[0])

    def seq_within(self, size: int, head: int) -> int:
        floor = self._transactions.read(partial(read_head, sql=self._sql)).floor
        return self._measure(size, floor, head)[0]

    def _measure(self, most_bytes: int, floor: int, head: int) -> tuple[int, int]:
        """Add up the sizes of the entries from ``head`` back to ``floor``, in small transactions.

        Return a seq and a size in bytes.  The returned seq is the lowest seq after which all
        entries together have at most ``most_bytes`` bytes.  If all entries have at most
        ``most_bytes`` bytes, the returned size is the size of all entries.  Otherwise, the returned
        size is the size of the entries from the returned seq on.
        """
        total, high = 0, head
        while high >= floor:
            low = max(high - SIZES_PER_STEP, floor - 1)
            size = self._transactions.read(partial(_size_of_entries, low=low, high=high))
            if total + size > most_bytes:
                for seq, entry_size in self._transactions.read(
                    partial(_sizes_of_entries, low=low, high=high)
                ):
                    total += entry_size
                    if total > most_bytes:
                        return seq, total
            total, high = total + size, low
        return floor - 1, total

    def publish(self, point: CompactionPoint, retained: Retained) -> int:
        self._transactions.read(
            lambda session: check_rows_exist(session, point.floor, retained.floor, self._location)
        )
        if retained.base_snapshot is not None:
            self._write_base_snapshot(retained.base_snapshot)
        if point.seq not in [snapshot.seq for snapshot in point.snapshots]:
            self._write_chunks(point.seq)
            self._write_row(self._snapshot_row)
        self._move_floor(retained)
        return self._snapshot_row.records + self._snapshot_row.quarantined

    def _write_base_snapshot(self, base: SnapshotInfo) -> None:
        """Publish a snapshot at an earlier seq, made from an older snapshot and the journal.

        While this compaction holds the lease, nothing changes the rows that this method reads.  The
        method therefore reads these rows in several small transactions.
        """
        older = self._transactions.read(partial(newest_snapshot_row, at=base.seq))
        row = SnapshotRow(base.seq, base.at)
        for chunk in chunks_of(EarlierSnapshot(self._transactions, older, base.seq).lines()):
            self._write_chunk(base.seq, row.chunks, chunk)
            row = with_chunk(row, chunk)
        self._write_row(row)

    def _write_chunks(self, seq: int) -> None:
        self._buffer.seek(0)
        for number, size in enumerate(self._chunk_sizes):
            self._write_chunk(seq, number, self._buffer.read(size))

    def _write_chunk(self, seq: int, number: int, chunk: bytes) -> None:
        chunks = task_snapshot_chunks.c
        same = sa.and_(chunks.seq == seq, chunks.chunk == number)
        row = (seq, number, chunk, checksum(chunk))
        self._lease.run(partial(self._replace_row, task_snapshot_chunks, same, row))

    def _write_row(self, row: SnapshotRow) -> None:
        same = task_snapshots.c.seq == row.seq
        self._lease.run(partial(self._replace_row, task_snapshots, same, row))

    def _replace_row(
        self, table: sa.Table, same: sa.ColumnElement[bool], row: tuple[Any, ...], tx: DriverSession
    ) -> None:
        """Delete the row that matches ``same`` if it exists, and insert ``row``.  A repeated call
        has the same result."""
        tx.execute_core(sa.delete(table).where(same))
        insert(tx, self._transactions.database, table, [row])

    def _move_floor(self, retained: Retained) -> None:
        """Move the floor and drop the snapshots that are not retained, in one transaction.

        After this transaction, readers ignore the rows that the next step of the compaction
        deletes.
        """
        dropped = task_snapshots.c.seq.not_in(sorted(retained.seqs))

        def work(tx: DriverSession) -> None:
            tx.execute_core(sa.delete(task_snapshots).where(dropped))
            tx.execute_core(sa.update(taskstore_head).values(floor=retained.floor))

        self._lease.run(work)

    def trim(self, point: CompactionPoint, retained: Retained) -> None:
        del point, retained  # after _move_floor, readers ignore the rows deleted here
        self._delete_leftovers()
        transactions, maintenance = self._transactions, self._transactions.database.maintenance
        while transactions.read(maintenance.freelist_count):
            self._lease.run(maintenance.release_pages)
        transactions.read(maintenance.shorten_files)

    def _delete_leftovers(self) -> None:
        """Delete the rows that readers ignore, in small transactions: entries below the floor,
        and chunks of dropped and unpublished snapshots."""
        while self._lease.run(_delete_chunks):
            pass
        database = self._transactions.database
        read_plan = partial(plan_trim, sql=self._sql, limit=ENTRIES_PER_STEP)
        while (plan := self._transactions.read(read_plan)) is not None:
            self._lease.run(partial(trim_entries, database=database, plan=plan))
            for item in plan.quarantined:
                self._on_quarantined(item)


def _size_of_entries(session: DriverSession, low: int, high: int) -> int:
    seq = task_journal.c.seq
    total = sa.select(sa.func.sum(sa.func.length(task_journal.c.payload)))
    return int(session.scalar(total.where(seq > low, seq <= high)) or 0)


def _sizes_of_entries(session: DriverSession, low: int, high: int) -> list[tuple[int, int]]:
    """Return the seq and the size of each entry after ``low`` up to ``high``, newest first."""
    seq, size = task_journal.c.seq, sa.func.length(task_journal.c.payload)
    rows = session.select(sa.select(seq, size).where(seq > low, seq <= high).order_by(seq.desc()))
    return [(seq, size or 0) for seq, size in rows]


class EarlierSnapshot:
    """Computes the lines of the snapshot at ``seq`` from an older snapshot and the later entries.

    If ``older`` is ``None``, the entries are applied to an empty ledger.  The result equals the
    result of :func:`taskstore.fold`.  The memory contains all task ids and all quarantined
    payloads, but only some rows at a time.
    """

    def __init__(self, transactions: Transactions, older: SnapshotRow | None, seq: int) -> None:
        self._transactions = transactions
        self._older = older
        self._seq = seq
        self._kinds: dict[str, EntryKind] = {}
        """The kind of the newest entry of each task."""
        self._older_quarantined: list[Quarantined] = []
        self._quarantined: list[Quarantined] = []

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of the snapshot, in order of task_id; quarantined payloads come last."""
        previous = None
        # If both have a line for a task, the line from the journal comes first.
        for task_id, _, line in heapq.merge(self._journal_lines(), self._older_lines()):
            if task_id != previous and line:
                yield line
            previous = task_id
        for item in self._older_quarantined:
            kind = self._kinds.get(item.task_id) if item.task_id is not None else None
            if kind is None or not item.is_obsoleted_by(item.task_id or "", kind):
                yield quarantined_line(item)
        yield from map(quarantined_line, self._quarantined)

    def _older_lines(self) -> Iterator[tuple[str, int, bytes]]:
        """Yield the task id and the line of each record of the older snapshot."""
        older, database = self._older, self._transactions.database
        if older is None:
            return
        for number in range(older.chunks):
            where = f"{database.location}: task_snapshot_chunks, seq {older.seq}"
            chunk = self._transactions.read(
                partial(
                    read_chunk,
                    sql=database.sql,
                    snapshot=older,
                    number=number,
                    location=database.location,
                )
            )
            for item in read_lines(chunk, where):
                if isinstance(item, Quarantined):
                    self._older_quarantined.append(item)
                else:
                    yield item.task_id, 1, encode_record(item)

    def _journal_lines(self) -> Iterator[tuple[str, int, bytes]]:
        """Yield the id of each task in the journal, and the line for the newest entry of the task.

        The line is empty if this entry deletes the task, or if the payload of this entry cannot be
        decoded.
        """
        after = ""
        while seqs := self._transactions.read(partial(self._newest_seqs, after=after)):
            for start in range(0, len(seqs), ROWS_PER_STEP):
                named = task_journal.c.seq.in_(seqs[start : start + ROWS_PER_STEP])
                query = sa.select(*ENTRY_COLUMNS).where(named).order_by(task_journal.c.task_id)
                for row in self._transactions.read(partial(_select, query=query)):
                    entry = entry_of(row, "task_journal")
                    after = entry.task_id
                    self._kinds[after] = entry.kind
                    if entry.quarantined is not None:
                        self._quarantined.append(entry.quarantined)
                    yield after, 0, b"" if entry.record is None else encode_record(entry.record)

    def _newest_seqs(self, session: DriverSession, after: str) -> list[int]:
        """Return the seq of the newest entry of each of the next tasks after the task id ``after``,
        in order of task_id."""
        entry = task_journal.c
        first = 0 if self._older is None else self._older.seq
        newest = (
            sa.select(sa.func.max(entry.seq))
            .where(entry.seq > first, entry.seq <= self._seq, entry.task_id > after)
            .group_by(entry.task_id)
            .order_by(entry.task_id)
        )
        return [seq for (seq,) in session.select(newest.limit(ENTRIES_PER_STEP))]


def _select(session: DriverSession, query: sa.Select[Any]) -> Sequence[Any]:
    return session.select(query)


def _delete_chunks(tx: DriverSession) -> bool:
    """Delete some chunks of a dropped or unpublished snapshot; return whether such a chunk
    existed."""
    seq, chunk = task_snapshot_chunks.c.seq, task_snapshot_chunks.c.chunk
    orphaned = ~sa.exists().where(task_snapshots.c.seq == seq)
    rows = tx.select(sa.select(seq, chunk).where(orphaned).order_by(seq, chunk).limit(1))
    for orphan, first in rows:
        if not isinstance(first, int):
            raise CorruptStoreError(
                "task_snapshot_chunks",
                f"a chunk of the snapshot {orphan!r} has the number {first!r}",
            )
        step = sa.and_(seq == orphan, chunk < first + CHUNKS_PER_STEP)
        tx.execute_core(sa.delete(task_snapshot_chunks).where(step))
    return bool(rows)


@contextmanager
def _temporary_file(database: Database) -> Iterator[IO[bytes]]:
    """Open a temporary file without a name in the database's ``temp_dir``.

    If ``temp_dir`` is ``None``, the file is in the system's directory for temporary files.
    """
    directory = database.temp_dir or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            yield file
    except OSError as error:
        raise StoreUnavailableError(
            f"cannot compact {database.location}: "
            f"cannot use a temporary file in {directory}: {error}",
            hint="free space in this directory, then compact again",
        ) from error


# -- trimming -----------------------------------------------------------------


def check_rows_exist(session: DriverSession, low: int, high: int, location: str) -> None:
    """Check that no entry in ``[low, high)`` contains the only copy of a record.

    Raises :class:`~taskstore.CorruptStoreError` if the newest entry of a task is in this range and
    is not a deletion, but the table ``tasks`` has no row for this task.
    """
    entry, later = task_journal.c, task_journal.alias("later")
    lost = (
        sa.select(entry.task_id, entry.seq)
        .where(entry.seq >= low, entry.seq < high, entry.kind != "deleted")
        .where(~sa.exists().where(tasks.c.task_id == entry.task_id))
        .where(~sa.exists().where(later.c.task_id == entry.task_id, later.c.seq > entry.seq))
    )
    rows = session.select(lost.limit(MAX_NAMED))
    if rows:
        names = ", ".join(f"task {task_id!r} (seq {seq})" for task_id, seq in rows)
        raise CorruptStoreError(
            f"{location}: tasks",
            f"these tasks have no row, and only the journal contains their records: {names}",
            hint="nothing was trimmed; restore the rows from the table task_journal (if this "
            "fails, restore a backup), then compact again",
        )


class TrimPlan(NamedTuple):
    """The next entries to trim, and the rows of ``task_set_aside`` to delete and to insert in the
    same transaction."""

    end: int
    """The seq of the first entry that is not trimmed."""
    floor: int
    obsolete_ids: Sequence[int]
    """The row ids of the ``task_set_aside`` rows to delete: trimmed entries delete the tasks of
    these rows."""
    quarantined: Sequence[Quarantined]
    """The payloads of the trimmed entries that cannot be decoded and have no other copy."""
    last_id: int
    """The highest row id in ``task_set_aside`` before the trim."""


def plan_trim(session: DriverSession, sql: Statements, limit: int) -> TrimPlan | None:
    """Return the plan for the next ``limit`` seqs below the floor; ``None`` if no entry is to be
    trimmed.

    Entries below the floor do not change, so this function needs no lock.
    """
    floor = read_head(session, sql).floor
    trimmed = (task_journal.c.seq == floor - 1) & (task_journal.c.revision == TRIMMED_REVISION)
    rest = sa.select(task_journal.c.seq).where(task_journal.c.seq < floor, ~trimmed)
    low = session.scalar(rest.order_by(task_journal.c.seq).limit(1))
    if low is None:
        return None
    end = min(floor, low + limit)
    ids, last_id = _quarantined_ids(session, sql)
    obsolete_ids: list[int] = []
    quarantined: list[Quarantined] = []
    seq = task_journal.c.seq
    for row in session.select(sa.select(*ENTRY_COLUMNS).where(seq >= low, seq < end).order_by(seq)):
        if row[2] == "deleted":
            obsolete_ids += ids.pop(row[3], ())
            continue
        item = _quarantine_entry(row)
        if item is not None and not _is_deleted_or_stored(session, row):
            quarantined.append(item)
    return TrimPlan(end, floor, obsolete_ids, quarantined, last_id)


def trim_entries(tx: DriverSession, database: Database, plan: TrimPlan) -> None:
    """Delete the entries of a plan, and store the quarantined payloads of the plan.

    The function does not delete the row at floor - 1, but clears its content except the commit id
    and the time.  This commit id shows whether a cursor at floor - 1 belongs to the history of this
    ledger.  The function is idempotent: a repeated call first deletes the rows of
    ``task_set_aside`` with ids above ``last_id``, which the earlier call inserted.
    """
    row_id = task_set_aside.c.id
    if plan.obsolete_ids:
        tx.execute_core(sa.delete(task_set_aside).where(row_id.in_(plan.obsolete_ids)))
    if plan.quarantined:
        tx.execute_core(sa.delete(task_set_aside).where(row_id > plan.last_id))
        payloads = enumerate(map(msgspec.json.encode, plan.quarantined), plan.last_id + 1)
        rows = [(number, payload, checksum(payload)) for number, payload in payloads]
        insert(tx, database, task_set_aside, rows)
    seq, last = task_journal.c.seq, plan.floor - 1
    tx.execute_core(sa.delete(task_journal).where(seq < plan.end, seq != last))
    if plan.end == plan.floor:
        tx.execute_core(sa.update(task_journal).where(seq == last).values(TRIMMED_ENTRY))


def _quarantine_entry(row: Any) -> Quarantined | None:
    """Return the payload of an undecodable entry; ``None`` if the entry can be decoded."""
    seq, _, _, task_id, revision, _, payload, _ = row
    try:
        quarantined = entry_of(row, "task_journal").quarantined
    except CorruptStoreError as error:
        reason = error.reason
    else:
        if quarantined is None:
            return None
        reason = quarantined.reason
    where = f"task_journal, seq {seq}"
    return Quarantined(as_bytes(payload), where, reason, task_id, revision, superseded=True)


def _is_deleted_or_stored(session: DriverSession, row: Any) -> bool:
    """Return whether a trim is allowed to drop the payload of an entry.

    A trim is allowed to drop the payload if a later entry deletes the task, or if the row of the
    task in ``tasks`` has the same bytes.
    """
    seq, _, _, task_id, revision, _, payload, _ = row
    entry = task_journal.c
    deletion = sa.select(entry.seq).where(
        entry.task_id == task_id, entry.seq > seq, entry.kind == "deleted"
    )
    if session.scalar(deletion.limit(1)) is not None:
        return True
    stored = session.select(
        sa.select(tasks.c.revision, stored_bytes(tasks.c.payload)).where(tasks.c.task_id == task_id)
    )
    return [(number, as_bytes(data)) for number, data in stored] == [(revision, as_bytes(payload))]


def _quarantined_ids(session: DriverSession, sql: Statements) -> tuple[dict[str, list[int]], int]:
    """Return the row ids of the superseded payloads in ``task_set_aside``, grouped by task id, and
    the highest row id in this table."""
    ids: dict[str, list[int]] = {}
    last = 0
    for last, item in quarantined_rows(session, sql):
        if item.superseded and item.task_id is not None:
            ids.setdefault(item.task_id, []).append(last)
    return ids, last
