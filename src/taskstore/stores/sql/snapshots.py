"""Whole ledgers: loading the rows, reading and writing snapshots, replacing everything."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

import msgspec
import sqlalchemy as sa

from taskstore.codec import check_nesting, checksum, encode_record
from taskstore.errors import ConflictError, CorruptStoreError
from taskstore.journal import SetAside, Snapshot, validated_snapshot
from taskstore.records import TaskRecord
from taskstore.stores.sql.commits import insert_row, too_new
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.rows import (
    Head,
    Mark,
    Tally,
    TaskRow,
    aside_line,
    aside_row,
    chunks_of,
    damage_of,
    read_lines,
    record_of,
)
from taskstore.stores.sql.session import Session
from taskstore.stores.sql.statements import PAGE, Statements, flat, pieces
from taskstore.stores.sql.tables import (
    task_journal,
    task_set_aside,
    task_snapshot_chunks,
    task_snapshots,
    tasks,
    taskstore_head,
)
from taskstore.stores.sql.transactions import Transactions


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


def read_set_aside(session: Session, sql: Statements) -> list[SetAside]:
    """What came in with a saved snapshot and did not decode."""
    found = []
    for number, payload, stored in session.rows(sql.read_set_aside):
        where = f"task_set_aside, row {number}"
        damage = damage_of(payload, stored)
        try:
            check_nesting(payload)
            item = msgspec.json.decode(payload, type=SetAside)
        except msgspec.DecodeError as error:
            damage = damage or str(error)
        found.append(item if damage is None else SetAside(payload, where, damage))
    return found


def load(transactions: Transactions) -> Snapshot:
    """Every live record, head and rows of one moment."""
    sql = transactions.database.sql

    def work(session: Session) -> Snapshot:
        head = read_head(session, sql)
        aside = read_set_aside(session, sql)
        records: dict[str, TaskRecord] = {}
        for row in scan_tasks(session, sql):
            found = record_of(row)
            if isinstance(found, TaskRecord):
                records[found.task_id] = found
            else:
                aside.append(found)
        return Snapshot(head.head_seq, MappingProxyType(records), head.last_at, tuple(aside))

    return transactions.read(work, one_moment=True)


def read_snapshot(transactions: Transactions, at: int) -> Snapshot | None:
    """The newest published snapshot at or before a seq."""
    sql = transactions.database.sql

    def work(session: Session) -> Snapshot | None:
        row = session.row(sql.snapshot_at, (at,))
        if row is None:
            return None
        return read_marked(session, sql, Mark(*row), transactions.database.location)

    return transactions.read(work, one_moment=True)


def read_marked(session: Session, sql: Statements, mark: Mark, location: str) -> Snapshot:
    """A published snapshot, of which the row is given.

    Raises :class:`~taskstore.CorruptStoreError` for a chunk that is missing or damaged.
    """
    records: dict[str, TaskRecord] = {}
    aside: list[SetAside] = []
    for item in _read_chunks(session, sql, mark, location):
        if isinstance(item, TaskRecord):
            records[item.task_id] = item
        else:
            aside.append(item)
    return Snapshot(mark.seq, MappingProxyType(records), mark.at, tuple(aside))


def _read_chunks(
    session: Session, sql: Statements, mark: Mark, location: str
) -> Iterator[TaskRecord | SetAside]:
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
    tally = Tally()
    for chunk in chunks_of(_store_all(tx, database, snapshot)):
        _insert(tx, database, task_snapshot_chunks, [chunk_row(snapshot.seq, tally, chunk)])
    _insert(tx, database, task_snapshots, [tally.mark(snapshot.seq, snapshot.at, "published")])
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


def chunk_row(seq: int, tally: Tally, chunk: bytes) -> tuple[Any, ...]:
    """The next row of ``task_snapshot_chunks``, counted in ``tally``."""
    number = tally.chunks
    tally.add(chunk)
    return (seq, number, chunk, checksum(chunk))


def _store_all(session: Session, database: Database, snapshot: Snapshot) -> Iterator[bytes]:
    """Insert the rows, and give the lines of their snapshot."""
    for ids in pieces(sorted(snapshot.records)):
        lot = [
            (snapshot.records[task_id], encode_record(snapshot.records[task_id])) for task_id in ids
        ]
        rows = [insert_row(record, payload, checksum(payload)) for record, payload in lot]
        _insert(session, database, tasks, rows)
        yield from (payload for _, payload in lot)
    taken = set(snapshot.records)
    for number, item in enumerate(snapshot.set_aside, 1):
        row = aside_row(item)
        if row is not None and row[0] not in taken:
            taken.add(row[0])
            _insert(session, database, tasks, [row])
        else:
            payload = msgspec.json.encode(item)
            _insert(session, database, task_set_aside, [(number, payload, checksum(payload))])
        yield aside_line(item)


def _insert(session: Session, database: Database, table: sa.Table, rows: list[Any]) -> None:
    for lot in database.lots(rows):
        session.execute(database.sql.insert[table][len(lot)], flat(lot))
