"""Segments: walking over their commits, creating them, cutting a torn tail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from taskstore.errors import CorruptStoreError
from taskstore.store.disk import Disk
from taskstore.stores.jsonfile.layout import TORN, JournalOffset, Layout, SegmentFile
from taskstore.stores.jsonfile.lines import (
    STAMP_BYTES,
    Identity,
    Line,
    decode_commit,
    encode_header,
    is_sound,
)

_BUFFER = 1 << 18


class CommitLocation(NamedTuple):
    """A commit and where it lies: ``raw`` is its line at ``offset`` of ``segment``."""

    segment: SegmentFile
    offset: int
    raw: bytes
    line: Line

    @property
    def where(self) -> str:
        """The place in words."""
        return f"{self.segment.path} at offset {self.offset}"


class SegmentReader:
    """The commits after a place, over as many segments as follow.

    While it is iterated, ``place`` is right after the last commit given.  It
    ends at the end of the last segment, where a torn line counts as nothing.
    Everything else that is not the next commit is :class:`CorruptStoreError`.
    """

    def __init__(self, layout: Layout, place: JournalOffset) -> None:
        self.layout = layout
        self.place = place

    def __iter__(self) -> Iterator[CommitLocation]:
        for segment in self.layout.segments:
            if segment.first < self.place.first:
                continue
            if segment.first > self.place.first:
                self._step_into(segment)
            yield from self.within(segment)

    def _step_into(self, segment: SegmentFile) -> None:
        if segment.first != self.place.seq + 1:
            raise CorruptStoreError(
                str(segment.path),
                f"begins at seq {segment.first}, but the journal before it ends at "
                f"seq {self.place.seq}",
                offset=0,
                hint="nothing was changed; put the missing part back or restore a backup",
            )
        self.place = self.layout.start_of(segment)

    def within(self, segment: SegmentFile) -> Iterator[CommitLocation]:
        """The commits after the place, to the end of its segment."""
        path, first, seq = str(segment.path), segment.first, self.place.seq
        last = segment is self.layout.segments[-1]
        for offset, raw in lines_of(segment, self.place.offset, last=last):
            line = decode_commit(raw, path, offset)
            if line.seq != seq + 1:
                raise CorruptStoreError(path, f"seq {line.seq} follows seq {seq}", offset=offset)
            seq, end = line.last, offset + len(raw)
            self.place = JournalOffset(
                first, seq, line.at, end, segment.inode, offset, raw[:STAMP_BYTES]
            )
            yield CommitLocation(segment, offset, raw, line)


def lines_of(
    segment: SegmentFile, offset: int, *, last: bool, naming: bytes = b""
) -> Iterator[tuple[int, bytes]]:
    """The lines from ``offset`` on that hold ``naming``, each with its offset.

    In the last segment, a torn line at the end counts as nothing.  Any other
    line that does not match its checksum is :class:`CorruptStoreError`.
    """
    with segment.path.open("rb", buffering=_BUFFER) as file:
        file.seek(offset)
        for raw in file:
            if naming in raw:
                if is_sound(raw):
                    yield offset, raw
                elif last and not file.read(1):
                    return
                else:
                    raise CorruptStoreError(
                        str(segment.path), "the line does not match its checksum", offset=offset
                    )
            offset += len(raw)


def prepare_segment(
    disk: Disk, path: Path, identity: Identity, *, at: int, base: bool = False
) -> Path:
    """Write what shall become the segment ``path`` beside it; returns where."""
    first = int(path.stem.partition("-")[2])
    return disk.write_temporary(path, [encode_header(identity, seq=first, at=at, base=base)])


def cut_tail(disk: Disk, descriptor: int, path: Path, offset: int) -> str:
    """Cut what lies after ``offset`` of an open segment, keeping its bytes; returns the notice.

    Only for who holds the write lock, and who syncs the segment before writing on.
    """
    with path.open("rb") as file:
        file.seek(offset)
        tail = file.read()
    kept = path.with_name(f"{path.name}.{offset}{TORN}")
    count = 1
    while kept.exists():
        count += 1
        kept = path.with_name(f"{path.name}.{offset}-{count}{TORN}")
    disk.publish(disk.write_temporary(kept, [tail]), kept)
    disk.truncate(descriptor, offset)
    return (
        f"{path}: {torn(len(tail), offset)}; it was cut off, and its bytes are kept in {kept.name}"
    )


def torn(size: int, offset: int) -> str:
    """What is known of the end of the last segment that is no commit."""
    return (
        f"the last line ({size} bytes at offset {offset}) was not completely written, "
        "or was damaged afterwards"
    )
