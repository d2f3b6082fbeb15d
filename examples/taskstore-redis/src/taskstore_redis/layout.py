"""The layout in Redis: keys, facts, images, entries, snapshots.  Pure functions.

Every key of a ledger begins with ``{NAME}:``.  The braces are a hash tag:
on a cluster all keys of one ledger are in one slot, as scripts require.

===============  =======  =====================================================
key              type     what
===============  =======  =====================================================
head             hash     ledger, timeline, head, floor, at, commit, format, base (the
                          commit id of the trimmed entry at floor - 1)
rows             hash     task id → image of its record
facts            hash     task id → its fields that scripts need (common.lua)
index            zset     members in the order of bytes, all of score 0: letter
                          of a field, NUL, value, NUL, created_at, task id
bookings         hash     dedup key (run id, NUL, run digest) → task id
journal          stream   one entry per change; the id of an entry is ``<seq>-0``
commits          stream   about the last thousand commits; the id of a commit is
                          ``<seq>-0``, with the seq of its last entry
deleted          zset     task ids; the score of a task id is the seq of the deletion
aside            hash     number → quarantined value of a saved snapshot, as JSON
aside_ids        hash     task id → revision and numbers of quarantined values
snapshots        hash     seq → at, records, chunks and token of a snapshot
snap:TOKEN       hash     number → chunk of records; ``aside`` → JSON lines
staging          hash     token → time at which its staged content expires (ms)
staging:TOKEN:…           staged rows, facts, index, bookings, aside, aside_ids
lease            string   token of the lease owner, the one compactor; expires
cut, saved                the progress of a compaction; see compaction.py
void:COMMIT      string   a commit id that must not be committed; expires
===============  =======  =====================================================

An *image* is the CRC-32 of a payload as eight hexadecimal digits, followed by the payload.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace
from taskstore import CorruptStoreError, EntryKind, JournalEntry, Quarantined, TaskRecord
from taskstore.store import checksum, decode_or_quarantine, quarantine

FORMAT = b"1"
"""The version of this layout; a store refuses any other."""

INDEXED = {
    "run_id": b"r",
    "status": b"s",
    "owner_key": b"o",
    "child_session_key": b"c",
    "requester_session_key": b"q",
    "parent_task_id": b"p",
    "parent_flow_id": b"f",
}
"""The indexed fields and their letters, in the order of the facts (common.lua)."""

CONTENT = ("rows", "facts", "index", "bookings", "aside", "aside_ids")
"""The keys that save_snapshot stages and replaces."""

ALL = b"*\0"
"""The prefix of the index members that list all tasks."""

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
        """The keys with the given names."""
        return [self[name] for name in names]

    def staged(self, token: str) -> list[bytes]:
        """The keys of staged content."""
        return [self[f"staging:{token}:{name}"] for name in CONTENT]

    def snapshot(self, token: str) -> bytes:
        """The key of a snapshot."""
        return self[f"snap:{token}"]

    def void(self, commit_id: str) -> bytes:
        """The key that voids a commit."""
        return self[f"void:{commit_id}"]


class State(NamedTuple):
    """The fields of ``head``, as scripts return them."""

    ledger: bytes
    timeline: int
    head: int
    floor: int
    at: int
    commit: str
    base: str = ""
    """The id of the commit at floor - 1, if it is known."""

    @property
    def identity(self) -> tuple[bytes, int]:
        """The ledger id and its timeline."""
        return (self.ledger, self.timeline)


def state_of(reply: Sequence[Any]) -> State:
    """The state in a reply; if ``head`` does not exist, the state of an empty ledger."""
    ledger, timeline, head, floor, at, commit, _, base = reply[:8]
    return State(
        ledger or b"",
        int(timeline or 0),
        int(head or 0),
        int(floor or 1),
        int(at or 0),
        (commit or b"").decode(),
        (base or b"").decode(),
    )


# -- facts and images ---------------------------------------------------------


def facts_of(record: TaskRecord) -> bytes:
    """The facts of a record without the last seq; the script puts the last seq in front."""
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
    """A time as 16 digits: the byte order of two such texts is the order of the two times."""
    return b"%0*d" % (TIME_DIGITS, time)


def sort_key_of(record: TaskRecord) -> bytes:
    """The sort key of a record in the index: created_at and task id."""
    return time_key(record.created_at) + record.task_id.encode()


def id_in_sort_key(sort_key: bytes) -> str:
    """The task id in a sort key of the index."""
    return sort_key[TIME_DIGITS:].decode("utf-8", "surrogateescape")


def revision_in(facts: bytes | None) -> int | None:
    """The revision in stored facts, or ``None`` if the facts are damaged."""
    parts = (facts or b"").split(b"\0")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None


def image_of(payload: bytes) -> bytes:
    """The image of a payload: its checksum, followed by the payload."""
    return b"%08x" % checksum(payload) + payload


def damage_of(image: bytes) -> str | None:
    """Return a text about the wrong checksum of an image; ``None`` if the checksum is right."""
    actual = b"%08x" % checksum(image[CRC_DIGITS:])
    stored = image[:CRC_DIGITS]
    if actual == stored:
        return None
    return f"the checksum is {actual.decode()}, but the stored one is {stored!r}"


def record_of(
    image: bytes, where: str, task_id: str, revision: int | None
) -> TaskRecord | Quarantined:
    """The record of an image, or a ``Quarantined`` if the image is damaged.

    An image of another task or revision counts as damaged: two rows must not become one record.
    """
    payload, damage = image[CRC_DIGITS:], damage_of(image)
    if damage is None:
        item = decode_or_quarantine(payload, where)
        if isinstance(item, Quarantined):
            return replace(item, task_id=task_id, revision=revision)
        if item.task_id == task_id and revision in (None, item.revision):
            return item
        damage = f"the payload is of task {item.task_id!r} at revision {item.revision}"
    return replace(quarantine(payload, where, damage), task_id=task_id, revision=revision)


# -- entries --------------------------------------------------------------------


class RawEntry(NamedTuple):
    """An entry of the journal as stored in the stream."""

    seq: int
    at: int
    commit: str
    kind: bytes
    task_id: str
    revision: int
    previous_seq: int
    """The seq of the previous entry of the same task; 0 if the task has no previous entry."""
    image: bytes


def raw_entry(reply: Sequence[Any], location: str) -> RawEntry:
    """One entry of an XRANGE reply; raises :class:`~taskstore.CorruptStoreError` for damage."""
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
        raise CorruptStoreError(
            f"{location}: journal", f"{reply!r:.200} is not an entry"
        ) from error


def entry_of(raw: RawEntry, location: str) -> JournalEntry:
    """The decoded entry; if the record of an upsert does not decode, ``quarantined`` has its
    bytes."""
    if raw.kind == _DELETED:
        record, quarantined, kind = None, None, EntryKind.DELETED
    elif raw.kind == _UPSERTED:
        where = f"{location}: journal, seq {raw.seq}"
        item = record_of(raw.image, where, raw.task_id, raw.revision)
        kind = EntryKind.UPSERTED
        record, quarantined = (None, item) if isinstance(item, Quarantined) else (item, None)
    else:
        raise CorruptStoreError(
            f"{location}: journal", f"an entry has the unknown kind {raw.kind!r}", offset=raw.seq
        )
    return JournalEntry(
        raw.seq, raw.at, kind, raw.task_id, raw.revision, record, raw.commit, quarantined
    )


# -- snapshots --------------------------------------------------------------------


class PublishedSnapshot(NamedTuple):
    """A published snapshot."""

    seq: int
    at: int
    records: int
    chunks: int
    token: str


def published_snapshot(seq: bytes, value: bytes) -> PublishedSnapshot:
    """A snapshot as stored in ``snapshots``."""
    at, records, chunks, token = value.split(b"\0")
    return PublishedSnapshot(int(seq), int(at), int(records), int(chunks), token.decode())


def published_snapshots(reply: Sequence[bytes]) -> list[PublishedSnapshot]:
    """The snapshots of an HGETALL reply, in order of seq."""
    return sorted(map(published_snapshot, reply[::2], reply[1::2]))


def items_of(chunk: bytes, where: str) -> Iterator[tuple[str, int, bytes]]:
    """Task id, revision and image of each record in a chunk.

    Raises :class:`~taskstore.CorruptStoreError` if the chunk ends too early.
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
