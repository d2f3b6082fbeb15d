"""The names of the files, and the operating system's errors in our words.

What is published under its final name was written under ``*.tmp`` and synced
before, and the directory is synced afterwards, so that a crash leaves either
the old file or the new one (:mod:`taskstore.disk`).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from taskstore.errors import StoreUnavailableError

LOCK_NAME = "lock"
COMPACT_LOCK_NAME = "compact.lock"
TORN = ".torn"

_SEGMENT = re.compile(r"journal-(\d{20})\.jsonl")
_SNAPSHOT = re.compile(r"snapshot-(\d{20})\.json")


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
