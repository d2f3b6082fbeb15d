"""Helpers that read and change the files of a JSON store directly."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

from taskstore.model.compaction_policy import CompactionPolicy

FOLD = CompactionPolicy(force=True)
FOLD_AND_TRIM = CompactionPolicy(force=True, history_s=0, history_entries=0, keep_snapshots=1)
CHILD_PRELUDE = """
import os, sys
from taskstore import *
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing.factories import *
"""


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("journal-*.jsonl"))


def snapshots(directory: Path) -> list[Path]:
    return sorted(directory.glob("snapshot-*.json"))


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def state_of(directory: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Return all that an open could change: names, modes, times and bytes."""
    return {
        path.name: (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            path.read_bytes(),
        )
        for path in directory.iterdir()
    } | {".": (directory.stat().st_mode, directory.stat().st_mtime_ns, 0, b"")}


def framed(body: bytes) -> bytes:
    """Return a line with its checksum."""
    return b'{"crc":"%08x",%b\n' % (zlib.crc32(body), body)


def forged(segment: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in a segment and recompute the checksums."""
    lines = segment.read_bytes().splitlines(keepends=True)
    assert any(old in line for line in lines)
    segment.write_bytes(b"".join(framed(line.replace(old, new)[18:-1]) for line in lines))


def damaged(path: Path, offset: int) -> bytes:
    """Flip a bit in a file; return its new content."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)
    return bytes(data)


def child(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start a Python process that has imported the store and the factories."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD_PRELUDE + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        **options,
    )


def output_of(code: str, *arguments: object) -> str:
    """Run a child process to its end; return its output."""
    process = child(code, *arguments)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    return printed
