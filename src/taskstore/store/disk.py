"""The file operations that change a ledger stored in files.

A store that keeps files uses one :class:`Disk` to create, change, flush, rename or remove
files.  The store reads files directly.  A test replaces the :class:`Disk` to count the
operations, to make an operation fail, or to record all operations and build the states
that a power loss can leave (``taskstore.testing.powerloss``).

The first methods of :class:`Disk` are single system calls.  The methods after them combine
several system calls.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

TEMPORARY = ".tmp"
"""The suffix of the name of a file that is not complete yet."""

_BUFFER = 1 << 20


class Disk:
    """File operations of the operating system.  An operation that fails raises ``OSError``."""

    # -- single system calls ------------------------------------------------

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """Open a file (``O_CREAT`` in ``flags`` creates the file); return the descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        """Write at an offset; return the number of written bytes, which can be less than all."""
        return os.pwrite(descriptor, data, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        """Truncate a file to ``size`` bytes."""
        os.ftruncate(descriptor, size)

    def sync_data(self, descriptor: int) -> None:
        """Flush a file's bytes and length to disk, so that both survive power loss."""
        if hasattr(os, "fdatasync"):
            os.fdatasync(descriptor)
        else:
            self.sync_file(descriptor)

    def sync_file(self, descriptor: int) -> None:
        """Flush a file's bytes and metadata to disk; the name of the file is not flushed."""
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves the data in the drive's cache
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)

    def sync_directory(self, directory: Path) -> None:
        """Flush the file names in a directory to disk, so that they survive power loss."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Atomically rename a file; a file that already has the new name is replaced."""
        os.replace(old, new)  # noqa: PTH105 - the plain system call

    def unlink(self, path: Path) -> None:
        """Remove the name of a file from its directory."""
        os.unlink(path)  # noqa: PTH108 - the plain system call

    def mkdir(self, path: Path, mode: int = 0o700) -> None:
        """Create a directory."""
        os.mkdir(path, mode)  # noqa: PTH102 - the plain system call

    # -- combined operations ------------------------------------------------

    def write_at(self, descriptor: int, data: bytes, offset: int) -> None:
        """Write all of ``data``; after an error, the file can contain a part of ``data``."""
        written = self.pwrite(descriptor, data, offset)
        while written < len(data):
            more = self.pwrite(descriptor, memoryview(data)[written:], offset + written)
            if not more:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written += more

    def write_new(self, path: Path, blocks: Iterable[bytes]) -> None:
        """Create a file of mode 0600 and flush its bytes to disk; the file name is not durable yet.

        Raises ``FileExistsError`` if the file exists.  If another error occurs, the
        method removes the file.
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
        """Write a temporary file next to ``path``, flush the file to disk and return its path.

        If the call fails, the method removes the temporary file.  The method replaces a
        temporary file that a killed process left.
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
        """Remove files in the given order; skip files that do not exist."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self.unlink(path)

    def make_directory(self, directory: Path) -> None:
        """Durably create a directory and its missing parents with mode 0700.

        An existing directory does not change, but must be readable and writable.
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
"""The :class:`Disk` that a store uses by default."""
