"""Which SQLite library is used, and whether two of them have one file open."""

from __future__ import annotations

import importlib
import sqlite3
import threading
from collections import Counter
from types import ModuleType
from typing import Any

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
