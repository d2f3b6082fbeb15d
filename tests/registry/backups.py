"""Backups of a ledger, and their restore under an open ledger, for every backend."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from taskstore.stores.memory import MemoryStorage
from taskstore.stores.sql.tables import metadata

_COPY = """
import sys
try:
    import pysqlite3 as sqlite3
except ImportError:
    import sqlite3
source, target = map(sqlite3.connect, sys.argv[1:])
source.backup(target)
source.close()
target.close()
"""


class MemoryBackup:
    def __init__(self, storage: MemoryStorage) -> None:
        self._storage = storage
        # All state except locks and conditions.
        self._what_is_stored = set(vars(MemoryStorage())) - {"changed", "lock"}
        self._kept = self._copy_of(storage)

    def restore(self) -> None:
        vars(self._storage).update(self._copy_of(SimpleNamespace(**self._kept)))

    def _copy_of(self, storage: Any) -> dict[str, Any]:
        return {name: copy.copy(getattr(storage, name)) for name in self._what_is_stored}


class DirectoryBackup:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept = directory.with_name("backup")
        shutil.copytree(directory, self._kept)

    def restore(self) -> None:
        for path in self._directory.iterdir():
            path.unlink()
        for path in self._kept.iterdir():
            shutil.copy2(path, self._directory)


class SQLiteBackup:
    """Copies the file in another process: in this one, only the store may open it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = path.with_name("backup.db")
        self._copy(path, self._kept)

    def restore(self) -> None:
        self._copy(self._kept, self._path)

    def _copy(self, source: Path, target: Path) -> None:
        subprocess.run([sys.executable, "-c", _COPY, str(source), str(target)], check=True)


class ServerBackup:
    """Copies all rows, and restores them in one transaction."""

    def __init__(self, url: str) -> None:
        self._engine = sa.create_engine(url)
        self._kept: dict[str, list[Any]] = {}
        with self._engine.connect() as connection:
            for table in metadata.sorted_tables:
                self._kept[table.name] = list(connection.execute(sa.select(table)).mappings())

    def restore(self) -> None:
        with self._engine.begin() as connection:
            for table in metadata.sorted_tables:
                connection.execute(sa.delete(table))
                if rows := self._kept[table.name]:
                    connection.execute(sa.insert(table), [dict(row) for row in rows])
        self._engine.dispose()
