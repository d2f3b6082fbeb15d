"""SQLite, through ``pysqlite3`` or the standard library's module."""

from __future__ import annotations

import logging
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

from taskstore.errors import (
    CorruptStoreError,
    StoreBusyError,
    StoreUnavailableError,
    ValidationError,
)
from taskstore.stores.fairlock import FairLock
from taskstore.stores.holders import lock_holders
from taskstore.stores.sql.dialects.base import LOCK_S, LOCK_WAIT_S, Database
from taskstore.stores.sql.errors import Fault, Translator, sqlite_fault
from taskstore.stores.sql.session import Session
from taskstore.stores.sql.sqlite_files import (
    ImmutableWatch,
    OpenFile,
    create_privately,
    library_notice,
    library_of,
    needs_immutable,
    open_files,
    opener,
    sqlite_module,
)
from taskstore.stores.sql.watches import DataVersionWatch

log = logging.getLogger("taskstore")

_WRITE_LOCK = 120
"""The byte of the ``-shm`` file that whoever writes holds: part of SQLite's file format."""

_SYNCHRONOUS = {"full": "FULL", "process": "NORMAL"}
"""SQLite's word for each durability."""


class SQLiteDatabase(Database):
    """An SQLite file."""

    driver = "pysqlite"
    compiler = SQLiteDialect_pysqlite(paramstyle="qmark")
    begin_schema = ("BEGIN IMMEDIATE",)
    waits_for_locks = False
    watch = DataVersionWatch
    erase_s: ClassVar[float] = 10.0
    """How long erasing waits for readers to let go of the log, in seconds."""
    fault_of = staticmethod(sqlite_fault)

    def __init__(
        self,
        engine: sa.Engine,
        *,
        owned: bool,
        durability: str = "full",
        read_only: bool = False,
        watch: ImmutableWatch | None = None,
        file: OpenFile | None = None,
    ) -> None:
        super().__init__(engine, owned=owned, durability=durability, read_only=read_only)
        self._watch = watch
        self._fair_lock = FairLock(Path(f"{self.location}-turn"))
        self._holds = False
        # A host's connections may be of another time than we are.
        self.file: OpenFile | None = file
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

    @property
    def scratch(self) -> Path | None:
        # The system's may lie in memory; where the ledger lies, there is room for it.
        return Path(self.location).parent

    def prepare(self, session: Session) -> None:
        # The journal mode is a property of the file, and changing it takes the
        # file for itself, which the busy timeout does not wait for.
        [mode] = session.row("PRAGMA journal_mode")
        started = time.monotonic()
        while self.owned and not self.read_only and mode != "wal":
            try:
                [mode] = session.row("PRAGMA journal_mode = WAL")
                break
            except self.translator.errors as error:
                waited = time.monotonic() - started
                if self.fault_of(error) is not Fault.BUSY or waited > LOCK_S:
                    raise
                time.sleep(random.uniform(0.001, 0.02))  # noqa: S311 - not a secret
        if mode != "wal" and self._watch is None:
            self.notice(
                f"{self.location} has the journal mode {mode}, not wal: readers and writers "
                "block each other" + ("" if self.owned else "; the engine's owner can change it")
            )

        if self.file is not None:
            self.file.note_logs()  # the logs of a file that has only now become one with logs

    def dedicate(self, session: Session) -> None:
        # SQLite's own waiting sleeps for up to a tenth of a second between two
        # looks, and finds the lock taken again each time.
        session.rows("PRAGMA busy_timeout = 0")

    def begin_write(self, session: Session) -> None:
        if not self.owned:
            [synchronous] = session.row("PRAGMA synchronous")
            [secure] = session.row("PRAGMA secure_delete")
            session.restore = (
                f"PRAGMA synchronous = {synchronous}",
                f"PRAGMA secure_delete = {secure}",
            )
            session.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[self.durability]}")
            session.row("PRAGMA secure_delete = ON")
        error: Exception | None = None

        def begin() -> bool:
            nonlocal error
            try:
                session.execute("BEGIN IMMEDIATE")
            except self.translator.errors as raised:
                if self.fault_of(raised) is not Fault.BUSY:
                    raise
                error = raised
                return False
            return True

        if not self._fair_lock.wait(begin, LOCK_WAIT_S) and not begin():
            assert error is not None
            raise error

    def holders(self, session: Session) -> Sequence[str]:
        del session
        # A writer holds a byte of the shared memory; without a write-ahead log, of the file.
        writing = lock_holders(f"{self.location}-shm", byte=_WRITE_LOCK)
        return writing or lock_holders(self.location)

    def check_there(self, session: Session) -> None:
        if session.file is not None:
            session.file.check_there()

    def check_read(self, session: Session) -> None:
        self.check_there(session)
        if self._watch is not None:
            self._watch.check()

    def reopen(self, set_up: Callable[[Database], None]) -> None:
        old, engine = self.file, self.engine
        if old is None or old.is_there():
            return
        old.await_successor()
        if old.is_there():
            return
        fresh = _open(Path(self.location), durability=self.durability, read_only=self.read_only)
        fresh.notices = self.notices
        try:
            set_up(fresh)
        except BaseException:
            fresh.close()
            assert fresh.file is not None
            old.inherit(fresh.file)
            raise
        self.engine, self.file = fresh.engine, fresh.file
        self._watch = fresh._watch  # noqa: SLF001 - another of us
        if self._holds:
            open_files.release(self.location, self._library)
            self.notice(open_files.hold(self.location, self._library))
        # SQLite leaves the logs at the path alone when it closes a file that has moved.
        engine.dispose()
        log.warning("%s was replaced while it was open: going on with the new file", self.location)

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
        self.notice(open_files.hold(self.location, self._library))

    def close(self) -> None:
        super().close()
        self._fair_lock.close()
        if self._holds:
            self._holds = False
            open_files.release(self.location, self._library)


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


def open_sqlite(path: Path, *, durability: str, read_only: bool) -> SQLiteDatabase:
    """A file by its path; a new one is created, empty and private."""
    if not read_only:
        create_privately(path)
    return _open(path, durability=durability, read_only=read_only)


def _open(path: Path, *, durability: str, read_only: bool) -> SQLiteDatabase:
    """A file that is there."""
    module = sqlite_module()
    driver_errors = Translator(str(path), module.Error, sqlite_fault)
    watch = None
    if read_only:
        with driver_errors:
            watch = ImmutableWatch(path) if needs_immutable(module, path) else None
    open_one = opener(
        module,
        path,
        busy_timeout_s=1.0 if read_only else 5.0,
        read_only=read_only,
        immutable=watch is not None,
    )
    pragmas = _READ_PRAGMAS if read_only else _write_pragmas(durability)

    def set_up(raw: Any) -> None:
        # Damaged text is for the checksums to find, not a reason to stop reading.
        raw.text_factory = _lenient
        for pragma in pragmas:
            raw.execute(pragma)

    file = OpenFile(path, open_one, set_up, module.Error)
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        module=module,
        creator=file.connect,
        poolclass=sa.QueuePool,
        isolation_level="AUTOCOMMIT",
    )

    @event.listens_for(engine, "connect")
    def note_file(_raw: Any, record: Any) -> None:
        record.info["file"] = file

    @event.listens_for(engine, "engine_disposed")
    def close_file(_engine: sa.Engine) -> None:
        file.close()

    return SQLiteDatabase(
        engine, owned=True, durability=durability, read_only=read_only, watch=watch, file=file
    )


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


def _lenient(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")
