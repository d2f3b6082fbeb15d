"""What compaction does for entries before it deletes them.

No entry is trimmed that is all there is of a task, and of those that do not
decode the bytes are kept in ``task_set_aside`` [12].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from taskstore.codec import checksum
from taskstore.errors import CorruptStoreError
from taskstore.journal import SetAside
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import Session
from taskstore.stores.sql.rows import as_bytes, entry_of
from taskstore.stores.sql.snapshots import insert, read_head, set_aside_rows
from taskstore.stores.sql.statements import ENTRY, Statements, stored_bytes
from taskstore.stores.sql.tables import task_journal, task_set_aside, tasks

_SHOWN = 3


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
    found = session.ask(lost.limit(_SHOWN))
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
    kept: Sequence[SetAside]
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
    kept: list[SetAside] = []
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


def _damage_of(row: Any) -> SetAside | None:
    """What is to be kept of an entry; ``None`` when it is sound."""
    seq, _, _, task_id, revision, _, payload, _ = row
    try:
        found = entry_of(row, "task_journal").set_aside
    except CorruptStoreError as error:
        reason = error.reason
    else:
        if found is None:
            return None
        reason = found.reason
    where = f"task_journal, seq {seq}"
    return SetAside(as_bytes(payload), where, reason, task_id, revision, superseded=True)


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
    for last, item in set_aside_rows(session, sql):
        if item.superseded and item.task_id is not None:
            rows.setdefault(item.task_id, []).append(last)
    return rows, last
