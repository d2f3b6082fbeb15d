"""The recorder: a real disk whose operations are recorded in a trace.

The trace identifies files and directories by node numbers, not by names.  A rename can give the
same name to another file, and an fsync applies to a file, not to a name.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from taskstore.store import disk as disk_module
from taskstore.store.disk import Disk


class Created(Struct, frozen=True):
    """A file, or a directory if ``is_directory`` is true, was created in a directory."""

    directory: int
    name: str
    node: int
    is_directory: bool = False


class Written(Struct, frozen=True):
    """Bytes were written to a file."""

    node: int
    offset: int
    data: bytes


class Truncated(Struct, frozen=True):
    """The length of a file was set to ``size``."""

    node: int
    size: int


class Synced(Struct, frozen=True):
    """A process made an fsync of a file, or of the names in a directory."""

    node: int


class SyncOmitted(Struct, frozen=True):
    """An fsync of a changed file or directory was omitted."""

    node: int


class Renamed(Struct, frozen=True):
    """A file was renamed within its directory; any file with the new name was replaced."""

    directory: int
    old: str
    new: str
    node: int


class Removed(Struct, frozen=True):
    """The name of a file was removed."""

    directory: int
    name: str
    node: int


class Expects(Struct, frozen=True):
    """The workload changed the content that is allowed after a power loss."""

    allowed: object


Operation = Created | Written | Truncated | Synced | SyncOmitted | Renamed | Removed | Expects


class KilledError(BaseException):
    """Simulates a kill of the process that uses a disk; a store must not catch this error."""


class Failpoint(Struct):
    """Makes a disk operation raise ``error``; ``step`` is the name of the operation.

    The first ``after`` calls of the operation succeed, and the next call fails.  A write that fails
    first writes ``written`` bytes.  If ``error`` is a :class:`KilledError`, later operations of the
    same process have no effect, as after a kill of the process.
    """

    step: str
    error: BaseException
    after: int = 0
    written: int = 0


class Recorder:
    """Records the operations on the files below ``root``; at first, ``root`` must be empty.

    Each process of the workload has its own disk from :meth:`disk`.  ``trace`` has
    the operations in order.  ``steps`` counts the operations by the method names of
    :class:`~taskstore.store.disk.Disk`; ``sites`` counts the operations by call site,
    ``(step, file, line)``.  ``unsynced`` has the node numbers of the files and
    directories that changed since their latest fsync.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trace: list[Operation] = []
        self.steps: Counter[str] = Counter()
        self.sites: Counter[tuple[str, str, int]] = Counter()
        self.lock = threading.RLock()
        self.unsynced: set[int] = set()
        self._nodes: dict[tuple[int, int], int] = {}
        self._count = 0
        if any(root.iterdir()):
            raise ValueError(f"{root} is not empty")
        self.register(root.stat())

    def disk(self, omits: Omits | None = None) -> RecordedDisk:
        """Return a disk for a new process.

        Every fsync on the disk calls ``omits`` with the operation and the call site.  If
        ``omits`` returns true, the fsync is omitted.
        """
        return RecordedDisk(self, omits or (lambda *_: False))

    def expect(self, allowed: object) -> None:
        """Record the content that a power loss after this trace position is allowed to leave."""
        with self.lock:
            self.trace.append(Expects(allowed))

    def record(self, operation: Operation) -> None:
        """Append an operation to the trace."""
        self.trace.append(operation)
        match operation:
            case Written(node) | Truncated(node) | Created(node) | Renamed(node) | Removed(node):
                self.unsynced.add(node)
            case Synced(node):
                self.unsynced.discard(node)

    def register(self, status: os.stat_result) -> int:
        """Return a new node number for a file; node numbers are never reused, unlike inodes."""
        self._count += 1
        self._nodes[status.st_dev, status.st_ino] = self._count
        return self._count

    def node(self, status: os.stat_result) -> int:
        """Return the node number of a registered file or directory."""
        return self._nodes[status.st_dev, status.st_ino]

    def directory(self, path: Path) -> int:
        """Return the node number of the root directory or of a directory below the root."""
        if not path.is_relative_to(self.root):
            raise ValueError(f"{path} is not below {self.root}")
        return self.node(path.stat())


CallSite = tuple[str, int]
"""A source file and a line number."""

Omits = Callable[[str, CallSite], bool]
"""A function that takes an operation and a call site, and returns whether to omit the fsync."""


class RecordedDisk(Disk):
    """The disk of one process; a :class:`Recorder` records the operations on the disk."""

    def __init__(self, recorder: Recorder, omits: Omits) -> None:
        self._recorder = recorder
        self._omits = omits
        self._files: dict[int, int] = {}
        self._killed = False
        self.failpoint: Failpoint | None = None

    def _begin(self, step: str) -> None:
        failpoint = self._count(step)
        if failpoint is not None:
            self._fail(failpoint)

    def _count(self, step: str) -> Failpoint | None:
        """Count a call of an operation; return the failpoint if this call must fail."""
        if self._killed:
            raise KilledError
        self._recorder.steps[step] += 1
        self._recorder.sites[step, *_call_site()] += 1
        failpoint = self.failpoint
        if failpoint is None or failpoint.step != step:
            return None
        failpoint.after -= 1
        return failpoint if failpoint.after < 0 else None

    def _fail(self, failpoint: Failpoint) -> None:
        self.failpoint = None
        self._killed = isinstance(failpoint.error, KilledError)
        raise failpoint.error

    def close_all(self) -> None:
        """Close the open files of a killed process, as the operating system does."""
        assert self._killed, "the process was not killed"
        while self._files:
            os.close(self._files.popitem()[0])

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        with self._recorder.lock:
            self._begin("open")
            is_new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
            descriptor = super().open(path, flags, mode)
            status = os.fstat(descriptor)
            if is_new:
                directory = self._recorder.directory(path.parent)
                node = self._recorder.register(status)
                self._recorder.record(Created(directory, path.name, node))
            self._files[descriptor] = self._recorder.node(status)
            return descriptor

    def close(self, descriptor: int) -> None:
        with self._recorder.lock:
            if self._killed:
                return
            self._begin("close")
            del self._files[descriptor]
            super().close(descriptor)

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        with self._recorder.lock:
            failpoint = self._count("pwrite")
            if failpoint is not None:
                data = data[: failpoint.written]
            written = super().pwrite(descriptor, data, offset) if data else 0
            if written:
                self._recorder.record(
                    Written(self._files[descriptor], offset, bytes(data[:written]))
                )
            if failpoint is not None:
                self._fail(failpoint)
            return written

    def truncate(self, descriptor: int, size: int) -> None:
        with self._recorder.lock:
            self._begin("truncate")
            super().truncate(descriptor, size)
            self._recorder.record(Truncated(self._files[descriptor], size))

    def sync_data(self, descriptor: int) -> None:
        self._sync("sync_data", self._files[descriptor])

    def sync_file(self, descriptor: int) -> None:
        self._sync("sync_file", self._files[descriptor])

    def sync_directory(self, directory: Path) -> None:
        self._sync("sync_directory", self._recorder.directory(directory))

    def _sync(self, step: str, node: int) -> None:
        # No real fsync is needed, because the power loss is simulated.
        with self._recorder.lock:
            self._begin(step)
            if not self._omits(step, _call_site()):
                self._recorder.record(Synced(node))
            elif node in self._recorder.unsynced:
                self._recorder.record(SyncOmitted(node))

    def rename(self, old: Path, new: Path) -> None:
        with self._recorder.lock:
            self._begin("rename")
            if old.parent != new.parent:
                raise ValueError(f"{new} is not in the directory of {old}")
            directory, node = self._recorder.directory(old.parent), self._recorder.node(old.stat())
            super().rename(old, new)
            self._recorder.record(Renamed(directory, old.name, new.name, node))

    def unlink(self, path: Path) -> None:
        with self._recorder.lock:
            self._begin("unlink")
            node = self._recorder.node(path.lstat())  # raises if the file is missing
            super().unlink(path)
            self._recorder.record(Removed(self._recorder.directory(path.parent), path.name, node))

    def mkdir(self, path: Path, mode: int = 0o700) -> None:
        with self._recorder.lock:
            self._begin("mkdir")
            super().mkdir(path, mode)
            directory = self._recorder.directory(path.parent)
            node = self._recorder.register(path.stat())
            self._recorder.record(Created(directory, path.name, node, is_directory=True))


_DISK_FILES = {disk_module.__file__, __file__}


def _call_site() -> CallSite:
    """Return the source line of the call: the first frame outside the disk modules."""
    frame = sys._getframe(1)  # noqa: SLF001 - the only access to the caller
    while frame.f_code.co_filename in _DISK_FILES and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
