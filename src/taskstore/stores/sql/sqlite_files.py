"""What only SQLite needs: which library, and how its files are made and opened.

Everything else about dialects is in :mod:`taskstore.stores.sql.dialects`.
"""

from __future__ import annotations

import importlib
import logging
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

from taskstore.errors import StoreUnavailableError
from taskstore.stores.sql.errors import ReplacedError

log = logging.getLogger("taskstore")

WAL_RESET = (
    "SQLite {version} (module {module}) has the WAL-reset bug, which can corrupt a database that "
    "several connections write and checkpoint; install pysqlite3, or Python with SQLite 3.51.3"
)


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether this version of SQLite can corrupt a WAL database (3.7.0 to 3.51.2)."""
    if (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45):
        return False
    return (3, 7, 0) <= version < (3, 51, 3)


def sqlite_module() -> ModuleType:
    """The DB-API module with the best SQLite that is installed: pysqlite3, or the
    standard library's."""
    try:
        return importlib.import_module("pysqlite3.dbapi2")
    except ImportError:
        return sqlite3.dbapi2


def library_notice(module: Any) -> str | None:
    """A warning when the SQLite of this module has the WAL-reset bug."""
    if not has_wal_reset_bug(module.sqlite_version_info):
        return None
    return WAL_RESET.format(version=module.sqlite_version, module=module.__name__.split(".")[0])


class _OpenFiles:
    """Which SQLite library holds which file in this process.

    File locks belong to the process: when one library closes a file, it
    drops the locks by which the other protects it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, list[str]] = {}

    def hold(self, path: str, library: str) -> str | None:
        """Note that a library holds a file; a warning when another one does already."""
        with self._lock:
            held = self._held.setdefault(path, [])
            others = sorted({name for name in held if name != library})
            held.append(library)
        if not others:
            return None
        return (
            f"{path} is open in this process through two SQLite libraries, {library} and "
            f"{', '.join(others)}: closing it in one drops the file locks of the other, and "
            "committed data can be lost; use one engine, or one module=, for both"
        )

    def release(self, path: str, library: str) -> None:
        """Forget one holder."""
        with self._lock:
            held = self._held.get(path, [])
            if library in held:
                held.remove(library)
            if not held:
                self._held.pop(path, None)


open_files = _OpenFiles()
"""The files that this process's stores hold open."""


def library_of(module: Any) -> str:
    """The name by which :data:`open_files` tells libraries apart."""
    return str(module.__name__).split(".", maxsplit=1)[0].removeprefix("_")


def create_privately(path: Path) -> None:
    """Make the file if it is not there, readable by its owner only.

    New directories are 0700, the file 0600; SQLite gives its ``-wal`` and
    ``-shm`` the mode of the file.  What exists is left as it is.
    """
    try:
        missing = [parent for parent in path.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if not path.is_file():
            kind = "is a directory" if path.is_dir() else "is no regular file"
            raise StoreUnavailableError(f"{path} {kind}, not a database") from None
        if not os.access(path, os.R_OK | os.W_OK):
            raise StoreUnavailableError(
                f"{path} cannot be written: permission denied", hint="open it read-only"
            ) from None
    except OSError as error:
        raise StoreUnavailableError(
            f"{path} cannot be created: {error.strerror or error}",
            hint=f"is {path.parent} a directory that you may write?",
        ) from error


_NO_FILE = (0, 0)


def inode_of(path: str) -> tuple[int, int]:
    """Which file lies at a path; (0, 0) where none can be seen."""
    try:
        found = os.stat(path)  # noqa: PTH116 - half the time
    except OSError:
        return _NO_FILE
    return (found.st_ino, found.st_dev)


_OPEN_LOG = "SELECT count(*) FROM sqlite_master"
"""Reads as little as there is: with the first read, a connection opens the log."""

REPLACING_S = 1.0
"""How long a file whose logs are gone is taken to be one that is just being replaced."""


class OpenFile:
    """The file that an engine's connections are to, and the logs beside it.

    It is only ever looked at from outside (``os.stat``): whoever opens and
    closes it beside SQLite drops SQLite's locks on it.

    One connection is kept and never lent.  While it is open, SQLite leaves the
    ``-wal`` and ``-shm`` that it opened where they are; when they are gone all
    the same, somebody has removed them, and what is committed to them is lost
    with the last who has them open.
    """

    def __init__(
        self,
        path: Path,
        open_one: Callable[[], Any],
        set_up: Callable[[Any], None],
        errors: type[Exception],
    ) -> None:
        """``open_one`` opens a connection and ``set_up`` makes it fit for use; ``errors`` is
        the root of what the driver raises."""
        self._path = str(path)
        self._open_one = open_one
        self._set_up = set_up
        self._errors = errors
        self._inode = inode_of(self._path)
        self._lock = threading.Lock()
        self._kept: Any = None
        # The logs that the kept connection has open, by name; none while it has no log.
        self._logs: dict[str, tuple[int, int]] = {}
        # Logs of a successor that could not be used, still to beware of.
        self._left: set[tuple[int, int]] = set()
        self._logs_gone_at: float | None = None

    def connect(self) -> Any:
        """Open a connection; raises :class:`ReplacedError` when that is not one to this file,
        or has a log that is nobody else's."""
        self.note_logs()
        return self._checked()

    def note_logs(self) -> None:
        """Note which logs belong to the file, as soon as it has any."""
        with self._lock:
            if self._kept is None:
                self._logs = {}  # those of one before went with it
                self._kept = self._checked()
            if self._logs:
                return
            self._kept.execute(_OPEN_LOG).fetchall()
            [mode] = self._kept.execute("PRAGMA journal_mode").fetchone()
            if mode == "wal":
                logs = {name: inode_of(name) for name in self._log_names()}
                if _NO_FILE in logs.values() and inode_of(self._path) == self._inode:
                    raise self._logs_removed()  # from under another store of this process
                self._logs = logs
        self.check_there()

    def is_there(self) -> bool:
        """Whether it still lies where it was opened, and its logs beside it."""
        return inode_of(self._path) == self._inode and self._logs_are_there()

    def check_there(self) -> None:
        """Raise :class:`ReplacedError` if it does not."""
        if not self.is_there():
            raise ReplacedError(
                f"{self._path} was moved, removed or replaced while it was open", hint="try again"
            )

    def inherit(self, other: OpenFile) -> None:
        """Take the logs that another file has left at the path for ones to beware of."""
        self._left.update(inode_of(name) for name in other.logs_left())

    def logs_left(self) -> list[str]:
        """The names under which logs of this very file still lie at the path."""
        lying = {name: inode_of(name) for name in self._log_names()}
        self._left.intersection_update(lying.values())
        return [name for name, log in lying.items() if log in {*self._logs.values(), *self._left}]

    def await_successor(self) -> None:
        """Wait a moment for the file that takes this one's place, if its logs went first.

        Raises :class:`~taskstore.StoreUnavailableError` unless that file can
        be opened without harm: a log that is replayed over another database
        than its own destroys it; one that is empty may yet be written to by
        who still has it open.
        """
        if self._logs_gone_at is None:
            self._logs_gone_at = time.monotonic()
        while inode_of(self._path) == self._inode and not self._logs_are_there():
            if time.monotonic() - self._logs_gone_at > REPLACING_S:
                raise self._logs_removed()
            time.sleep(0.001)
        self._logs_gone_at = None
        if self.is_there():
            return  # they have come back
        replaced = (
            f"{self._path} was moved, removed or replaced while it was open: "
            "nothing is written to it or read from it any more"
        )
        if inode_of(self._path) == _NO_FILE:
            raise StoreUnavailableError(replaced, hint="put it back, or open it again")
        if left := self.logs_left():
            raise StoreUnavailableError(
                f"{replaced}; {' and '.join(left)} still belong to the file that was there before",
                hint="stop every process that has it open, remove "
                f"{self._path}-wal and {self._path}-shm, and open it again",
            )

    def close(self) -> None:
        """Close the connection that was kept."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()

    def _checked(self) -> Any:
        raw = self._open_one()
        try:
            # Not a byte was read yet: a log that is not its own was left alone.
            self.check_there()
            self._set_up(raw)
            raw.execute(_OPEN_LOG).fetchall()
            self.check_there()  # or it has made itself a log
        except self._errors:
            raw.close()
            self.check_there()  # then that is why
            raise
        except BaseException:
            raw.close()
            raise
        return raw

    def _logs_removed(self) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"the -wal or -shm beside {self._path} was removed while it was open: nothing is "
            "written to it or read from it any more",
            hint="start nothing new on it, and let every process that has it open close it, "
            "which saves what was committed; then open it again",
        )

    def _log_names(self) -> tuple[str, ...]:
        return (f"{self._path}-wal", f"{self._path}-shm")

    def _logs_are_there(self) -> bool:
        logs = self._logs.items()
        return all(inode_of(name) == inode for name, inode in logs)


def opener(
    module: Any, path: Path, *, busy_timeout_s: float, read_only: bool, immutable: bool
) -> Callable[[], Any]:
    """A function that opens one connection to a file, in driver-level autocommit."""
    # The path is quoted for a URI: it may hold %, ? and #.  No connection makes the file.
    mode = "ro" if read_only else "rw"
    name = f"file:{quote(os.fsencode(path))}?mode={mode}" + ("&immutable=1" if immutable else "")

    def connect() -> Any:
        return module.connect(
            name,
            timeout=busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
            uri=True,
        )

    return connect


class ImmutableWatch:
    """Notices when a file that was opened as immutable changed after all.

    SQLite then neither locks nor looks for a ``-wal``: what it reads is right
    only as long as nobody writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._state()

    def _state(self) -> tuple[object, ...]:
        found = self._path.stat()
        return (found.st_ino, found.st_size, found.st_mtime_ns, wal_exists(self._path))

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


def wal_exists(path: Path) -> bool:
    """Whether a write-ahead log lies beside the database."""
    return Path(f"{path}-wal").exists()


def needs_immutable(module: Any, path: Path) -> bool:
    """Find out whether a file can only be read as immutable.

    Raises :class:`~taskstore.StoreUnavailableError` where it cannot be read
    at all: no such file, no right to, or a ``-wal`` without the ``-shm`` that
    this user may not create.
    """
    try:
        found = path.stat()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise StoreUnavailableError(f"{path} cannot be read: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        raise StoreUnavailableError(f"{path} is not a file")
    if not os.access(path, os.R_OK):
        raise StoreUnavailableError(f"{path} cannot be read: permission denied")
    connection = None
    try:
        connection = opener(module, path, busy_timeout_s=1.0, read_only=True, immutable=False)()
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except module.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (8, 14):  # READONLY, CANTOPEN
            raise
        if not wal_exists(path):
            return True
        raise StoreUnavailableError(
            f"{path} has a write-ahead log, and {path.parent} cannot be written, "
            "which SQLite needs to read it",
            hint="read it as its owner, or let its writer close it",
        ) from error
    finally:
        if connection is not None:
            connection.close()
    return False
