"""Snapshots: reading them, and bringing one forward over the journal."""

from __future__ import annotations

from types import MappingProxyType

from taskstore.journal import EntryKind, SetAside, Snapshot
from taskstore.records import TaskRecord
from taskstore.stores.jsonfile.index import Index
from taskstore.stores.jsonfile.layout import Layout, Place, open_snapshot
from taskstore.stores.jsonfile.lines import Entry, image
from taskstore.stores.jsonfile.segments import Walk


def check_newest(layout: Layout) -> None:
    """Raise :class:`CorruptStoreError` unless the newest snapshot matches its checksum."""
    if layout.newest is not None:
        with open_snapshot(layout.directory, layout.newest.seq) as reader:
            for _ in reader:
                pass


def read_snapshot(layout: Layout, seq: int, *, strict: bool) -> Snapshot:
    """A retained snapshot, decoded."""
    with open_snapshot(layout.directory, seq) as reader:
        return reader.snapshot(strict=strict)


def load(layout: Layout, *, strict: bool, index: Index | None = None) -> tuple[Snapshot, Place]:
    """The newest snapshot brought forward to the end of the journal, and where that is.

    Only the last image of each task is decoded.  ``index``, when given, is
    empty and learns the keys of everything on the way.
    """
    records: dict[str, TaskRecord] = {}
    aside: list[SetAside] = []
    if layout.newest is not None:
        newest = read_snapshot(layout, layout.newest.seq, strict=strict)
        records, aside = dict(newest.records), list(newest.set_aside)
        if index is not None:
            index.deleted.update(layout.newest.deleted)
    images: dict[str, tuple[Entry, str]] = {}
    walk = Walk(layout, layout.after_newest())
    for found in walk:
        where = found.where
        for entry in found.line.entries:
            images[entry.task_id] = (entry, where)
            if index is not None and entry.kind is EntryKind.DELETED:
                index.deleted[entry.task_id] = found.line.seq
    if images and aside:
        aside = [
            item
            for item in aside
            if not (last := images.get(item.task_id or ""))
            or not item.goes_with(last[0].task_id, last[0].kind)
        ]
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
    place = walk.place
    snapshot = Snapshot(place.seq, MappingProxyType(records), place.at, tuple(aside))
    if index is not None:
        index.learn(snapshot)
    return snapshot, place
