"""What compaction does for entries before it deletes them.

No entry is trimmed that is all there is of a task, and of those that do not
decode the bytes are kept in ``task_set_aside`` [12].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from taskstore.codec import checksum
from taskstore.errors import CorruptStoreError
from taskstore.journal import SetAside
from taskstore.stores.sql.rows import as_bytes, entry_of
from taskstore.stores.sql.session import Session
from taskstore.stores.sql.snapshots import read_set_aside
from taskstore.stores.sql.statements import Statements
from taskstore.stores.sql.tables import task_journal, task_set_aside, tasks

PAGE = 250
"""How many entries are read at a time: their payloads may be large."""
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
    """What is to be done about entries besides deleting them."""

    damaged: Sequence[int]
    """The seqs of those that do not decode."""
    forgotten: Sequence[int]
    """The rows of ``task_set_aside`` that keep something of a task that they delete."""


def examine(session: Session, sql: Statements, low: int, high: int) -> Findings:
    """Look through the entries in ``[low, high)``."""
    kept = _kept_rows(session, sql)
    damaged: list[int] = []
    forgotten: list[int] = []
    while low < high:
        for row in _entries(session, low, min(low + PAGE, high)):
            if row[2] == "deleted":
                forgotten += kept.pop(row[3], ())
            elif _damage_of(row) is not None:
                damaged.append(row[0])
        low += PAGE
    return Findings(damaged, forgotten)


def set_aside_entries(session: Session, sql: Statements, found: Findings) -> list[SetAside]:
    """Keep the bytes of entries that are about to be deleted, in the same transaction.

    An entry whose task is deleted by a later one goes as every deleted record does, and
    one that is still its task's row, byte by byte, is kept by that.
    """
    aside = task_set_aside.c
    if found.forgotten:
        session.change(sa.delete(task_set_aside).where(aside.id.in_(found.forgotten)))
    moved: list[SetAside] = []
    for seq in found.damaged:
        for row in _entries(session, seq, seq + 1):
            item = _damage_of(row)
            if item is not None and not _is_gone_or_stored(session, row):
                moved.append(item)
    last = session.scalar(sa.select(sa.func.max(aside.id))) or 0
    for number, item in enumerate(moved, last + 1):
        payload = msgspec.json.encode(item)
        session.execute(sql.insert[task_set_aside][1], (number, payload, checksum(payload)))
    return moved


def _entries(session: Session, low: int, high: int) -> Iterable[Any]:
    seq = task_journal.c.seq
    columns = [
        sa.cast(column, sa.LargeBinary) if column.name == "payload" else column
        for column in task_journal.columns
    ]
    return session.ask(sa.select(*columns).where(seq >= low, seq < high).order_by(seq))


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
    seq, _, _, task_id, revision, _, payload, _ = row
    entry = task_journal.c
    deletion = sa.select(entry.seq).where(
        entry.task_id == task_id, entry.seq > seq, entry.kind == "deleted"
    )
    if session.scalar(deletion.limit(1)) is not None:
        return True
    stored = session.ask(
        sa.select(tasks.c.revision, sa.cast(tasks.c.payload, sa.LargeBinary)).where(
            tasks.c.task_id == task_id
        )
    )
    return [(found, as_bytes(data)) for found, data in stored] == [(revision, as_bytes(payload))]


def _kept_rows(session: Session, sql: Statements) -> dict[str, list[int]]:
    """Which rows of ``task_set_aside`` keep something of which task."""
    kept: dict[str, list[int]] = {}
    numbers = [row[0] for row in session.rows(sql.read_set_aside)]
    for number, item in zip(numbers, read_set_aside(session, sql), strict=True):
        if item.superseded and item.task_id is not None:
            kept.setdefault(item.task_id, []).append(number)
    return kept
