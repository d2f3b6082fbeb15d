"""Compaction: fold the journal into a snapshot, publish it, trim.

The write lock is held twice for a moment: to begin a new segment at N + 1,
so that everything up to N lies in files that no longer change, and to tell
the others that the floor has moved.  In between the old snapshot is streamed
and merged with the last images of the journal, in memory bounded by the keys.
Publishing the snapshot at N, whose header declares the floor, is what moves
it; the files below it are removed afterwards, oldest first.
"""

from __future__ import annotations

import contextlib
import heapq
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from taskstore.model import codec
from taskstore.model.chunked import chunked_sort
from taskstore.model.journal import EntryKind, Quarantined
from taskstore.model.policies import JournalStats, SnapshotInfo
from taskstore.stores.common.compaction import CompactionPoint, CompactionSteps, Retained
from taskstore.stores.jsonfile.index import keys_of
from taskstore.stores.jsonfile.layout import (
    TORN,
    Layout,
    SnapshotHeader,
    open_snapshot,
    read_layout,
    read_snapshot_header,
)
from taskstore.stores.jsonfile.lines import Entry, image
from taskstore.stores.jsonfile.segments import CommitLocation, SegmentReader
from taskstore.stores.jsonfile.writing import Writer

TIDYING_S = 5.0
"""How long a compaction waits for its lock, in seconds: writers that clear up hold it briefly."""


class Compaction(CompactionSteps):
    """The steps of one compaction.  ``erase`` removes the torn lines that were kept, too.

    ``superseded`` is what was set aside of entries that were trimmed.
    """

    def __init__(self, writer: Writer, *, erase: bool) -> None:
        self.superseded: list[Quarantined] = []
        self._writer = writer
        self._erase = erase
        self._layout = writer.layout

    def stats(self, now: int) -> JournalStats:
        writer = self._writer
        with writer.entered():
            assert writer.index is not None
            layout = writer.layout
            newest = layout.newest.seq if layout.newest is not None else 0
            since = [segment for segment in layout.segments if segment.first > newest]
            first = next(iter(SegmentReader(layout, layout.after_newest())), None)
            return JournalStats(
                now=now,
                newest=newest,
                floor=layout.floor,
                entries=writer.place.seq - newest,
                records=len(writer.index.revisions),
                bytes=sum(segment.path.stat().st_size - segment.start for segment in since),
                oldest_at=first.line.at if first is not None else None,
            )

    def lock(self) -> AbstractContextManager[None]:
        return self._writer.compact_lock().held(TIDYING_S, "another compactor")

    def begin(self) -> CompactionPoint:
        with self._writer.entered():
            layout = self._layout = self._writer.roll()
            seq, at = self._writer.place.seq, self._writer.place.at
        directory = layout.directory
        # Read again: what the last run removed may still be in the layout that the writer keeps.
        marks = tuple(
            SnapshotInfo(seq, read_snapshot_header(directory, seq).at)
            for seq in read_layout(directory).snapshots
        )
        return CompactionPoint(seq, at, layout.floor, marks)

    def publish(self, point: CompactionPoint, retained: Retained) -> int:
        layout, floor, disk = self._layout, retained.floor, self._writer.disk
        merge = Merge(layout, point.seq, floor)
        path = layout.snapshot_path(point.seq)
        ledger, timeline = layout.identity.ledger, layout.identity.timeline
        deleted = {task_id: seq for task_id, seq in merge.deleted.items() if seq >= floor}
        header = SnapshotHeader(point.seq, point.at, ledger, timeline, floor, deleted)
        blocks = codec.write_snapshot(header, merge.payloads(), merge.aside())
        disk.publish(disk.write_temporary(path, blocks), path)
        with self._writer.entered():
            self._writer.settle(floor)
        self.superseded = merge.superseded
        return merge.count

    def trim(self, point: CompactionPoint, retained: Retained) -> None:
        layout = self._layout
        dropped = [mark.seq for mark in point.marks if mark.seq not in retained.seqs]
        void = read_layout(layout.directory).void
        self._remove((*void, *(layout.snapshot_path(seq) for seq in dropped)))
        if self._erase:
            self._remove(tuple(layout.directory.glob(f"*{TORN}")))

    def _remove(self, paths: tuple[Path, ...]) -> None:
        """Remove files in this order.  The directory is synced in between, so
        that no crash shows a later one gone and an earlier one still there."""
        if paths:
            self._writer.disk.remove_all(paths)
            self._writer.disk.sync_directory(self._layout.directory)


class _Image(Struct, frozen=True, gc=False):
    """Where the last payload of a task lies; there are many, and no collector looks at them."""

    segment: int
    offset: int
    length: int


def _damage_of(entry: Entry, where: str) -> Quarantined | None:
    """What is set aside of an entry, if it does not decode or holds something else."""
    item = image(entry, where, strict=False)
    if isinstance(item, Quarantined):
        return item
    if (item.task_id, item.revision) == (entry.task_id, entry.revision):
        return None
    reason = "is the record of another change"
    return Quarantined(bytes(entry.record), where, reason, entry.task_id, entry.revision)


class Merge:
    """The newest snapshot merged with the last images of the journal up to ``seq``.

    Only keys are held in memory.  A payload whose keys cannot be told is moved
    to what is set aside; any other stays as the bytes that it is, also when
    it does not decode.  ``superseded`` is what is kept of entries below ``floor``
    that do not decode, though their tasks went on [12].
    """

    def __init__(self, layout: Layout, seq: int, floor: int) -> None:
        self.count = 0
        self.deleted: dict[str, int] = {}
        self._layout = layout
        self._floor = floor
        self._ends: dict[str, _Image | Quarantined | None] = {}
        """By task what its last change in the journal left; ``None``: it was deleted."""
        self._damaged: dict[str, Quarantined] = {}
        """By task its last change, if that is below the floor and does not decode."""
        self._superseded: dict[str, list[Quarantined]] = {}
        self._unknown: list[Quarantined] = []
        if layout.newest is not None:
            self.deleted.update(layout.newest.deleted)
        trims = floor > layout.floor
        for found in SegmentReader(
            layout, layout.before(layout.floor) if trims else layout.after_newest()
        ):
            if found.line.seq > seq:
                break
            self._take(found, found.where)
        self.superseded = [item for items in self._superseded.values() for item in items]

    def _take(self, found: CommitLocation, where: str) -> None:
        newest = self._layout.newest
        since_newest = newest is None or found.line.seq > newest.seq
        position = 0
        for seq, entry in enumerate(found.line.entries, found.line.seq):
            task_id = entry.task_id
            replaced = self._damaged.pop(task_id, None)
            if entry.kind is EntryKind.DELETED:
                # What was kept of it goes as every deleted record does.
                self._superseded.pop(task_id, None)
                if since_newest:
                    self._ends[task_id] = None
                    self.deleted[task_id] = found.line.seq
                continue
            if replaced is not None:
                self._superseded.setdefault(task_id, []).append(replaced)
            damage = _damage_of(entry, where)
            if damage is not None and seq < self._floor:
                self._damaged[task_id] = replace(
                    damage, where=f"{where}, seq {seq}", superseded=True
                )
            if since_newest:
                payload = bytes(entry.record)
                position = found.raw.index(payload, position)
                self._ends[task_id] = damage
                keys = keys_of(payload) if damage is not None else None
                if damage is None or (keys is not None and keys.task_id == task_id):
                    self._ends[task_id] = _Image(
                        found.segment.first, found.offset + position, len(payload)
                    )
                position += len(payload)

    def payloads(self) -> Iterator[bytes]:
        """The live payloads in order of task_id."""
        for _, payload in heapq.merge(self._old(), self._new()):
            self.count += 1
            yield payload

    def _new(self) -> Iterator[tuple[str, bytes]]:
        """The payloads of the journal with their task ids."""
        with contextlib.ExitStack() as stack:
            files = {
                segment.first: stack.enter_context(segment.path.open("rb"))
                for segment in self._layout.segments
            }
            for task_id in chunked_sort(self._ends):
                found = self._ends[task_id]
                if isinstance(found, _Image):
                    file = files[found.segment]
                    yield task_id, os.pread(file.fileno(), found.length, found.offset)

    def aside(self) -> Iterator[Quarantined]:
        """What is set aside, to be asked for after the payloads."""
        found = (item for item in self._ends.values() if isinstance(item, Quarantined))
        for item in (*self.superseded, *self._unknown, *found):
            self.count += 1
            yield item

    def _old(self) -> Iterator[tuple[str, bytes]]:
        """The payloads of the old snapshot that stay, with their task ids."""
        layout = self._layout
        if layout.newest is None:
            return
        with open_snapshot(layout.directory, layout.newest.seq) as reader:
            for payload in reader:
                keys = keys_of(payload)
                if keys is None:
                    where = str(layout.snapshot_path(layout.newest.seq))
                    self._unknown.append(codec.quarantine(payload, where, "its id cannot be told"))
                elif keys.task_id not in self._ends:
                    yield keys.task_id, payload
            self._unknown += reader.aside
            self._unknown = [item for item in self._unknown if not self._is_obsolete(item)]

    def _is_obsolete(self, item: Quarantined) -> bool:
        task_id = item.task_id
        if task_id is None or task_id not in self._ends:
            return False
        deleted = self._ends[task_id] is None
        return item.goes_with(task_id, EntryKind.DELETED if deleted else EntryKind.UPSERTED)
