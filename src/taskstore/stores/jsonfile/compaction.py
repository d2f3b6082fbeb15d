"""Compaction: fold the journal into a snapshot, publish the snapshot, trim.

The compactor takes the write lock twice, each time for a short time.  First the compactor begins a
new segment at seq N + 1; after that, the files with entries up to seq N do not change.  Then the
compactor reads the old snapshot as a stream and merges this snapshot with the newest payload of
each task in the journal.  The merge keeps only keys in memory.  The compactor publishes the
snapshot at seq N.  The publication moves the floor, because the snapshot's header declares the new
floor.  The compactor takes the write lock again to show other processes that the floor has moved.
Finally, the compactor removes the files below the floor, oldest first.

If there is no snapshot at the seq directly before the new floor, the compactor also makes a
snapshot at this seq.  If no segment begins at the new floor, the floor is in the middle of a
segment.  The compactor then copies the end of this segment to a new segment that starts a chain.
A segment that starts a chain is live only if it begins at the floor.  Therefore an entry and its
copy are never live at the same time.
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
from taskstore.model.compaction_policy import JournalStats, SnapshotInfo
from taskstore.model.journal import EntryKind, Quarantined
from taskstore.model.query import chunked_sort
from taskstore.stores.common.compaction import (
    CompactionPoint,
    CompactionSteps,
    EntryCommit,
    Retained,
)
from taskstore.stores.jsonfile.index import decode_stub
from taskstore.stores.jsonfile.layout import (
    TORN,
    Layout,
    LedgerSnapshotHeader,
    open_snapshot,
    permissions_source,
    read_layout,
    read_snapshot_header,
    retry_while_changing,
    segment_name,
)
from taskstore.stores.jsonfile.lines import Entry, decode_entry, encode_header
from taskstore.stores.jsonfile.reading import Reader
from taskstore.stores.jsonfile.segments import CommitReader, LocatedCommit
from taskstore.stores.jsonfile.writing import Writer

COMPACT_LOCK_TIMEOUT_S = 5.0
"""How long a compaction waits for the compaction lock, in seconds.  A writer that removes leftover
files takes the compaction lock too."""


class Compaction(CompactionSteps):
    """The steps of one compaction.  If ``erase`` is true, the compaction also removes the files
    with saved torn lines.

    ``superseded`` lists the quarantined payloads of trimmed entries.
    """

    def __init__(self, writer: Writer, reader: Reader, *, erase: bool) -> None:
        self.superseded: list[Quarantined] = []
        self._writer = writer
        self._reader = reader
        self._erase = erase
        self._layout = writer.layout
        self._lock = writer.compact_lock()

    def stats(self, now: int, most_bytes: int) -> JournalStats:
        del most_bytes
        writer = self._writer
        with writer.lock():
            assert writer.index is not None
            layout = writer.layout
            newest = layout.newest_snapshot.seq if layout.newest_snapshot is not None else 0
            sizes = {
                segment.first: segment.path.stat().st_size - segment.start
                for segment in layout.segments
            }
            oldest = next(iter(CommitReader(layout, layout.after_newest_snapshot())), None)
            return JournalStats(
                now=now,
                newest_snapshot_seq=newest,
                floor=layout.floor,
                entries=writer.end.seq - newest,
                records=len(writer.index.revisions),
                bytes=sum(size for first, size in sizes.items() if first > newest),
                history_bytes=sum(sizes.values()),
                oldest_at=oldest.line.at if oldest is not None else None,
            )

    def lock(self) -> AbstractContextManager[object]:
        self._lock = self._writer.compact_lock()
        return self._lock.hold(COMPACT_LOCK_TIMEOUT_S, "another compactor")

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        directory = self._layout.directory

        # The writer's layout can still contain snapshots that the previous compaction removed.
        def attempt(_: int) -> tuple[SnapshotInfo, ...]:
            return tuple(
                SnapshotInfo(seq, read_snapshot_header(directory, seq).at)
                for seq in read_layout(directory).snapshots
            )

        return retry_while_changing(directory, attempt)

    def begin(self) -> CompactionPoint:
        with self._writer.lock():
            layout = self._layout = self._writer.roll()
            self._lock.lock_next_segment(layout.segments[-1].path)
            seq, at = self._writer.end.seq, self._writer.end.at
        return CompactionPoint(seq, at, layout.floor, self.snapshots())

    def commit_of(self, seq: int) -> EntryCommit:
        line = self._reader.with_layout(lambda layout: self._reader.commit_of(layout, seq))
        return EntryCommit(line.at, line.commit_id)

    def seq_within(self, size: int, head: int) -> int:
        layout, left = self._layout, size
        for segment in reversed(layout.segments):
            if segment.first > head:
                continue
            end = segment.path.stat().st_size
            left -= end - segment.start
            if left < 0:
                for location in CommitReader(layout, layout.start_of(segment)).commits_in(segment):
                    if location.offset + len(location.raw) - segment.start >= -left:
                        return location.line.last
        return layout.floor - 1

    def publish(self, point: CompactionPoint, retained: Retained) -> int:
        layout, floor, disk = self._layout, retained.floor, self._writer.disk
        # All files are written before the first is published: versions of taskstore that do not
        # know the rule for a copied segment can read the directory until then.
        segments, snapshots = [], []
        if retained.base_snapshot is not None:
            segments = self._write_base_segment(retained.base_snapshot)
            snapshots = [self._write_base_snapshot(point, retained.base_snapshot)]
        merge = Merge(layout, point.seq, floor)
        snapshots.append(
            self._write_snapshot(merge, layout, SnapshotInfo(point.seq, point.at), floor)
        )
        for temporary, path in segments:
            disk.publish(temporary, path)
        if retained.base_snapshot is not None:
            # Until the last rename, this segment can follow the newest snapshot.
            self._lock.lock_next_segment(layout.directory / segment_name(floor))
        for temporary, path in snapshots:
            disk.publish(temporary, path)
        with self._writer.lock():
            self._writer.announce_floor(floor)
        self.superseded = merge.superseded
        return merge.count

    def _write_base_segment(self, base: SnapshotInfo) -> list[tuple[Path, Path]]:
        """Write the segment that begins at the new floor.  Return a list with its temporary and its
        final path; the list is empty if the segment exists."""
        floor = base.seq + 1
        source = self._layout.segment_start(floor)
        if source.first == floor:
            return []
        directory = self._layout.directory
        path, permissions_from = (
            directory / segment_name(first) for first in (floor, source.first)
        )
        # While a compaction runs, writers remove temporary files only if their names begin as
        # those of segments do.
        temporary = self._writer.disk.write_temporary(
            path.with_name(f"snapshot-{path.name}"), self._copied_segment(base), permissions_from
        )
        return [(temporary, path)]

    def _write_base_snapshot(self, point: CompactionPoint, base: SnapshotInfo) -> tuple[Path, Path]:
        """Write the snapshot directly before the new floor; return its temporary and its final
        path."""
        layout = self._layout
        older = [snapshot.seq for snapshot in point.snapshots if snapshot.seq < base.seq]
        newest = read_snapshot_header(layout.directory, older[-1]) if older else None
        before = layout._replace(newest_snapshot=newest)
        floor = base.seq + 1
        return self._write_snapshot(Merge(before, base.seq, floor), before, base, floor)

    def _copied_segment(self, base: SnapshotInfo) -> Iterator[bytes]:
        """Yield a new segment in blocks: a header, then the commits after ``base`` from one older
        segment."""
        layout = self._layout
        yield encode_header(layout.identity, seq=base.seq + 1, at=base.at, starts_chain=True)
        start = layout.segment_start(base.seq + 1)
        [segment] = (segment for segment in layout.segments if segment.first == start.first)
        for location in CommitReader(layout, start).commits_in(segment):
            if location.line.seq > base.seq:
                yield location.raw

    def _write_snapshot(
        self, merge: Merge, layout: Layout, info: SnapshotInfo, floor: int
    ) -> tuple[Path, Path]:
        """Write a snapshot to a temporary file; return its temporary and its final path."""
        path = layout.snapshot_path(info.seq)
        ledger, timeline = layout.identity.ledger, layout.identity.timeline
        deleted = {task_id: seq for task_id, seq in merge.deleted.items() if seq >= floor}
        header = LedgerSnapshotHeader(
            info.seq, info.at, ledger, timeline, floor, deleted, merge.commit_id
        )
        blocks = codec.encode_snapshot_blocks(header, merge.payloads(), merge.quarantined())
        permissions_from = permissions_source(self._layout)
        return self._writer.disk.write_temporary(path, blocks, permissions_from), path

    def trim(self, point: CompactionPoint, retained: Retained) -> None:
        layout = self._layout
        dropped = [info.seq for info in point.snapshots if info.seq not in retained.seqs]
        obsolete = read_layout(layout.directory).obsolete
        self._remove((*obsolete, *(layout.snapshot_path(seq) for seq in dropped)))
        if self._erase:
            self._remove(tuple(layout.directory.glob(f"*{TORN}")))

    def _remove(self, paths: tuple[Path, ...]) -> None:
        """Remove files in the given order, and fsync the directory.  A crash after this call
        therefore cannot restore one of these files."""
        if paths:
            self._writer.disk.remove_all(paths)
            self._writer.disk.sync_directory(self._layout.directory)


class _PayloadLocation(Struct, frozen=True, gc=False):
    """The location of a task's newest payload.  A merge creates many instances of this class; the
    garbage collector does not track these instances."""

    segment: int
    offset: int
    length: int


def _quarantine_damaged(entry: Entry, where: str) -> Quarantined | None:
    """Return an entry's payload if it does not decode or belongs to another change, else
    ``None``."""
    item = decode_entry(entry, where, strict=False)
    if isinstance(item, Quarantined):
        return item
    if (item.task_id, item.revision) == (entry.task_id, entry.revision):
        return None
    reason = "is the record of another change"
    return Quarantined(bytes(entry.record), where, reason, entry.task_id, entry.revision)


class Merge:
    """The newest snapshot merged with the newest payload of each task in the journal up to ``seq``.

    The merge keeps only keys in memory.  A payload without readable keys is quarantined; every
    other payload is copied as bytes, even if the payload does not decode.  ``superseded`` lists
    payloads that do not decode: a payload is in the list if its entry is below ``floor`` and its
    task has a later entry [12].
    """

    def __init__(self, layout: Layout, seq: int, floor: int) -> None:
        self.count = 0
        self.commit_id = "" if layout.newest_snapshot is None else layout.newest_snapshot.commit_id
        """The id of the newest commit."""
        self.deleted: dict[str, int] = {}
        self._layout = layout
        self._floor = floor
        self._last_states: dict[str, _PayloadLocation | Quarantined | None] = {}
        """Maps each task id in the journal to the task's newest payload, or ``None`` for a deleted
        task."""
        self._damaged: dict[str, Quarantined] = {}
        """Maps a task id to the payload of the task's newest entry so far, if this entry is below
        the floor and the payload does not decode."""
        self._superseded: dict[str, list[Quarantined]] = {}
        self._unidentified: list[Quarantined] = []
        if layout.newest_snapshot is not None:
            self.deleted.update(layout.newest_snapshot.deleted)
        trims = floor > layout.floor
        start = layout.segment_start(layout.floor) if trims else layout.after_newest_snapshot()
        for location in CommitReader(layout, start):
            if location.line.seq > seq:
                break
            self._add_commit(location, location.where)
        self.superseded = [item for items in self._superseded.values() for item in items]

    def _add_commit(self, location: LocatedCommit, where: str) -> None:
        newest = self._layout.newest_snapshot
        since_newest = newest is None or location.line.seq > newest.seq
        if since_newest:
            self.commit_id = location.line.commit_id
        start = 0
        for seq, entry in enumerate(location.line.entries, location.line.seq):
            task_id = entry.task_id
            replaced = self._damaged.pop(task_id, None)
            if entry.kind is EntryKind.DELETED:
                # The deletion of a task also removes the superseded payloads of the task.
                self._superseded.pop(task_id, None)
                if since_newest:
                    self._last_states[task_id] = None
                    self.deleted[task_id] = location.line.seq
                continue
            if replaced is not None:
                self._superseded.setdefault(task_id, []).append(replaced)
            damage = _quarantine_damaged(entry, where)
            if damage is not None and seq < self._floor:
                self._damaged[task_id] = replace(
                    damage, where=f"{where}, seq {seq}", superseded=True
                )
            if since_newest:
                payload = bytes(entry.record)
                start = location.raw.index(payload, start)
                self._last_states[task_id] = damage
                keys = decode_stub(payload) if damage is not None else None
                if damage is None or (keys is not None and keys.task_id == task_id):
                    self._last_states[task_id] = _PayloadLocation(
                        location.segment.first, location.offset + start, len(payload)
                    )
                start += len(payload)

    def payloads(self) -> Iterator[bytes]:
        """Yield the payloads of all current records, in order of task_id."""
        for _, payload in heapq.merge(self._snapshot_payloads(), self._journal_payloads()):
            self.count += 1
            yield payload

    def _journal_payloads(self) -> Iterator[tuple[str, bytes]]:
        """Yield the task id and the newest payload of each task in the journal."""
        with contextlib.ExitStack() as stack:
            files = {
                segment.first: stack.enter_context(segment.path.open("rb"))
                for segment in self._layout.segments
            }
            for task_id in chunked_sort(self._last_states):
                state = self._last_states[task_id]
                if isinstance(state, _PayloadLocation):
                    file = files[state.segment]
                    yield task_id, os.pread(file.fileno(), state.length, state.offset)

    def quarantined(self) -> Iterator[Quarantined]:
        """Yield the quarantined payloads; the caller must first exhaust :meth:`payloads`."""
        states = (item for item in self._last_states.values() if isinstance(item, Quarantined))
        for item in (*self.superseded, *self._unidentified, *states):
            self.count += 1
            yield item

    def _snapshot_payloads(self) -> Iterator[tuple[str, bytes]]:
        """Yield id and payload of each task that is in the old snapshot and has no later journal
        entry."""
        layout = self._layout
        if layout.newest_snapshot is None:
            return
        with open_snapshot(layout.directory, layout.newest_snapshot.seq) as reader:
            for payload in reader:
                keys = decode_stub(payload)
                if keys is None:
                    where = str(layout.snapshot_path(layout.newest_snapshot.seq))
                    item = codec.quarantine(payload, where, "its task id cannot be read")
                    self._unidentified.append(item)
                elif keys.task_id not in self._last_states:
                    yield keys.task_id, payload
            items = (*self._unidentified, *reader.quarantined)
            self._unidentified = [item for item in items if not self._is_obsolete(item)]

    def _is_obsolete(self, item: Quarantined) -> bool:
        task_id = item.task_id
        if task_id is None or task_id not in self._last_states:
            return False
        deleted = self._last_states[task_id] is None
        return item.is_obsoleted_by(task_id, EntryKind.DELETED if deleted else EntryKind.UPSERTED)
