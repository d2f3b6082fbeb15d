"""Pure functions that decode rows to records, entries and quarantined bytes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from taskstore.errors import CorruptStoreError, ValidationError
from taskstore.model.codec import (
    checksum,
    decode_or_quarantine,
    decode_record,
    quarantine,
)
from taskstore.model.journal import EntryKind, JournalEntry, Quarantined
from taskstore.model.records import TaskRecord
from taskstore.model.validation import check_int, check_key

QUARANTINED_CHECKSUM = -1
"""The checksum in a row of ``tasks`` that stores a quarantined payload of a saved snapshot.  No
payload has this checksum, so a row with this checksum is never decoded as a record."""

QUARANTINED_PREFIX = b"!"
"""The first byte of a snapshot line that contains a quarantined payload."""


class HeadRow(NamedTuple):
    """The head row; the fields are in the order of the table's columns."""

    id: int
    ledger_id: str
    timeline: int
    head_seq: int
    floor: int
    last_at: int
    schema_epoch: int
    lease_owner: str | None
    lease_until: int | None


class ClaimedSeqs(NamedTuple):
    """The values of the head row after a claim of seqs, and the id of the base commit.

    ``base_commit_id`` is the commit id of the journal entry at the base seq; ``None`` if the
    journal has no entry at that seq.
    """

    head_seq: int
    last_at: int
    floor: int
    base_commit_id: str | None


class SnapshotRow(NamedTuple):
    """A row of ``task_snapshots``; the fields are in the order of the table's columns."""

    seq: int
    at: int
    chunks: int = 0
    records: int = 0
    quarantined: int = 0
    size: int = 0
    checksum: int = 0


class TaskRow(NamedTuple):
    """A row of ``tasks``, with only those columns that a scan or a query reads."""

    task_id: str
    revision: int
    payload: bytes
    checksum: int


def head_of(row: Sequence[Any]) -> HeadRow:
    """Return the head row, or raise :class:`CorruptStoreError` for a value of a wrong type."""
    head = HeadRow(*row)
    if not (
        {*map(type, (head.timeline, *head[3:7]))} == {int}
        and isinstance(head.ledger_id, str)
        and isinstance(head.lease_owner, str | None)
        and isinstance(head.lease_until, int | None)
    ):
        raise damaged_head_error()
    return head


def damaged_head_error() -> CorruptStoreError:
    """Return the error for a head row that contains a value of a wrong type."""
    return CorruptStoreError(
        "taskstore_head",
        "the head row contains a value of a wrong type",
        hint="run 'taskstore verify' on a copy, and restore a backup",
    )


def snapshot_row_of(row: Sequence[Any]) -> SnapshotRow:
    """Return a row of ``task_snapshots``, or raise :class:`CorruptStoreError` for a value of a
    wrong type."""
    if not all(type(value) is int for value in row):
        reason = "a row contains a value of a wrong type"
        raise CorruptStoreError(f"task_snapshots, seq {row[0]}", reason)
    return SnapshotRow(*row)


def damage_of(payload: bytes | None, stored: int | None) -> str | None:
    """Return a description of the damage if the payload is missing or the checksum is wrong; return
    ``None`` if the checksum is right."""
    if payload is None:
        return "the payload is missing"
    actual = checksum(payload)
    return None if actual == stored else f"its checksum is {actual}, but {stored} is stored"


def record_of(row: TaskRow) -> TaskRecord | Quarantined:
    """Return the record of a row of ``tasks``, or the quarantined bytes if the row is damaged.

    A row also counts as damaged if its payload belongs to another task, because two rows must not
    have the same record.
    """
    where = f"tasks, row {row.task_id!r}"
    payload = row.payload if isinstance(row.payload, bytes) else as_bytes(row.payload)
    if zlib.crc32(payload) == row.checksum:
        try:
            record = decode_record(payload, where)
        except CorruptStoreError as error:
            damage = error.reason
        else:
            if record.task_id == row.task_id:
                return record
            damage = f"the payload belongs to task {record.task_id!r}"
    elif row.checksum == QUARANTINED_CHECKSUM:
        damage = "the payload was quarantined in a snapshot that was saved to this ledger"
    else:
        damage = damage_of(payload, row.checksum) or ""
    return Quarantined(payload, where, damage, row.task_id, row.revision)


def entry_of(row: Sequence[Any], where: str) -> JournalEntry:
    """Return the journal entry of a row of ``task_journal``.

    The values of ``row`` are in the order of the table's columns.  If the payload cannot be
    decoded, the field ``quarantined`` of the entry contains the bytes of the payload.
    """
    seq, at, kind, task_id, revision, commit_id, payload, stored = row
    if not (
        type(seq) is type(at) is type(revision) is int and type(task_id) is type(commit_id) is str
    ):
        raise CorruptStoreError(where, "an entry has a value of a wrong type", offset=seq)
    if kind == "deleted":
        return JournalEntry(seq, at, EntryKind.DELETED, task_id, revision, None, commit_id)
    if kind != "upserted":
        raise CorruptStoreError(where, f"an entry has the unknown kind {kind!r}", offset=seq)
    location = f"task_journal, seq {seq}"
    payload = as_bytes(payload)
    damage = damage_of(payload, stored)
    found = (
        decode_or_quarantine(payload, location)
        if damage is None
        else quarantine(payload, location, damage)
    )
    if isinstance(found, TaskRecord):
        if (found.task_id, found.revision) == (task_id, revision):
            return JournalEntry(seq, at, EntryKind.UPSERTED, task_id, revision, found, commit_id)
        found = Quarantined(payload, location, f"the payload belongs to task {found.task_id!r}")
    quarantined = msgspec.structs.replace(found, task_id=task_id, revision=revision)
    return JournalEntry(
        seq, at, EntryKind.UPSERTED, task_id, revision, None, commit_id, quarantined=quarantined
    )


def as_bytes(value: object) -> bytes:
    """Return a column value as bytes, even if another program stored a value of another type."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    return b"" if value is None else str(value).encode()


def quarantined_row(item: Quarantined) -> tuple[Any, ...] | None:
    """Return the row of ``tasks`` that stores a quarantined payload under its task id; ``None`` if
    the payload has no valid task id."""
    try:
        task_id = check_key("task_id", item.occupied_task_id)
        revision = check_int("revision", item.revision or 0)
    except ValidationError:
        return None
    unset = (None,) * 7
    return (task_id, revision, 0, "", "", *unset, item.raw, QUARANTINED_CHECKSUM)


def line_of(row: TaskRow) -> bytes:
    """Return the snapshot line of a row: the payload, or :func:`quarantined_line` of a damaged row.

    The payload is not decoded if the checksum is right, and the payload begins with ``{`` and
    contains no newline.
    """
    payload = as_bytes(row.payload)
    if damage_of(payload, row.checksum) is None and payload[:1] == b"{" and b"\n" not in payload:
        return payload
    found = record_of(row)
    if isinstance(found, TaskRecord):
        return msgspec.json.format(payload, indent=-1)
    return quarantined_line(found)


def quarantined_line(item: Quarantined) -> bytes:
    """Return the snapshot line of a quarantined payload."""
    return QUARANTINED_PREFIX + msgspec.json.encode(item)
