"""Who holds a lock on a file, as far as the system tells.

Linux lists the locks of all processes with the file that they are on.
Nothing here opens a file that may be locked: closing it would drop the locks
that this process has on it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

_LOCKS = Path("/proc/locks")
_FIELDS = 8
"""How many fields a lock has there that was given: who still waits stands behind an arrow."""
_WORDS = 4
_LONGEST = 80
_TELLING = re.compile(r"^--?[^=]+=|://|^--?(pass|pw|token|secret|key)", re.IGNORECASE)


def lock_holders(path: str | Path, *, byte: int | None = None) -> tuple[str, ...]:
    """Name the processes with an exclusive lock on a file, or on one ``byte`` of it.

    Empty when the system does not tell: it is not Linux, the file system has
    numbers of its own, or the process is of another machine or container.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - what is locked is not opened
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return ()
    file = (os.major(found.st_dev), os.minor(found.st_dev), found.st_ino)
    pids = set()
    for line in lines:
        fields = line.split()
        if len(fields) != _FIELDS or fields[3] != "WRITE" or not fields[4].isdigit():
            continue
        major, minor, inode = fields[5].split(":")
        first, last = int(fields[6]), float("inf" if fields[7] == "EOF" else fields[7])
        locked = (int(major, 16), int(minor, 16), int(inode))
        if locked == file and (byte is None or first <= byte <= last):
            pids.add(int(fields[4]))
    return tuple(process(pid) for pid in sorted(pids))


def process(pid: int) -> str:
    """A process in words: its pid, and what it runs if that may be seen."""
    if pid == os.getpid():
        return f"pid {pid}, this process"
    command = command_of(pid)
    return f"pid {pid}, {command}" if command else f"pid {pid}"


def command_of(pid: int) -> str:
    """The first words of a process's command line; none that might tell a secret."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    told: list[str] = []
    for word in words[:_WORDS]:
        if _TELLING.search(word) or "\n" in word or word == "-c":
            break
        told.append(word)
    text = " ".join(told).strip()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def named(holders: Iterable[str]) -> str:
    """A sentence about who holds a lock."""
    names = "; ".join(holders)
    return f"held by {names}" if names else "who holds it, the system does not tell"
