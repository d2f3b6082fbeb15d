"""Bytes to record and back: one encoding for row, journal and snapshot.

A payload is the record as a JSON object whose first member is its format
version, ``{"v":"1.1","task_id":…}``; fields at their default are left out.
The current version is decoded straight into a :class:`TaskRecord`, and so are
older ones that only lack optional fields.  Any other goes the slow way:
older ones through the upcasters, a newer minor version by keeping the members
that this version does not know, so that writing the record back loses
nothing.  A newer major version is refused.

1.1 added the optional ``lease_until`` and ``lease_token``.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct
from msgspec.structs import force_setattr, replace

from taskstore.errors import CorruptStoreError
from taskstore.model.journal import Quarantined, Snapshot, snapshot_of, validated_snapshot
from taskstore.model.records import FORMAT_VERSION, MAX_INT, NO_METADATA, PAYLOAD_DEPTH, TaskRecord
from taskstore.model.validation import SAME_MAJOR, nests_deeper

UPCASTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "1.0": lambda members: {**members, "v": "1.1"},
}
"""From an older version to the next: payload as a dict, changed ``v`` included."""

SNAPSHOT_FORMAT = "taskstore-snapshot/1"
"""The format that :func:`encode_snapshot` writes."""

_T = TypeVar("_T")
_FORMAT_FIRST = b'{"format":"%s",' % SNAPSHOT_FORMAT.encode()
_BLOCK_LINES = 256
_BRACE = ord("{")
_MAJOR = FORMAT_VERSION.split(".", maxsplit=1)[0]
_CURRENT = b'{"v":"%s",' % FORMAT_VERSION.encode()
_LACKING_ONLY = b'{"v":"1.0",'
"""How a payload begins that is of this version but for optional fields it does not have."""
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(TaskRecord)
_FIELDS = {field.encode_name for field in msgspec.structs.fields(TaskRecord)} - {"_unknown"} | {"v"}


def checksum(payload: bytes) -> int:
    """CRC-32 of a payload, as an integer from 0 to 2**32 - 1."""
    return zlib.crc32(payload)


def encode_record(record: TaskRecord) -> bytes:
    """The payload of a record.  The same record always gives the same bytes."""
    if record.unknown_json is None:
        return _encoder.encode(record)
    members = msgspec.json.decode(_encoder.encode(replace(record, unknown_json=None)), type=dict)
    return _encoder.encode({**members, **msgspec.json.decode(record.unknown_json)})


def decode_record(payload: bytes, where: str = "record") -> TaskRecord:
    """The record of a payload.

    Raises :class:`CorruptStoreError`, naming ``where``, for anything that is
    not a record of this major version.
    """
    if payload.startswith(_LACKING_ONLY):
        payload = _CURRENT + payload[len(_LACKING_ONLY) :]
    try:
        if payload.count(b"{") + payload.count(b"[") > PAYLOAD_DEPTH:
            check_nesting(payload)
        record = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _decode_slowly(payload, where)
    if record.unknown_json is not None:
        return _decode_slowly(payload, where)
    if record.metadata_json is not NO_METADATA:
        force_setattr(record, "metadata_json", _metadata(record.metadata_json, where))
    return record


def check_nesting(encoded: bytes, depth: int = PAYLOAD_DEPTH) -> None:
    """Raise :class:`msgspec.DecodeError` for JSON that nests more than ``depth`` deep.

    For whatever is decoded that others may have written: how deep the decoder
    itself goes depends on the interpreter, and on the caller's stack.
    """
    if nests_deeper(encoded, depth):
        raise msgspec.DecodeError(f"it is nested more than {depth} deep")


def _metadata(encoded: Raw, where: str) -> Raw:
    """A copy: a ``Raw`` is a view into the whole payload, and would keep it alive."""
    copy = encoded.copy()
    if memoryview(copy)[0] != _BRACE:
        raise CorruptStoreError(where, "has metadata that is not a JSON object")
    return copy


def _decode_slowly(payload: bytes, where: str) -> TaskRecord:
    """Decode another version, or say why the payload does not decode."""
    try:
        check_nesting(payload)
        members = msgspec.json.decode(payload)
        if not isinstance(members, dict):
            raise CorruptStoreError(where, "is not a JSON object")
        while isinstance(version := members.get("v"), str) and version in UPCASTERS:
            members = UPCASTERS[version](members)
        if not isinstance(version, str) or not SAME_MAJOR.match(version):
            raise CorruptStoreError(where, f"has the record format {version!r}, not {_MAJOR}.x")
        unknown = {name: value for name, value in members.items() if name not in _FIELDS}
        known = {name: value for name, value in members.items() if name in _FIELDS}
        if version != FORMAT_VERSION:
            unknown["v"] = version
        record = _decoder.decode(_encoder.encode({**known, "v": FORMAT_VERSION}))
        kept = Raw(msgspec.json.encode(unknown, order="deterministic")) if unknown else None
        metadata = _metadata(record.metadata_json, where)
        return replace(record, metadata_json=metadata, unknown_json=kept)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptStoreError(where, f"does not decode: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        # An upcaster stumbled over what is missing or of another type.
        raise CorruptStoreError(where, f"does not decode: {error!r}") from error


def decode_or_quarantine(payload: bytes, where: str) -> TaskRecord | Quarantined:
    """The record of a payload, or the payload as bytes to keep and report."""
    try:
        return decode_record(payload, where)
    except CorruptStoreError as error:
        return quarantine(payload, where, error.reason)


def quarantine(payload: bytes, where: str, reason: str) -> Quarantined:
    """Wrap a payload that does not decode, with what can still be told of it."""
    task_id = revision = None
    try:
        check_nesting(payload)
        members = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        members = None
    if isinstance(members, dict):
        if isinstance(members.get("task_id"), str):
            task_id = members["task_id"]
        if type(members.get("revision")) is int:
            revision = members["revision"]
    return Quarantined(bytes(payload), where, reason, task_id, revision)


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """A whole snapshot as one value, for stores that keep everything in one.

    It is validated: :class:`ValidationError` for what may not be stored.
    """
    snapshot = validated_snapshot(snapshot)
    payloads = (encode_record(snapshot.records[task_id]) for task_id in sorted(snapshot.records))
    header = SnapshotHeader(snapshot.seq, snapshot.at)
    return b"".join(write_snapshot(header, payloads, snapshot.quarantined))


def decode_snapshot(data: bytes, where: str = "snapshot") -> Snapshot:
    """The snapshot that :func:`encode_snapshot` wrote.

    A record that does not decode is set aside.  Raises
    :class:`CorruptStoreError`, naming ``where``, for damage.
    """
    reader = SnapshotReader(io.BytesIO(data), where, SnapshotHeader)
    return reader.snapshot()


def write_snapshot(
    header: SnapshotHeader, payloads: Iterable[bytes], aside: Iterable[Quarantined] = ()
) -> Iterator[bytes]:
    """Write a snapshot in blocks of bytes: a JSON document with one payload a line.

    The first line names the format and holds what ``header`` says.  Memory is bounded
    by a block.  The last line is the CRC-32 of everything before it.
    """
    crc = 0
    head = _FORMAT_FIRST + _encoder.encode(header)[1:]
    for block in _blocks(head, payloads, aside):
        crc = zlib.crc32(block, crc)
        yield block
    yield b'"checksum":"%08x"}\n' % crc


def _blocks(
    head: bytes, payloads: Iterable[bytes], aside: Iterable[Quarantined]
) -> Iterator[bytes]:
    yield head[:-1] + b',"records":[\n'
    yield from _lines(payloads)
    yield b'],"set_aside":[\n'
    yield from _lines(map(_encoder.encode, aside))
    yield b"],\n"


def _lines(values: Iterable[bytes]) -> Iterator[bytes]:
    """JSON values as the lines of an array, a few hundred a block."""
    values = iter(values)
    block = list(islice(values, _BLOCK_LINES))
    while block:
        following = list(islice(values, _BLOCK_LINES))
        yield b",\n".join(block) + (b",\n" if following else b"\n")
        block = following


class SnapshotHeader(Struct, frozen=True):
    """What the first line of every snapshot says after its format."""

    seq: Annotated[int, Meta(ge=0, le=MAX_INT)]
    at: Annotated[int, Meta(ge=0, le=MAX_INT)]


_H = TypeVar("_H", bound=SnapshotHeader)


class SnapshotReader(Generic[_H]):
    """Reads what :func:`write_snapshot` wrote, line by line, in bounded memory.

    ``header`` is the header, decoded as ``header_type``.  Iterating gives the payloads
    (``bytes``) in order of task_id; when the iteration has ended without an error,
    the checksum has been found right and ``aside`` holds what was set aside.
    Everything else is :class:`CorruptStoreError` naming ``where``.
    """

    def __init__(self, lines: Iterable[bytes], where: str, header_type: type[_H]) -> None:
        self._lines = iter(lines)
        self._where = where
        self._crc = 0
        self._offset = 0
        self.aside: list[Quarantined] = []
        first = self._line()
        if not first.endswith(b',"records":[\n'):
            raise self._damaged("the header line is damaged")
        if not first.startswith(_FORMAT_FIRST):
            raise self._damaged(f"the format is not {SNAPSHOT_FORMAT}")
        header = first[len(_FORMAT_FIRST) : -len(b',"records":[\n')]
        self.header = self._json(b"{" + header + b"}", header_type)

    def __iter__(self) -> Iterator[bytes]:
        yield from self._until(b'],"set_aside":[\n')
        self.aside = [self._json(line, Quarantined) for line in self._until(b"],\n")]
        expected = b'"checksum":"%08x"}\n' % self._crc
        if self._line() != expected:
            raise self._damaged("the checksum does not match")
        if next(self._lines, None) is not None:
            raise self._damaged("there is something after the checksum")

    def snapshot(self, *, strict: bool = False) -> Snapshot:
        """Everything at once, decoded; ``strict`` raises for what is or would be set aside."""
        decode = decode_record if strict else decode_or_quarantine
        items = [decode(payload, self._where) for payload in self]
        if strict and self.aside:
            raise CorruptStoreError(self.aside[0].where, self.aside[0].reason)
        return snapshot_of(self.header.seq, self.header.at, (*self.aside, *items))

    def _until(self, end: bytes) -> Iterator[bytes]:
        while (line := self._line()) != end:
            yield line[:-2] if line.endswith(b",\n") else line[:-1]

    def _line(self) -> bytes:
        line = next(self._lines, None)
        if line is None or not line.endswith(b"\n"):
            raise self._damaged("the file ends too early")
        if not line.startswith(b'"checksum"'):
            self._crc = zlib.crc32(line, self._crc)
            self._offset += len(line)
        return line

    def _json(self, value: bytes, kind: type[_T]) -> _T:
        try:
            check_nesting(value)
            return msgspec.json.decode(value, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._damaged(f"does not decode: {error}") from error

    def _damaged(self, reason: str) -> CorruptStoreError:
        return CorruptStoreError(self._where, reason, offset=self._offset)
