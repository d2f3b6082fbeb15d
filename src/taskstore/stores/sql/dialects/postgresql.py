"""PostgreSQL, through psycopg 3."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from taskstore.errors import StoreUnavailableError
from taskstore.stores.sql.dialects.base import LOCK_S, Database
from taskstore.stores.sql.errors import postgresql_fault
from taskstore.stores.sql.session import Session


class PostgreSQLDatabase(Database):
    """A PostgreSQL database, through psycopg 3."""

    driver = "psycopg"
    compiler = PGDialect_psycopg(paramstyle="format")  # type: ignore[no-untyped-call]
    begin_read = ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",)
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


def open_postgresql(url: sa.URL, *, durability: str, read_only: bool) -> PostgreSQLDatabase:
    """A database by its URL, with an engine of our own."""
    defaults = {"application_name": "taskstore", "connect_timeout": 10}
    try:
        engine = sa.create_engine(
            url,
            isolation_level="AUTOCOMMIT",
            client_encoding="utf8",
            hide_parameters=True,
            connect_args={name: defaults[name] for name in defaults.keys() - url.query.keys()},
        )
    except ImportError as error:
        raise StoreUnavailableError(
            f"the driver of {url.drivername} is not installed: {error}",
            hint="pip install 'taskstore[postgres]'",
        ) from error
    settings = [f"lock_timeout = '{LOCK_S}s'", f"idle_in_transaction_session_timeout = '{LOCK_S}s'"]
    if read_only:
        settings.append("default_transaction_read_only = on")

    @event.listens_for(engine, "connect")
    def configure(raw: Any, _record: object) -> None:
        for setting in settings:
            raw.execute(f"SET {setting}")
        raw.commit()

    return PostgreSQLDatabase(engine, owned=True, durability=durability, read_only=read_only)
