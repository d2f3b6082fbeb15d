"""A fair lock: a waiting room before a lock that has no queue of its own.

Whoever polls a lock loses it to the process that has just released it and
asks for it again at once; with a few busy writers that can go on for a long
time.  So only one waiter at a time polls: the one that holds ``flock`` on a
second file, the waiting room.  The others wait for the waiting room, and so
does the process that has just released the lock.  The waiting room makes the
lock fair and protects nothing: a waiter that was killed leaves it by that, and
one that was stopped in it is passed.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PATIENCE_S = 0.25
"""How long a waiter waits for the waiting room before it polls the lock without it, in seconds."""

_PAUSE_S = 0.0002
_LONGEST_PAUSE_S = 0.01
_AGE_S = 0.003  # after so long, a waiter polls twice as often as a newcomer


class FairLock:
    """The waiting room at the file ``path``, which is made when a lock is first contended.

    Threads that share an instance have to exclude each other themselves.
    """

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)  # in a third of the time
        self._descriptor = -1
        # Whether a waiter that does not move was found in the waiting room.
        self._passing = False

    def wait(self, attempt: Callable[[], bool], timeout_s: float) -> bool:
        """Call ``attempt`` until it returns true; whether it did within ``timeout_s`` seconds."""
        # Without the file, the lock has never been contended.
        if self._descriptor < 0 and not os.access(self._path, os.F_OK) and attempt():
            return True
        try:
            started, waited, first = time.monotonic(), 0.0, False
            while True:
                first = first or self._enter()
                self._passing = not first and (self._passing or waited > PATIENCE_S)
                if (first or self._passing) and attempt():
                    return True
                if waited >= timeout_s:
                    return False
                # The longer a waiter has waited, the more often it polls, so that newcomers
                # seldom pass it; only where the lock is held for longer than commits take
                # does polling become rare.
                eager = _PAUSE_S / (1 + min(waited, 7 * _AGE_S) / _AGE_S)
                pause = max(eager, min((waited - PATIENCE_S) / 100, _LONGEST_PAUSE_S))
                jittered = pause * random.uniform(0.5, 1)  # noqa: S311 (jitter)
                time.sleep(min(jittered, timeout_s - waited))
                waited = time.monotonic() - started
        finally:
            if self._descriptor >= 0:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file.  Closing twice is fine."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _enter(self) -> bool:
        """Enter the waiting room; false when another waiter is in it."""
        try:
            if self._descriptor < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                self._descriptor = os.open(self._path, flags, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without such locks: then the lock is not fair
            return True
        return True


_LOCKS = Path("/proc/locks")
_FIELDS = 8
"""How many fields a lock has there that was given: who still waits stands behind an arrow."""
_WORDS = 4
_LONGEST = 80
_TELLING = re.compile(r"^--?[^=]+=|://|^--?(pass|pw|token|secret|key)", re.IGNORECASE)


def lock_owners(path: str | Path, *, byte: int | None = None) -> tuple[str, ...]:
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
    return tuple(describe_process(pid) for pid in sorted(pids))


def describe_process(pid: int) -> str:
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


def describe_owners(holders: Iterable[str]) -> str:
    """A sentence about who holds a lock."""
    names = "; ".join(holders)
    return f"held by {names}" if names else "who holds it, the system does not tell"
