"""Snapshots: writing them, reading them, and bringing one forward over the journal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from taskstore import codec
from taskstore.disk import Disk
from taskstore.errors import CorruptStoreError
from taskstore.journal import EntryKind, SetAside, Snapshot
from taskstore.records import TaskRecord
from taskstore.stores.jsonfile.files import numbered
from taskstore.stores.jsonfile.index import Index
from taskstore.stores.jsonfile.layout import Layout, Place, damaged_snapshot_hint
from taskstore.stores.jsonfile.lines import Entry, Identity, image
from taskstore.stores.jsonfile.segments import Walk

_BUFFER = 1 << 20


def write_snapshot(
    disk: Disk,
    path: Path,
    payloads: Iterable[bytes],
    aside: Iterable[SetAside],
    *,
    identity: Identity,
    at: int,
    floor: int,
    deleted: Mapping[str, int],
) -> Path:
    """Write what shall become the snapshot ``path`` beside it; returns where.

    ``payloads`` come in order of task_id; ``deleted`` are the deletions that
    the journal before it still holds from ``floor`` on.
    """
    header: dict[str, Any] = {
        "seq": int(path.stem.partition("-")[2]),
        "at": at,
        "ledger": identity.ledger,
        "timeline": identity.timeline,
        "floor": floor,
        "deleted": dict(deleted),
    }
    return disk.write_temporary(path, codec.write_snapshot(header, payloads, aside))


@contextmanager
def opened(layout: Layout, seq: int) -> Iterator[codec.SnapshotReader]:
    """Open a snapshot.  Damage says whether the ledger can do without it."""
    path = layout.snapshot_path(seq)
    with path.open("rb", buffering=_BUFFER) as file:
        try:
            yield codec.SnapshotReader(file, str(path))
        except CorruptStoreError as error:
            if error.where != str(path) or layout.newest is None or seq != layout.newest.seq:
                raise
            snapshots, segments = numbered(entry.name for entry in layout.directory.iterdir())
            hint = damaged_snapshot_hint(layout.directory, snapshots, dict.fromkeys(segments))
            raise CorruptStoreError(
                error.where, error.reason, offset=error.offset, hint=hint
            ) from error


def check_newest(layout: Layout) -> None:
    """Raise :class:`CorruptStoreError` unless the newest snapshot matches its checksum."""
    if layout.newest is not None:
        with opened(layout, layout.newest.seq) as reader:
            for _ in reader:
                pass


def read_snapshot(layout: Layout, seq: int, *, strict: bool) -> Snapshot:
    """A retained snapshot, decoded."""
    records: dict[str, TaskRecord] = {}
    aside: list[SetAside] = []
    at = _read_into(layout, seq, records, aside, strict=strict)
    return Snapshot(seq, MappingProxyType(records), at, tuple(aside))


def _read_into(
    layout: Layout,
    seq: int,
    records: dict[str, TaskRecord],
    aside: list[SetAside],
    *,
    strict: bool,
    index: Index | None = None,
) -> int:
    """Decode a snapshot into the containers given; returns its time."""
    where = str(layout.snapshot_path(seq))
    decode = codec.decode_record if strict else codec.decode_or_set_aside
    with opened(layout, seq) as reader:
        for payload in reader:
            item = decode(payload, where)
            if isinstance(item, SetAside):
                aside.append(item)
            else:
                records[item.task_id] = item
        aside[:0] = reader.aside
        if strict and aside:
            raise CorruptStoreError(aside[0].where, aside[0].reason)
        if index is not None:
            index.deleted.update(reader.header.get("deleted", {}))
        at: int = reader.header["at"]
        return at


def load(layout: Layout, *, strict: bool, index: Index | None = None) -> tuple[Snapshot, Place]:
    """The newest snapshot brought forward to the end of the journal, and where that is.

    Only the last image of each task is decoded.  ``index``, when given, is
    empty and learns the keys of everything on the way.
    """
    records: dict[str, TaskRecord] = {}
    aside: list[SetAside] = []
    if layout.newest is not None:
        _read_into(layout, layout.newest.seq, records, aside, strict=strict, index=index)
    images: dict[str, tuple[Entry, str]] = {}
    walk = Walk(layout, layout.after_newest())
    for found in walk:
        where = found.where
        for entry in found.line.entries:
            images[entry.task_id] = (entry, where)
            if index is not None and entry.kind is EntryKind.DELETED:
                index.deleted[entry.task_id] = found.line.seq
    if images and aside:
        aside = [item for item in aside if not _is_obsolete(item, images)]
    for task_id, (entry, where) in images.items():
        if entry.kind is EntryKind.DELETED:
            records.pop(task_id, None)
            continue
        item = image(entry, where, strict=strict)
        if isinstance(item, SetAside):
            records.pop(task_id, None)
            aside.append(item)
        else:
            records[task_id] = item
    if index is not None:
        for record in records.values():
            index.add(record)
        for item in aside:
            index.add_set_aside(item)
    place = walk.place
    return Snapshot(place.seq, MappingProxyType(records), place.at, tuple(aside)), place


def index_of(layout: Layout) -> tuple[Index, Place]:
    """What a writer has to know as of the newest snapshot, and the place after it."""
    index = Index()
    if layout.newest is not None:
        with opened(layout, layout.newest.seq) as reader:
            for payload in reader:
                index.add_payload(payload)
            for item in reader.aside:
                index.add_set_aside(item)
            index.deleted.update(reader.header.get("deleted", {}))
    return index, layout.after_newest()


def _is_obsolete(item: SetAside, images: Mapping[str, tuple[Entry, str]]) -> bool:
    """Whether the journal has a later image of the task, or deletes it."""
    found = images.get(item.task_id or "")
    return found is not None and (not item.superseded or found[0].kind is EntryKind.DELETED)
