"""Locks between processes: flock on a descriptor held open.

The file ``lock`` also holds the line ``<pid> <generation> <synced> <synced>``.
The pid is the last writer's, for messages.  The generation tells everybody
whether the set of files may have changed, or been cut: a writer that rolls,
replaces or cuts makes it odd before and even after, under the lock.  ``synced``
is a note up to which offset of the last segment everything has been synced, so
that the next writer need not do it again; it stands there twice, and when the
two differ nothing is known.  All this means something only among living
processes, so it is never synced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskstore.errors import StoreBusyError
from taskstore.store.disk import Disk
from taskstore.stores.common.locks import FairLock, describe_owners, describe_process, lock_owners

_FIELDS = 4
STATE_BYTES = 74
"""How long the line in the lock file is."""


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
        self.waiting_room = FairLock(path.with_name(f"{path.name}.turn"))
        """Where the lock is waited for: ``waiting_room.wait(lock.try_acquire, timeout_s)``."""
        self._name = os.fspath(path)
        self._node = (0, 0)

    def try_acquire(self) -> bool:
        """Take the lock if it is free; whether it was."""
        while True:
            if self.descriptor < 0:
                self._open()
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
            self._close()

    def close(self) -> None:
        """Close the files, which releases the lock, but not in a forked child: the files are
        the parent's too.  Closing twice is fine."""
        self.waiting_room.close()
        self._close()

    def _close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            self._disk.close(descriptor)

    def _open(self) -> None:
        self.descriptor = self._disk.open(self.path, os.O_RDWR | os.O_CREAT)
        mine = os.fstat(self.descriptor)
        self._node = (mine.st_ino, mine.st_dev)

    @contextmanager
    def held(self, timeout_s: float, what: str) -> Iterator[None]:
        """Hold the lock and close it, or raise :class:`StoreBusyError` saying that ``what``
        holds it."""
        try:
            wait = self.waiting_room.wait
            if not (self.try_acquire() or (timeout_s > 0 and wait(self.try_acquire, timeout_s))):
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
    """The lock of the directory's writers, with the state that the file tells.

    ``generation`` is that of the files, ``seen`` the one as of which its owner
    knows them, ``None`` when that is another or may be.  ``synced`` is the offset in
    the last segment up to which everything was synced when the generation was
    what it is; 0 when nothing is known.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(path, disk)
        self.generation = 0
        self.seen: int | None = None
        self.synced = 0
        self.state: bytes | None = None
        """What was read or written last: while the file tells the same, so does the lock."""
        self._pid = os.getpid()

    def _open(self) -> None:
        # Another lock file may be that of other files.
        self.state, self.seen = None, None
        super()._open()

    def take_in(self, state: bytes) -> None:
        """Take in what the file tells, and leave our pid as the last writer's.  Under the lock."""
        pid, self.generation, self.synced = _parse(state)
        self.state = state
        if pid == 0:
            # A new lock file: nobody may take its generation for an old one.
            self.generation = time.time_ns() & ~1
        if pid != self._pid:
            self._write_state()

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
        """Tell everybody that the set of files has changed, as we know it.  Under the lock."""
        self.generation += 2 - self.generation % 2
        self.synced = 0
        self._write_state()
        self.seen = self.generation

    def _write_state(self) -> None:
        state = b"%010d %020d %020d %020d\n" % (
            self._pid,
            self.generation,
            self.synced,
            self.synced,
        )
        self.state = None
        self._disk.pwrite(self.descriptor, state, 0)
        self.state = state


def read_generation(path: Path) -> tuple[int, int] | None:
    """The generation and the inode of the lock file, read without the lock.

    ``None`` when the generation cannot be told or is changing.
    """
    try:
        with path.open("rb", buffering=0) as file:
            pid, number, _ = _parse(file.read(STATE_BYTES))
            inode = os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return None
    return (number, inode) if pid and number % 2 == 0 else None


def busy(path: Path, what: str, waited_s: float) -> StoreBusyError:
    """The error of somebody who waited in vain for the lock at ``path``."""
    owners = lock_owners(path)
    if not owners:
        with contextlib.suppress(OSError):
            pid, _, _ = _parse(path.read_bytes())
            # The lock itself tells nothing: the last writer is the likeliest.
            owners = (f"perhaps {describe_process(pid)}",) if pid else ()
    waited = f" for {waited_s:g} s" if waited_s else ""
    return StoreBusyError(
        f"the store {path.parent} is busy: {what} has held {path.name}{waited}; "
        f"{describe_owners(owners)}",
        hint="try again, or see what that process is doing",
        owners=owners,
    )


def _parse(state: bytes) -> tuple[int, int, int]:
    """Pid, generation and what is synced; zeros where they cannot be told."""
    fields = state.split()
    if len(fields) != _FIELDS or not all(field.isdigit() for field in fields):
        return 0, 0, 0
    pid, generation, once, again = map(int, fields)
    return pid, generation, once if once == again else 0
