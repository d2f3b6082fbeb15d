"""From rows to records and journal entries, damaged ones included: pure."""

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

QUARANTINED = -1
"""The checksum of a row of ``tasks`` that came in with a saved snapshot and did not
decode: no payload has it, so none of these is taken for a record by chance."""

ASIDE = b"!"
"""How the line of a snapshot begins that holds what did not decode."""


class Head(NamedTuple):
    """The head row, in order of its columns."""

    id: int
    ledger_id: str
    timeline: int
    head_seq: int
    floor: int
    last_at: int
    schema_epoch: int
    lease_owner: str | None
    lease_until: int | None


class Claimed(NamedTuple):
    """The head row after seqs were claimed, and which commit was asked about.

    ``over`` is the id of the commit at the seq that was asked for, ``None`` if
    there is none.
    """

    head_seq: int
    last_at: int
    floor: int
    over: str | None


class SnapshotRow(NamedTuple):
    """A row of ``task_snapshots``, in order of its columns."""

    seq: int
    at: int
    chunks: int = 0
    records: int = 0
    quarantined: int = 0
    size: int = 0
    checksum: int = 0


class TaskRow(NamedTuple):
    """What is read of a row of ``tasks``."""

    task_id: str
    revision: int
    payload: bytes
    checksum: int


def damage_of(payload: bytes, stored: int | None) -> str | None:
    """Say what is wrong with a payload, going by its checksum; ``None`` if nothing."""
    found = checksum(payload)
    return None if found == stored else f"the checksum is {found}, stored with it is {stored}"


def record_of(row: TaskRow) -> TaskRecord | Quarantined:
    """The record of a row of ``tasks``, or its bytes when it is damaged.

    A row is also damaged when its payload is of another task: two rows must
    not become one record.
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
            damage = f"the payload is of task {record.task_id!r}"
    elif row.checksum == QUARANTINED:
        damage = "it was set aside in the snapshot that this ledger was made from"
    else:
        damage = damage_of(payload, row.checksum) or ""
    return Quarantined(payload, where, damage, row.task_id, row.revision)


def entry_of(row: Sequence[Any], where: str) -> JournalEntry:
    """The journal entry of a row (in order of the columns of ``task_journal``).

    An upsert that does not decode keeps its bytes in ``quarantined``.
    """
    seq, at, kind, task_id, revision, commit_id, payload, stored = row
    if kind == "deleted":
        return JournalEntry(seq, at, EntryKind.DELETED, task_id, revision, None, commit_id)
    if kind != "upserted":
        raise CorruptStoreError(where, f"an entry is of unknown kind {kind!r}", offset=seq)
    place = f"task_journal, seq {seq}"
    payload = as_bytes(payload)
    damage = damage_of(payload, stored)
    found = (
        decode_or_quarantine(payload, place)
        if damage is None
        else quarantine(payload, place, damage)
    )
    if isinstance(found, TaskRecord):
        if (found.task_id, found.revision) == (task_id, revision):
            return JournalEntry(seq, at, EntryKind.UPSERTED, task_id, revision, found, commit_id)
        found = Quarantined(payload, place, f"the payload is of task {found.task_id!r}")
    kept = msgspec.structs.replace(found, task_id=task_id, revision=revision)
    return JournalEntry(
        seq, at, EntryKind.UPSERTED, task_id, revision, None, commit_id, quarantined=kept
    )


def as_bytes(value: object) -> bytes:
    """Bytes, whatever somebody else put into a column of bytes."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    return b"" if value is None else bytes(value)  # type: ignore[call-overload]  # or it raises


def quarantined_row(item: Quarantined) -> tuple[Any, ...] | None:
    """The row of ``tasks`` that stands for something set aside, so that nobody takes
    its id; ``None`` when it has no id that could be one."""
    try:
        task_id = check_key("task_id", item.occupies)
        revision = check_int("revision", item.revision or 0)
    except ValidationError:
        return None
    unset = (None,) * 7
    return (task_id, revision, 0, "", "", *unset, item.raw, QUARANTINED)


def line_of(row: TaskRow) -> bytes:
    """The line by which a snapshot carries a row: its payload, or what is damaged, wrapped.

    The payload is not decoded: a checksum that fits vouches for it.
    """
    payload = as_bytes(row.payload)
    if damage_of(payload, row.checksum) is None and payload[:1] == b"{" and b"\n" not in payload:
        return payload
    found = record_of(row)
    if isinstance(found, TaskRecord):
        return msgspec.json.format(payload, indent=-1)
    return quarantined_line(found)


def quarantined_line(item: Quarantined) -> bytes:
    """The line by which a snapshot carries something that does not decode."""
    return ASIDE + msgspec.json.encode(item)
