"""The file system, as far as the store relies on it: names, modes, syncing, replacing.

What is published under its final name was written under ``*.tmp`` and synced
before, and the directory is synced afterwards, so that a crash leaves either
the old file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from taskstore.errors import StoreUnavailableError

LOCK_NAME = "lock"
COMPACT_LOCK_NAME = "compact.lock"
TEMPORARY = ".tmp"
TORN = ".torn"

_SEGMENT = re.compile(r"journal-(\d{20})\.jsonl")
_SNAPSHOT = re.compile(r"snapshot-(\d{20})\.json")
_BUFFER = 1 << 20


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
    """Turn the operating system's errors into ours, naming the ledger's directory."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailableError(
            f"the store {directory} cannot be used: {error}", hint=_ADVICE.get(error.errno or 0)
        ) from error


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


def make_directory(directory: Path) -> None:
    """Create a directory and its parents with mode 0700; an existing one is left as it is."""
    missing = []
    place = directory
    while not place.exists():
        missing.append(place)
        place = place.parent
    for part in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            part.mkdir(mode=0o700)
        sync_directory(part.parent)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))


def sync_data(descriptor: int) -> None:
    """Make what was appended to a file survive power loss."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        sync_file(descriptor)


def sync_file(descriptor: int) -> None:
    """Make a file survive power loss."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves the data in the drive's cache
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive power loss."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of ``data``; what stops it is raised, with a part of it in the file."""
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):
        more = os.pwrite(descriptor, data[written:], offset + written)
        if not more:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += more


def write_temporary(path: Path, blocks: Iterable[bytes]) -> Path:
    """Write what shall become ``path`` beside it, synced; returns where.  No trace if it fails."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb", buffering=_BUFFER) as file:  # noqa: PTH123 - it is a descriptor
            file.writelines(blocks)
            file.flush()
            sync_file(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def publish(temporary: Path, path: Path) -> None:
    """Give a written file its name, durably."""
    temporary.replace(path)
    sync_directory(path.parent)


def remove_all(paths: Iterable[Path]) -> None:
    """Remove files in this order; those that are gone already do not matter."""
    for path in paths:
        path.unlink(missing_ok=True)
