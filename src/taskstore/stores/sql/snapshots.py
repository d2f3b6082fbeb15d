"""Whole ledgers: loading the rows, reading and writing snapshots, replacing everything."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import msgspec
import sqlalchemy as sa

from taskstore.errors import ConflictError, CorruptStoreError
from taskstore.model.codec import check_nesting, checksum, decode_or_quarantine, encode_record
from taskstore.model.journal import Quarantined, Snapshot, snapshot_of, validated_snapshot
from taskstore.model.records import TaskRecord
from taskstore.stores.sql.commits import insert_row, too_new
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import Session, flat, pieces
from taskstore.stores.sql.rows import (
    ASIDE,
    Head,
    SnapshotRow,
    TaskRow,
    damage_of,
    quarantined_line,
    quarantined_row,
    record_of,
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
"""A chunk of a snapshot is closed when it holds this much, so that it stays
well below what servers take in one statement."""
CHUNK_RECORDS = 1000


def read_head(session: Session, sql: Statements, *, lock: bool = False) -> Head:
    """The head row, with ``lock`` keeping other writers out."""
    row = session.row(sql.lock_head if lock else sql.head)
    if row is None:
        raise CorruptStoreError("taskstore_head", "the head row is missing")
    return Head(*row)


def scan_tasks(session: Session, sql: Statements) -> Iterator[TaskRow]:
    """Every row of ``tasks`` in order of id."""
    return chain.from_iterable(_task_pages(session, sql))


def _task_pages(session: Session, sql: Statements) -> Iterator[Iterable[TaskRow]]:
    after = ""
    while True:
        rows = session.rows(sql.scan_tasks, (after,))
        yield map(TaskRow._make, rows)
        if len(rows) < PAGE:
            return
        after = rows[-1][0]


def quarantined_rows(session: Session, sql: Statements) -> Iterator[tuple[int, Quarantined]]:
    """The rows of ``task_set_aside``: their ids, and what they hold."""
    for number, payload, stored in session.rows(sql.read_quarantined):
        where = f"task_set_aside, row {number}"
        damage = damage_of(payload, stored)
        try:
            check_nesting(payload)
            item = msgspec.json.decode(payload, type=Quarantined)
        except msgspec.DecodeError as error:
            damage = damage or str(error)
        yield number, item if damage is None else Quarantined(payload, where, damage)


def read_quarantined(session: Session, sql: Statements) -> list[Quarantined]:
    """What came in with a saved snapshot and did not decode."""
    return [item for _, item in quarantined_rows(session, sql)]


def read_snapshot_rows(session: Session) -> list[SnapshotRow]:
    """The published snapshots, oldest first."""
    rows = session.ask(sa.select(task_snapshots).order_by(task_snapshots.c.seq))
    return [SnapshotRow(*row) for row in rows]


def newest_snapshot_row(session: Session, at: int) -> SnapshotRow | None:
    """The newest published snapshot at or before a seq."""
    return next((mark for mark in reversed(read_snapshot_rows(session)) if mark.seq <= at), None)


def load(transactions: Transactions) -> Snapshot:
    """Every live record, head and rows of one moment."""
    sql = transactions.database.sql

    def work(session: Session) -> Snapshot:
        head = read_head(session, sql)
        aside = read_quarantined(session, sql)
        rows = map(record_of, scan_tasks(session, sql))
        return snapshot_of(head.head_seq, head.last_at, chain(aside, rows))

    return transactions.read(work, one_moment=True)


def read_snapshot(transactions: Transactions, at: int) -> Snapshot | None:
    """The newest published snapshot at or before a seq."""
    database = transactions.database

    def work(session: Session) -> Snapshot | None:
        mark = newest_snapshot_row(session, at)
        if mark is None:
            return None
        return read_published(session, database.sql, mark, database.location)

    return transactions.read(work, one_moment=True)


def read_published(session: Session, sql: Statements, mark: SnapshotRow, location: str) -> Snapshot:
    """A published snapshot, of which the row is given.

    Raises :class:`~taskstore.CorruptStoreError` for a chunk that is missing or damaged.
    """
    return snapshot_of(mark.seq, mark.at, _read_chunks(session, sql, mark, location))


def _read_chunks(
    session: Session, sql: Statements, mark: SnapshotRow, location: str
) -> Iterator[TaskRecord | Quarantined]:
    total = 0
    for number in range(mark.chunks):
        where = f"{location}: task_snapshot_chunks, seq {mark.seq}, chunk {number}"
        row = session.row(sql.read_chunk, (mark.seq, number))
        damage = "is missing" if row is None else damage_of(row[0], row[1])
        if damage is not None:
            raise CorruptStoreError(where, damage)
        total = zlib.crc32(row[0], total)
        yield from read_lines(row[0], where)
    if total != mark.checksum:
        raise CorruptStoreError(
            f"{location}: task_snapshots, seq {mark.seq}", "its chunks are not those it was made of"
        )


def save(transactions: Transactions, snapshot: Snapshot) -> None:
    """Replace everything by a snapshot, in one transaction."""
    snapshot = validated_snapshot(snapshot)
    database = transactions.database
    for attempt in transactions.attempts(reads_back=True):
        with attempt, transactions.write() as tx:
            if database.claim(tx, 0, 0, 0) is None:
                raise too_new(database, tx)
            head = read_head(tx, database.sql)
            if head.head_seq and snapshot.seq <= head.head_seq:
                raise ConflictError(
                    [], f"the snapshot is at seq {snapshot.seq}, the head at {head.head_seq}"
                )
            _replace(tx, database, snapshot, head)
            return
        if attempt.unanswered and transactions.read_back(partial(_is_at, database, snapshot.seq)):
            return


def _is_at(database: Database, seq: int, tx: Session) -> bool:
    head = read_head(tx, database.sql)
    return (head.head_seq, head.floor) == (seq, seq + 1)


def _replace(tx: Session, database: Database, snapshot: Snapshot, head: Head) -> None:
    for table in (tasks, task_journal, task_snapshot_chunks, task_snapshots, task_set_aside):
        tx.change(sa.delete(table))
    mark = SnapshotRow(snapshot.seq, snapshot.at)
    for chunk in chunks_of(_store_all(tx, database, snapshot)):
        row = (snapshot.seq, mark.chunks, chunk, checksum(chunk))
        insert(tx, database, task_snapshot_chunks, [row])
        mark = with_chunk(mark, chunk)
    insert(tx, database, task_snapshots, [mark])
    tx.change(
        sa.update(taskstore_head).values(
            head_seq=snapshot.seq,
            floor=snapshot.seq + 1,
            last_at=max(snapshot.at, head.last_at),
            # Another content under the same seqs is another life of the ledger.
            timeline=head.timeline + (1 if head.head_seq else 0),
            lease_owner=None,
            lease_until=None,
        )
    )


def _store_all(session: Session, database: Database, snapshot: Snapshot) -> Iterator[bytes]:
    """Insert the rows, and give the lines of their snapshot."""
    for ids in pieces(sorted(snapshot.records)):
        lot = [
            (snapshot.records[task_id], encode_record(snapshot.records[task_id])) for task_id in ids
        ]
        rows = [insert_row(record, payload, checksum(payload)) for record, payload in lot]
        insert(session, database, tasks, rows)
        yield from (payload for _, payload in lot)
    taken = set(snapshot.records)
    for number, item in enumerate(snapshot.quarantined, 1):
        row = quarantined_row(item)
        if row is not None and row[0] not in taken:
            taken.add(row[0])
            insert(session, database, tasks, [row])
        else:
            payload = msgspec.json.encode(item)
            insert(session, database, task_set_aside, [(number, payload, checksum(payload))])
        yield quarantined_line(item)


def insert(session: Session, database: Database, table: sa.Table, rows: list[Any]) -> None:
    """Insert rows, in order of the table's columns, whatever is there."""
    for lot in database.lots(rows):
        session.execute(database.sql.insert[table](len(lot)), flat(lot))


# -- chunks ----------------------------------------------------------------


def read_lines(data: bytes, where: str) -> Iterator[TaskRecord | Quarantined]:
    """What the lines of a chunk hold."""
    for line in data.split(b"\n"):
        if line[:1] == ASIDE:
            try:
                check_nesting(line)
                yield msgspec.json.decode(line[1:], type=Quarantined)
            except msgspec.DecodeError as error:
                raise CorruptStoreError(where, f"a line does not decode: {error}") from error
        elif line:
            yield decode_or_quarantine(line, where)


def chunks_of(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Join lines into chunks of bounded size."""
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


def with_chunk(mark: SnapshotRow, chunk: bytes) -> SnapshotRow:
    """The row of a snapshot to which one more chunk is added."""
    aside = (b"\n" + chunk).count(b"\n" + ASIDE)
    return mark._replace(
        chunks=mark.chunks + 1,
        records=mark.records + chunk.count(b"\n") + 1 - aside,
        quarantined=mark.quarantined + aside,
        size=mark.size + len(chunk),
        checksum=zlib.crc32(chunk, mark.checksum),
    )
