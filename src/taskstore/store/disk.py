"""The file operations that change a ledger stored in files.

A store that keeps files uses one :class:`Disk` to create, change, flush, rename or remove files.
The store reads files directly.  A test replaces the :class:`Disk` for one of three purposes: to
count the operations; to make an operation fail; or to record all operations and build the directory
contents that a power loss can leave (``taskstore.testing.powerloss``).

The first methods of :class:`Disk` are single system calls.  The other methods of :class:`Disk`
combine several system calls.

A new file gets the owner, the group and the mode of the file ``permissions_from``, whose users must
be able to use the new file.  Without ``permissions_from``, a new file gets the owner and the group
of its directory.  Only the owner can then use the file; if a group can write the directory, this
group can use the file too.  Until a new file has its final owner and group, only its creator can
use the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TEMPORARY = ".tmp"
"""The suffix of the name of a file that is not yet complete."""

_BUFFER = 1 << 20
_READ_WRITE = 0o6
_NOT_PERMITTED = (errno.EPERM, errno.EINVAL, errno.ENOTSUP)
"""The errors of ``fchown`` if this process, or the file system, cannot set an owner or group."""

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(rb"\\([0-7]{3})")
"""Matches the octal code of an escaped character in a path of ``/proc/self/mountinfo``: a space, a
tab, a newline, a backslash or ``#``."""


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
        """Write at an offset; return the number of written bytes, which can be less than the data
        has."""
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

    def chown(self, descriptor: int, uid: int, gid: int) -> None:
        """Set the owner and the group of an open file; the value -1 leaves the owner or group as it
        is."""
        os.fchown(descriptor, uid, gid)

    def chmod(self, descriptor: int, mode: int) -> None:
        """Set the mode of an open file."""
        os.fchmod(descriptor, mode)

    # -- combined operations ------------------------------------------------

    def write_at(self, descriptor: int, data: bytes, offset: int) -> None:
        """Write all of ``data``; after an error, the file can contain a part of ``data``."""
        written = self.pwrite(descriptor, data, offset)
        while written < len(data):
            more = self.pwrite(descriptor, memoryview(data)[written:], offset + written)
            if not more:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written += more

    def create(self, path: Path, permissions_from: Path | None = None) -> int:
        """Create a file for the users of ``permissions_from``; return the descriptor, open for
        reading and writing.

        Raises ``FileExistsError`` if the file exists, and ``PermissionError`` if this process
        cannot give the file to the users of ``permissions_from``.
        """
        descriptor = self.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            _hand_over(self, descriptor, path, _access_of(path, permissions_from))
        except BaseException:
            with contextlib.suppress(OSError):
                self.close(descriptor)
            with contextlib.suppress(OSError):
                self.unlink(path)
            raise
        return descriptor

    def open_or_create(self, path: Path, permissions_from: Path | None = None) -> int:
        """Open a file for reading; create a missing file as :meth:`create` does."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                return self.open(path, os.O_RDONLY)
            with contextlib.suppress(FileExistsError):  # another process created it
                return self.create(path, permissions_from)

    def write_new(
        self, path: Path, blocks: Iterable[bytes], permissions_from: Path | None = None
    ) -> None:
        """Create a file as :meth:`create` does, and flush its bytes to disk; the file name is not
        durable yet.

        Raises ``FileExistsError`` if the file exists.  If another error occurs, the
        method removes the file.
        """
        descriptor = self.create(path, permissions_from)
        try:
            try:
                _write_blocks(self, descriptor, blocks)
                self.sync_file(descriptor)
            finally:
                self.close(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                self.unlink(path)
            raise

    def write_temporary(
        self, path: Path, blocks: Iterable[bytes], permissions_from: Path | None = None
    ) -> Path:
        """Write a temporary file next to ``path`` with :meth:`write_new`; return the temporary
        path.

        If the call fails, the method removes the temporary file.  The method replaces a
        temporary file that a killed process left.
        """
        temporary = path.with_name(path.name + TEMPORARY)
        self.remove_all([temporary])
        self.write_new(temporary, blocks, permissions_from)
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
        """Durably create a directory and its missing parents; each new directory gets the owner and
        the group of its own parent.

        Each new directory has mode 0700, or 2770 if a group can write its parent.  The method does
        not change an existing directory, but raises an error if this process cannot read or write
        the directory.
        """
        missing = []
        existing = directory
        while not existing.exists():
            missing.append(existing)
            existing = existing.parent
        for part in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process created it
                _make_one_directory(self, part)
            self.sync_directory(part.parent)
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))


def permission_hint(path: Path) -> str:
    """Return a hint for a user who has no permission to use ``path``, a file or directory of a
    ledger."""
    hint = "check the owners and modes of the directory and its files"
    with contextlib.suppress(OSError):
        status = path.stat()
        hint += (
            f": {path} belongs to user {status.st_uid} and has mode "
            f"{stat.S_IMODE(status.st_mode):04o}, and this process runs as user {os.geteuid()}"
        )
        mode = path.parent.stat().st_mode
        # A directory that everybody can write, such as /tmp, must be sticky.
        if mode & stat.S_ISVTX and mode & stat.S_IWGRP and not mode & stat.S_IWOTH:
            hint += (
                f"; {path.parent} is sticky, so the users of its group cannot replace each "
                f"other's files: run 'chmod -t {shlex.quote(str(path.parent))}', and let the "
                "group read and write the files of the ledger"
            )
    return hint


def alias_reason(path: str) -> str | None:
    """Return the reason why a file can also have another path; ``None`` if no reason is known.

    A file has another path if it has several hard links, or if the file itself is a mount point.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - faster than Path.stat
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    if status.st_nlink > 1:
        return f"{path} has {status.st_nlink} hard links"
    try:
        mounts = _MOUNTS.read_bytes().split(b"\n")[:-1]
    except OSError:  # the system is not Linux
        return None
    # The device of a mounted file is the device of its directory, so only the list of mounts
    # shows the mount.
    points = [_ESCAPED.sub(_unescaped, line.split(b" ")[4]) for line in mounts]
    return f"{path} is mounted as a single file" if os.fsencode(path) in points else None


def _unescaped(code: re.Match[bytes]) -> bytes:
    return bytes([int(code[1], 8)])


def _hand_over(disk: Disk, descriptor: int, path: Path, wanted: _Access) -> None:
    """Set the owner, the group and the mode of a new file or directory."""
    given = os.fstat(descriptor)
    # Only root can set the owner.  A member of a group can set this group.
    for uid in (wanted.uid, -1):
        if (given.st_uid, given.st_gid) != (wanted.uid, wanted.gid):
            try:
                disk.chown(descriptor, uid, wanted.gid)
            except OSError as error:
                if error.errno not in _NOT_PERMITTED:
                    raise
            given = os.fstat(descriptor)
    mode = wanted.mode | given.st_mode & stat.S_ISGID
    if given.st_gid != wanted.gid:
        # The members of this group get only the access of all other users.
        mode = mode & 0o707 | (mode & 0o007) << 3
    if not wanted.is_satisfied(given, mode):
        raise PermissionError(
            errno.EPERM,
            f"this process cannot create the file for the user {wanted.uid} and the group "
            f"{wanted.gid}, who use the ledger",
            str(path),
        )
    if stat.S_IMODE(given.st_mode) != mode:
        try:
            disk.chmod(descriptor, mode)
        except OSError as error:
            if wanted.required or error.errno not in _NOT_PERMITTED:
                raise


def _write_blocks(disk: Disk, descriptor: int, blocks: Iterable[bytes]) -> None:
    offset, buffer = 0, bytearray()
    for block in blocks:
        buffer += block
        if len(buffer) >= _BUFFER:
            disk.write_at(descriptor, bytes(buffer), offset)
            offset += len(buffer)
            buffer.clear()
    if buffer:
        disk.write_at(descriptor, bytes(buffer), offset)


def _make_one_directory(disk: Disk, directory: Path) -> None:
    disk.mkdir(directory)
    access = _access_of(directory, None)
    mode = 0o2770 if access.mode & stat.S_IWGRP else 0o700
    descriptor = disk.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _hand_over(disk, descriptor, directory, access._replace(mode=mode))
    finally:
        disk.close(descriptor)


class _Access(NamedTuple):
    """The owner, the group and the mode that a new file should get.

    ``required`` is true if the three values come from the file ``permissions_from``.  The users of
    this file must then be able to use the new file.
    """

    uid: int
    gid: int
    mode: int
    required: bool

    def is_satisfied(self, given: os.stat_result, mode: int) -> bool:
        """Return whether the new file gives the users of ``permissions_from`` enough access.
        ``given`` has the owner and the group of the new file; ``mode`` is the mode of the new file.
        The owner and the group of ``permissions_from`` must be able to read and write the new file
        as they can read and write ``permissions_from``."""
        if not self.required:
            return True
        owner, group = self.mode >> 6 & _READ_WRITE, self.mode >> 3 & _READ_WRITE
        others = mode & _READ_WRITE
        if given.st_gid == self.gid:
            # The owner of ``permissions_from`` uses the new file as a member of the group.
            return given.st_uid == self.uid or not owner & ~(group | others)
        return not group & ~others and (given.st_uid == self.uid or not owner & ~others)


def _access_of(path: Path, permissions_from: Path | None) -> _Access:
    """Return the access that a new file should get: from ``permissions_from``, or else from its
    directory."""
    if permissions_from is not None:
        with contextlib.suppress(FileNotFoundError):
            status = permissions_from.stat()
            return _Access(status.st_uid, status.st_gid, status.st_mode & 0o777, required=True)
    status = path.parent.stat()
    shared = status.st_mode & stat.S_IWGRP and not status.st_mode & stat.S_ISVTX
    return _Access(status.st_uid, status.st_gid, 0o660 if shared else 0o600, required=False)


SYSTEM = Disk()
"""The :class:`Disk` that a store uses by default."""
