"""The choice of the SQLite library, and warnings about unsafe libraries."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sqlite3
import sys
import threading
from collections import Counter
from types import ModuleType
from typing import Any

WAL_RESET_WARNING = (
    "SQLite {version} (module {module}) has the WAL-reset bug, which can corrupt a database when "
    "several connections write and checkpoint; {hint}"
)

_WHEELS = {("linux", "x86_64"), ("darwin", "arm64")}
"""The platforms for which pysqlite3 has wheels."""

_MODULE_HINT = "pass module=pysqlite3.dbapi2 to create_engine"


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Return whether a version of SQLite has the bug that can corrupt a database in WAL mode.

    The versions 3.7.0 to 3.51.2 have the bug, except 3.44.6 and later 3.44 versions, and 3.50.7 and
    later 3.50 versions.
    """
    if (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45):
        return False
    return (3, 7, 0) <= version < (3, 51, 3)


def sqlite_module() -> ModuleType:
    """Return the DB-API module of pysqlite3 if it is installed, otherwise Python's ``sqlite3``."""
    try:
        return importlib.import_module("pysqlite3.dbapi2")
    except ImportError:
        return sqlite3.dbapi2


def library_notice(module: Any, *, owned: bool) -> str | None:
    """Return a warning if the SQLite library of ``module`` has the WAL-reset bug; else ``None``.
    ``owned`` says whether taskstore chose the module."""
    if not has_wal_reset_bug(module.sqlite_version_info):
        return None
    return WAL_RESET_WARNING.format(
        version=module.sqlite_version,
        module=library_of(module),
        hint=library_hint(module, owned=owned),
    )


def library_hint(module: Any, *, owned: bool) -> str:
    """Return a hint: how to replace the SQLite library of ``module`` on this platform."""
    try:
        installed = importlib.import_module("pysqlite3.dbapi2")
    except ImportError:
        installed = None
    passes_module = "" if owned or library_of(module) == "pysqlite3" else f", and {_MODULE_HINT}"
    if installed is not None and not has_wal_reset_bug(installed.sqlite_version_info):
        return f"pysqlite3 with SQLite {installed.sqlite_version} is installed: {_MODULE_HINT}"
    machine = platform.machine()
    if (sys.platform, machine) not in _WHEELS:
        return (
            "use a Python with SQLite 3.51.3 or later, or let only one process write "
            f"(pysqlite3 has no wheels for {sys.platform} on {machine})"
        )
    if installed is None and importlib.util.find_spec("pysqlite3") is not None:
        return (
            "pysqlite3 is installed but cannot be imported: run "
            f"'pip install --force-reinstall pysqlite3'{passes_module}"
        )
    return f"run 'pip install --upgrade pysqlite3'{passes_module}"


# A garbage collection can close a store while this thread owns the lock.
_open_files_lock = threading.RLock()
_open_files: Counter[tuple[str, str]] = Counter()
"""The number of open stores in this process, by path of the file and name of the SQLite library."""


def register_open(path: str, library: str) -> str | None:
    """Add a store that opens a file to the count of open stores.  Return a warning if another
    SQLite library in this process has the file open, else ``None``.

    POSIX file locks belong to the process: when one library closes a file, the
    process also loses the locks of the other library.
    """
    with _open_files_lock:
        others = sorted(
            name for other, name in tuple(_open_files) if other == path and name != library
        )
        _open_files[path, library] += 1
    if not others:
        return None
    # An engine without module= uses the library of Python.
    ours = library_of(sqlite_module())
    hint = f"with module={ours}.dbapi2" if ours == "pysqlite3" else "without module="
    return (
        f"{path} is open in this process through two SQLite libraries, {library} and "
        f"{', '.join(others)}: if one library closes the file, the other loses its file "
        f"locks, and committed data can be lost; create every engine for this file {hint}"
    )


def register_close(path: str, library: str) -> None:
    """Remove a store that has closed a file from the count of open stores."""
    with _open_files_lock:
        _open_files[path, library] -= 1
        if _open_files[path, library] <= 0:
            del _open_files[path, library]


def library_of(module: Any) -> str:
    """Return the name of a module's SQLite library, as :func:`register_open` expects it."""
    return str(module.__name__).split(".", maxsplit=1)[0].removeprefix("_")
