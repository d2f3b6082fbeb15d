"""What only SQLite needs: which library, and how its files are made and opened.

Everything else about dialects is in :mod:`taskstore.stores.sql.dialects`.
"""

from __future__ import annotations

import importlib
import os
import sqlite3
import stat
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

from taskstore.errors import StoreUnavailableError

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


_opening = threading.Lock()
_open_files: Counter[tuple[str, str]] = Counter()
"""How many stores of this process hold which file through which SQLite library."""


def hold(path: str, library: str) -> str | None:
    """Note that a store opens a file; a warning when another library has it open already.

    File locks belong to the process: when one library closes a file, it
    drops the locks by which the other protects it.
    """
    with _opening:
        held = sorted(name for place, name in _open_files if place == path and name != library)
        _open_files[path, library] += 1
    if not held:
        return None
    return (
        f"{path} is open in this process through two SQLite libraries, {library} and "
        f"{', '.join(held)}: closing it in one drops the file locks of the other, and "
        "committed data can be lost; use one engine, or one module=, for both"
    )


def release(path: str, library: str) -> None:
    """Note that a store has closed a file."""
    with _opening:
        _open_files[path, library] -= 1
        if _open_files[path, library] <= 0:
            del _open_files[path, library]


def library_of(module: Any) -> str:
    """The name by which :func:`hold` tells libraries apart."""
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
