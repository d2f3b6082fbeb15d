"""The recorder: a disk that does everything for real and writes down what was done.

The log speaks of files and directories by number, not by name: a name may come
to mean another file, and it is the file that is synced.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from taskstore.store import disk as door
from taskstore.store.disk import Disk


class Made(Struct, frozen=True):
    """A name was created in a directory, for a new file or, when ``folder``, a new directory."""

    directory: int
    name: str
    node: int
    folder: bool = False


class Wrote(Struct, frozen=True):
    """Bytes were written to a file."""

    node: int
    offset: int
    data: bytes


class Truncated(Struct, frozen=True):
    """A file was given another length."""

    node: int
    size: int


class Synced(Struct, frozen=True):
    """A file, or the names in a directory, were made to survive."""

    node: int


class Omitted(Struct, frozen=True):
    """A file or directory was not synced, where it ought to have been."""

    node: int


class Renamed(Struct, frozen=True):
    """A file got another name in its directory; what had that name is gone."""

    directory: int
    old: str
    new: str
    node: int


class Removed(Struct, frozen=True):
    """The name of a file was removed."""

    directory: int
    name: str
    node: int


class Said(Struct, frozen=True):
    """The workload has something to say about what has to hold from here on."""

    what: object


Operation = Made | Wrote | Truncated | Synced | Omitted | Renamed | Removed | Said


class KilledError(BaseException):
    """The process at this disk was killed: not an error that anybody may handle."""


class Trap(Struct):
    """Lets a step of a disk fail with ``error``: the next one, or one ``after`` some others.

    A write has written ``written`` bytes by then.  :class:`KilledError` kills
    the process: what it does to unwind has no effect.
    """

    step: str
    error: BaseException
    after: int = 0
    written: int = 0


class Recorder:
    """The log of one file system below ``root``, an empty directory.

    Each process that the workload plays gets a disk of its own from
    :meth:`disk`.  ``log`` holds the operations in order, ``steps`` counts them
    by the names of the methods of :class:`~taskstore.store.disk.Disk`, and ``sites``
    has each step with the place in the code, ``(step, file, line)``, which
    asked for it; ``unsynced`` are the files and directories that were changed
    since they were synced.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[Operation] = []
        self.steps: Counter[str] = Counter()
        self.sites: Counter[tuple[str, str, int]] = Counter()
        self.lock = threading.RLock()
        self.unsynced: set[int] = set()
        self._nodes: dict[tuple[int, int], int] = {}
        self._count = 0
        if any(root.iterdir()):
            raise ValueError(f"{root} is not empty")
        self.born(root.stat())

    def disk(self, omits: Omits | None = None) -> RecordedDisk:
        """The disk as one more process sees it.

        ``omits`` is asked before every sync, with the step and its site; what
        it returns true for is left out, as by a store that forgot it.
        """
        return RecordedDisk(self, omits or (lambda *_: False))

    def say(self, what: object) -> None:
        """Write down what has to hold from here on."""
        with self.lock:
            self.log.append(Said(what))

    def note(self, operation: Operation) -> None:
        """Write down what was done."""
        self.log.append(operation)
        match operation:
            case Wrote(node) | Truncated(node) | Made(node) | Renamed(node) | Removed(node):
                self.unsynced.add(node)
            case Synced(node):
                self.unsynced.discard(node)

    def born(self, status: os.stat_result) -> int:
        """Give a new file its number; numbers of the file system are used again, ours are not."""
        self._count += 1
        self._nodes[status.st_dev, status.st_ino] = self._count
        return self._count

    def node(self, status: os.stat_result) -> int:
        """The number of a file that is there."""
        return self._nodes[status.st_dev, status.st_ino]

    def directory(self, path: Path) -> int:
        """The number of a directory below the root, or of the root."""
        if not path.is_relative_to(self.root):
            raise ValueError(f"{path} is not below {self.root}")
        return self.node(path.stat())


Site = tuple[str, int]
"""A file and a line in it."""

Omits = Callable[[str, Site], bool]
"""Whether a sync, given by its step and its site, is left out."""


class RecordedDisk(Disk):
    """The disk of one process: see :class:`Recorder`."""

    def __init__(self, recorder: Recorder, omits: Omits) -> None:
        self._recorder = recorder
        self._omits = omits
        self._files: dict[int, int] = {}
        self._dead = False
        self.trap: Trap | None = None

    def _begin(self, step: str) -> None:
        if self._dead:
            raise KilledError
        self._recorder.steps[step] += 1
        self._recorder.sites[step, *_site()] += 1
        if self.trap is not None and self.trap.step == step:
            if self.trap.after:
                self.trap.after -= 1
            elif step != "pwrite":
                self._spring(self.trap)

    def _spring(self, trap: Trap) -> None:
        self.trap = None
        self._dead = isinstance(trap.error, KilledError)
        raise trap.error

    def bury(self) -> None:
        """Close what a killed process left open, as the system does, after it has unwound."""
        assert self._dead, "this process lives"
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
                self._recorder.note(Made(directory, path.name, self._recorder.born(status)))
            self._files[descriptor] = self._recorder.node(status)
            return descriptor

    def close(self, descriptor: int) -> None:
        with self._recorder.lock:
            if self._dead:
                return
            self._begin("close")
            del self._files[descriptor]
            super().close(descriptor)

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        with self._recorder.lock:
            self._begin("pwrite")
            trap = self.trap
            sprung = trap is not None and trap.step == "pwrite" and not trap.after
            if trap is not None and sprung:
                data = data[: trap.written]
            written = super().pwrite(descriptor, data, offset) if data else 0
            if written:
                self._recorder.note(Wrote(self._files[descriptor], offset, bytes(data[:written])))
            if trap is not None and sprung:
                self._spring(trap)
            return written

    def truncate(self, descriptor: int, size: int) -> None:
        with self._recorder.lock:
            self._begin("truncate")
            super().truncate(descriptor, size)
            self._recorder.note(Truncated(self._files[descriptor], size))

    def sync_data(self, descriptor: int) -> None:
        self._sync("sync_data", self._files[descriptor])

    def sync_file(self, descriptor: int) -> None:
        self._sync("sync_file", self._files[descriptor])

    def sync_directory(self, directory: Path) -> None:
        self._sync("sync_directory", self._recorder.directory(directory))

    def _sync(self, step: str, node: int) -> None:
        # Not for real: whether the machine loses power is ours to say.
        with self._recorder.lock:
            self._begin(step)
            if not self._omits(step, _site()):
                self._recorder.note(Synced(node))
            elif node in self._recorder.unsynced:
                self._recorder.note(Omitted(node))

    def rename(self, old: Path, new: Path) -> None:
        with self._recorder.lock:
            self._begin("rename")
            if old.parent != new.parent:
                raise ValueError(f"{old} would go to another directory")
            directory, node = self._recorder.directory(old.parent), self._recorder.node(old.stat())
            super().rename(old, new)
            self._recorder.note(Renamed(directory, old.name, new.name, node))

    def unlink(self, path: Path) -> None:
        with self._recorder.lock:
            self._begin("unlink")
            node = self._recorder.node(path.lstat())  # raises when it is not there
            super().unlink(path)
            self._recorder.note(Removed(self._recorder.directory(path.parent), path.name, node))

    def mkdir(self, path: Path, mode: int = 0o700) -> None:
        with self._recorder.lock:
            self._begin("mkdir")
            super().mkdir(path, mode)
            directory = self._recorder.directory(path.parent)
            node = self._recorder.born(path.stat())
            self._recorder.note(Made(directory, path.name, node, folder=True))


_OURS = {door.__file__, __file__}


def _site() -> Site:
    """Where in the code the step was asked for: the first place that is not the disk's."""
    frame = sys._getframe(1)  # noqa: SLF001 - the way to the caller
    while frame.f_code.co_filename in _OURS and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
