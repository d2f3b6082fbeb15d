"""Noticing that an open SQLite file, or a log beside it, was removed, moved or replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from taskstore.errors import StoreReplacedError, StoreUnavailableError

_NO_FILE = (0, 0)

_OPEN_LOG = "SELECT count(*) FROM sqlite_master"
"""Reads as little as there is: with the first read, a connection opens the log."""

_TICK_NS = 20_000_000
"""How long two changes of a directory may get the same modification time, in nanoseconds."""


def inode_of(path: str) -> tuple[int, int]:
    """Which file lies at a path; (0, 0) where none can be seen."""
    try:
        found = os.stat(path)  # noqa: PTH116 - half the time
    except OSError:
        return _NO_FILE
    return (found.st_ino, found.st_dev)


def _stamp_of(directory: str) -> tuple[int, int] | None:
    """What differs when a directory was changed or moved: its modification time and inode."""
    try:
        found = os.stat(directory)  # noqa: PTH116 - half the time
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ino)


class FileGuard:
    """Refuses every use of a file that is not any more the one that a store has opened.

    What is committed to a file or a log without a name is lost with the last
    process that has it open.  So each commit is preceded, and each read followed,
    by one look at the directory, whose modification time moves with every name
    that is made, removed or replaced in it; only then are the files looked at.
    They are only ever looked at from outside (``os.stat``): opening and closing
    the file beside SQLite drops SQLite's locks on it.

    One connection, the anchor, is open from the beginning and is used for nothing
    else.  While it is open, SQLite leaves the ``-wal`` and ``-shm`` that it opened
    where they are: only somebody else can remove them.
    """

    def __init__(
        self, path: Path, open_one: Callable[[], Any], set_up: Callable[[Any], object]
    ) -> None:
        """``open_one`` opens a connection and ``set_up`` makes it fit for use."""
        self._path = str(path)
        self._directory = str(path.parent)
        self._open_one = open_one
        self._set_up = set_up
        self._inode = inode_of(self._path)
        # The logs that the anchor has open, by name; none while it has no log.
        self._logs: dict[str, tuple[int, int]] = {}
        self._anchor: Any = None
        # The directory when all was in order.
        self._settled: tuple[int, int] | None = None
        self._lost = ""

    def start(self) -> None:
        """Open the anchor, before any other connection.  Raises what the driver raises."""
        self._anchor = self.connect()
        self.note_logs()

    def note_logs(self) -> None:
        """Note which logs belong to the file, as soon as it has any."""
        if self._anchor is not None and not self._logs:
            self._anchor.execute(_OPEN_LOG).fetchall()
            [mode] = self._anchor.execute("PRAGMA journal_mode").fetchone()
            if mode == "wal":
                # One that cannot be seen was removed from under another store of this process.
                names = (f"{self._path}-wal", f"{self._path}-shm")
                self._logs = {name: inode_of(name) for name in names}
        self.look()

    def connect(self) -> Any:
        """Open a connection, to this file and with the logs that it has."""
        raw = None
        try:
            raw = self._open_one()
            self.look()  # not a byte was read yet: a log that is not its own is left alone
            self._set_up(raw)
            raw.execute(_OPEN_LOG).fetchall()
            self.look()  # or the connection has made itself a log
        except BaseException as error:
            if raw is not None:
                raw.close()
            if isinstance(error, Exception):
                self.look()  # then that is why
            raise
        return raw

    def check(self) -> None:
        """Raise :class:`~taskstore.StoreReplacedError` if the file or a log was removed, moved
        or replaced since it was opened."""
        try:
            found = os.stat(self._directory)  # noqa: PTH116 - half the time
        except OSError:
            self._look(None)
            return
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp != self._settled:
            self._look(stamp)

    def look(self) -> None:
        """The same, whatever the directory tells."""
        self._look(_stamp_of(self._directory))

    def _look(self, stamp: tuple[int, int] | None) -> None:
        """Look at the files; ``stamp`` is of the directory before that, so that what is changed
        after the look changes it again."""
        files = () if self._lost else ((self._path, self._inode), *self._logs.items())
        for name, inode in files:
            try:
                found = os.stat(name)  # noqa: PTH116 - half the time
            except OSError:
                there = _NO_FILE
            else:
                there = (found.st_ino, found.st_dev)
            if there != inode or inode == _NO_FILE:
                self._lost = "file" if name == self._path else "log"
                break
        if self._lost:
            self._settled = None
            self._refuse()
        aged = stamp is not None and time.time_ns() - stamp[0] > _TICK_NS
        self._settled = stamp if aged else None

    def close(self) -> None:
        """Close the anchor."""
        anchor, self._anchor = self._anchor, None
        if anchor is not None:
            anchor.close()

    def _refuse(self) -> NoReturn:
        refused = "nothing is written to it or read from it any more"
        if self._lost == "log":
            raise StoreReplacedError(
                f"the -wal or -shm beside {self._path} was removed while it was open: {refused}",
                hint="start nothing new on it, and let every process that has it open close it, "
                "which saves what was committed; then open it again",
            )
        refused = f"{self._path} was moved, removed or replaced while it was open: {refused}"
        left = [name for name, log in self._logs.items() if inode_of(name) == log != _NO_FILE]
        if left and inode_of(self._path) != _NO_FILE:
            # A log that is replayed over another database than its own destroys it.
            raise StoreReplacedError(
                f"{refused}; {' and '.join(left)} still belong to the file that was there before",
                hint="stop every process that has it open, remove "
                f"{self._path}-wal and {self._path}-shm, and open it again",
            )
        raise StoreReplacedError(refused, hint="open it again, or put the file back first")


class ImmutableGuard:
    """Notices when a file that was opened as immutable changed after all.

    SQLite then neither locks nor looks for a ``-wal``: what it reads is right
    only as long as nobody writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._state()

    def _state(self) -> tuple[object, ...]:
        found = self._path.stat()
        log = inode_of(f"{self._path}-wal")
        return (found.st_ino, found.st_size, found.st_mtime_ns, log)

    def check(self) -> None:
        """Raise :class:`~taskstore.StoreUnavailableError` when a writer has appeared."""
        try:
            unchanged = self._state() == self._seen
        except OSError:
            unchanged = False
        if not unchanged:
            raise StoreUnavailableError(
                f"{self._path} was changed by a writer while it was read without locks",
                hint=f"open it again, or make {self._path.parent} writable",
            )

    look = check
