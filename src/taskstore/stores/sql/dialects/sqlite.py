"""The SQLite dialect, through ``pysqlite3`` or the standard library's module."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
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
from taskstore.store.disk import SYSTEM, alias_reason, permission_hint
from taskstore.store.opening import redacted
from taskstore.stores.common.integrity import MAX_PROBLEMS
from taskstore.stores.common.locks import LockQueue, describe_owners, lock_owners
from taskstore.stores.sql import sqlite_library
from taskstore.stores.sql.dialects.base import (
    WRITE_LOCK_TIMEOUT_S,
    Database,
    DriverSession,
    Maintenance,
    VacuumReport,
    log,
)
from taskstore.stores.sql.errors import ErrorKind, Translator, sqlite_error_kind
from taskstore.stores.sql.sqlite_guard import (
    WAS_CUT,
    FileGuard,
    ImmutableGuard,
    check_logs,
    is_empty,
    lacks_pages,
)
from taskstore.stores.sql.sqlite_library import (
    library_hint,
    library_notice,
    library_of,
    sqlite_module,
)
from taskstore.stores.sql.tables import ONLY_ON, metadata

_WRITE_LOCK_BYTE = 120
"""The offset of the byte that a writer locks in the ``-shm`` file (from SQLite's format)."""

_CORRUPT = 11
"""SQLite's primary result code for damage: for example, the file has fewer pages than its header
says."""

_NOT_A_DATABASE = 26
"""SQLite's primary result code for a file that is not a database."""

_SIZE_PRAGMAS = ("page_count", "page_size")
"""The product of the values of these pragmas is the size of a complete file, in bytes."""

_SYNCHRONOUS = {"full": "FULL", "process": "NORMAL"}
"""Maps each value of the option ``durability`` to a value of ``PRAGMA synchronous``."""

_INCREMENTAL = 2
"""The value of ``PRAGMA auto_vacuum`` for a file from which free pages can be removed."""

_PAGES_PER_STEP = 256
"""The maximum number of free pages that one transaction removes from the file."""

_SPACE_FACTOR = 1.05
"""The assumed size of a file that can shrink, or of a log, divided by the size of its pages."""

_BUSY_TIMEOUT_S = 5.0
"""How long SQLite waits for a lock before the store retries, in seconds."""

_CONTENTION_S = 1.0
"""How long writers use the lock queue after the most recent contention, in seconds."""


class SQLiteMaintenance(Maintenance):
    """The maintenance of an SQLite file."""

    erase_timeout_s: ClassVar[float] = 10.0
    """How long :meth:`scrub_deleted` waits until readers release the log, in seconds."""

    def freelist_count(self, session: DriverSession) -> int:
        [mode] = session.row("PRAGMA auto_vacuum")
        return session.row("PRAGMA freelist_count")[0] if mode == _INCREMENTAL else 0

    def release_pages(self, session: DriverSession) -> None:
        for _ in range(min(_PAGES_PER_STEP, self.freelist_count(session))):
            # With SQLite before 3.41, the driver stops after one page, whatever the argument.
            session.rows("PRAGMA incremental_vacuum(1)")

    def shorten_files(self, session: DriverSession) -> None:
        # SQLite shortens the file at a checkpoint.  A passive checkpoint waits for no lock.
        session.rows("PRAGMA wal_checkpoint(PASSIVE)")

    def engine_problems(self, session: DriverSession) -> list[str]:
        # The check compares every index with its table, but by the declarations in the schema.
        problems = [*_schema_problems(session)]
        rows = session.rows(f"PRAGMA integrity_check({MAX_PROBLEMS})")
        if rows != [("ok",)]:
            problems += [
                f"SQLite's integrity check: {' '.join(str(row[0]).split())}" for row in rows
            ]
        return problems

    def scrub_deleted(self, session: DriverSession) -> None:
        # secure_delete overwrites deleted bytes in the file, but the write-ahead log keeps earlier
        # page images until a checkpoint truncates it.
        [timeout_ms] = session.row("PRAGMA busy_timeout")
        session.restore_later(f"PRAGMA busy_timeout = {timeout_ms}")
        session.rows("PRAGMA busy_timeout = 100")
        started = time.monotonic()
        while time.monotonic() - started < self.erase_timeout_s:
            busy, *_rest = session.row("PRAGMA wal_checkpoint(TRUNCATE)")
            if not busy:
                return
        raise StoreBusyError(
            f"{session.database.location}: deleted records were erased from the database, but not "
            "from its write-ahead log, because readers still use the log",
            hint="when the readers have finished, compact with erase_deleted again",
        )


class SQLiteDatabase(Database):
    """A database in an SQLite file."""

    names = ("sqlite",)
    maintenance = SQLiteMaintenance()
    driver = "pysqlite"
    sa_dialect = SQLiteDialect_pysqlite(paramstyle="qmark")
    begin_schema = ("BEGIN IMMEDIATE",)
    waits_for_locks = False
    error_kind = staticmethod(sqlite_error_kind)

    @classmethod
    def open(cls, url: str, *, durability: str, read_only: bool) -> SQLiteDatabase:
        (path, links_allowed), module = path_of(url), sqlite_module()
        check_logs(path, partial(file_problem, module, path))
        immutable, notice = None, None
        if read_only:
            with Translator(str(path), module.Error, sqlite_error_kind):
                immutable = ImmutableGuard(path) if needs_immutable(module, path) else None
        else:
            if not links_allowed:
                refuse_aliased_file(str(path))
            notice = create_privately(path)
        open_one = connection_factory(
            module,
            path,
            busy_timeout_s=1.0 if read_only else _BUSY_TIMEOUT_S,
            read_only=read_only,
            immutable=immutable is not None,
        )
        pragmas = _READ_PRAGMAS if read_only else _write_pragmas(durability)

        def set_up(raw: Any) -> Any:
            raw.text_factory = _DECODE_TEXT
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
        database = cls(
            engine,
            owned=True,
            durability=durability,
            read_only=read_only,
            files=files,
            immutable=immutable,
        )
        database.links_allowed = links_allowed
        database.add_notice(notice)
        return database

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
        # There is no guard for a host's engine: its connections can be older than this object.
        self._file_guard = files
        self._immutable_guard = immutable
        self.guard = immutable or files
        # The system's directory for temporary files can be in memory and then too small.
        self.temp_dir = Path(self.location).parent
        self._lock_queue: LockQueue | None = None  # opened at the first contention
        self._contended_until = 0.0
        self._registered = False
        self._alias_logged = False
        module: Any = engine.dialect.loaded_dbapi
        self._library = library_of(module)
        if module.sqlite_version_info < (3, 35):
            raise StoreUnavailableError(
                f"SQLite {module.sqlite_version} is too old: taskstore needs 3.35 or later",
                hint=library_hint(module, owned=owned),
            )
        self.add_notice(library_notice(module, owned=owned))

    @staticmethod
    def suffix(column: sa.ColumnElement[str], length: int) -> sa.ColumnElement[str]:
        return sa.func.substr(column, -length)

    def _location(self) -> str:
        if self.owned:
            return str(self.engine.url.database)
        name = str(self.engine.url.database)
        translator = Translator(name, sa.exc.SQLAlchemyError, self.error_kind)
        if name not in ("None", "") and not name.startswith((":memory:", "file:")):
            self._check_logs(Path(os.path.realpath(name)))  # before the first connection
        with translator, self.engine.connect() as connection:
            files = connection.exec_driver_sql("PRAGMA database_list").all()
        path = next((row[2] for row in files if row[1] == "main"), "")
        if not path:
            raise ValidationError("engine", "has an in-memory database: use the URL 'memory:'")
        self._check_logs(Path(path).resolve())
        return str(Path(path).resolve())

    def _check_logs(self, path: Path) -> None:
        check_logs(path, partial(file_problem, self.engine.dialect.loaded_dbapi, path))

    def lock_schema(self, connection: sa.Connection) -> None:
        if not connection.exec_driver_sql("PRAGMA page_count").scalar():
            # The mode must be set before the first table; otherwise only a vacuum changes it.
            connection.exec_driver_sql("PRAGMA auto_vacuum = INCREMENTAL")
        super().lock_schema(connection)

    def configure(self, session: DriverSession) -> None:
        [mode] = session.row("PRAGMA journal_mode")
        if self.owned and not self.read_only and mode != "wal":
            # A change of the file's journal mode needs exclusive access to the file.  The
            # busy timeout does not apply to the wait for this access, so the caller retries.
            session.rows("PRAGMA journal_mode = WAL")
            [mode] = session.row("PRAGMA journal_mode")
        if mode != "wal" and self._immutable_guard is None:
            self.add_notice(
                f"{self.location} has the journal mode {mode} instead of wal, so readers and "
                f"writers block each other; {self._journal_mode_hint()}"
            )
        if self._file_guard is not None:
            self._file_guard.record_logs()  # the new journal mode can have created -wal and -shm

    def _journal_mode_hint(self) -> str:
        if not self.owned:
            return "run PRAGMA journal_mode = WAL once on a connection of the engine"
        if self.read_only:
            return "open the ledger once for writing, which sets the mode wal"
        return "move the ledger to a local file system"

    def configure_borrowed_connection(self, session: DriverSession) -> None:
        # The store retries, so a long busy timeout of the host would only delay the StoreBusyError.
        [timeout_ms] = session.row("PRAGMA busy_timeout")
        if timeout_ms > _BUSY_TIMEOUT_S * 1000:
            session.restore_later(f"PRAGMA busy_timeout = {timeout_ms}")
            session.row(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_S * 1000:.0f}")

    def configure_writer(self, session: DriverSession) -> None:
        # SQLite's busy handler sleeps up to 0.1 s between attempts, and other writers can take the
        # lock during such a sleep.
        session.rows("PRAGMA busy_timeout = 0")

    def begin_write(self, session: DriverSession) -> None:
        host_timeout_ms = None if self.owned else self._set_up_host(session)
        if time.monotonic() < self._contended_until or not self._begin(session):
            self._contended_until = time.monotonic() + _CONTENTION_S
            if self._lock_queue is None:
                self._lock_queue = LockQueue(Path(f"{self.location}-turn"), Path(self.location))
            if not self._lock_queue.poll_in_turn(
                partial(self._begin, session), WRITE_LOCK_TIMEOUT_S
            ):
                session.execute("BEGIN IMMEDIATE")
        if host_timeout_ms is not None:
            # With another journal mode than wal, COMMIT waits until the readers have finished.
            session.row(f"PRAGMA busy_timeout = {host_timeout_ms}")

    def _begin(self, session: DriverSession) -> bool:
        """Begin a write transaction if the write lock is free; return whether the lock was free."""
        try:
            session.cursor.execute("BEGIN IMMEDIATE")
        except self.translator.errors as error:
            if self.error_kind(error) is not ErrorKind.LOCK_TIMEOUT:
                raise
            return False
        return True

    def _set_up_host(self, session: DriverSession) -> int:
        """Configure a host's connection for a write; return the host's busy timeout in
        milliseconds."""
        [synchronous] = session.row("PRAGMA synchronous")
        [secure] = session.row("PRAGMA secure_delete")
        [timeout_ms] = session.row("PRAGMA busy_timeout")
        session.restore_later(
            f"PRAGMA synchronous = {synchronous}",
            f"PRAGMA secure_delete = {secure}",
            f"PRAGMA busy_timeout = {timeout_ms}",
        )
        session.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[self.durability]}")
        session.row("PRAGMA secure_delete = ON")
        self.configure_writer(session)
        return int(timeout_ms)

    def lock_owners(self, session: DriverSession) -> Sequence[str]:
        del session
        # A writer locks a byte of the -shm file; without a -shm, it locks the database file.
        owners = lock_owners(f"{self.location}-shm", byte=_WRITE_LOCK_BYTE)
        return owners or lock_owners(self.location)

    def rollback(self, session: DriverSession) -> None:
        if session.raw.in_transaction:
            session.execute("ROLLBACK")

    def check_integrity(self, connection: sa.Connection) -> None:
        result = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if result != "ok":
            raise CorruptStoreError(self.location, f"the database is malformed: {result}")

    @classmethod
    def vacuum(cls, url: str) -> VacuumReport:
        (path, links_allowed), module = path_of(url), sqlite_module()
        check_logs(path, partial(file_problem, module, path))
        if not links_allowed:
            refuse_aliased_file(str(path))
        library, before = library_of(module), path.stat().st_size
        other_library = sqlite_library.register_open(str(path), library)
        connect = connection_factory(
            module, path, busy_timeout_s=1.0, read_only=False, immutable=False
        )
        try:
            translator = Translator(str(path), module.Error, sqlite_error_kind)
            if other_library:
                raise _open_elsewhere(path)
            with translator, closing(connect()) as raw:
                locked = _lock_file(raw)
                if locked:
                    needed = _check_space(raw, path)
                    _rebuild(raw, module, Path(f"{path}-vacuum"))
            if not locked:
                raise _open_elsewhere(path)  # this connection is closed, so it owns no lock
        finally:
            sqlite_library.register_close(str(path), library)
        return VacuumReport(needed, before, path.stat().st_size)

    def register_open(self) -> None:
        if not (self.owned or self.read_only or self.links_allowed):
            refuse_aliased_file(self.location)
        self.current_notices()  # logs what a report would say
        self._registered = True
        self.add_notice(sqlite_library.register_open(self.location, self._library))
        if self._file_guard is not None:
            with self.translator:
                self._file_guard.start()

    def current_notices(self) -> tuple[str, ...]:
        reason = None if self.links_allowed else alias_reason(self.location)
        if reason is None:
            return super().current_notices()
        notice = f"{reason}: {_ALIAS_RISK}; {_alias_hint(self.location)}"
        if not self._alias_logged:
            self._alias_logged = True
            log.warning("%s", notice)
        return (*super().current_notices(), notice)

    def close(self) -> None:
        super().close()
        if self._file_guard is not None:
            self._file_guard.close()
        if self._lock_queue is not None:
            self._lock_queue.close()
        if self._registered:
            self._registered = False
            sqlite_library.register_close(self.location, self._library)


def _schema_problems(session: DriverSession) -> Iterator[str]:
    """Yield the differences between the declared columns and indexes and the tables of a ledger."""
    for table in metadata.sorted_tables:
        # The key of the column in the primary key counts from 1.
        keys = {column: number for number, column in enumerate(table.primary_key, 1)}
        found = {row[1]: row[2:6] for row in session.rows(f"PRAGMA table_info({table.name})")}
        for column in table.columns:
            declared = column.type.compile(dialect=SQLiteDatabase.sa_dialect)
            expected = (declared, int(not column.nullable), None, keys.get(column, 0))
            if found.get(column.name) != expected:
                yield f"the declaration of the column {column.name} of {table.name} is damaged"
        for index in table.indexes:
            if "sqlite" in ONLY_ON.get(str(index.name), {"sqlite"}):
                yield from _index_problems(session, index)


def _index_problems(session: DriverSession, index: sa.Index) -> Iterator[str]:
    assert index.table is not None
    listed = session.rows(f"PRAGMA index_list({index.table.name})")
    unique = [row[2] for row in listed if row[1] == index.name]
    if not unique:
        yield f"the index {index.name} is missing"
        return
    # Each row: the rank in the index, the number and the name of the column, whether the order is
    # descending, the collation, whether the column is part of the key.
    rows = session.rows(f"PRAGMA index_xinfo({index.name})")
    columns = [row[2:5] for row in rows if row[5]]
    query = "SELECT sql FROM sqlite_master WHERE type = 'index' AND name = ?"
    stored = " ".join(str(session.row(query, (index.name,))[0]).split())
    condition = index.dialect_options["sqlite"]["where"]
    expected = [(column.name, 0, "BINARY") for column in index.columns]
    if (unique, columns, stored.partition(" WHERE ")[2]) != (
        [int(index.unique)],
        expected,
        "" if condition is None else condition.text,
    ):
        yield f"the declaration of the index {index.name} is damaged"


_ALIAS_RISK = (
    "SQLite keeps the log of a file beside the name by which the file was opened, so a writer that "
    "opens another name loses committed tasks"
)


def _alias_hint(path: str) -> str:
    return (
        "open the ledger by one path in every process: for a container, mount the directory "
        f"{Path(path).parent} instead of the file, and remove other hard links; "
        "if no process opens another name, 'links=allow' permits the names"
    )


def refuse_aliased_file(path: str) -> None:
    """Raise :class:`~taskstore.StoreUnavailableError` if the file can also have another path."""
    reason = alias_reason(path)
    if reason is not None:
        error = StoreUnavailableError(
            f"{reason}, so it was not opened for writing: {_ALIAS_RISK}",
            hint=_alias_hint(path),
        )
        error.retryable = False  # without a repair, the next call fails too
        raise error


def path_of(url: str) -> tuple[Path, bool]:
    """Return the path of the file that an SQLite URL names, and whether the URL has the option
    ``links=allow``.  The path is not percent-decoded."""
    rest, question, options = url.partition(":")[2].partition("?")
    if rest in ("", "//", "///") or ":memory:" in rest:
        raise ValidationError(
            "url", "an in-memory SQLite database is not durable: use 'memory:' instead"
        )
    if not rest.startswith("///"):
        raise ValidationError("url", f"{redacted(url)!r} must be 'sqlite:///PATH'")
    if question and options != "links=allow":
        shown = redacted(f"?{options}")[1:]
        raise ValidationError(
            "url", f"{shown!r} is not an option of an SQLite URL; the only option is links=allow"
        )
    path = rest[3:]
    if "\0" in path:
        raise ValidationError("url", "contains a NUL character")
    # Symbolic links are resolved, so that every store creates and locks the same file.
    return Path(os.path.realpath(path)), bool(question)


_DECODE_TEXT = partial(str, encoding="utf-8", errors="surrogateescape")
"""Decodes damaged text without an error, so that a scan of a table can read the other rows.
Checksums detect the damage."""

_READ_PRAGMAS = ("PRAGMA query_only = ON",)


def _write_pragmas(durability: str) -> tuple[str, ...]:
    pragmas = [
        f"PRAGMA synchronous = {_SYNCHRONOUS[durability]}",
        # Four times the default: with synchronous=NORMAL, writers wait mostly for checkpoints.
        "PRAGMA wal_autocheckpoint = 4000",
        f"PRAGMA journal_size_limit = {64 * 1024 * 1024}",
        "PRAGMA secure_delete = ON",  # overwrites deleted bytes in the file
    ]
    if sys.platform == "darwin" and durability == "full":
        pragmas += ["PRAGMA fullfsync = ON", "PRAGMA checkpoint_fullfsync = ON"]
    return tuple(pragmas)


def create_privately(path: Path) -> str | None:
    """Create the database file if it does not exist; return a notice if the file exists and is
    empty.

    The new file has the same users as its directory.  Missing directories are created as well.
    SQLite creates the ``-wal`` and ``-shm`` with the mode of the database file.  Existing files
    keep their modes.
    """
    try:
        if not path.exists():
            if not path.parent.exists():
                SYSTEM.make_directory(path.parent)
            SYSTEM.close(SYSTEM.create(path))
            return None
    except FileExistsError:  # another process created the file
        pass
    except OSError as error:
        raise StoreUnavailableError(
            f"{path} cannot be created: {error.strerror or error}",
            hint=f"check that {path.parent} is a directory and that you have write permission",
        ) from error
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise StoreUnavailableError(f"{path} is {kind}, so it cannot be a database")
    if not os.access(path, os.R_OK | os.W_OK):
        hint = permission_hint(path)
        if os.access(path, os.R_OK):
            hint = f"open the ledger read-only, or {hint}"
        raise StoreUnavailableError(f"{path} cannot be written: permission denied", hint=hint)
    if is_empty(path.stat()):
        return (
            f"{path} existed and was empty, so it is used as a new ledger; if it contained "
            "tasks before, close the ledger and restore a backup"
        )
    return None


def connection_factory(
    module: Any, path: Path, *, busy_timeout_s: float, read_only: bool, immutable: bool
) -> Callable[[], Any]:
    """Return a function that opens a new connection to a file, in the driver's autocommit mode."""
    # The path can contain %, ? and #, so it is quoted.  Neither mode creates a file.
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


def file_problem(module: Any, path: Path) -> str | None:
    """Return why SQLite must not open a file that is not empty beside a log with content; ``None``
    if SQLite can open the file.

    SQLite itself reads the header, without locks or logs.  If this function opened and closed the
    file, this process would lose the locks that SQLite has on the file.
    """
    connect = connection_factory(module, path, busy_timeout_s=0.0, read_only=True, immutable=True)
    try:
        with closing(connect()) as connection:
            [pages], [page_size] = (
                connection.execute(f"PRAGMA {name}").fetchone() for name in _SIZE_PRAGMAS
            )
        suspect = pages * page_size > path.stat().st_size
    except module.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == _NOT_A_DATABASE:
            return "is not an SQLite database"
        suspect = code == _CORRUPT
    return WAS_CUT if suspect and lacks_pages(path) else None


def _lock_file(raw: Any) -> bool:
    """Lock the file exclusively until the connection is closed; return false if another
    connection has the file open."""
    for pragma in _write_pragmas("full"):
        raw.execute(pragma)
    raw.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
    try:
        raw.execute("BEGIN EXCLUSIVE")
    except raw.Error as error:
        if sqlite_error_kind(error) is not ErrorKind.LOCK_TIMEOUT:
            raise
        return False
    raw.execute("COMMIT")
    return True


def _open_elsewhere(path: Path) -> StoreBusyError:
    owners = lock_owners(path, shared=True)
    return StoreBusyError(
        f"{path} is open elsewhere, so it cannot be rebuilt ({describe_owners(owners)})",
        hint="nothing was changed; stop every process that has the ledger open, then try again",
        owners=owners,
    )


def _check_space(raw: Any, path: Path) -> int:
    """Return how many free bytes a vacuum needs beside the file; raise
    :class:`~taskstore.StoreUnavailableError` if fewer bytes are free."""
    [pages], [unused], [page_size], [mode] = (
        raw.execute(f"PRAGMA {name}").fetchone()
        for name in ("page_count", "freelist_count", "page_size", "journal_mode")
    )
    # The copy, and the log of the transaction that writes the copy back: a write-ahead log has the
    # new pages, a rollback journal has the old pages.
    log_pages = pages - unused if mode == "wal" else pages
    needed = int((pages - unused + log_pages) * page_size * _SPACE_FACTOR)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise StoreUnavailableError(
            f"{path}: a vacuum needs {needed:,} free bytes in {path.parent}, but only {free:,} "
            "bytes are free",
            hint="nothing was changed; free some space, or first compact without a vacuum, "
            "then try again",
        )
    return needed


def _rebuild(raw: Any, module: Any, copy: Path) -> None:
    """Write the content of the database to a copy without free pages, and write the copy back in
    one transaction.

    SQLite's own VACUUM makes its copy in the system's directory for temporary files.  If this
    directory is in memory, it can be too small for the copy.
    """
    try:
        copy.unlink(missing_ok=True)  # a killed process can have left its copy
        os.close(os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        raw.execute("PRAGMA auto_vacuum = INCREMENTAL")
        raw.execute("VACUUM INTO ?", (os.fspath(copy),))
        with closing(module.connect(os.fspath(copy))) as source:
            source.backup(raw)
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except OSError as error:
        raise StoreUnavailableError(
            f"{copy} cannot be created: {error.strerror or error}",
            hint="nothing was changed; check that the directory can be written",
        ) from error
    finally:
        with suppress(OSError):
            copy.unlink(missing_ok=True)


def wal_exists(path: Path) -> bool:
    """Return whether the database file has a write-ahead log."""
    return Path(f"{path}-wal").exists()


def needs_immutable(module: Any, path: Path) -> bool:
    """Return whether SQLite must read a file with the option ``immutable=1``.

    The option is necessary in two cases.  If the directory of the file is not writable, SQLite
    cannot read the file without this option.  If the file is empty and a log lies beside the file,
    SQLite removes the log without this option.

    Raises :class:`~taskstore.StoreUnavailableError` if one of these is true: (a) the file does
    not exist; (b) the file is not readable by this user; (c) the file has a ``-wal`` but no
    ``-shm``, and this user is not allowed to create the ``-shm``.
    """
    try:
        status = path.stat()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise StoreUnavailableError(
            f"{path} cannot be read: {reason}", hint="check the path"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise StoreUnavailableError(f"{path} is not a regular file")
    if not os.access(path, os.R_OK):
        raise StoreUnavailableError(
            f"{path} cannot be read: permission denied", hint=permission_hint(path)
        )
    if is_empty(status):
        return True
    connection = None
    try:
        connection = connection_factory(
            module, path, busy_timeout_s=1.0, read_only=True, immutable=False
        )()
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except module.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (8, 14):  # READONLY, CANTOPEN
            raise
        if not wal_exists(path):
            return True
        raise StoreUnavailableError(
            f"{path} has a write-ahead log, and {path.parent} cannot be written, "
            "but SQLite must write to this directory to read the log",
            hint="read the ledger as the owner of the file, or let the writer close the ledger",
        ) from error
    finally:
        if connection is not None:
            connection.close()
    return False
