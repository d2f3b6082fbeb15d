"""Segment files: reading commits, creating a segment, truncating a torn line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from taskstore.errors import CorruptStoreError
from taskstore.store.disk import Disk
from taskstore.stores.jsonfile.layout import TORN, JournalOffset, Layout, SegmentFile
from taskstore.stores.jsonfile.lines import (
    LINE_PREFIX_BYTES,
    Identity,
    Line,
    decode_commit,
    encode_header,
    is_intact,
)

_BUFFER = 1 << 18


class LocatedCommit(NamedTuple):
    """A commit and its location; ``raw`` is the commit's line, at ``offset`` in ``segment``."""

    segment: SegmentFile
    offset: int
    raw: bytes
    line: Line

    @property
    def where(self) -> str:
        """Return the location of the commit as text."""
        return f"{self.segment.path} at offset {self.offset}"


class CommitReader:
    """The commits after a journal position, in the segment of the position and in all later
    segments.

    During an iteration, ``position`` is directly after the commit that was yielded most recently.
    The iteration ends at the end of the last segment; a torn line at this end is ignored.  If the
    reader finds other bytes in place of the next commit, the iteration raises
    :class:`CorruptStoreError`.
    """

    def __init__(self, layout: Layout, position: JournalOffset) -> None:
        self.layout = layout
        self.position = position

    def __iter__(self) -> Iterator[LocatedCommit]:
        for segment in self.layout.segments:
            if segment.first < self.position.first:
                continue
            if segment.first > self.position.first:
                self._enter(segment)
            yield from self.commits_in(segment)

    def _enter(self, segment: SegmentFile) -> None:
        if segment.first != self.position.seq + 1:
            raise CorruptStoreError(
                str(segment.path),
                f"begins at seq {segment.first}, but the journal before this segment ends at "
                f"seq {self.position.seq}",
                offset=0,
                hint="nothing was changed; put the missing segment back, or if it is lost, "
                "restore a backup",
            )
        self.position = self.layout.start_of(segment)

    def commits_in(self, segment: SegmentFile) -> Iterator[LocatedCommit]:
        """Yield the commits of ``segment`` after ``position``."""
        path, first, seq = str(segment.path), segment.first, self.position.seq
        last = segment is self.layout.segments[-1]
        for offset, raw in read_lines(segment, self.position.offset, last=last):
            line = decode_commit(raw, path, offset)
            if line.seq != seq + 1:
                raise CorruptStoreError(path, f"seq {line.seq} follows seq {seq}", offset=offset)
            seq, end = line.last, offset + len(raw)
            self.position = JournalOffset(
                first, seq, line.at, end, segment.inode, offset, raw[:LINE_PREFIX_BYTES]
            )
            yield LocatedCommit(segment, offset, raw, line)


def read_lines(
    segment: SegmentFile, offset: int, *, last: bool, containing: bytes = b""
) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of each line from ``offset`` on that contains the bytes
    ``containing``.

    A torn line at the end of the last segment is ignored.  If any other line that contains
    ``containing`` does not match its checksum, the function raises :class:`CorruptStoreError`.
    """
    with segment.path.open("rb", buffering=_BUFFER) as file:
        file.seek(offset)
        for raw in file:
            if containing in raw:
                if is_intact(raw):
                    yield offset, raw
                elif last and not file.read(1):
                    return
                else:
                    raise CorruptStoreError(
                        str(segment.path), "the line does not match its checksum", offset=offset
                    )
            offset += len(raw)


def prepare_segment(
    disk: Disk,
    path: Path,
    identity: Identity,
    *,
    at: int,
    permissions_from: Path | None,
    starts_chain: bool = False,
) -> Path:
    """Write a new, empty segment to a temporary file for ``path``; return the temporary path."""
    first = int(path.stem.partition("-")[2])
    header = encode_header(identity, seq=first, at=at, starts_chain=starts_chain)
    return disk.write_temporary(path, [header], permissions_from)


def truncate_tail(disk: Disk, descriptor: int, path: Path, offset: int) -> str:
    """Truncate an open segment at ``offset``, after saving the removed bytes in another file.

    Returns a notice for operators.  The caller must own the write lock, and must flush the
    segment to disk before the next append.
    """
    with path.open("rb") as file:
        file.seek(offset)
        tail = file.read()
    kept = path.with_name(f"{path.name}.{offset}{TORN}")
    count = 1
    while kept.exists():
        count += 1
        kept = path.with_name(f"{path.name}.{offset}-{count}{TORN}")
    disk.publish(disk.write_temporary(kept, [tail], path), kept)
    disk.truncate(descriptor, offset)
    torn_line = torn_line_text(len(tail), offset)
    return f"{path}: {torn_line}; the line was removed, and its bytes are kept in {kept.name}"


def torn_line_text(size: int, offset: int) -> str:
    """Return a text that describes a torn line at the end of the last segment."""
    return (
        f"the last line ({size} bytes at offset {offset}) was not completely written, "
        "or was damaged afterwards"
    )
