"""The files of the directory: their names, the live files, OS errors.

- The newest snapshot has the highest seq; its header declares the floor.  Publishing a snapshot
  moves the floor.  Files below the floor are obsolete and are removed later.
- A segment that starts a chain is live only if it begins at the floor and the snapshot before it
  exists.  A writer first creates the segment, and then publishes a snapshot that moves the floor to
  the start of the segment.
- All live files must belong to one ledger, and their seqs must have no gap; otherwise the store is
  corrupt.

A published file was written as ``*.tmp`` and flushed to disk before its rename, and the
directory is flushed to disk after the rename.  A crash therefore leaves either the old file or the
complete new file (:mod:`taskstore.store.disk`).
"""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from msgspec import field

from taskstore.errors import CorruptStoreError, StoreUnavailableError
from taskstore.model import codec
from taskstore.model.journal import Snapshot
from taskstore.store.disk import alias_reason, permission_hint
from taskstore.stores.common.retry import Backoff
from taskstore.stores.jsonfile.lines import LINE_PREFIX_BYTES, Identity, decode_header, is_intact

LOCK_NAME = "lock"
COMPACT_LOCK_NAME = "compact.lock"
TORN = ".torn"

_SEGMENT = re.compile(r"journal-(\d{20})\.jsonl")
_SNAPSHOT = re.compile(r"snapshot-(\d{20})\.json")

_T = TypeVar("_T")
_MAX_ATTEMPTS = 20
_MAX_DAMAGED_ATTEMPTS = 3
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05
_BUFFER = 1 << 20


class LedgerSnapshotHeader(codec.SnapshotHeader, frozen=True):
    """The first line of a snapshot file: the common header, and the fields of this store.

    ``deleted`` maps the id of each deleted task to a seq of the commit that deleted the task.
    ``deleted`` contains only the deletions before the snapshot that are still in the journal.
    ``commit_id`` is the id of the commit at ``seq`` (empty if unknown).
    """

    ledger: str
    timeline: int
    floor: int
    deleted: dict[str, int] = field(default_factory=dict)
    commit_id: str = field(default="", name="commit")


class SegmentFile(NamedTuple):
    """One live segment; the first commit of the segment begins at the offset ``start``."""

    first: int
    path: Path
    inode: int
    start: int
    at: int
    identity: Identity
    starts_chain: bool


class JournalOffset(NamedTuple):
    """A position in the journal: the byte ``offset`` in the segment ``first``.

    ``seq`` and ``at`` are the seq and the time of the last entry before the position.
    ``line_offset`` is the offset of the last line before the position, and ``line_prefix`` is
    the start of this line (empty before the first commit of a segment).  The prefix and the
    segment's ``inode`` show later whether the position is still valid.
    """

    first: int
    seq: int
    at: int
    offset: int = 0
    inode: int = 0
    line_offset: int = 0
    line_prefix: bytes = b""


class Layout(NamedTuple):
    """The live files of a ledger, as found by one reading of the directory.

    ``segments`` and the seqs in ``snapshots`` are ascending.  ``obsolete`` lists the files to
    remove, in order of removal.  If missing segments make the floor higher than the newest snapshot
    declares, ``missing_history`` is a notice about the missing seqs.
    """

    directory: Path
    segments: tuple[SegmentFile, ...] = ()
    snapshots: tuple[int, ...] = ()
    newest_snapshot: LedgerSnapshotHeader | None = None
    floor: int = 1
    obsolete: tuple[Path, ...] = ()
    missing_history: str | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether the directory contains no ledger yet."""
        return not self.segments

    @property
    def identity(self) -> Identity:
        """Return the identity of the ledger."""
        if self.newest_snapshot is not None:
            return Identity(self.newest_snapshot.ledger, self.newest_snapshot.timeline)
        return self.segments[0].identity

    def snapshot_path(self, seq: int) -> Path:
        """Return the path of the snapshot at ``seq``."""
        return self.directory / snapshot_name(seq)

    def after_newest_snapshot(self) -> JournalOffset:
        """Return the position right after the newest snapshot."""
        return self.segment_start(
            self.newest_snapshot.seq + 1 if self.newest_snapshot is not None else 1
        )

    def start_of(self, segment: SegmentFile) -> JournalOffset:
        """Return the position before the first commit of a segment."""
        return JournalOffset(
            segment.first, segment.first - 1, segment.at, segment.start, segment.inode
        )

    def is_valid(self, position: JournalOffset) -> bool:
        """Return whether a stored journal position is still valid."""
        for segment in self.segments:
            if (segment.first, segment.inode) == (position.first, position.inode):
                with segment.path.open("rb") as file:
                    file.seek(position.line_offset)
                    prefix = position.line_prefix
                    return not prefix or file.read(LINE_PREFIX_BYTES) == prefix
        return False

    def segment_start(self, seq: int) -> JournalOffset:
        """Return the start of the segment that contains ``seq``, a seq from the floor on."""
        earlier = [segment for segment in self.segments if segment.first <= seq]
        return self.start_of(earlier[-1] if earlier else self.segments[0])


def retry_while_changing(directory: Path, work: Callable[[int], _T]) -> _T:
    """Call ``work(1)``, ``work(2)`` and so on, until a call succeeds; return its result.

    A call can fail because a compactor has removed a file, or because a file seems damaged while
    another process changes the file.  In these two cases ``work`` is called again, a few times at
    most.
    """
    attempt = damaged = 0
    backoff = Backoff(_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S)
    while True:
        attempt += 1
        try:
            return work(attempt)
        except FileNotFoundError:
            if attempt == _MAX_ATTEMPTS or not directory.is_dir():
                raise
        except CorruptStoreError:
            damaged += 1
            if damaged == _MAX_DAMAGED_ATTEMPTS:
                raise
        backoff.sleep()


def read_layout(directory: Path) -> Layout:
    """Return the live files of a directory.

    Raises :class:`CorruptStoreError` if the files do not form one ledger, and ``OSError`` if the
    directory cannot be read or another process removes a file during the call.
    """
    snapshots, firsts = parse_file_names(os.listdir(directory))  # noqa: PTH208 - twice as fast
    newest = read_snapshot_header(directory, snapshots[-1]) if snapshots else None
    declared = newest.floor if newest is not None else 1
    segments: list[SegmentFile] = []
    abandoned: list[SegmentFile] = []
    for first in firsts:
        if first >= declared:
            segment = _read_segment(directory / segment_name(first), first)
            begins_at_floor = first == declared and (first == 1 or first - 1 in snapshots)
            unpublished = segment.starts_chain and not begins_at_floor
            (abandoned if unpublished else segments).append(segment)
    obsolete = (
        *(segment.path for segment in abandoned),
        *(directory / segment_name(first) for first in firsts if first < declared),
        *(directory / snapshot_name(seq) for seq in snapshots if seq < declared - 1),
    )
    if not segments and newest is None:
        return Layout(directory, obsolete=obsolete)
    floor = _floor(directory, declared, snapshots, [segment.first for segment in segments])
    layout = Layout(
        directory,
        segments=tuple(segment for segment in segments if segment.first >= floor),
        snapshots=tuple(seq for seq in snapshots if seq >= floor - 1),
        newest_snapshot=newest,
        floor=floor,
        obsolete=obsolete,
        missing_history=f"the journal from seq {declared} to {floor - 1} is missing"
        if floor > declared
        else None,
    )
    _check_one_ledger(layout)
    return layout


def _read_segment(path: Path, first: int) -> SegmentFile:
    """Return a segment, after reading its header."""
    with path.open("rb") as file:
        inode = os.fstat(file.fileno()).st_ino
        line = file.readline()
    if not is_intact(line):
        raise CorruptStoreError(str(path), "the header is damaged", offset=0)
    header = decode_header(line, str(path))
    if header.seq != first:
        reason = f"the header declares first seq {header.seq}, but the file name declares {first}"
        raise CorruptStoreError(str(path), reason, offset=0)
    identity = Identity(header.ledger, header.timeline)
    return SegmentFile(first, path, inode, len(line), header.at, identity, header.starts_chain)


@contextmanager
def open_snapshot(
    directory: Path, seq: int
) -> Iterator[codec.SnapshotReader[LedgerSnapshotHeader]]:
    """Open a snapshot.  If the newest snapshot is damaged, the error's hint says how to read the
    ledger without this snapshot."""
    path = directory / snapshot_name(seq)
    with path.open("rb", buffering=_BUFFER) as file:
        try:
            yield codec.SnapshotReader(file, str(path), LedgerSnapshotHeader)
        except CorruptStoreError as error:
            if error.where != str(path):
                raise
            raise CorruptStoreError(
                error.where, error.reason, offset=error.offset, hint=_damaged_hint(directory, seq)
            ) from error


def read_snapshot_header(directory: Path, seq: int) -> LedgerSnapshotHeader:
    """Return the header of a snapshot without verifying the file's checksum."""
    with open_snapshot(directory, seq) as reader:
        if reader.header.seq != seq:
            path = str(directory / snapshot_name(seq))
            reason = (
                f"the header declares seq {reader.header.seq}, but the file name declares {seq}"
            )
            raise CorruptStoreError(path, reason)
        return reader.header


def commit_id_before_floor(layout: Layout) -> str:
    """Return the id of the commit at floor - 1, read from the header of the snapshot at this
    seq."""
    seq = layout.floor - 1
    if not seq:
        return ""
    newest = layout.newest_snapshot
    if newest is None or newest.seq != seq:
        newest = read_snapshot_header(layout.directory, seq)
    return newest.commit_id


def check_newest_snapshot(layout: Layout) -> None:
    """Raise :class:`CorruptStoreError` unless the newest snapshot matches its checksum."""
    if layout.newest_snapshot is not None:
        with open_snapshot(layout.directory, layout.newest_snapshot.seq) as reader:
            for _ in reader:
                pass


def read_snapshot(layout: Layout, seq: int, *, strict: bool) -> Snapshot:
    """Return a retained snapshot with decoded records."""
    with open_snapshot(layout.directory, seq) as reader:
        return reader.snapshot(strict=strict)


def _damaged_hint(directory: Path, seq: int) -> str | None:
    """Return a hint that says how to read the ledger without its newest snapshot; return ``None``
    if the ledger cannot be read without this snapshot."""
    snapshots, segments = parse_file_names(entry.name for entry in directory.iterdir())
    is_newest = snapshots[-1:] == [seq]
    for older in (*reversed(snapshots[:-1]), 0) if is_newest else ():
        if older + 1 in segments and seq + 1 in segments:
            source = snapshot_name(older) if older in snapshots else "an empty ledger"
            return (
                f"nothing was changed; move {snapshot_name(seq)} out of {directory}: the ledger "
                f"is then read from {source} and the later segments"
            )
    return None


def _floor(
    directory: Path, declared: int, snapshots: Sequence[int], segments: Sequence[int]
) -> int:
    """Return the lowest seq, at least ``declared``, from which the journal has no gap."""
    for floor in sorted({declared, *(seq + 1 for seq in snapshots)}):
        if floor >= declared and floor in segments and (floor == 1 or floor - 1 in snapshots):
            return floor
    raise _missing(directory / segment_name((snapshots or [0])[-1] + 1))


def _missing(segment: Path) -> CorruptStoreError:
    return CorruptStoreError(
        str(segment),
        "the segment that continues the newest snapshot is missing",
        hint="nothing was changed; put the missing file back, or if it is lost, restore a backup",
    )


def _check_one_ledger(layout: Layout) -> None:
    """Raise an error if the files belong to different ledgers, or no segment follows the newest
    snapshot."""
    for segment in layout.segments:
        if segment.identity != layout.identity:
            raise CorruptStoreError(
                str(segment.path),
                f"belongs to the ledger {segment.identity.ledger}, timeline "
                f"{segment.identity.timeline}, but the other files belong to the ledger "
                f"{layout.identity.ledger}, timeline {layout.identity.timeline}",
                offset=0,
                hint="nothing was changed; move the files of the other ledger to another directory",
            )
    if layout.newest_snapshot is not None:
        following = layout.directory / segment_name(layout.newest_snapshot.seq + 1)
        if following not in [segment.path for segment in layout.segments]:
            raise _missing(following)


def segment_name(first: int) -> str:
    """Return the name of the segment whose first seq is ``first``."""
    return f"journal-{first:020d}.jsonl"


def snapshot_name(seq: int) -> str:
    """Return the name of the snapshot at ``seq``."""
    return f"snapshot-{seq:020d}.json"


def permissions_source(layout: Layout) -> Path:
    """Return the file whose users must be able to use a new snapshot: the newest snapshot, or the
    newest segment if there is no snapshot."""
    if layout.newest_snapshot is not None:
        return layout.snapshot_path(layout.newest_snapshot.seq)
    return layout.segments[-1].path


def newest_segment(directory: Path) -> Path | None:
    """Return the path of the newest segment, or ``None`` if there is no segment."""
    _, firsts = parse_file_names(os.listdir(directory))  # noqa: PTH208 - as in read_layout
    return directory / segment_name(firsts[-1]) if firsts else None


def parse_file_names(names: Iterable[str]) -> tuple[list[int], list[int]]:
    """Return the seqs of the snapshots and the first seqs of the segments, both ascending."""
    snapshots, segments = [], []
    for name in names:
        if match := _SNAPSHOT.fullmatch(name):
            snapshots.append(int(match[1]))
        elif match := _SEGMENT.fullmatch(name):
            segments.append(int(match[1]))
    return sorted(snapshots), sorted(segments)


def refuse_aliased_segment(segment: Path) -> None:
    """Raise :class:`StoreUnavailableError` if the newest segment can also have another path.

    The lock of the writers is on the directory.  Writers of two directories that contain the same
    segment do not exclude each other, and write to the same offsets of the segment.  Other segments
    and the snapshots do not change, so their links are harmless.
    """
    reason = alias_reason(str(segment))
    if reason is not None:
        error = StoreUnavailableError(
            f"{reason}, so the ledger was not opened for writing: {_ALIAS_RISK}",
            hint=_alias_hint(segment),
        )
        error.retryable = False  # without a repair, the next call fails too
        raise error


def alias_notice(segment: Path) -> str | None:
    """Return a notice if the newest segment can also have another path, otherwise ``None``."""
    reason = alias_reason(str(segment))
    return None if reason is None else f"{reason}: {_ALIAS_RISK}; {_alias_hint(segment)}"


_ALIAS_RISK = (
    "the lock of the writers is on the directory, so a writer that opens the file in another "
    "directory overwrites committed tasks"
)


def _alias_hint(segment: Path) -> str:
    directory = segment.parent
    where, file = shlex.quote(str(directory.parent)), shlex.quote(str(segment))
    return (
        "copy the directory without links (cp -a instead of cp -al) and use only the copy, or "
        f"remove the other links: find {where} -xdev -samefile {file} shows the links below "
        f"{directory.parent}; for a container, mount the directory {directory} instead of a file"
    )


def files_gone_error(directory: Path) -> StoreUnavailableError:
    """Return the error for a ledger whose files were removed after it was opened."""
    return StoreUnavailableError(
        f"the files of the store {directory} are gone",
        hint="restore the files; to begin an empty ledger instead, remove the file "
        f"{LOCK_NAME!r} and open the store again",
    )


@contextmanager
def translate_os_errors(directory: Path) -> Iterator[None]:
    """Translate the operating system's errors into :class:`StoreUnavailableError`."""
    try:
        yield
    except OSError as error:
        raise unavailable_error(directory, error) from error


def unavailable_error(directory: Path, error: OSError) -> StoreUnavailableError:
    """Return the :class:`StoreUnavailableError` for an error of the operating system."""
    hint = _HINTS.get(error.errno or 0)
    if error.errno in (errno.EACCES, errno.EPERM):
        path = error.filename
        hint = permission_hint(Path(path) if isinstance(path, str) else directory)
    return StoreUnavailableError(f"the store {directory} cannot be used: {error}", hint=hint)


_HINTS = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "the path must be a directory",
    errno.EEXIST: "the path must be a directory",
    errno.EROFS: "open the store read-only",
    errno.ENOSPC: "free space on the disk",
    errno.EDQUOT: "free space in the quota",
    errno.EIO: "check the disk",
    # flock of the directory
    errno.EBADF: "keep the ledger on a local disk: this file system cannot lock a directory",
    errno.ENOLCK: "keep the ledger on a local disk: this file system cannot lock a directory",
}
