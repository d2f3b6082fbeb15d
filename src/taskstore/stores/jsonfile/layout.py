"""The files of the directory: their names, which of them count, and errors in using them.

- The newest snapshot is the one with the highest seq; its header declares the
  floor.  Publishing a snapshot is what moves the floor; what lies below it is
  void and is removed at leisure.
- A segment marked ``base`` counts only when the snapshot before it is there:
  it is created first, and the snapshot is what replaces the content.
- What counts has to be one chain of one ledger, else it is damaged.

What is published under its final name was written under ``*.tmp`` and synced
before, and the directory is synced afterwards, so that a crash leaves either
the old file or the new one (:mod:`taskstore.store.disk`).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from msgspec import field

from taskstore.errors import CorruptStoreError, StoreUnavailableError
from taskstore.model import codec
from taskstore.model.journal import Snapshot
from taskstore.stores.common.retry import Backoff
from taskstore.stores.jsonfile.lines import STAMP_BYTES, Identity, decode_header, is_sound

LOCK_NAME = "lock"
COMPACT_LOCK_NAME = "compact.lock"
TORN = ".torn"

_SEGMENT = re.compile(r"journal-(\d{20})\.jsonl")
_SNAPSHOT = re.compile(r"snapshot-(\d{20})\.json")

_T = TypeVar("_T")
_ATTEMPTS = 20
_DAMAGED_ATTEMPTS = 3
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05
_BUFFER = 1 << 20


class SnapshotHeader(codec.SnapshotHeader, frozen=True):
    """The first line of a snapshot.

    ``deleted`` are the deletions that the journal before it still holds: a seq of the
    commit by task id.
    """

    ledger: str
    timeline: int
    floor: int
    deleted: dict[str, int] = field(default_factory=dict)


class SegmentFile(NamedTuple):
    """One segment that counts; commits begin at the offset ``start``."""

    first: int
    path: Path
    inode: int
    start: int
    at: int
    identity: Identity
    base: bool


class JournalOffset(NamedTuple):
    """A place in the journal: what lies before ``offset`` of segment ``first`` has been read.

    ``seq`` and ``at`` are those of the last entry before it.  ``mark`` is
    the offset of the last line before it and ``stamp`` how that line begins,
    by which, with the segment's ``inode``, the place is recognised later; there
    is no such line before the first commit of a segment.
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
    lost: str | None = None

    @property
    def fresh(self) -> bool:
        """Whether there is no ledger yet."""
        return not self.segments

    @property
    def identity(self) -> Identity:
        """Which ledger this is."""
        if self.newest is not None:
            return Identity(self.newest.ledger, self.newest.timeline)
        return self.segments[0].identity

    def snapshot_path(self, seq: int) -> Path:
        """Where the snapshot as of ``seq`` lies."""
        return self.directory / snapshot_name(seq)

    def after_newest(self) -> JournalOffset:
        """The place right after the newest snapshot."""
        return self.before(self.newest.seq + 1 if self.newest is not None else 1)

    def start_of(self, segment: SegmentFile) -> JournalOffset:
        """The place before the first commit of a segment."""
        return JournalOffset(
            segment.first, segment.first - 1, segment.at, segment.start, segment.inode
        )

    def holds(self, place: JournalOffset) -> bool:
        """Whether a place that was remembered is still what it was."""
        for segment in self.segments:
            if (segment.first, segment.inode) == (place.first, place.inode):
                with segment.path.open("rb") as file:
                    file.seek(place.mark)
                    return not place.stamp or file.read(STAMP_BYTES) == place.stamp
        return False

    def before(self, seq: int) -> JournalOffset:
        """The start of the segment that holds ``seq``, which must not be below the floor."""
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
    newest = read_snapshot_header(directory, snapshots[-1]) if snapshots else None
    declared = newest.floor if newest is not None else 1
    segments: list[SegmentFile] = []
    abandoned: list[SegmentFile] = []
    for first in firsts:
        if first >= declared:
            segment = _read_segment(directory / segment_name(first), first)
            cut_off = segment.base and first > 1 and first - 1 not in snapshots
            (abandoned if cut_off else segments).append(segment)
    void = (
        *(segment.path for segment in abandoned),
        *(directory / segment_name(first) for first in firsts if first < declared),
        *(directory / snapshot_name(seq) for seq in snapshots if seq < declared - 1),
    )
    if not segments and newest is None:
        return Layout(directory, void=void)
    floor = _floor(directory, declared, snapshots, [segment.first for segment in segments])
    layout = Layout(
        directory,
        segments=tuple(segment for segment in segments if segment.first >= floor),
        snapshots=tuple(seq for seq in snapshots if seq >= floor - 1),
        newest=newest,
        floor=floor,
        void=void,
        lost=f"the journal from seq {declared} to {floor - 1} is missing"
        if floor > declared
        else None,
    )
    _check_one_ledger(layout)
    return layout


def _read_segment(path: Path, first: int) -> SegmentFile:
    """Read the header of a segment."""
    with path.open("rb") as file:
        inode = os.fstat(file.fileno()).st_ino
        line = file.readline()
    if not is_sound(line):
        raise CorruptStoreError(str(path), "the header is damaged", offset=0)
    header = decode_header(line, str(path))
    if header.seq != first:
        raise CorruptStoreError(
            str(path), f"the header says that it begins at seq {header.seq}", offset=0
        )
    identity = Identity(header.ledger, header.timeline)
    return SegmentFile(first, path, inode, len(line), header.at, identity, header.base)


@contextmanager
def open_snapshot(directory: Path, seq: int) -> Iterator[codec.SnapshotReader[SnapshotHeader]]:
    """Open a snapshot.  Damage of the newest one says whether the ledger can do without it."""
    path = directory / snapshot_name(seq)
    with path.open("rb", buffering=_BUFFER) as file:
        try:
            yield codec.SnapshotReader(file, str(path), SnapshotHeader)
        except CorruptStoreError as error:
            if error.where != str(path):
                raise
            raise CorruptStoreError(
                error.where, error.reason, offset=error.offset, hint=_damaged_hint(directory, seq)
            ) from error


def read_snapshot_header(directory: Path, seq: int) -> SnapshotHeader:
    """Read the first line of a snapshot; its checksum is not looked at."""
    with open_snapshot(directory, seq) as reader:
        if reader.header.seq != seq:
            path = str(directory / snapshot_name(seq))
            raise CorruptStoreError(path, f"the header is that of seq {reader.header.seq}")
        return reader.header


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


def _damaged_hint(directory: Path, seq: int) -> str | None:
    """Say whether the ledger can do without a damaged snapshot, if that is the newest."""
    snapshots, segments = numbered(entry.name for entry in directory.iterdir())
    is_newest = snapshots[-1:] == [seq]
    for older in (*reversed(snapshots[:-1]), 0) if is_newest else ():
        if older + 1 in segments and seq + 1 in segments:
            source = snapshot_name(older) if older in snapshots else "an empty ledger"
            return (
                f"nothing was changed; with {snapshot_name(seq)} moved aside, {directory} "
                f"is read from {source} and the journal after it"
            )
    return None


def _floor(
    directory: Path, declared: int, snapshots: Sequence[int], segments: Sequence[int]
) -> int:
    """The first seq at or above the declared floor from which all history can be answered."""
    for floor in sorted({declared, *(seq + 1 for seq in snapshots)}):
        if floor >= declared and floor in segments and (floor == 1 or floor - 1 in snapshots):
            return floor
    raise _missing(directory / segment_name((snapshots or [0])[-1] + 1))


def _missing(segment: Path) -> CorruptStoreError:
    return CorruptStoreError(
        str(segment),
        "the segment that continues the newest snapshot is missing",
        hint="nothing was changed; put the missing file back or restore a backup",
    )


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
    if layout.newest is not None:
        following = layout.directory / segment_name(layout.newest.seq + 1)
        if following not in [segment.path for segment in layout.segments]:
            raise _missing(following)


def segment_name(first: int) -> str:
    """The name of the segment whose first seq is ``first``."""
    return f"journal-{first:020d}.jsonl"


def snapshot_name(seq: int) -> str:
    """The name of the snapshot as of ``seq``."""
    return f"snapshot-{seq:020d}.json"


def numbered(names: Iterable[str]) -> tuple[list[int], list[int]]:
    """The seqs of the snapshots and the first seqs of the segments among ``names``, ascending."""
    snapshots, segments = [], []
    for name in names:
        if match := _SNAPSHOT.fullmatch(name):
            snapshots.append(int(match[1]))
        elif match := _SEGMENT.fullmatch(name):
            segments.append(int(match[1]))
    return sorted(snapshots), sorted(segments)


@contextmanager
def translated(directory: Path) -> Iterator[None]:
    """Turn the operating system's errors into ours."""
    try:
        yield
    except OSError as error:
        raise unavailable(directory, error) from error


def unavailable(directory: Path, error: OSError) -> StoreUnavailableError:
    """An error of the operating system in our words, naming the ledger's directory."""
    return StoreUnavailableError(
        f"the store {directory} cannot be used: {error}", hint=_ADVICE.get(error.errno or 0)
    )


_ADVICE = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "the path has to be a directory",
    errno.EEXIST: "the path has to be a directory",
    errno.EACCES: "check who owns the directory and its files, and their modes",
    errno.EPERM: "check who owns the directory and its files, and their modes",
    errno.EROFS: "open it read-only",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in the quota",
    errno.EIO: "check the disk",
}
