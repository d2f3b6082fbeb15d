"""File locks between processes: the queue of waiters, and the lock owners.

A process that only polls a lock seldom gets the lock, because the process that released the lock
often takes the lock again at once.  While a few writers are busy, a waiting process can starve.
:class:`LockQueue` prevents starvation with a queue: a waiter polls the lock only while the waiter
owns ``flock`` on a second file, the queue file.  The other waiters poll the queue file.  A process
that has just released the lock and needs the lock again polls the queue file too.  The queue only
orders the waiters; the queue protects no data.  A killed waiter leaves the queue.  If a waiter is
stopped, the other waiters bypass this waiter.

:func:`lock_owners` asks the operating system which processes own a lock.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from taskstore.store.disk import SYSTEM

QUEUE_TIMEOUT_S = 0.25
"""How long a waiter waits in the queue before it polls the lock directly, in seconds."""

_PAUSE_S = 0.0002
_LONGEST_PAUSE_S = 0.01
_AGING_S = 0.003  # after this time, in seconds, a waiter polls twice as often as a new waiter


class LockQueue:
    """The queue of waiters for a lock; the file ``path`` is the queue file.  The first waiter
    creates the queue file for the users of the file ``permissions_from``.

    Threads that share an instance must exclude each other by another lock.  If another program
    removes the queue file, the waiters detect the removal after a moment, and use a new file.
    """

    def __init__(self, path: Path, permissions_from: Path | None = None) -> None:
        self._path = os.fspath(path)  # a str is three times as fast as a Path
        self._permissions_from = permissions_from
        self._descriptor = -1
        self._check_at = 0.0
        # True if this waiter ignores the queue, because a stopped waiter is at the front.
        self._bypasses = False

    def poll_in_turn(self, attempt: Callable[[], bool], timeout_s: float) -> bool:
        """Call ``attempt()`` while this waiter is the first in the queue.

        The method returns true as soon as ``attempt()`` returns true, or false after ``timeout_s``
        seconds."""
        # If the queue file does not exist, no process has ever waited for the lock.
        if self._descriptor < 0 and not os.access(self._path, os.F_OK) and attempt():
            return True
        try:
            started, waited, at_front = time.monotonic(), 0.0, False
            if self._descriptor >= 0 and started >= self._check_at:
                self._check_file(started)
            while True:
                at_front = at_front or self._enter_queue()
                self._bypasses = not at_front and (self._bypasses or waited > QUEUE_TIMEOUT_S)
                if (at_front or self._bypasses) and attempt():
                    return True
                if waited >= timeout_s:
                    return False
                # The polling rate grows with the time waited, so that new waiters seldom
                # overtake this waiter.  The polling rate falls only if the lock owner keeps the
                # lock for longer than a commit takes.
                eager = _PAUSE_S / (1 + min(waited, 7 * _AGING_S) / _AGING_S)
                pause = max(eager, min((waited - QUEUE_TIMEOUT_S) / 100, _LONGEST_PAUSE_S))
                jittered = pause * random.uniform(0.5, 1)  # noqa: S311 (jitter)
                time.sleep(min(jittered, timeout_s - waited))
                waited = time.monotonic() - started
        finally:
            if self._descriptor >= 0:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the queue file.  A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _check_file(self, now: float) -> None:
        """Close the queue file if another program has removed or replaced the file at this path."""
        self._check_at = now + QUEUE_TIMEOUT_S
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):  # noqa: PTH116
                return
        except FileNotFoundError:
            pass
        self.close()

    def _enter_queue(self) -> bool:
        """Become the first waiter in the queue; return false if another process is the first
        waiter."""
        try:
            if self._descriptor < 0:
                self._descriptor = SYSTEM.open_or_create(Path(self._path), self._permissions_from)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # the file system does not support flock: there is no queue
            return True
        return True


_LOCKS = Path("/proc/locks")
_LOCK_FIELD_COUNT = 8
"""The number of fields in a line of ``/proc/locks`` for a granted lock.  The line of a process that
waits has one field more."""
_COMMAND_WORDS = 4
_COMMAND_LENGTH = 80
_SENSITIVE = re.compile(r"^--?[^=]+=|://|^--?(pass|pw|token|secret|key)", re.IGNORECASE)


def lock_owners(
    path: str | Path, *, byte: int | None = None, shared: bool = False
) -> tuple[str, ...]:
    """Describe the processes that own an exclusive lock on a file, or on one ``byte`` of a file.
    If ``shared`` is true, the result also contains the owners of shared locks.

    The result is empty if no process owns such a lock, or if one of these conditions is true:
    (a) the operating system is not Linux; (b) the file system reports other inode numbers than
    ``/proc/locks``; (c) the owner runs on another machine or in another container.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - a locked file must not be opened
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return ()
    file = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    pids = set()
    for line in lines:
        fields = line.split()
        if len(fields) != _LOCK_FIELD_COUNT or not fields[4].isdigit():
            continue
        if fields[3] != "WRITE" and not shared:
            continue
        major, minor, inode = fields[5].split(":")
        first, last = int(fields[6]), float("inf" if fields[7] == "EOF" else fields[7])
        locked = (int(major, 16), int(minor, 16), int(inode))
        if locked == file and (byte is None or first <= byte <= last):
            pids.add(int(fields[4]))
    return tuple(describe_process(pid) for pid in sorted(pids))


def describe_process(pid: int) -> str:
    """Return a process as text: its pid, and its command if the system reports the command."""
    if pid == os.getpid():
        return f"pid {pid}, this process"
    command = command_of(pid)
    return f"pid {pid}, {command}" if command else f"pid {pid}"


def command_of(pid: int) -> str:
    """Return the first words of a process's command line; stop before a word that is possibly
    secret."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    shown: list[str] = []
    for word in words[:_COMMAND_WORDS]:
        if _SENSITIVE.search(word) or "\n" in word or word == "-c":
            break
        shown.append(word)
    text = " ".join(shown).strip()
    return text if len(text) <= _COMMAND_LENGTH else f"{text[:_COMMAND_LENGTH]}…"


def describe_owners(owners: Iterable[str]) -> str:
    """Return a phrase that names the owners of a lock."""
    names = "; ".join(owners)
    return f"held by {names}" if names else "the system does not report the lock owner"
