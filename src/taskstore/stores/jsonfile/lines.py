"""The lines of a segment: a header, then one commit per line.

A line is ``{"crc":"xxxxxxxx",…}`` and a newline; the CRC-32 covers the bytes between the first
comma and the newline.  Bytes that do not match their checksum do not count as a line.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec
from msgspec import Raw, Struct, field

from taskstore.errors import CorruptStoreError
from taskstore.model import codec
from taskstore.model.journal import Change, Commit, EntryKind, JournalEntry, Put, Quarantined
from taskstore.model.records import PAYLOAD_DEPTH, TaskRecord

JOURNAL_FORMAT = "taskstore-journal/1"
LINE_PREFIX_BYTES = 18
"""The length of the prefix that identifies a line; the prefix is ``{"crc":"xxxxxxxx",``."""

_EMPTY = Raw(b"")
_encoder = msgspec.json.Encoder()


class Identity(Struct, frozen=True):
    """The ledger and the timeline that a file belongs to."""

    ledger: str
    timeline: int


class Header(Struct, frozen=True):
    """The first line of a segment.

    ``seq`` is the first seq of the segment.  ``at`` is the time of the entry before the segment
    (Unix milliseconds).  ``starts_chain`` (``base`` on disk) is false if the segment continues an
    earlier segment.  ``starts_chain`` is true in two cases: (a) the segment continues a snapshot
    that replaced the whole content; (b) a compaction copied the end of an earlier segment to this
    segment.
    """

    format: str
    ledger: str
    timeline: int
    seq: int
    at: int
    starts_chain: bool = field(default=False, name="base")


class Entry(Struct, frozen=True, gc=False):
    """One change of a commit; ``record`` is the payload, which is empty for a deletion."""

    kind: EntryKind
    task_id: str
    revision: int
    record: Raw = _EMPTY


class Line(Struct, frozen=True, gc=False):
    """One commit, whose first entry has the seq ``seq``."""

    commit_id: str = field(name="commit")
    seq: int
    at: int
    entries: list[Entry]

    @property
    def last(self) -> int:
        """Return the seq of the last entry."""
        return self.seq + len(self.entries) - 1


_RECORD_DEPTH = 3
"""The nesting depth of a record in the line of a commit."""
_header_decoder = msgspec.json.Decoder(Header)
_line_decoder = msgspec.json.Decoder(Line)


def is_intact(line: bytes) -> bool:
    """Return whether a line is complete and matches its checksum."""
    return (
        line[:8] == b'{"crc":"'
        and line[16:LINE_PREFIX_BYTES] == b'",'
        and line[-2:] == b"}\n"
        and line[8:16] == b"%08x" % zlib.crc32(memoryview(line)[LINE_PREFIX_BYTES:-1])
    )


def encode_header(identity: Identity, *, seq: int, at: int, starts_chain: bool = False) -> bytes:
    """Return the first line of a segment."""
    header = Header(JOURNAL_FORMAT, identity.ledger, identity.timeline, seq, at, starts_chain)
    body = _encoder.encode(header)[1:]
    return b'{"crc":"%08x",%b\n' % (zlib.crc32(body), body)


def decode_header(line: bytes, where: str) -> Header:
    """Return the header in an intact first line, or raise :class:`CorruptStoreError`."""
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
            hint="nothing was changed; if a newer taskstore wrote this file, upgrade taskstore",
        )
    return header


def encode_changes(changes: Sequence[Change]) -> bytes:
    """Return the entries of a commit as JSON, with the encoded records embedded."""
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
    """Return the line of a commit."""
    body = b'"commit":"%b","seq":%d,"at":%d,"entries":[%b]}' % (
        commit.commit_id.encode(),
        commit.first_seq,
        commit.at,
        entries,
    )
    return b'{"crc":"%08x",%b\n' % (zlib.crc32(body), body)


def decode_commit(line: bytes, where: str, offset: int) -> Line:
    """Return the commit in an intact line, or raise :class:`CorruptStoreError`."""
    try:
        codec.check_nesting(line, PAYLOAD_DEPTH + _RECORD_DEPTH)
        decoded = _line_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptStoreError(
            where, f"the line is not a commit: {error}", offset=offset
        ) from error
    if not decoded.entries:
        raise CorruptStoreError(where, "the commit has no entries", offset=offset)
    return decoded


def task_id_pattern(task_id: str) -> bytes:
    """Return a byte string that every line with an entry of the task contains."""
    return b'"task_id":%b' % _encoder.encode(task_id)


def journal_entry(line: Line, index: int, where: str, *, strict: bool) -> JournalEntry:
    """Return the journal entry at ``index`` of a commit.  ``strict`` has the meaning described at
    :func:`decode_entry`."""
    entry = line.entries[index]
    record, quarantined = None, None
    if entry.kind is EntryKind.UPSERTED:
        item = decode_entry(entry, where, strict=strict)
        if isinstance(item, Quarantined):
            quarantined = item
        else:
            record = item
    return JournalEntry(
        seq=line.seq + index,
        at=line.at,
        kind=entry.kind,
        task_id=entry.task_id,
        revision=entry.revision,
        record=record,
        commit_id=line.commit_id,
        quarantined=quarantined,
    )


def decode_entry(entry: Entry, where: str, *, strict: bool) -> TaskRecord | Quarantined:
    """Return the record of an entry.  If the payload does not decode, the result depends on
    ``strict``: if ``strict`` is true, raise :class:`CorruptStoreError`; otherwise return the
    quarantined payload."""
    if strict:
        return codec.decode_record(bytes(entry.record), where)
    item = codec.decode_or_quarantine(bytes(entry.record), where)
    if isinstance(item, Quarantined):
        return Quarantined(item.raw, where, item.reason, entry.task_id, entry.revision)
    return item
