"""Locks between processes: flock on a descriptor held open.

The file ``lock`` also holds the line ``<pid> <generation>`` and a note.  The
pid is the last writer's, for messages.  The generation tells everybody whether
the set of files may have changed, or been cut: a writer that rolls, replaces
or cuts makes it odd before and even after, under the lock.  The note tells up
to which offset of the last segment everything has been synced, so that the
next writer need not do it again; it stands there twice, and when the two
differ, or it is missing, nothing is known.  All this means something only
among living processes, so it is never synced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from taskstore.disk import Disk
from taskstore.errors import StoreBusyError
from taskstore.stores.fairlock import FairLock
from taskstore.stores.holders import lock_holders, named, process
from taskstore.stores.retry import Contention

_LINE_BYTES = 64
_STATE_BYTES = 106


class FileLock:
    """An exclusive lock on one file, which it creates with mode 0600.

    Two instances exclude each other, also within one process; threads that
    share an instance have to exclude each other themselves.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.descriptor = -1
        """The open file.  The holder releases the lock with ``fcntl.flock`` in its own
        ``finally``: an interrupt could strike at the start of a method that did it."""
        self._disk = disk
        self._fair_lock = FairLock(path.with_name(f"{path.name}.turn"))
        self._name = os.fspath(path)
        self._node = (0, 0)
        self.opened = 0
        """How often the file was opened: after another time it may be another file."""

    def acquire(self, timeout_s: float) -> bool:
        """Take the lock, waiting at most ``timeout_s`` seconds; whether it was got."""
        if self.descriptor < 0:
            self._reopen()
        return self._attempt() if timeout_s <= 0 else self._fair_lock.wait(self._attempt, timeout_s)

    def _attempt(self) -> bool:
        """Take the lock if it is free; whether it was."""
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                there = os.stat(self._name)  # noqa: PTH116 - half the time
                if (there.st_ino, there.st_dev) == self._node:
                    return True
            except BlockingIOError:
                return False
            except FileNotFoundError:
                pass
            # The file was removed or replaced: a lock on it excludes no newcomer.
            self._reopen()

    def close(self) -> None:
        """Close the files, which releases the lock, but not in a forked child: the files are
        the parent's too.  Closing twice is fine."""
        self._fair_lock.close()
        self._close()

    def _close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            self._disk.close(descriptor)

    def _reopen(self) -> None:
        self._close()
        self.opened += 1
        self.descriptor = self._disk.open(self.path, os.O_RDWR | os.O_CREAT)
        mine = os.fstat(self.descriptor)
        self._node = (mine.st_ino, mine.st_dev)

    @contextmanager
    def held(self, timeout_s: float, what: str) -> Iterator[None]:
        """Hold the lock and close it, or raise :class:`StoreBusyError` saying that ``what``
        holds it."""
        try:
            if not self.acquire(timeout_s):
                raise busy(self.path, what, timeout_s)
            yield
        finally:
            # Never fails: what was done under the lock is done.
            try:
                if self.descriptor >= 0:
                    fcntl.flock(self.descriptor, fcntl.LOCK_UN)
                self.close()
            except OSError:
                self.close()


class WriteLock(FileLock):
    """The lock of the directory's writers, with the generation of its files.

    ``synced`` is the offset in the last segment up to which everything was
    synced when the generation was what it is; 0 when nothing is known.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(path, disk)
        self.generation = 0
        self.synced = 0
        self._pid = os.getpid()
        self._state: bytes | None = None

    def _reopen(self) -> None:
        self._state = None
        super()._reopen()

    def read_state(self) -> int:
        """Return the generation and leave our pid as the last writer's.  Under the lock."""
        state = os.pread(self.descriptor, _STATE_BYTES, 0)
        if state == self._state:
            return self.generation
        pid, self.generation = _parse(state)
        self.synced = _parse_note(state)
        if pid == 0:
            # A new lock file: nobody may take its generation for an old one.
            self.generation, self.synced = time.time_ns() & ~1, 0
        if pid != self._pid:
            self._write_state()
        return self.generation

    def note_synced(self, offset: int) -> None:
        """Tell that the last segment has been synced up to ``offset``.  Under the lock, and
        only afterwards.  Never fails: without the note somebody syncs once more."""
        self.synced = offset
        with contextlib.suppress(OSError):
            self._write_state()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Tell everybody that the set of files changes.  Under the lock.

        When the body raises, the generation stays odd: the next writer looks
        through the directory and clears up.
        """
        self.generation += 1 + self.generation % 2
        self.synced = 0
        self._write_state()
        yield
        self.settle()

    def settle(self) -> None:
        """Tell everybody that the set of files has changed.  Under the lock."""
        self.generation += 2 - self.generation % 2
        self.synced = 0
        self._write_state()

    def _write_state(self) -> None:
        # The note begins where older versions do not look.
        note = b"%020d" % self.synced
        state = b"%010d %020d%32s\n%b %b\n" % (self._pid, self.generation, b"", note, note)
        self._state = None
        self._disk.pwrite(self.descriptor, state, 0)
        self._state = state


class Generation(NamedTuple):
    """The generation of a directory's files, and by which lock file that is."""

    number: int
    inode: int


def read_generation(path: Path) -> Generation | None:
    """The generation, read without the lock; ``None`` when it cannot be told or is changing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        pid, number = _parse(os.pread(descriptor, _LINE_BYTES, 0))
        inode = os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)
    return Generation(number, inode) if pid and number % 2 == 0 else None


def patiently(acquire: Callable[[float], bool], timeout_s: float, directory: Path) -> bool:
    """Go on waiting for a lock of the writers as long as these make progress; whether it was got.

    A first wait, of half of ``timeout_s``, has been in vain.
    """
    contention = Contention(lambda: _end_of_journal(directory))
    while timeout_s > 0 and contention.moves():
        if acquire(timeout_s / 2):
            return True
    return False


def _end_of_journal(directory: Path) -> object:
    """What differs when somebody has committed; ``None`` when it cannot be told."""
    with contextlib.suppress(OSError, ValueError):
        last = max(directory.glob("journal-*.jsonl"))
        return (last, last.stat().st_size)
    return None


def busy(path: Path, what: str, waited_s: float) -> StoreBusyError:
    """The error of somebody who waited in vain for the lock at ``path``."""
    holders = lock_holders(path)
    if not holders:
        with contextlib.suppress(OSError):
            pid, _ = _parse(path.read_bytes())
            # The lock itself tells nothing: the last writer is the likeliest.
            holders = (f"perhaps {process(pid)}",) if pid else ()
    waited = f" for {waited_s:g} s" if waited_s else ""
    return StoreBusyError(
        f"the store {path.parent} is busy: {what} has held {path.name}{waited}; {named(holders)}",
        hint="try again, or see what that process is doing",
        holders=holders,
    )


def _parse(state: bytes) -> tuple[int, int]:
    pid, _, generation = state[:_LINE_BYTES].strip().partition(b" ")
    if pid.isdigit() and generation.isdigit():
        return int(pid), int(generation)
    return 0, 0


def _parse_note(state: bytes) -> int:
    once, _, again = state[_LINE_BYTES:].strip().partition(b" ")
    return int(once) if once == again and once.isdigit() else 0
