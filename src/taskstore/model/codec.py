"""The encoding of records and snapshots as JSON.

A payload is a record that is encoded as a JSON object.  The first member is the format version,
``{"v":"1.1","task_id":…}``; a field that has its default value is omitted.  A payload of the
current version is decoded directly into a :class:`TaskRecord`, and so is an older payload that
only lacks optional fields.  A payload that cannot be decoded directly takes longer to decode.
Upcasters convert a payload of an older version.  A payload of a newer minor version can have
unknown members; the record keeps these members, and :func:`encode_record` writes them back.  A
payload of a newer major version is refused.

Version 1.1 added the optional fields ``lease_until`` and ``lease_token``.
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
from taskstore.model.validation import READABLE_VERSION, exceeds_depth

UPCASTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "1.0": lambda members: {**members, "v": "1.1"},
}
"""Maps a format version to the function that converts a payload to the next format version."""

SNAPSHOT_FORMAT = "taskstore-snapshot/1"
"""The name of the format that :func:`encode_snapshot` writes."""

_T = TypeVar("_T")
_FORMAT_PREFIX = b'{"format":"%s",' % SNAPSHOT_FORMAT.encode()
_BLOCK_LINES = 256
_BRACE = ord("{")
_MAJOR = FORMAT_VERSION.split(".", maxsplit=1)[0]
_CURRENT_PREFIX = b'{"v":"%s",' % FORMAT_VERSION.encode()
_COMPATIBLE_PREFIX = b'{"v":"1.0",'
"""The first bytes of a payload of version 1.0, which lacks only optional fields of version 1.1."""
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(TaskRecord)
_FIELDS = {field.encode_name for field in msgspec.structs.fields(TaskRecord)} - {"_unknown"} | {"v"}


def checksum(payload: bytes) -> int:
    """Return the CRC-32 of a payload, an integer from 0 to 2**32 - 1."""
    return zlib.crc32(payload)


def encode_record(record: TaskRecord) -> bytes:
    """Return the payload of a record.  Equal records have equal payloads."""
    if record.unknown_json is None:
        return _encoder.encode(record)
    members = msgspec.json.decode(_encoder.encode(replace(record, unknown_json=None)), type=dict)
    return _encoder.encode({**members, **msgspec.json.decode(record.unknown_json)})


def decode_record(payload: bytes, where: str = "record") -> TaskRecord:
    """Return the record of a payload.

    Raises :class:`CorruptStoreError`, with ``where`` as the location, if the payload is not
    a record of the current major version.
    """
    if payload.startswith(_COMPATIBLE_PREFIX):
        payload = _CURRENT_PREFIX + payload[len(_COMPATIBLE_PREFIX) :]
    try:
        if payload.count(b"{") + payload.count(b"[") > PAYLOAD_DEPTH:
            check_nesting(payload)
        record = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _decode_other_version(payload, where)
    if record.unknown_json is not None:
        return _decode_other_version(payload, where)
    if record.metadata_json is not NO_METADATA:
        force_setattr(record, "metadata_json", _copy_metadata(record.metadata_json, where))
    return record


def check_nesting(encoded: bytes, depth: int = PAYLOAD_DEPTH) -> None:
    """Raise :class:`msgspec.DecodeError` for JSON with more than ``depth`` levels of nesting.

    Call this function before you decode untrusted input: the nesting limit of the JSON
    decoder depends on the interpreter and on the caller's stack.
    """
    if exceeds_depth(encoded, depth):
        raise msgspec.DecodeError(f"the JSON is nested more than {depth} levels deep")


def _copy_metadata(encoded: Raw, where: str) -> Raw:
    """Return a copy of ``encoded``.

    ``encoded`` is a view of the payload and would keep the whole payload in memory.
    """
    copy = encoded.copy()
    if memoryview(copy)[0] != _BRACE:
        raise CorruptStoreError(where, "has metadata that is not a JSON object")
    return copy


def _decode_other_version(payload: bytes, where: str) -> TaskRecord:
    """Decode a payload of another version; raise :class:`CorruptStoreError` if decoding fails."""
    try:
        check_nesting(payload)
        members = msgspec.json.decode(payload)
        if not isinstance(members, dict):
            raise CorruptStoreError(where, "is not a JSON object")
        while isinstance(version := members.get("v"), str) and version in UPCASTERS:
            members = UPCASTERS[version](members)
        if not isinstance(version, str) or not READABLE_VERSION.match(version):
            reason = (
                f"has the record format {version!r}; only the formats {_MAJOR}.x can be decoded"
            )
            raise CorruptStoreError(where, reason)
        unknown = {name: value for name, value in members.items() if name not in _FIELDS}
        known = {name: value for name, value in members.items() if name in _FIELDS}
        if version != FORMAT_VERSION:
            unknown["v"] = version
        record = _decoder.decode(_encoder.encode({**known, "v": FORMAT_VERSION}))
        kept = Raw(msgspec.json.encode(unknown, order="deterministic")) if unknown else None
        metadata = _copy_metadata(record.metadata_json, where)
        return replace(record, metadata_json=metadata, unknown_json=kept)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptStoreError(where, f"cannot be decoded: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        # An upcaster failed, because a member is missing or has the wrong type.
        raise CorruptStoreError(where, f"cannot be decoded: {error!r}") from error


def decode_or_quarantine(payload: bytes, where: str) -> TaskRecord | Quarantined:
    """Return the record of a payload, or a :class:`Quarantined` if the payload does not decode."""
    try:
        return decode_record(payload, where)
    except CorruptStoreError as error:
        return quarantine(payload, where, error.reason)


def quarantine(payload: bytes, where: str, reason: str) -> Quarantined:
    """Return a payload as a :class:`Quarantined`, with its task id and revision if these can be
    read."""
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
    """Return an encoded snapshot, for stores that keep the whole ledger in one value.

    Raises :class:`ValidationError` for an invalid record.
    """
    snapshot = validated_snapshot(snapshot)
    payloads = (encode_record(snapshot.records[task_id]) for task_id in sorted(snapshot.records))
    header = SnapshotHeader(snapshot.seq, snapshot.at)
    return b"".join(encode_snapshot_blocks(header, payloads, snapshot.quarantined))


def decode_snapshot(data: bytes, where: str = "snapshot") -> Snapshot:
    """Return the snapshot that :func:`encode_snapshot` encoded.

    A record that cannot be decoded is quarantined.  Raises :class:`CorruptStoreError`,
    with ``where`` as the location, if the data is damaged.
    """
    reader = SnapshotReader(io.BytesIO(data), where, SnapshotHeader)
    return reader.snapshot()


def encode_snapshot_blocks(
    header: SnapshotHeader, payloads: Iterable[bytes], quarantined: Iterable[Quarantined] = ()
) -> Iterator[bytes]:
    """Yield an encoded snapshot in blocks of bytes: a JSON document with one payload per line.

    The first line of the document contains the format and the members of ``header``.  The
    last line contains the CRC-32 of all earlier lines.  The memory use does not depend on
    the size of the snapshot.
    """
    crc = 0
    opening = _FORMAT_PREFIX + _encoder.encode(header)[1:]
    for block in _blocks(opening, payloads, quarantined):
        crc = zlib.crc32(block, crc)
        yield block
    yield b'"checksum":"%08x"}\n' % crc


def _blocks(
    opening: bytes, payloads: Iterable[bytes], quarantined: Iterable[Quarantined]
) -> Iterator[bytes]:
    yield opening[:-1] + b',"records":[\n'
    yield from _lines(payloads)
    yield b'],"set_aside":[\n'
    yield from _lines(map(_encoder.encode, quarantined))
    yield b"],\n"


def _lines(values: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a JSON array, one value per line, in blocks of up to 256 lines."""
    values = iter(values)
    block = list(islice(values, _BLOCK_LINES))
    while block:
        following = list(islice(values, _BLOCK_LINES))
        yield b",\n".join(block) + (b",\n" if following else b"\n")
        block = following


class SnapshotHeader(Struct, frozen=True):
    """The JSON members after ``format`` in the first line of an encoded snapshot."""

    seq: Annotated[int, Meta(ge=0, le=MAX_INT)]
    at: Annotated[int, Meta(ge=0, le=MAX_INT)]


_Header = TypeVar("_Header", bound=SnapshotHeader)


class SnapshotReader(Generic[_Header]):
    """Reads the output of :func:`encode_snapshot_blocks` line by line; the memory use is bounded.

    ``header`` is the decoded header, an object of the type ``header_type``.  Iteration
    yields the payloads (``bytes``) in order of task_id.  After the last payload, the
    iteration verifies the checksum and stores the quarantined records in ``quarantined``.
    Damaged data raises :class:`CorruptStoreError`, with ``where`` as the location.
    """

    def __init__(self, lines: Iterable[bytes], where: str, header_type: type[_Header]) -> None:
        self._lines = iter(lines)
        self._where = where
        self._crc = 0
        self._offset = 0
        self.quarantined: list[Quarantined] = []
        first = self._next_line()
        if not first.endswith(b',"records":[\n'):
            raise self._damaged("the header line is damaged")
        if not first.startswith(_FORMAT_PREFIX):
            raise self._damaged(f"the format is not {SNAPSHOT_FORMAT}")
        header = first[len(_FORMAT_PREFIX) : -len(b',"records":[\n')]
        self.header = self._decode(b"{" + header + b"}", header_type)

    def __iter__(self) -> Iterator[bytes]:
        yield from self._lines_until(b'],"set_aside":[\n')
        lines = self._lines_until(b"],\n")
        self.quarantined = [self._decode(line, Quarantined) for line in lines]
        expected = b'"checksum":"%08x"}\n' % self._crc
        if self._next_line() != expected:
            raise self._damaged("the checksum does not match")
        if next(self._lines, None) is not None:
            raise self._damaged("there is data after the checksum")

    def snapshot(self, *, strict: bool = False) -> Snapshot:
        """Return the whole snapshot; with ``strict``, raise :class:`CorruptStoreError` if a record
        cannot be decoded."""
        decode = decode_record if strict else decode_or_quarantine
        items = [decode(payload, self._where) for payload in self]
        if strict and self.quarantined:
            raise CorruptStoreError(self.quarantined[0].where, self.quarantined[0].reason)
        return snapshot_of(self.header.seq, self.header.at, (*self.quarantined, *items))

    def _lines_until(self, end: bytes) -> Iterator[bytes]:
        while (line := self._next_line()) != end:
            yield line[:-2] if line.endswith(b",\n") else line[:-1]

    def _next_line(self) -> bytes:
        line = next(self._lines, None)
        if line is None or not line.endswith(b"\n"):
            raise self._damaged("the file is truncated")
        if not line.startswith(b'"checksum"'):
            self._crc = zlib.crc32(line, self._crc)
            self._offset += len(line)
        return line

    def _decode(self, value: bytes, kind: type[_T]) -> _T:
        try:
            check_nesting(value)
            return msgspec.json.decode(value, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._damaged(f"cannot be decoded: {error}") from error

    def _damaged(self, reason: str) -> CorruptStoreError:
        return CorruptStoreError(self._where, reason, offset=self._offset)
