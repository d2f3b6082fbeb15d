"""Locks between processes with flock, and the writers' shared state.

The file with the name ``lock`` also contains the line ``<pid> <generation> <synced> <synced>``.
``pid`` is the process id of the last writer, for messages.  ``generation`` changes when the set
of files changes or a segment is truncated: the lock owner makes ``generation`` odd before the
change and even afterwards.  ``synced`` is an offset in the last segment: all bytes before the
offset are flushed to disk, and the next writer need not flush them again.  The offset is
written twice; if the two copies differ, the offset is unknown.  Only running processes use this
line, so the line is never flushed to disk.
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

_FIELD_COUNT = 4
STATE_BYTES = 74
"""The length of the line in the lock file, in bytes."""


class FileLock:
    """An exclusive lock on one file, which is created with mode 0600.

    Two instances exclude each other, also within one process.  Threads that share an
    instance must exclude each other by another lock.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.descriptor = -1
        """The open file.  The lock owner calls ``fcntl.flock`` itself in a ``finally`` to release
        the lock: an interrupt could prevent a release method from running."""
        self._disk = disk
        self.queue = FairLock(path.with_name(f"{path.name}.turn"))
        """The queue of waiters; a waiter calls ``queue.wait(lock.try_acquire, timeout_s)``."""
        self._name = os.fspath(path)
        self._file_id = (0, 0)

    def try_acquire(self) -> bool:
        """Take the lock if it is free; return whether the lock was taken."""
        while True:
            if self.descriptor < 0:
                self._open()
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.stat(self._name)  # noqa: PTH116 - takes half the time of Path.stat
                if (status.st_ino, status.st_dev) == self._file_id:
                    return True
            except BlockingIOError:
                return False
            except FileNotFoundError:
                pass
            # The lock file was removed or replaced: its lock does not exclude users of a new file.
            self._close()

    def close(self) -> None:
        """Close the lock file and the queue file.  This releases the lock, except in a forked
        child, because the parent still has the files open.  A second call does nothing."""
        self.queue.close()
        self._close()

    def _close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            self._disk.close(descriptor)

    def _open(self) -> None:
        self.descriptor = self._disk.open(self.path, os.O_RDWR | os.O_CREAT)
        status = os.fstat(self.descriptor)
        self._file_id = (status.st_ino, status.st_dev)

    @contextmanager
    def held(self, timeout_s: float, role: str) -> Iterator[None]:
        """Take the lock, keep the lock during the body, then close the lock file.  If the lock
        is not free in time, raises :class:`StoreBusyError`, which names ``role`` as the lock
        owner."""
        try:
            wait = self.queue.wait
            if not (self.try_acquire() or (timeout_s > 0 and wait(self.try_acquire, timeout_s))):
                raise busy_error(self.path, role, timeout_s)
            yield
        finally:
            # The release must not raise an error, because the work under the lock is complete.
            try:
                if self.descriptor >= 0:
                    fcntl.flock(self.descriptor, fcntl.LOCK_UN)
                self.close()
            except OSError:
                self.close()


class WriteLock(FileLock):
    """The lock of the directory's writers, with the state in the lock file.

    ``generation`` is the current generation of the files.  ``known_generation`` is the
    generation of the owner's layout; ``None`` if the layout can be outdated.  ``synced`` is the
    offset in the last segment up to which all bytes are flushed to disk in this generation; 0
    if the offset is unknown.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(path, disk)
        self.generation = 0
        self.known_generation: int | None = None
        self.synced = 0
        self.state: bytes | None = None
        """The line most recently read or written.  The attributes are current while the lock file
        contains this line.
        """
        self._pid = os.getpid()

    def _open(self) -> None:
        # A new lock file can belong to other journal files.
        self.state, self.known_generation = None, None
        super()._open()

    def load_state(self, state: bytes) -> None:
        """Set the attributes from the line of the lock file, and record this process as the
        last writer.  Requires the lock."""
        pid, self.generation, self.synced = _parse(state)
        self.state = state
        if pid == 0:
            # A new lock file: its generation must differ from every earlier generation.
            self.generation = time.time_ns() & ~1
        if pid != self._pid:
            self._write_state()

    def record_synced(self, offset: int) -> None:
        """Record that the last segment is flushed to disk up to ``offset``.  Requires the lock and
        the completed fsync.  Never raises: if the offset is not recorded, the next writer flushes
        the bytes again."""
        self.synced = offset
        with contextlib.suppress(OSError):
            self._write_state()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark the set of files as changing while the ``with`` block runs.  Requires the lock.

        If the body raises, the generation stays odd.  The next writer then reads the directory
        again and removes leftover files.
        """
        self.generation += 1 + self.generation % 2
        self.synced = 0
        self._write_state()
        yield
        self.bump_generation()

    def bump_generation(self) -> None:
        """Show other processes that the set of files has changed.  Requires the lock."""
        self.generation += 2 - self.generation % 2
        self.synced = 0
        self._write_state()
        self.known_generation = self.generation

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
    """Return the generation and the inode of the lock file; takes no lock.

    Returns ``None`` if the generation is unknown, or odd because of a change in progress.
    """
    try:
        with path.open("rb", buffering=0) as file:
            pid, generation, _ = _parse(file.read(STATE_BYTES))
            inode = os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return None
    return (generation, inode) if pid and generation % 2 == 0 else None


def busy_error(path: Path, role: str, waited_s: float) -> StoreBusyError:
    """Return the error for a waiter that waited too long for the lock at ``path``."""
    owners = lock_owners(path)
    if not owners:
        with contextlib.suppress(OSError):
            pid, _, _ = _parse(path.read_bytes())
            # The system does not report the owner; the last writer is the most likely owner.
            owners = (f"perhaps {describe_process(pid)}",) if pid else ()
    waited = f" for {waited_s:g} s" if waited_s else ""
    return StoreBusyError(
        f"the store {path.parent} is busy: {role} has held the file {path.name!r}{waited}; "
        f"{describe_owners(owners)}",
        hint="try again; if this fails too, check what the lock owner is doing",
        owners=owners,
    )


def _parse(state: bytes) -> tuple[int, int, int]:
    """Return the pid, the generation and the synced offset in a line; 0 for each unknown value."""
    fields = state.split()
    if len(fields) != _FIELD_COUNT or not all(field.isdigit() for field in fields):
        return 0, 0, 0
    pid, generation, synced, copy = map(int, fields)
    return pid, generation, synced if synced == copy else 0
