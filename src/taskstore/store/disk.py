"""The door to the disk: every file operation by which a ledger in files changes.

A store that keeps files goes through one :class:`Disk` for whatever makes,
changes, syncs, renames or removes them; reading needs no door.  So a test can
stand in the door: count the steps, let one fail, or record them all and build
what a power loss would leave (``taskstore.testing.powerloss``).

The first half of the methods are the steps themselves, as thin as the system's
own; the second half is made of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

TEMPORARY = ".tmp"
"""What the name of a file ends with until it is whole."""

_BUFFER = 1 << 20


class Disk:
    """The operating system's files.  Errors are ``OSError``."""

    # -- the steps ----------------------------------------------------------

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """Open a file, which is created as ``flags`` say; returns a descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        """Write at an offset; returns how many bytes were written, perhaps not all."""
        return os.pwrite(descriptor, data, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut a file to ``size`` bytes."""
        os.ftruncate(descriptor, size)

    def sync_data(self, descriptor: int) -> None:
        """Make the bytes and the length of a file survive power loss."""
        if hasattr(os, "fdatasync"):
            os.fdatasync(descriptor)
        else:
            self.sync_file(descriptor)

    def sync_file(self, descriptor: int) -> None:
        """Make a file survive power loss, with everything that is known of it but its name."""
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
        """Give a file another name in one step; what had that name is gone."""
        os.replace(old, new)  # noqa: PTH105 - the system's own

    def unlink(self, path: Path) -> None:
        """Remove the name of a file."""
        os.unlink(path)  # noqa: PTH108 - the system's own

    def mkdir(self, path: Path, mode: int = 0o700) -> None:
        """Create a directory."""
        os.mkdir(path, mode)  # noqa: PTH102 - the system's own

    # -- made of them -------------------------------------------------------

    def write_at(self, descriptor: int, data: bytes, offset: int) -> None:
        """Write all of ``data``; what stops it is raised, with a part of it in the file."""
        written = self.pwrite(descriptor, data, offset)
        while written < len(data):
            more = self.pwrite(descriptor, memoryview(data)[written:], offset + written)
            if not more:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written += more

    def write_new(self, path: Path, blocks: Iterable[bytes]) -> None:
        """Create a file of mode 0600 and write it, synced.  Its name is not durable yet.

        Raises ``FileExistsError`` when it is there.  No trace if it fails.
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
        """Write what shall become ``path`` beside it, synced; returns where.

        No trace if it fails.  A leftover of somebody who was killed is replaced.
        """
        temporary = path.with_name(path.name + TEMPORARY)
        self.remove_all([temporary])
        self.write_new(temporary, blocks)
        return temporary

    def publish(self, temporary: Path, path: Path) -> None:
        """Give a written file its name, durably."""
        self.rename(temporary, path)
        self.sync_directory(path.parent)

    def remove_all(self, paths: Iterable[Path]) -> None:
        """Remove files in this order; those that are gone already do not matter."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self.unlink(path)

    def make_directory(self, directory: Path) -> None:
        """Create a directory and its parents with mode 0700, durably.

        One that is there is left as it is; it has to be usable.
        """
        missing = []
        place = directory
        while not place.exists():
            missing.append(place)
            place = place.parent
        for part in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster
                self.mkdir(part)
            self.sync_directory(part.parent)
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))


SYSTEM = Disk()
"""The door that everybody uses who is not given another."""
