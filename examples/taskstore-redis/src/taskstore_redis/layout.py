"""What stands in Redis, and how it is read: names of keys, facts, images, entries.  All pure.

Every key of a ledger begins with ``{NAME}:``.  The braces are a hash tag:
on a cluster all keys of one ledger are in one slot, as scripts need it.

===============  =======  =====================================================
key              type     what
===============  =======  =====================================================
head             hash     ledger, timeline, head, floor, at, commit, format
rows             hash     task id → image of its record
facts            hash     task id → what scripts have to know of it (common.lua)
index            zset     members in the order of bytes, all of score 0: letter
                          of a field, NUL, value, NUL, created_at, task id
bookings         hash     run id, NUL, booking → task id
journal          stream   an entry per change, its id is ``<seq>-0``
commits          stream   the last thousand or so, by the seq of their last entry
deleted          zset     task id, the seq of its deletion as its score
aside            hash     number → what a saved snapshot had set aside, as JSON
aside_ids        hash     task id → revision and numbers of what is set aside
snapshots        hash     seq → at, records, chunks and token of a snapshot
snap:TOKEN       hash     number → chunk of records; ``aside`` → JSON lines
staging          hash     token → until when its content is being built (ms)
staging:TOKEN:…           rows, facts, index, bookings, aside, aside_ids to be
lease            string   token of the one compactor, with an expiry
cut, saved                what a compactor is copying; see compaction.py
void:COMMIT      string   a commit that must not happen any more, with an expiry
===============  =======  =====================================================

An *image* is the CRC-32 of a payload as eight hexadecimal digits, and the payload.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace
from taskstore import CorruptStoreError, EntryKind, JournalEntry, Quarantined, TaskRecord
from taskstore.store import checksum, decode_or_quarantine, quarantine

FORMAT = b"1"
"""The layout of these keys; another one is refused."""

INDEXED = {
    "run_id": b"r",
    "status": b"s",
    "owner_key": b"o",
    "child_session_key": b"c",
    "requester_session_key": b"q",
    "parent_task_id": b"p",
    "parent_flow_id": b"f",
}
"""Fields that the index finds records by, in the order of the facts (common.lua)."""

CONTENT = ("rows", "facts", "index", "bookings", "aside", "aside_ids")
"""The keys that save_snapshot replaces by those that it staged."""

ALL = b"*\0"
"""What the members of the index begin with that are about every task."""

CRC_DIGITS = 8
TIME_DIGITS = 16
_ITEM = struct.Struct(">HQI")
_UPSERTED, _DELETED = b"u", b"d"


class Keys:
    """The names of a ledger's keys."""

    def __init__(self, namespace: str) -> None:
        self.prefix = b"{%s}:" % namespace.encode()

    def __getitem__(self, name: str) -> bytes:
        return self.prefix + name.encode()

    def named(self, *names: str) -> list[bytes]:
        """Several at once."""
        return [self[name] for name in names]

    def staged(self, token: str) -> list[bytes]:
        """The keys in which content is built that may become the live one."""
        return [self[f"staging:{token}:{name}"] for name in CONTENT]

    def snapshot(self, token: str) -> bytes:
        """The key of a snapshot."""
        return self[f"snap:{token}"]

    def void(self, commit_id: str) -> bytes:
        """The key that forbids a commit."""
        return self[f"void:{commit_id}"]


class State(NamedTuple):
    """The head of a ledger, as scripts return it."""

    ledger: bytes
    timeline: int
    head: int
    floor: int
    at: int
    commit: str

    @property
    def identity(self) -> tuple[bytes, int]:
        """Which ledger this is, and which life of it."""
        return (self.ledger, self.timeline)


def state_of(reply: Sequence[Any]) -> State:
    """The state in a reply: that of a new ledger where there is none."""
    ledger, timeline, head, floor, at, commit = reply[:6]
    return State(
        ledger or b"",
        int(timeline or 0),
        int(head or 0),
        int(floor or 1),
        int(at or 0),
        (commit or b"").decode(),
    )


# -- facts and images ---------------------------------------------------------


def facts_of(record: TaskRecord) -> bytes:
    """The facts of a record, but for the seq of its last entry, which a script puts before."""
    return b"\0".join(
        (
            b"%d" % record.revision,
            time_key(record.created_at),
            _fact(record.run_digest),
            *(_fact(getattr(record, field)) for field in INDEXED),
        )
    )


def _fact(value: str | None) -> bytes:
    return b"" if value is None else b"=" + value.encode()


def time_key(time: int) -> bytes:
    """A time as its sort_key in the order of bytes: 16 digits."""
    return b"%0*d" % (TIME_DIGITS, time)


def sort_key_of(record: TaskRecord) -> bytes:
    """A record's sort_key in the order of the index."""
    return time_key(record.created_at) + record.task_id.encode()


def id_in_sort_key(sort_key: bytes) -> str:
    """The task id of a sort_key in the order of the index."""
    return sort_key[TIME_DIGITS:].decode("utf-8", "surrogateescape")


def revision_in(facts: bytes | None) -> int | None:
    """The revision in stored facts, if they hold one."""
    parts = (facts or b"").split(b"\0")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None


def image_of(payload: bytes) -> bytes:
    """A payload with its checksum before it."""
    return b"%08x" % checksum(payload) + payload


def damage_of(image: bytes) -> str | None:
    """Say what is wrong with an image, going by its checksum; ``None`` if nothing."""
    found = b"%08x" % checksum(image[CRC_DIGITS:])
    stored = image[:CRC_DIGITS]
    if found == stored:
        return None
    return f"the checksum is {found.decode()}, stored with it is {stored!r}"


def record_of(
    image: bytes, where: str, task_id: str, revision: int | None
) -> TaskRecord | Quarantined:
    """The record of an image, or its bytes when it is damaged.

    It is damaged too when it is of another task, or at another revision:
    two rows must not become one record.
    """
    payload, damage = image[CRC_DIGITS:], damage_of(image)
    if damage is None:
        found = decode_or_quarantine(payload, where)
        if isinstance(found, Quarantined):
            return replace(found, task_id=task_id, revision=revision)
        if found.task_id == task_id and revision in (None, found.revision):
            return found
        damage = f"the payload is of task {found.task_id!r} at revision {found.revision}"
    return replace(quarantine(payload, where, damage), task_id=task_id, revision=revision)


# -- entries --------------------------------------------------------------------


class RawEntry(NamedTuple):
    """An entry of the journal as it stands in the stream."""

    seq: int
    at: int
    commit: str
    kind: bytes
    task_id: str
    revision: int
    previous_seq: int
    """The seq of the entry before of the same task, 0 if there is none."""
    image: bytes


def raw_entry(reply: Sequence[Any], location: str) -> RawEntry:
    """One entry as XRANGE gives it; raises :class:`~taskstore.CorruptStoreError`."""
    try:
        name, fields = reply
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        return RawEntry(
            seq=int(name.partition(b"-")[0]),
            at=int(values[b"t"]),
            commit=values[b"c"].decode(),
            kind=values[b"k"],
            task_id=values[b"i"].decode(),
            revision=int(values[b"r"]),
            previous_seq=int(values[b"b"]),
            image=values[b"p"],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptStoreError(f"{location}: journal", f"{reply!r:.200} is no entry") from error


def entry_of(raw: RawEntry, location: str) -> JournalEntry:
    """The entry; an upsert that does not decode keeps its bytes in ``quarantined``."""
    if raw.kind == _DELETED:
        record, aside, kind = None, None, EntryKind.DELETED
    elif raw.kind == _UPSERTED:
        where = f"{location}: journal, seq {raw.seq}"
        found = record_of(raw.image, where, raw.task_id, raw.revision)
        kind = EntryKind.UPSERTED
        record, aside = (None, found) if isinstance(found, Quarantined) else (found, None)
    else:
        raise CorruptStoreError(
            f"{location}: journal", f"an entry is of unknown kind {raw.kind!r}", offset=raw.seq
        )
    return JournalEntry(raw.seq, raw.at, kind, raw.task_id, raw.revision, record, raw.commit, aside)


# -- snapshots --------------------------------------------------------------------


class PublishedSnapshot(NamedTuple):
    """A published snapshot."""

    seq: int
    at: int
    records: int
    chunks: int
    token: str


def published_snapshot(seq: bytes, value: bytes) -> PublishedSnapshot:
    """A mark as it stands in ``snapshots``."""
    at, records, chunks, token = value.split(b"\0")
    return PublishedSnapshot(int(seq), int(at), int(records), int(chunks), token.decode())


def published_snapshots(reply: Sequence[bytes]) -> list[PublishedSnapshot]:
    """Every mark of an HGETALL, in order of seq."""
    return sorted(map(published_snapshot, reply[::2], reply[1::2]))


def items_of(chunk: bytes, where: str) -> Iterator[tuple[str, int, bytes]]:
    """Task id, revision and image of each record in a chunk.

    Raises :class:`~taskstore.CorruptStoreError` for one that ends too early.
    """
    offset = 0
    while offset < len(chunk):
        start = offset + _ITEM.size
        if start > len(chunk):
            raise CorruptStoreError(where, "a chunk ends too early", offset=offset)
        id_size, revision, image_size = _ITEM.unpack_from(chunk, offset)
        middle, offset = start + id_size, start + id_size + image_size
        if offset > len(chunk):
            raise CorruptStoreError(where, "a chunk ends too early", offset=start)
        task_id = chunk[start:middle].decode("utf-8", "surrogateescape")
        yield task_id, revision, chunk[middle:offset]
