"""Locks between processes with flock, and the writers' shared state.

A writer locks the *directory*.  A compaction or a replacement of the content locks the *segment
that follows the newest snapshot*.  No program can remove or replace the directory or this segment
unnoticed, because there is no ledger without them.  A file that exists only to be locked would not
be safe: a cleaner could remove the file while a process owns the lock, and another process could
then create a new file and lock the new file.

The file with the name ``lock`` contains the line ``<pid> <generation> <synced> <synced>``.  ``pid``
is the process id of the last writer, for messages.  ``generation`` is a number that rises when the
set of files changes or a segment is truncated: the lock owner makes ``generation`` odd before the
operation and even after the operation.  ``synced`` is an offset in the last segment: all bytes
before the offset are flushed to disk, and the next writer does not have to flush these bytes again.
The line contains the offset twice; if the two copies differ, the offset is unknown.  Only running
processes use these values, so the line is never flushed to disk.  If the file ``lock`` was removed,
the next writer creates a new file ``lock`` and reads the directory again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskstore.errors import CorruptStoreError, StoreBusyError
from taskstore.store.disk import TEMPORARY, Disk
from taskstore.stores.common.locks import LockQueue, describe_owners, describe_process, lock_owners
from taskstore.stores.jsonfile.layout import (
    COMPACT_LOCK_NAME,
    LOCK_NAME,
    files_gone_error,
    newest_segment,
    read_layout,
    retry_while_changing,
)

_FIELD_COUNT = 4
STATE_BYTES = 74
"""The length of the line in the lock file, in bytes."""


class PathLock:
    """An exclusive ``flock`` on the file or directory that a path names.

    Two instances exclude each other, also within one process.  Threads that share an
    instance must exclude each other by another lock.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.descriptor = -1
        """The open file.  To release the lock, the lock owner calls ``fcntl.flock`` directly in a
        ``finally`` block.  A release method would not be safe, because an interrupt could prevent
        the method from running."""
        self._disk = disk
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
            # The file was removed or replaced: its lock does not exclude users of a new file.
            self._close()

    def close(self) -> None:
        """Close the file.  The closing releases the lock.  In a forked child the lock is not
        released, because the parent still has the file open.  A second call does nothing."""
        self._close()

    def _close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            self._disk.close(descriptor)

    def _open(self) -> None:
        self.descriptor = self._open_path()
        status = os.fstat(self.descriptor)
        self._file_id = (status.st_ino, status.st_dev)

    def _open_path(self) -> int:
        return self._disk.open(self.path, os.O_RDONLY)


class _CreatedLock(PathLock):
    """A lock on a file.  The first process that takes the lock creates the file, for all users of
    the ledger."""

    def _open_path(self) -> int:
        return self._disk.open_or_create(self.path, newest_segment(self.path.parent))


class CompactLock:
    """The lock that excludes compactions and replacements of the content.

    The owner first locks the file ``compact.lock``.  A program that copies the ledger locks this
    file too.  Then the owner locks the segment that follows the newest snapshot.  Only the owner
    publishes snapshots.  Before the owner publishes a snapshot, the owner also locks the segment
    that will follow the new snapshot (:meth:`lock_next_segment`).  Therefore no other process can
    take the compaction lock at the same time, even if ``compact.lock`` was removed.
    """

    def __init__(self, directory: Path, disk: Disk) -> None:
        self.directory = directory
        self._disk = disk
        self._file = _CreatedLock(directory / COMPACT_LOCK_NAME, disk)
        self._segments: dict[Path, PathLock] = {}
        self._busy_path = self._file.path
        queue = directory / f"{COMPACT_LOCK_NAME}.turn"
        self._queue = LockQueue(queue, self._file.path)

    def try_acquire(self) -> bool:
        """Take the lock if it is free; return whether the lock was taken."""
        self._busy_path = self._file.path
        return self._file.try_acquire() and self._try_segment()

    def _try_segment(self) -> bool:
        while True:
            path = self._segment_to_lock()
            lock = self._segments.setdefault(path, PathLock(path, self._disk))
            try:
                if not lock.try_acquire():
                    self._busy_path = path
                    return False
            except FileNotFoundError:
                continue  # another owner has just removed the segment
            if self._segment_to_lock() == path:
                return True
            # Another owner has just published a snapshot.
            self._segments.pop(path).close()

    def _segment_to_lock(self) -> Path:
        layout = retry_while_changing(self.directory, lambda _: read_layout(self.directory))
        if layout.is_empty:
            raise files_gone_error(self.directory)
        first = layout.after_newest_snapshot().first
        return next(segment.path for segment in layout.segments if segment.first == first)

    def lock_next_segment(self, path: Path) -> None:
        """Lock the segment that will follow the new snapshot.  The caller must own the compaction
        lock."""
        if path not in self._segments:
            lock = self._segments[path] = PathLock(path, self._disk)
            if not lock.try_acquire():
                raise busy_error(path, "another compactor", 0)

    def close(self) -> None:
        """Release the lock and close all files.  A second call does nothing."""
        self._queue.close()
        while self._segments:
            self._segments.popitem()[1].close()
        self._file.close()

    @contextmanager
    def hold(self, timeout_s: float, role: str) -> Iterator[CompactLock]:
        """Own the compaction lock during the ``with`` body, then close the lock.  If the lock is
        not free within ``timeout_s`` seconds, raises :class:`StoreBusyError`; the message calls the
        lock owner ``role``."""
        try:
            poll = self._queue.poll_in_turn
            if not (self.try_acquire() or (timeout_s > 0 and poll(self.try_acquire, timeout_s))):
                raise busy_error(self._busy_path, role, timeout_s)
            yield self
        finally:
            # The release must not raise an error, because the work under the lock is complete.
            try:
                self.close()
            except OSError:
                self.close()


class WriteLock(PathLock):
    """The write lock of the ledger (a lock on the directory), and the values in the lock file.

    ``generation`` is the current generation of the files.  ``known_generation`` is the generation
    in which the owner's layout was read; ``None`` if the layout can be outdated.  ``synced`` is an
    offset in the last segment: in this generation, all bytes before the offset are flushed to disk.
    ``synced`` is 0 if the offset is unknown.
    """

    def __init__(self, directory: Path, disk: Disk) -> None:
        super().__init__(directory, disk)
        self.state_path = directory / LOCK_NAME
        self.state_descriptor = -1
        self.generation = 0
        self.known_generation: int | None = None
        self.synced = 0
        self.state: bytes | None = None
        """The line of the lock file that was most recently read or written.  The attributes of this
        object are current as long as the lock file contains this line.
        """
        self.queue = LockQueue(directory / f"{LOCK_NAME}.turn", self.state_path)
        """The queue of waiters; a waiter calls ``queue.poll_in_turn(lock.try_acquire,
        timeout_s)``."""
        self.mentions_ledger = False
        """Whether the lock file says that the directory contained a ledger."""
        self._pid = os.getpid()
        self._is_recorded = True
        self._state_name = os.fspath(self.state_path)
        self._state_id = (0, 0)

    def try_acquire(self) -> bool:
        """Take the lock if it is free, and open the lock file; return whether the lock was
        taken."""
        while True:
            if self.descriptor < 0:
                self._open()
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.stat(self._name)  # noqa: PTH116 - takes half the time of Path.stat
            except BlockingIOError:
                return False
            except FileNotFoundError:
                pass
            else:
                if (status.st_ino, status.st_dev) == self._file_id:
                    break
            # The directory was moved, removed or replaced.
            self._close()
        try:
            status = os.stat(self._state_name)  # noqa: PTH116 - as above
            if (status.st_ino, status.st_dev) == self._state_id:
                return True
        except FileNotFoundError:
            pass
        return self._open_state()

    def _open_path(self) -> int:
        return self._disk.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def _open_state(self) -> bool:
        """Open the lock file, or create it.  Return false if a process with an older version of
        taskstore owns the lock of this file.  The caller must own the write lock."""
        self._close_state()
        # A new lock file can belong to other journal files.
        self.state, self.known_generation = None, None
        try:
            self.state_descriptor = self._disk.open(self.state_path, os.O_RDWR)
        except FileNotFoundError:
            self._create_state()
        status = os.fstat(self.state_descriptor)
        self._state_id = (status.st_ino, status.st_dev)
        try:
            # taskstore 0.1.0 excludes other writers with an exclusive lock on this file.  It must
            # not write while a later version has the ledger open.
            fcntl.flock(self.state_descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close_state()
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            return False
        return True

    def _create_state(self) -> None:
        # A process that is killed here leaves no lock file that other users cannot open.
        temporary = self.state_path.with_name(LOCK_NAME + TEMPORARY)
        self._disk.remove_all([temporary])
        self.state_descriptor = self._disk.create(temporary, newest_segment(self.path))
        # If a cleaner has just removed the new file, the next writer creates another one.
        with contextlib.suppress(FileNotFoundError):
            self._disk.rename(temporary, self.state_path)

    def _close_state(self) -> None:
        descriptor, self.state_descriptor = self.state_descriptor, -1
        self._state_id = (0, 0)
        if descriptor >= 0:
            self._disk.close(descriptor)

    def close(self) -> None:
        """Close all files.  The closing releases the lock.  In a forked child the lock is not
        released, because the parent still has the files open.  A second call does nothing."""
        self.queue.close()
        self._close_state()
        self._close()

    def load_state(self, state: bytes) -> None:
        """Set the attributes from the line of the lock file.  The caller must own the write
        lock."""
        pid, self.generation, self.synced = _parse(state)
        self.state = state
        self.mentions_ledger = mentions_ledger(state)
        self._is_recorded = pid == self._pid
        if pid == 0:
            # A new lock file: its generation must differ from every earlier generation, and is odd
            # until the ledger is known to exist.
            self.generation = time.time_ns() | 1

    def confirm_state(self) -> None:
        """Record that the files are complete, and that this process is the last writer.  The caller
        must own the write lock."""
        if self.generation % 2:
            self.bump_generation()
        elif not self._is_recorded:
            self._write_state()
        self.known_generation = self.generation

    def record_synced(self, offset: int) -> None:
        """Record that the last segment is flushed to disk up to ``offset``.  The caller must own
        the write lock, and must have completed the fsync.  This method raises no ``OSError``: if
        the offset cannot be recorded, the next writer flushes the bytes again."""
        self.synced = offset
        with contextlib.suppress(OSError):
            self._write_state()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark the set of files as changing while the ``with`` body runs.  The caller must own the
        write lock.

        If the body raises an error, the generation stays odd.  The next writer then reads the
        directory again and removes leftover files.
        """
        self.generation += 1 + self.generation % 2
        self.synced = 0
        self._write_state()
        yield
        self.bump_generation()

    def bump_generation(self) -> None:
        """Show other processes that the set of files has changed.  The caller must own the write
        lock."""
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
        self._disk.pwrite(self.state_descriptor, state, 0)
        self.state, self._is_recorded = state, True


def read_generation(path: Path) -> tuple[int, int] | None:
    """Return the generation in the lock file, and the inode of the lock file; take no lock.

    Returns ``None`` if the generation is unknown, or if the generation is odd because another
    process is changing the set of files.
    """
    try:
        with path.open("rb", buffering=0) as file:
            pid, generation, _ = _parse(file.read(STATE_BYTES))
            inode = os.fstat(file.fileno()).st_ino
    except (FileNotFoundError, PermissionError):
        return None
    return (generation, inode) if pid and generation % 2 == 0 else None


def check_not_removed(directory: Path) -> None:
    """Raise :class:`CorruptStoreError` if the lock file in a directory says that the directory once
    contained a ledger.  The caller has found that the directory contains no ledger now."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        if mentions_ledger((directory / LOCK_NAME).read_bytes()[:STATE_BYTES]):
            raise removed_error(directory)


def removed_error(directory: Path) -> CorruptStoreError:
    """Return the error for a directory whose ledger was removed."""
    return CorruptStoreError(
        str(directory),
        f"the file {LOCK_NAME!r} says that the directory contained a ledger, but the snapshots "
        "and segments are gone",
        hint="nothing was changed; restore the files from a backup, or remove "
        f"{directory / LOCK_NAME} to begin an empty ledger",
    )


def busy_error(path: Path, role: str, waited_s: float) -> StoreBusyError:
    """Return the error for a waiter that waited too long for the lock of ``path``, a directory or a
    file in the directory."""
    owners = lock_owners(path)
    directory = path if path.is_dir() else path.parent
    what = "the directory" if path == directory else f"the file {path.name!r}"
    if not owners and path == directory:
        with contextlib.suppress(OSError):
            pid, _, _ = _parse((directory / LOCK_NAME).read_bytes())
            # The system does not report the owner; the last writer is the most likely owner.
            owners = (f"perhaps {describe_process(pid)}",) if pid else ()
    waited = f" for {waited_s:g} s" if waited_s else ""
    return StoreBusyError(
        f"the store {directory} is busy: {role} has locked {what}{waited}; "
        f"{describe_owners(owners)}",
        hint="try again; if this fails too, check what the lock owner is doing",
        owners=owners,
    )


def mentions_ledger(state: bytes) -> bool:
    """Return whether the line of a lock file says that the directory contained a ledger.

    The function reads only the pid and the generation, because every version of taskstore writes
    these two values first.
    """
    fields = state.split()[:2]
    return len(fields) == 2 and all(field.isdigit() for field in fields) and int(fields[0]) > 0  # noqa: PLR2004


def _parse(state: bytes) -> tuple[int, int, int]:
    """Parse a line of the lock file: return its pid, generation and synced offset, each 0 if the
    line does not contain it."""
    fields = state.split()
    if len(fields) != _FIELD_COUNT or not all(field.isdigit() for field in fields):
        return 0, 0, 0
    pid, generation, synced, copy = map(int, fields)
    return pid, generation, synced if synced == copy else 0
