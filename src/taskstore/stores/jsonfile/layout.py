"""Which files of the directory count: the rule from which everything else follows.

- The newest snapshot is the one with the highest seq; its header declares the
  floor.  Publishing a snapshot is what moves the floor; what lies below it is
  void and is removed at leisure.
- A segment marked ``base`` counts only when the snapshot before it is there:
  it is created first, and the snapshot is what replaces the content.
- A header that is torn in the last segment, with nothing after it, means that
  the segment was never born.
- What counts has to be one chain of one ledger, else it is damaged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from taskstore.codec import SNAPSHOT_FORMAT, check_nesting
from taskstore.errors import CorruptStoreError
from taskstore.stores.jsonfile.files import numbered, segment_name, snapshot_name
from taskstore.stores.jsonfile.lines import STAMP_BYTES, Identity, decode_header, is_sound
from taskstore.stores.retry import Backoff

_T = TypeVar("_T")
_ATTEMPTS = 20
_DAMAGED_ATTEMPTS = 3
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05
_RECORDS = b',"records":[\n'


class SnapshotHeader(Struct, frozen=True):
    """What the first line of a snapshot says, but for the deletions."""

    format: str
    seq: int
    at: int
    ledger: str
    timeline: int
    floor: int


class SegmentFile(NamedTuple):
    """One segment that counts; commits begin at the offset ``start``."""

    first: int
    path: Path
    inode: int
    start: int
    at: int
    identity: Identity
    base: bool


class Place(NamedTuple):
    """A place in the journal: what lies before ``offset`` of segment ``first`` has been read.

    ``seq`` and ``at`` are those of the last entry before it.  ``mark`` is
    the offset of the last line before it and ``stamp`` how that line begins,
    by which, with the segment's ``inode``, the place is recognised later.
    ``offset`` 0 is the start of the segment.
    """

    first: int
    seq: int
    at: int
    offset: int = 0
    inode: int = 0
    mark: int = 0
    stamp: bytes = b""


class Layout(NamedTuple):
    """The files of a ledger that count, as of one look through the directory.

    ``segments`` and ``snapshots`` (seqs) are ascending, ``void`` is in the
    order in which it has to be removed.  ``lost`` says that the floor had to
    be put higher than declared, because segments are missing.
    """

    directory: Path
    segments: tuple[SegmentFile, ...] = ()
    snapshots: tuple[int, ...] = ()
    newest: SnapshotHeader | None = None
    floor: int = 1
    void: tuple[Path, ...] = ()
    unborn: Path | None = None
    lost: str | None = None

    @property
    def fresh(self) -> bool:
        """Whether there is no ledger yet."""
        return not self.segments and self.newest is None

    @property
    def identity(self) -> Identity:
        """Which ledger this is."""
        if self.newest is not None:
            return Identity(self.newest.ledger, self.newest.timeline)
        return self.segments[0].identity

    def snapshot_path(self, seq: int) -> Path:
        """Where the snapshot as of ``seq`` lies."""
        return self.directory / snapshot_name(seq)

    def after_newest(self) -> Place:
        """The place right after the newest snapshot."""
        if self.newest is None:
            return Place(1, 0, 0)
        return Place(self.newest.seq + 1, self.newest.seq, self.newest.at)

    def start_of(self, segment: SegmentFile) -> Place:
        """The place before the first commit of a segment."""
        return Place(segment.first, segment.first - 1, segment.at)

    def holds(self, place: Place) -> bool:
        """Whether a place that was remembered is still what it was."""
        for segment in self.segments:
            if (segment.first, segment.inode) == (place.first, place.inode):
                with segment.path.open("rb") as file:
                    file.seek(place.mark)
                    return not place.stamp or file.read(STAMP_BYTES) == place.stamp
        return False

    def grown(self, place: Place, descriptor: int) -> int | None:
        """By how many bytes the last segment, open as ``descriptor``, goes beyond a place in it.

        ``None`` when the place is no longer what it was: another file may have
        the segment's name, or a backup may have been copied over it.
        """
        segment = self.segments[-1]
        try:
            found = segment.path.stat()
        except FileNotFoundError:
            return None
        same = found.st_ino == segment.inode and found.st_size >= place.offset
        if not same or os.pread(descriptor, len(place.stamp), place.mark) != place.stamp:
            return None
        return found.st_size - place.offset

    def before(self, seq: int) -> Place:
        """The start of the segment that holds ``seq``, which must not be below the floor."""
        if not self.segments:
            return self.after_newest()
        holding = [segment for segment in self.segments if segment.first <= seq]
        return self.start_of(holding[-1] if holding else self.segments[0])


def settled(directory: Path, work: Callable[[int], _T]) -> _T:
    """Do ``work``, given the number of the attempt from 1, while files change under it.

    A compactor removes files without keeping anybody out.  So when one has
    vanished, or something looks damaged that may just be changing, the work
    is done again, a few times.
    """
    attempt = damaged = 0
    backoff = Backoff(_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S)
    while True:
        attempt += 1
        try:
            return work(attempt)
        except FileNotFoundError:
            if attempt == _ATTEMPTS or not directory.is_dir():
                raise
        except CorruptStoreError:
            damaged += 1
            if damaged == _DAMAGED_ATTEMPTS:
                raise
        backoff.sleep()


def read_layout(directory: Path) -> Layout:
    """Look through a directory.

    Raises :class:`CorruptStoreError` when what is there is not one ledger,
    ``OSError`` when it cannot be read or a file vanishes meanwhile.
    """
    snapshots, firsts = numbered(os.listdir(directory))  # noqa: PTH208 - half the time
    segments: dict[int, SegmentFile | CorruptStoreError | None] = {
        first: _read_segment(directory / segment_name(first), first) for first in firsts
    }
    abandoned = [
        first
        for first, segment in segments.items()
        if isinstance(segment, SegmentFile)
        and segment.base
        and first > 1
        and first - 1 not in snapshots
    ]
    for first in abandoned:
        del segments[first]
    newest = _read_newest(directory, snapshots, segments)
    unborn = None
    if segments and segments[max(segments)] is None:
        unborn = directory / segment_name(max(segments))
        if len(segments) == 1 and newest is None and max(segments) == 1:
            return Layout(directory, unborn=unborn)
    declared = newest.floor if newest is not None else 1
    if not segments and newest is None:
        void = tuple(directory / segment_name(first) for first in abandoned)
        return Layout(directory, void=void)
    floor = _floor(directory, declared, snapshots, segments)
    chain = _chain(directory, floor, segments)
    layout = Layout(
        directory,
        segments=chain,
        snapshots=tuple(seq for seq in snapshots if seq >= floor - 1),
        newest=newest,
        floor=floor,
        void=(
            *(directory / segment_name(first) for first in abandoned),
            *(directory / segment_name(first) for first in sorted(segments) if first < declared),
            *(directory / snapshot_name(seq) for seq in snapshots if seq < declared - 1),
        ),
        unborn=unborn,
        lost=f"the journal from seq {declared} to {floor - 1} is missing"
        if floor > declared
        else None,
    )
    _check_one_ledger(layout)
    return layout


def _read_segment(path: Path, first: int) -> SegmentFile | CorruptStoreError | None:
    """Read a segment's header: damage is returned, ``None`` when it is torn with nothing after."""
    with path.open("rb") as file:
        inode = os.fstat(file.fileno()).st_ino
        line = file.readline()
        if not is_sound(line):
            if not file.read(1):
                return None
            return CorruptStoreError(str(path), "the header is damaged", offset=0)
    try:
        header = decode_header(line, str(path))
    except CorruptStoreError as error:
        return error
    if header.seq != first:
        return CorruptStoreError(
            str(path), f"the header says that it begins at seq {header.seq}", offset=0
        )
    identity = Identity(header.ledger, header.timeline)
    return SegmentFile(first, path, inode, len(line), header.at, identity, header.base)


def _read_newest(
    directory: Path,
    snapshots: list[int],
    segments: dict[int, SegmentFile | CorruptStoreError | None],
) -> SnapshotHeader | None:
    if not snapshots:
        return None
    hint = damaged_snapshot_hint(directory, snapshots, segments)
    return read_snapshot_header(directory / snapshot_name(snapshots[-1]), snapshots[-1], hint)


def read_snapshot_header(path: Path, seq: int, hint: str | None = None) -> SnapshotHeader:
    """Read the first line of a snapshot; its checksum is not looked at."""
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(_RECORDS):
        raise CorruptStoreError(str(path), "the header line is damaged", offset=0, hint=hint)
    try:
        check_nesting(line)
        header = msgspec.json.decode(line[: -len(_RECORDS)] + b"}", type=SnapshotHeader)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptStoreError(
            str(path), f"the header does not decode: {error}", offset=0, hint=hint
        ) from error
    if header.format != SNAPSHOT_FORMAT or header.seq != seq:
        raise CorruptStoreError(
            str(path),
            f"the header is not that of {SNAPSHOT_FORMAT} at seq {seq}",
            offset=0,
            hint=hint,
        )
    return header


def damaged_snapshot_hint(
    directory: Path, snapshots: list[int], segments: Mapping[int, object]
) -> str | None:
    """Say whether the ledger can do without its newest snapshot, which is damaged."""
    newest = snapshots[-1]
    for older in (*reversed(snapshots[:-1]), 0):
        if older + 1 in segments and newest + 1 in segments:
            source = snapshot_name(older) if older in snapshots else "an empty ledger"
            return (
                f"nothing was changed; with {snapshot_name(newest)} moved aside, {directory} "
                f"is read from {source} and the journal after it"
            )
    return None


def _floor(
    directory: Path,
    declared: int,
    snapshots: list[int],
    segments: dict[int, SegmentFile | CorruptStoreError | None],
) -> int:
    """The first seq at or above the declared floor from which all history can be answered."""
    for floor in sorted({declared, *(seq + 1 for seq in snapshots)}):
        if floor >= declared and floor in segments and (floor == 1 or floor - 1 in snapshots):
            return floor
    raise CorruptStoreError(
        str(directory / segment_name((snapshots or [0])[-1] + 1)),
        "the segment that continues the newest snapshot is missing",
        hint="nothing was changed; put the missing file back or restore a backup",
    )


def _chain(
    directory: Path, floor: int, segments: dict[int, SegmentFile | CorruptStoreError | None]
) -> tuple[SegmentFile, ...]:
    chain = []
    last = max(segments)
    for first in sorted(segments):
        segment = segments[first]
        if first < floor:
            continue
        if isinstance(segment, CorruptStoreError):
            raise segment
        if segment is not None:
            chain.append(segment)
        elif first != last:
            path = str(directory / segment_name(first))
            raise CorruptStoreError(path, "the header is damaged", offset=0)
    return tuple(chain)


def _check_one_ledger(layout: Layout) -> None:
    """Refuse files of different ledgers, and a newest snapshot that nothing continues."""
    for segment in layout.segments:
        if segment.identity != layout.identity:
            raise CorruptStoreError(
                str(segment.path),
                f"belongs to the ledger {segment.identity.ledger}, timeline "
                f"{segment.identity.timeline}, the others to {layout.identity.ledger}, "
                f"timeline {layout.identity.timeline}",
                offset=0,
                hint="nothing was changed; move the files of the other ledger aside",
            )
    if layout.newest is None:
        return
    following = layout.directory / segment_name(layout.newest.seq + 1)
    if following != layout.unborn and following not in [s.path for s in layout.segments]:
        raise CorruptStoreError(
            str(following),
            "the segment that continues the newest snapshot is missing",
            hint="nothing was changed; put the missing file back or restore a backup",
        )
