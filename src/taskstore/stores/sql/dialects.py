"""The one place for what differs between databases once they are open.

A :class:`Database` is one database as its dialect wants to be spoken to: how
transactions begin, how seqs are claimed, what durability takes, what the
driver's errors mean.  Adding a dialect is adding a subclass, naming it in
``DIALECTS``, and saying in ``engines.py`` how its engine is made.
"""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine.interfaces import Dialect

from taskstore.errors import StoreBusyError, StoreUnavailableError, ValidationError
from taskstore.stores.sql.errors import Fault, Translator, postgresql_fault, sqlite_fault
from taskstore.stores.sql.session import Session
from taskstore.stores.sql.sqlite_files import (
    ImmutableWatch,
    library_notice,
    library_of,
    open_files,
)
from taskstore.stores.sql.statements import Statements
from taskstore.stores.sql.tables import SCHEMA_EPOCH

log = logging.getLogger("taskstore")

LOCK_S = 30
"""How long we wait for locks, and a server keeps our idle transactions, in seconds."""

SYNCHRONOUS = {"full": "FULL", "process": "NORMAL"}
"""SQLite's word for each durability."""


class Database:
    """One database.  ``owned`` tells that the engine is ours and not a host's."""

    driver: ClassVar[str]
    """The driver that the statements are compiled for."""
    compiler: ClassVar[Dialect]
    begin_read: str = "BEGIN"
    """Begins a transaction that sees one moment and writes nothing."""
    begin_schema: ClassVar[tuple[str, ...]] = ("BEGIN",)
    """Begins the only transaction that changes the schema."""
    waits_for_locks: ClassVar[bool] = True
    """Whether the database queues for locks; if not, trying again is left to us."""
    _compiled: ClassVar[Statements]

    def __init__(
        self, engine: sa.Engine, *, owned: bool, durability: str = "full", read_only: bool = False
    ) -> None:
        self.engine = engine
        self.owned = owned
        self.durability = durability
        self.read_only = read_only
        self.notices: list[str] = []
        self.location = self._location()
        dbapi: Any = engine.dialect.loaded_dbapi
        self.translator = Translator(
            self.location, dbapi.Error, self.fault_of, _password(engine.url)
        )

    def __init_subclass__(cls) -> None:
        cls._compiled = Statements(cls.compiler)

    @property
    def sql(self) -> Statements:
        """The compiled statements, shared by all databases of the dialect."""
        return self._compiled

    @property
    def scratch(self) -> Path | None:
        """A directory for temporary files; ``None`` is the system's."""
        return None

    def _location(self) -> str:
        url = self.engine.url
        place = {name: url.query[name] for name in ("host", "port") if name in url.query}
        return url.set(query=place).render_as_string(hide_password=True)

    @staticmethod
    def fault_of(error: BaseException) -> Fault:
        """Say what kind of trouble a driver's exception is."""
        raise AssertionError(error)

    def notice(self, text: str | None) -> None:
        """Tell the operator: in the report, and once in the log."""
        if text is not None and text not in self.notices:
            self.notices.append(text)
            log.warning("%s", text)

    def cursor(self, raw: Any) -> Any:
        """A cursor of the driver that gives tuples."""
        return raw.cursor()

    def hold(self) -> None:
        """Note that a store has the database open."""

    def prepare(self, session: Session) -> None:
        """Look at the database, and set it up, when its schema is known to be ours."""

    def begin_write(self, session: Session) -> None:
        """Begin a transaction that writes."""
        raise AssertionError(session)

    def after_write(self, session: Session) -> None:
        """Set a host's connection back to how it was."""

    def after_read(self) -> None:
        """Check that what was read can be trusted."""

    def rollback(self, session: Session) -> None:
        """End the transaction if there is one; raises when the connection is broken."""
        raise AssertionError(session)

    def claim(self, session: Session, count: int, now: int) -> tuple[int, int, int] | None:
        """Take seqs under the head lock: (head, last_at, floor) afterwards.

        ``None`` when the schema epoch is not one that we may write.
        """
        rows = session.rows(self.sql.claim_returning, (count, now, now, SCHEMA_EPOCH))
        return rows[0] if rows else None

    def erase(self, session: Session) -> None:
        """Get rid of deleted bytes that the database still keeps in its files."""

    def close(self) -> None:
        """Give up the engine, if it is ours."""
        if self.owned:
            self.engine.dispose()


class SQLiteDatabase(Database):
    """An SQLite file."""

    driver = "pysqlite"
    compiler = SQLiteDialect_pysqlite(paramstyle="qmark")
    begin_schema = ("BEGIN IMMEDIATE",)
    waits_for_locks = False
    fault_of = staticmethod(sqlite_fault)

    def __init__(
        self,
        engine: sa.Engine,
        *,
        owned: bool,
        durability: str = "full",
        read_only: bool = False,
        watch: ImmutableWatch | None = None,
    ) -> None:
        super().__init__(engine, owned=owned, durability=durability, read_only=read_only)
        self._watch = watch
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

    def begin_write(self, session: Session) -> None:
        if not self.owned:
            [synchronous] = session.row("PRAGMA synchronous")
            [secure] = session.row("PRAGMA secure_delete")
            session.restore = (
                f"PRAGMA synchronous = {synchronous}",
                f"PRAGMA secure_delete = {secure}",
            )
            session.execute(f"PRAGMA synchronous = {SYNCHRONOUS[self.durability]}")
            session.row("PRAGMA secure_delete = ON")
        session.execute("BEGIN IMMEDIATE")

    def after_write(self, session: Session) -> None:
        for pragma in session.restore:
            session.rows(pragma)
        session.restore = ()

    def after_read(self) -> None:
        if self._watch is not None:
            self._watch.check()

    def rollback(self, session: Session) -> None:
        if session.raw.in_transaction:
            session.execute("ROLLBACK")

    def erase(self, session: Session) -> None:
        # Deleted bytes are overwritten in the file (secure_delete), but the
        # log keeps earlier images of pages until it is emptied.
        for _ in range(100):
            busy, *_rest = session.row("PRAGMA wal_checkpoint(TRUNCATE)")
            if not busy:
                return
            time.sleep(0.1)
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
        if self._holds:
            self._holds = False
            open_files.release(self.location, self._library)


class PostgreSQLDatabase(Database):
    """A PostgreSQL database, through psycopg 3."""

    driver = "psycopg"
    compiler = PGDialect_psycopg(paramstyle="format")  # type: ignore[no-untyped-call]
    begin_read = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    # Any number will do, as long as it is always the same: "task" in ASCII.
    begin_schema = ("BEGIN", "SELECT pg_advisory_xact_lock(1952543595)")
    fault_of = staticmethod(postgresql_fault)
    _begin_write = "BEGIN ISOLATION LEVEL READ COMMITTED"

    def cursor(self, raw: Any) -> Any:
        from psycopg.rows import tuple_row

        # Binary results: bytes are not sent as hexadecimal digits.
        return raw.cursor(binary=True, row_factory=tuple_row)

    def prepare(self, session: Session) -> None:
        [encoding] = session.row("SHOW server_encoding")
        if encoding != "UTF8":
            raise StoreUnavailableError(
                f"{self.location} is encoded in {encoding}, which cannot hold every text",
                hint="use a database with the encoding UTF8",
            )
        [synchronous] = session.row("SHOW synchronous_commit")
        wanted = synchronous
        if self.durability == "process":
            wanted = "off"
        elif synchronous == "off":
            wanted = "on"
        if wanted != synchronous:
            self._begin_write = (
                f"{PostgreSQLDatabase._begin_write}; SET LOCAL synchronous_commit TO {wanted}"
            )
        [fsync] = session.row("SHOW fsync")
        if fsync == "off" and not self.read_only:
            self.notice(f"{self.location}: the server runs with fsync=off, nothing is power-safe")

    def begin_write(self, session: Session) -> None:
        # Never prepared: it may be two statements, in one round trip.
        session.raw.execute(self._begin_write, prepare=False)

    def rollback(self, session: Session) -> None:
        raw = session.raw
        if raw.closed:
            raise StoreUnavailableError(f"{self.location}: the connection is closed")
        if raw.info.transaction_status != 0:  # IDLE
            raw.execute("ROLLBACK")


DIALECTS: dict[str, type[Database]] = {
    "sqlite": SQLiteDatabase,
    "postgresql": PostgreSQLDatabase,
}
"""The dialects that there are, by SQLAlchemy's name for them."""


def _password(url: sa.URL) -> str | None:
    found = url.password or url.query.get("password")
    return str(found) if found else None
