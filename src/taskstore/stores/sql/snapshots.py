"""Functions that load rows, read published snapshots, and replace a ledger's content."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import msgspec
import sqlalchemy as sa

from taskstore.errors import ConflictError, CorruptStoreError
from taskstore.model.codec import check_nesting, checksum, decode_or_quarantine, encode_record
from taskstore.model.journal import (
    Quarantined,
    Snapshot,
    snapshot_of,
    validated_snapshot,
)
from taskstore.model.records import TaskRecord
from taskstore.stores.sql.commits import insert_values, schema_epoch_error
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import DriverSession, flat_parameters, row_groups
from taskstore.stores.sql.rows import (
    QUARANTINED_PREFIX,
    HeadRow,
    SnapshotRow,
    TaskRow,
    as_bytes,
    damage_of,
    head_of,
    quarantined_line,
    quarantined_row,
    record_of,
    snapshot_row_of,
)
from taskstore.stores.sql.statements import PAGE, Statements
from taskstore.stores.sql.tables import (
    task_journal,
    task_set_aside,
    task_snapshot_chunks,
    task_snapshots,
    tasks,
    taskstore_head,
)
from taskstore.stores.sql.transactions import Transactions

CHUNK_BYTES = 1024 * 1024
"""The size in bytes at which a snapshot chunk is complete.  Servers accept statements that are much
longer than a chunk."""
CHUNK_RECORDS = 1000


def read_head(session: DriverSession, sql: Statements, *, lock: bool = False) -> HeadRow:
    """Read the head row; if ``lock`` is true, lock the row against other writers."""
    row = session.row(sql.lock_head if lock else sql.head)
    if row is None:
        raise CorruptStoreError("taskstore_head", "the head row is missing")
    return head_of(row)


def scan_tasks(session: DriverSession, sql: Statements) -> Iterator[TaskRow]:
    """Yield every row of ``tasks``, in order of task id."""
    return chain.from_iterable(_task_pages(session, sql))


def _task_pages(session: DriverSession, sql: Statements) -> Iterator[Iterable[TaskRow]]:
    after = ""
    while True:
        rows = session.rows(sql.scan_tasks, (after,))
        yield map(TaskRow._make, rows)
        if len(rows) < PAGE:
            return
        after = next_key(rows, after, "tasks")


def next_key(rows: Sequence[Sequence[Any]], after: Any, table: str) -> Any:
    """Return the key of the last row of ``rows``; the next read of a scan begins after this key.

    Raises :class:`~taskstore.CorruptStoreError` if this key is not greater than ``after``: on a
    damaged index, a scan could otherwise run forever.
    """
    key = rows[-1][0]
    if type(key) is not type(after) or not key > after:
        raise CorruptStoreError(table, f"the rows after {after!r} are not in order of the key")
    return key


def quarantined_rows(session: DriverSession, sql: Statements) -> Iterator[tuple[int, Quarantined]]:
    """Yield the row id and the quarantined payload of every row of ``task_set_aside``."""
    for number, value, stored in session.rows(sql.read_quarantined):
        where = f"task_set_aside, row {number}"
        payload = as_bytes(value)
        damage = damage_of(payload, stored)
        try:
            check_nesting(payload)
            item = msgspec.json.decode(payload, type=Quarantined)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            damage = damage or str(error)
        yield number, item if damage is None else Quarantined(payload, where, damage)


def read_quarantined(session: DriverSession, sql: Statements) -> list[Quarantined]:
    """Return the quarantined payloads of ``task_set_aside``."""
    return [item for _, item in quarantined_rows(session, sql)]


def read_snapshot_rows(session: DriverSession) -> list[SnapshotRow]:
    """Return the rows of ``task_snapshots``, oldest snapshot first."""
    rows = session.select(sa.select(task_snapshots).order_by(task_snapshots.c.seq))
    return [snapshot_row_of(row) for row in rows]


def newest_snapshot_row(session: DriverSession, at: int) -> SnapshotRow | None:
    """Return the newest row of ``task_snapshots`` at or before a seq; ``None`` if there is none."""
    return next((row for row in reversed(read_snapshot_rows(session)) if row.seq <= at), None)


def load(transactions: Transactions) -> Snapshot:
    """Load every live record; the head and the rows are read in one transaction."""
    sql = transactions.database.sql

    def work(session: DriverSession) -> Snapshot:
        head = read_head(session, sql)
        quarantined = read_quarantined(session, sql)
        rows = map(record_of, scan_tasks(session, sql))
        return snapshot_of(head.head_seq, head.last_at, chain(quarantined, rows))

    return transactions.read(work, in_transaction=True)


def read_snapshot(transactions: Transactions, at: int) -> Snapshot | None:
    """Return the newest published snapshot at or before a seq; ``None`` if there is no snapshot."""
    database = transactions.database

    def work(session: DriverSession) -> Snapshot | None:
        row = newest_snapshot_row(session, at)
        if row is None:
            return None
        return read_published(session, database.sql, row, database.location)

    return transactions.read(work, in_transaction=True)


def read_published(
    session: DriverSession, sql: Statements, row: SnapshotRow, location: str
) -> Snapshot:
    """Return the published snapshot that a row of ``task_snapshots`` describes.

    Raises :class:`~taskstore.CorruptStoreError` if a chunk is missing or damaged.
    """
    return snapshot_of(row.seq, row.at, _read_chunks(session, sql, row, location))


def _read_chunks(
    session: DriverSession, sql: Statements, snapshot: SnapshotRow, location: str
) -> Iterator[TaskRecord | Quarantined]:
    actual = SnapshotRow(snapshot.seq, snapshot.at)
    for number in range(snapshot.chunks):
        chunk = read_chunk(session, sql, snapshot, number, location)
        actual = with_chunk(actual, chunk)
        yield from read_lines(chunk, _chunk_name(location, snapshot, number))
    for name, found, stored in zip(SnapshotRow._fields, actual, snapshot, strict=True):
        if found != stored:
            raise CorruptStoreError(
                f"{location}: task_snapshots, seq {snapshot.seq}",
                f"the {name} of the chunks is {found}, but {stored} is stored",
            )


def read_chunk(
    session: DriverSession, sql: Statements, snapshot: SnapshotRow, number: int, location: str
) -> bytes:
    """Return one chunk of a published snapshot; raise :class:`~taskstore.CorruptStoreError` if the
    chunk is missing or damaged."""
    row = session.row(sql.read_chunk, (snapshot.seq, number))
    damage = "the chunk is missing" if row is None else damage_of(row[0], row[1])
    if damage is not None:
        raise CorruptStoreError(_chunk_name(location, snapshot, number), damage)
    chunk: bytes = row[0]
    return chunk


def _chunk_name(location: str, snapshot: SnapshotRow, number: int) -> str:
    return f"{location}: task_snapshot_chunks, seq {snapshot.seq}, chunk {number}"


def save(transactions: Transactions, snapshot: Snapshot) -> None:
    """Replace the whole content of the ledger with a snapshot, in one transaction."""
    snapshot = validated_snapshot(snapshot)
    database = transactions.database
    for attempt in transactions.attempts(reads_back=True):
        with attempt, transactions.write() as tx:
            if database.claim_seqs(tx, 0, 0, 0) is None:
                raise schema_epoch_error(database, tx)
            head = read_head(tx, database.sql)
            if head.head_seq and snapshot.seq <= head.head_seq:
                raise ConflictError(
                    [],
                    f"the snapshot is at seq {snapshot.seq}, "
                    f"but the head is at seq {head.head_seq}",
                )
            _replace_content(tx, database, snapshot, head)
            return
        if attempt.unconfirmed and transactions.read_back_commit(
            partial(_is_saved, database, snapshot.seq)
        ):
            return


def _is_saved(database: Database, seq: int, tx: DriverSession) -> bool:
    head = read_head(tx, database.sql)
    return (head.head_seq, head.floor) == (seq, seq + 1)


def _replace_content(
    tx: DriverSession, database: Database, snapshot: Snapshot, head: HeadRow
) -> None:
    for table in (tasks, task_journal, task_snapshot_chunks, task_snapshots, task_set_aside):
        tx.execute_core(sa.delete(table))
    row = SnapshotRow(snapshot.seq, snapshot.at)
    for chunk in chunks_of(_insert_content(tx, database, snapshot)):
        values = (snapshot.seq, row.chunks, chunk, checksum(chunk))
        insert(tx, database, task_snapshot_chunks, [values])
        row = with_chunk(row, chunk)
    insert(tx, database, task_snapshots, [row])
    tx.execute_core(
        sa.update(taskstore_head).values(
            head_seq=snapshot.seq,
            floor=snapshot.seq + 1,
            last_at=max(snapshot.at, head.last_at),
            # Seqs of the new content can repeat old seqs, so the new content gets a new timeline.
            timeline=head.timeline + (1 if head.head_seq else 0),
            lease_owner=None,
            lease_until=None,
        )
    )


def _insert_content(
    session: DriverSession, database: Database, snapshot: Snapshot
) -> Iterator[bytes]:
    """Insert the records and the quarantined payloads of a snapshot, and yield the snapshot
    lines."""
    for ids in row_groups(sorted(snapshot.records)):
        group = [
            (snapshot.records[task_id], encode_record(snapshot.records[task_id])) for task_id in ids
        ]
        rows = [insert_values(record, payload, checksum(payload)) for record, payload in group]
        insert(session, database, tasks, rows)
        yield from (payload for _, payload in group)
    used_ids = set(snapshot.records)
    for number, item in enumerate(snapshot.quarantined, 1):
        row = quarantined_row(item)
        if row is not None and row[0] not in used_ids:
            used_ids.add(row[0])
            insert(session, database, tasks, [row])
        else:
            payload = msgspec.json.encode(item)
            insert(session, database, task_set_aside, [(number, payload, checksum(payload))])
        yield quarantined_line(item)


def insert(session: DriverSession, database: Database, table: sa.Table, rows: list[Any]) -> None:
    """Insert rows without preconditions; the values are in order of the table's columns."""
    for group in database.row_groups(rows):
        session.execute(database.sql.insert[table](len(group)), flat_parameters(group))


# -- chunks ----------------------------------------------------------------


def read_lines(data: bytes, where: str) -> Iterator[TaskRecord | Quarantined]:
    """Yield the record or the quarantined payload of each line of a chunk."""
    for line in data.split(b"\n"):
        if line[:1] == QUARANTINED_PREFIX:
            try:
                check_nesting(line)
                yield msgspec.json.decode(line[1:], type=Quarantined)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise CorruptStoreError(where, f"a line cannot be decoded: {error}") from error
        elif line:
            yield decode_or_quarantine(line, where)


def chunks_of(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Join lines into chunks of limited size."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line) + 1
        if size >= CHUNK_BYTES or len(chunk) == CHUNK_RECORDS:
            yield b"\n".join(chunk)
            chunk, size = [], 0
    if chunk:
        yield b"\n".join(chunk)


def with_chunk(row: SnapshotRow, chunk: bytes) -> SnapshotRow:
    """Return the row of a snapshot, updated for one more chunk."""
    quarantined = (b"\n" + chunk).count(b"\n" + QUARANTINED_PREFIX)
    return row._replace(
        chunks=row.chunks + 1,
        records=row.records + chunk.count(b"\n") + 1 - quarantined,
        quarantined=row.quarantined + quarantined,
        size=row.size + len(chunk),
        checksum=zlib.crc32(chunk, row.checksum),
    )
