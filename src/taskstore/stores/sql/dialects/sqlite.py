"""SQLite, through ``pysqlite3`` or the standard library's module."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

from taskstore.errors import (
    CorruptStoreError,
    StoreBusyError,
    StoreUnavailableError,
    ValidationError,
)
from taskstore.stores.common.locks import FairLock, lock_owners
from taskstore.stores.sql import sqlite_library
from taskstore.stores.sql.dialects.base import LOCK_WAIT_S, Database, Session
from taskstore.stores.sql.errors import Fault, Translator, sqlite_fault
from taskstore.stores.sql.sqlite_guard import FileGuard, ImmutableGuard
from taskstore.stores.sql.sqlite_library import library_notice, library_of, sqlite_module

_WRITE_LOCK = 120
"""The byte of the ``-shm`` file that whoever writes holds: part of SQLite's file format."""

_SYNCHRONOUS = {"full": "FULL", "process": "NORMAL"}
"""SQLite's word for each durability."""

_CROWDED_S = 1.0
"""How long after a lock was not free at once writers queue for it, in seconds."""


class SQLiteDatabase(Database):
    """An SQLite file."""

    names = ("sqlite",)
    driver = "pysqlite"
    compiler = SQLiteDialect_pysqlite(paramstyle="qmark")
    begin_schema = ("BEGIN IMMEDIATE",)
    waits_for_locks = False
    erase_s: ClassVar[float] = 10.0
    """How long erasing waits for readers to let go of the log, in seconds."""
    fault_of = staticmethod(sqlite_fault)

    @classmethod
    def open(cls, url: str, *, durability: str, read_only: bool) -> SQLiteDatabase:
        path, module = path_of(url), sqlite_module()
        immutable = None
        if read_only:
            with Translator(str(path), module.Error, sqlite_fault):
                immutable = ImmutableGuard(path) if needs_immutable(module, path) else None
        else:
            create_privately(path)
        open_one = opener(
            module,
            path,
            busy_timeout_s=1.0 if read_only else 5.0,
            read_only=read_only,
            immutable=immutable is not None,
        )
        pragmas = _READ_PRAGMAS if read_only else _write_pragmas(durability)

        def set_up(raw: Any) -> Any:
            raw.text_factory = _LENIENT
            for pragma in pragmas:
                raw.execute(pragma)
            return raw

        files = FileGuard(path, open_one, set_up) if immutable is None else None
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(path)),
            module=module,
            creator=files.connect if files is not None else lambda: set_up(open_one()),
            poolclass=sa.QueuePool,
            isolation_level="AUTOCOMMIT",
        )
        return cls(
            engine,
            owned=True,
            durability=durability,
            read_only=read_only,
            files=files,
            immutable=immutable,
        )

    def __init__(
        self,
        engine: sa.Engine,
        *,
        owned: bool,
        durability: str = "full",
        read_only: bool = False,
        files: FileGuard | None = None,
        immutable: ImmutableGuard | None = None,
    ) -> None:
        super().__init__(engine, owned=owned, durability=durability, read_only=read_only)
        # None for a host's engine, whose connections may be of another time than we are.
        self._files = files
        self._immutable = immutable
        self.guard = immutable or files
        # The system's may lie in memory; where the ledger lies, there is room for it.
        self.scratch = Path(self.location).parent
        self._fair_lock: FairLock | None = None  # made when the lock is first contended
        self._crowded_until = 0.0
        self._holds = False
        module: Any = engine.dialect.loaded_dbapi
        self._library = library_of(module)
        if module.sqlite_version_info < (3, 35):
            raise StoreUnavailableError(
                f"SQLite {module.sqlite_version} is too old, 3.35 is needed",
                hint="install pysqlite3",
            )
        self.notice(library_notice(module))

    def _location(self) -> str:
        if self.owned:
            return str(self.engine.url.database)
        translator = Translator(
            str(self.engine.url.database), sa.exc.SQLAlchemyError, self.fault_of
        )
        with translator, self.engine.connect() as connection:
            files = connection.exec_driver_sql("PRAGMA database_list").all()
        path = next((row[2] for row in files if row[1] == "main"), "")
        if not path:
            raise ValidationError("engine", "is of an in-memory database: use memory: for that")
        return str(Path(path).resolve())

    def prepare(self, session: Session) -> None:
        [mode] = session.row("PRAGMA journal_mode")
        if self.owned and not self.read_only and mode != "wal":
            # The journal mode is a property of the file, and changing it takes the
            # file for itself, which the busy timeout does not wait for: it is tried again.
            session.rows("PRAGMA journal_mode = WAL")
            [mode] = session.row("PRAGMA journal_mode")
        if mode != "wal" and self._immutable is None:
            self.notice(
                f"{self.location} has the journal mode {mode}, not wal: readers and writers "
                "block each other" + ("" if self.owned else "; the engine's owner can change it")
            )
        if self._files is not None:
            self._files.note_logs()  # the logs of a file that has only now become one with logs

    def dedicate(self, session: Session) -> None:
        # SQLite's own waiting sleeps for up to a tenth of a second between two
        # looks, and finds the lock taken again each time.
        session.rows("PRAGMA busy_timeout = 0")

    def begin_write(self, session: Session) -> None:
        if not self.owned:
            self._set_up_host(session)
        if time.monotonic() < self._crowded_until or not self._begin(session):
            self._crowded_until = time.monotonic() + _CROWDED_S
            if self._fair_lock is None:
                self._fair_lock = FairLock(Path(f"{self.location}-turn"))
            if not self._fair_lock.wait(partial(self._begin, session), LOCK_WAIT_S):
                session.execute("BEGIN IMMEDIATE")

    def _begin(self, session: Session) -> bool:
        """Begin if nobody writes; whether that was so."""
        try:
            session.cursor.execute("BEGIN IMMEDIATE")
        except self.translator.errors as error:
            if self.fault_of(error) is not Fault.BUSY:
                raise
            return False
        return True

    def _set_up_host(self, session: Session) -> None:
        [synchronous] = session.row("PRAGMA synchronous")
        [secure] = session.row("PRAGMA secure_delete")
        session.restore = (
            f"PRAGMA synchronous = {synchronous}",
            f"PRAGMA secure_delete = {secure}",
        )
        session.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[self.durability]}")
        session.row("PRAGMA secure_delete = ON")

    def lock_owners(self, session: Session) -> Sequence[str]:
        del session
        # A writer holds a byte of the shared memory; without a write-ahead log, of the file.
        writing = lock_owners(f"{self.location}-shm", byte=_WRITE_LOCK)
        return writing or lock_owners(self.location)

    def rollback(self, session: Session) -> None:
        if session.raw.in_transaction:
            session.execute("ROLLBACK")

    def check_sound(self, connection: sa.Connection) -> None:
        found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if found != "ok":
            raise CorruptStoreError(self.location, f"the database is malformed: {found}")

    def erase(self, session: Session) -> None:
        # Deleted bytes are overwritten in the file (secure_delete), but the
        # log keeps earlier images of pages until it is emptied.
        [patience] = session.row("PRAGMA busy_timeout")
        session.restore = (f"PRAGMA busy_timeout = {patience}",)
        session.rows("PRAGMA busy_timeout = 100")
        started = time.monotonic()
        while time.monotonic() - started < self.erase_s:
            busy, *_rest = session.row("PRAGMA wal_checkpoint(TRUNCATE)")
            if not busy:
                return
        raise StoreBusyError(
            f"{self.location}: deleted records are gone from the database, but readers keep its "
            "write-ahead log, which still holds them",
            hint="compact with erase_deleted again when they are done",
        )

    def hold(self) -> None:
        self._holds = True
        self.notice(sqlite_library.hold(self.location, self._library))
        if self._files is not None:
            with self.translator:
                self._files.start()

    def close(self) -> None:
        super().close()
        if self._files is not None:
            self._files.close()
        if self._fair_lock is not None:
            self._fair_lock.close()
        if self._holds:
            self._holds = False
            sqlite_library.release(self.location, self._library)


def path_of(url: str) -> Path:
    """The file that an SQLite URL names: the path as it stands, as SQLAlchemy reads it."""
    rest = url.partition(":")[2]
    if rest in ("", "//", "///") or ":memory:" in rest:
        raise ValidationError("url", "an in-memory SQLite database is not durable: use memory:")
    if not rest.startswith("///") or "?" in rest:
        raise ValidationError("url", f"{url!r} is not sqlite:/// and a path, without options")
    path = rest[3:]
    if "\0" in path:
        raise ValidationError("url", "holds a NUL character")
    # Links are followed, so that the file itself is made private and locked by one name.
    return Path(os.path.realpath(path))


_LENIENT = partial(str, encoding="utf-8", errors="surrogateescape")
"""Damaged text is for the checksums to find, not a reason to stop reading."""

_READ_PRAGMAS = ("PRAGMA query_only = ON",)


def _write_pragmas(durability: str) -> tuple[str, ...]:
    pragmas = [
        f"PRAGMA synchronous = {_SYNCHRONOUS[durability]}",
        # Four times the default: checkpoints are what NORMAL mostly waits for.
        "PRAGMA wal_autocheckpoint = 4000",
        f"PRAGMA journal_size_limit = {64 * 1024 * 1024}",
        # Deleted text is overwritten where it stood.
        "PRAGMA secure_delete = ON",
    ]
    if sys.platform == "darwin" and durability == "full":
        pragmas += ["PRAGMA fullfsync = ON", "PRAGMA checkpoint_fullfsync = ON"]
    return tuple(pragmas)


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
