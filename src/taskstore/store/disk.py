"""Every file operation that changes a ledger stored in files.

A store that keeps files calls one :class:`Disk` to create, change, sync, rename
or remove them; it reads files directly.  A test replaces the :class:`Disk` to
count the operations, to make one fail, or to record all of them and build the
states that a power loss may leave (``taskstore.testing.powerloss``).

The first half of the methods are single system calls; the second half combines
them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

TEMPORARY = ".tmp"
"""The suffix of a file name until the file is complete."""

_BUFFER = 1 << 20


class Disk:
    """File operations of the operating system.  They raise ``OSError``."""

    # -- single system calls ------------------------------------------------

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """Open a file, or create it if ``flags`` say so; returns a descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        """Write at an offset; returns the number of bytes written, which may be fewer."""
        return os.pwrite(descriptor, data, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut a file to ``size`` bytes."""
        os.ftruncate(descriptor, size)

    def sync_data(self, descriptor: int) -> None:
        """Make a file's bytes and its length survive power loss."""
        if hasattr(os, "fdatasync"):
            os.fdatasync(descriptor)
        else:
            self.sync_file(descriptor)

    def sync_file(self, descriptor: int) -> None:
        """Make a file's bytes and all its metadata except its name survive power loss."""
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves the data in the drive's cache
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)

    def sync_directory(self, directory: Path) -> None:
        """Make the names in a directory survive power loss."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Atomically rename a file; it replaces a file that has the new name."""
        os.replace(old, new)  # noqa: PTH105 - the plain system call

    def unlink(self, path: Path) -> None:
        """Remove a file's name."""
        os.unlink(path)  # noqa: PTH108 - the plain system call

    def mkdir(self, path: Path, mode: int = 0o700) -> None:
        """Create a directory."""
        os.mkdir(path, mode)  # noqa: PTH102 - the plain system call

    # -- combined operations ------------------------------------------------

    def write_at(self, descriptor: int, data: bytes, offset: int) -> None:
        """Write all of ``data``; after an error, the file may contain a part of it."""
        written = self.pwrite(descriptor, data, offset)
        while written < len(data):
            more = self.pwrite(descriptor, memoryview(data)[written:], offset + written)
            if not more:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written += more

    def write_new(self, path: Path, blocks: Iterable[bytes]) -> None:
        """Create a file of mode 0600, write and sync it.  Its name is not durable yet.

        Raises ``FileExistsError`` if it exists.  Removes its own file on an error.
        """
        descriptor = self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                self._write_blocks(descriptor, blocks)
                self.sync_file(descriptor)
            finally:
                self.close(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                self.unlink(path)
            raise

    def _write_blocks(self, descriptor: int, blocks: Iterable[bytes]) -> None:
        offset, buffer = 0, bytearray()
        for block in blocks:
            buffer += block
            if len(buffer) >= _BUFFER:
                self.write_at(descriptor, bytes(buffer), offset)
                offset += len(buffer)
                buffer.clear()
        if buffer:
            self.write_at(descriptor, bytes(buffer), offset)

    def write_temporary(self, path: Path, blocks: Iterable[bytes]) -> Path:
        """Write and sync a temporary file beside ``path``; returns the temporary path.

        Removes the file on an error.  Replaces the leftover file of a killed process.
        """
        temporary = path.with_name(path.name + TEMPORARY)
        self.remove_all([temporary])
        self.write_new(temporary, blocks)
        return temporary

    def publish(self, temporary: Path, path: Path) -> None:
        """Durably rename a temporary file to its final name."""
        self.rename(temporary, path)
        self.sync_directory(path.parent)

    def remove_all(self, paths: Iterable[Path]) -> None:
        """Remove files in this order; skips files that do not exist."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self.unlink(path)

    def make_directory(self, directory: Path) -> None:
        """Durably create a directory and its parents with mode 0700.

        Leaves an existing directory unchanged; it must be readable and writable.
        """
        missing = []
        existing = directory
        while not existing.exists():
            missing.append(existing)
            existing = existing.parent
        for part in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process created it
                self.mkdir(part)
            self.sync_directory(part.parent)
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))


SYSTEM = Disk()
"""The default :class:`Disk`, used when a store is not given another."""
