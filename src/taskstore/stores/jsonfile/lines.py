"""The lines of a segment: a header, then one commit per line, each under its checksum.

A line is ``{"crc":"xxxxxxxx",…}`` and a newline; the CRC-32 covers what
follows the comma up to the newline.  A line is there or not: what does not
match its checksum is no line.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec
from msgspec import Raw, Struct

from taskstore.errors import CorruptStoreError
from taskstore.model import codec
from taskstore.model.journal import Change, Commit, EntryKind, JournalEntry, Put, Quarantined
from taskstore.model.records import PAYLOAD_DEPTH, TaskRecord

JOURNAL_FORMAT = "taskstore-journal/1"
STAMP_BYTES = 18
"""How much of a line tells it from any other: ``{"crc":"xxxxxxxx",``."""

_NOTHING = Raw(b"")
_encoder = msgspec.json.Encoder()


class Identity(Struct, frozen=True):
    """Which ledger a file belongs to, and to which life of it."""

    ledger: str
    timeline: int


class Header(Struct, frozen=True):
    """The first line of a segment.

    ``seq`` is the first seq of the segment, ``at`` the time of the entry
    before it (Unix milliseconds).  ``base`` tells that the segment continues
    a snapshot that replaced everything, and not an earlier segment.
    """

    format: str
    ledger: str
    timeline: int
    seq: int
    at: int
    base: bool = False


class Entry(Struct, frozen=True, gc=False):
    """One change of a commit; ``record`` is the payload, empty for a deletion."""

    kind: EntryKind
    task_id: str
    revision: int
    record: Raw = _NOTHING


class Line(Struct, frozen=True, gc=False):
    """One commit: its entries have the seqs from ``seq`` on."""

    commit: str
    seq: int
    at: int
    entries: list[Entry]

    @property
    def last(self) -> int:
        """The seq of the last entry."""
        return self.seq + len(self.entries) - 1


_DEPTH_OF_RECORD = 3
"""How deep in the line of a commit a record stands."""
_header_decoder = msgspec.json.Decoder(Header)
_line_decoder = msgspec.json.Decoder(Line)


def is_sound(line: bytes) -> bool:
    """Whether a line is whole and matches its checksum."""
    return (
        line[:8] == b'{"crc":"'
        and line[16:STAMP_BYTES] == b'",'
        and line[-2:] == b"}\n"
        and line[8:16] == b"%08x" % zlib.crc32(memoryview(line)[STAMP_BYTES:-1])
    )


def encode_header(identity: Identity, *, seq: int, at: int, base: bool = False) -> bytes:
    """The first line of a segment."""
    header = Header(JOURNAL_FORMAT, identity.ledger, identity.timeline, seq, at, base)
    body = _encoder.encode(header)[1:]
    return b'{"crc":"%08x",%b\n' % (zlib.crc32(body), body)


def decode_header(line: bytes, where: str) -> Header:
    """The header that a sound first line holds; :class:`CorruptStoreError` if it is none."""
    try:
        codec.check_nesting(line)
        header = _header_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptStoreError(where, f"the header is damaged: {error}", offset=0) from error
    if header.format != JOURNAL_FORMAT:
        raise CorruptStoreError(
            where,
            f"the format is {header.format!r}, not {JOURNAL_FORMAT!r}",
            offset=0,
            hint="nothing was changed; a newer taskstore may have written it",
        )
    return header


def encode_changes(changes: Sequence[Change]) -> bytes:
    """The entries of a commit, joined from the payloads as they are."""
    entries = []
    for change in changes:
        if isinstance(change, Put):
            record = change.record
            entry = b'{"kind":"upserted","task_id":%b,"revision":%d,"record":%b}' % (
                _encoder.encode(record.task_id),
                record.revision,
                codec.encode_record(record),
            )
        else:
            entry = b'{"kind":"deleted","task_id":%b,"revision":%d}' % (
                _encoder.encode(change.task_id),
                change.revision,
            )
        entries.append(entry)
    return b",".join(entries)


def encode_commit(commit: Commit, entries: bytes) -> bytes:
    """The line of a commit."""
    body = b'"commit":"%b","seq":%d,"at":%d,"entries":[%b]}' % (
        commit.commit_id.encode(),
        commit.first_seq,
        commit.at,
        entries,
    )
    return b'{"crc":"%08x",%b\n' % (zlib.crc32(body), body)


def decode_commit(line: bytes, where: str, offset: int) -> Line:
    """The commit that a sound line holds; :class:`CorruptStoreError` if it is none."""
    try:
        codec.check_nesting(line, PAYLOAD_DEPTH + _DEPTH_OF_RECORD)
        decoded = _line_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptStoreError(where, f"the line is no commit: {error}", offset=offset) from error
    if not decoded.entries:
        raise CorruptStoreError(where, "the commit has no entries", offset=offset)
    return decoded


def id_needle(task_id: str) -> bytes:
    """What a line holds if it has an entry of this task."""
    return b'"task_id":%b' % _encoder.encode(task_id)


def journal_entry(line: Line, index: int, where: str, *, strict: bool) -> JournalEntry:
    """The journal entry at ``index`` of a commit; ``strict`` raises for what does not decode."""
    entry = line.entries[index]
    record, aside = None, None
    if entry.kind is EntryKind.UPSERTED:
        item = image(entry, where, strict=strict)
        if isinstance(item, Quarantined):
            aside = item
        else:
            record = item
    return JournalEntry(
        seq=line.seq + index,
        at=line.at,
        kind=entry.kind,
        task_id=entry.task_id,
        revision=entry.revision,
        record=record,
        commit_id=line.commit,
        quarantined=aside,
    )


def image(entry: Entry, where: str, *, strict: bool) -> TaskRecord | Quarantined:
    """The record of an entry, or its payload set aside; ``strict`` raises instead."""
    if strict:
        return codec.decode_record(bytes(entry.record), where)
    item = codec.decode_or_quarantine(bytes(entry.record), where)
    if isinstance(item, Quarantined):
        return Quarantined(item.raw, where, item.reason, entry.task_id, entry.revision)
    return item
