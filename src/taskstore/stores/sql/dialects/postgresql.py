"""PostgreSQL, through psycopg 3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from taskstore.errors import StoreUnavailableError
from taskstore.stores.sql.dialects.base import LOCK_S, LOCK_WAIT_S, Database, Session
from taskstore.stores.sql.errors import postgresql_fault
from taskstore.stores.sql.statements import Statements

_CHANNEL = "taskstore_"
_KEY = "hashtextextended({}, 0)"

_HOLDERS = """
SELECT DISTINCT held.pid, who.application_name, host(who.client_addr), who.state,
    extract(epoch FROM clock_timestamp() - who.xact_start)::int
FROM pg_locks AS held LEFT JOIN pg_stat_activity AS who ON who.pid = held.pid
WHERE held.relation = 'taskstore_head'::regclass AND held.granted
    AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND held.mode <> 'AccessShareLock' AND held.pid <> pg_backend_pid()
    AND NOT EXISTS (SELECT FROM pg_locks AS wait WHERE wait.pid = held.pid AND NOT wait.granted)
"""
"""Who has locked rows of the head's table, or all of it, and waits for nobody."""


class PostgreSQLStatements(Statements):
    """Whoever claims seqs notifies those who listen, when he commits.

    A commit that notifies holds a lock of the whole server while it is written
    to disk.  So that nobody pays for what nobody listens to, a listener
    shares an advisory lock, and a claim looks whether it could have it alone.
    It keeps it then until the end of the transaction, so that who wants to
    listen gets the lock after that, and looks at the head after that.
    """

    @cached_property
    def claim(self) -> str:
        """As everywhere, with a fifth column that means nothing."""
        channel = f"'{_CHANNEL}' || taskstore_head.ledger_id"
        notified: sa.ColumnElement[Any] = sa.literal_column(
            f"CASE WHEN pg_try_advisory_xact_lock({_KEY.format(channel)}) THEN NULL "
            f"ELSE CAST(pg_notify({channel}, '') AS text) END"
        )
        return self._claim_giving(notified)

    be_heard = f"SELECT pg_try_advisory_lock_shared({_KEY.format('%s')})"
    """Let writers know that somebody listens; parameter: the channel."""
    be_quiet = f"SELECT pg_advisory_unlock_shared({_KEY.format('%s')})"
    """The opposite; parameter: the channel."""

    @staticmethod
    def channel_of(ledger_id: str) -> str:
        """Where the commits of a ledger are told of."""
        return _CHANNEL + ledger_id


_DEFAULTS: dict[str, object] = {
    "application_name": "taskstore",
    # Of a host that is gone without a word: connecting takes this long for each, and
    # a connection that was made is given up after 25 s.  The system's own limits are hours.
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
"""What we ask of the driver, unless the URL asks for something else."""


class PostgreSQLDatabase(Database):
    """A PostgreSQL database, through psycopg 3."""

    names = ("postgresql",)
    extra = "postgres"
    driver = "psycopg"
    statements = PostgreSQLStatements
    sql: PostgreSQLStatements
    # SQLAlchemy does not type how its dialects are made.
    compiler = PGDialect_psycopg(paramstyle="format")  # type: ignore[no-untyped-call]
    begin_read = ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",)
    # Any number will do, as long as it is always the same: "task" in ASCII.
    begin_schema = ("BEGIN", "SELECT pg_advisory_xact_lock(1952543595)")
    fault_of = staticmethod(postgresql_fault)
    _begin_write = "BEGIN ISOLATION LEVEL READ COMMITTED"

    @classmethod
    def connect(cls, url: sa.URL, *, durability: str, read_only: bool) -> PostgreSQLDatabase:
        defaults = {**_DEFAULTS}
        if _has_several_hosts(url):
            defaults["target_session_attrs"] = "read-write"
        engine = sa.create_engine(
            url,
            isolation_level="AUTOCOMMIT",
            client_encoding="utf8",
            hide_parameters=True,
            connect_args={name: defaults[name] for name in defaults.keys() - url.query.keys()},
        )
        settings = [
            f"lock_timeout = '{LOCK_WAIT_S}s'",
            f"idle_in_transaction_session_timeout = '{LOCK_S}s'",
            "client_min_messages = warning",
        ]
        if read_only:
            settings.append("default_transaction_read_only = on")
        database = cls(engine, owned=True, durability=durability, read_only=read_only)

        @event.listens_for(engine, "connect")
        def configure(raw: Any, record: Any) -> None:
            record.info["generation"] = database.generation
            for setting in settings:
                raw.execute(f"SET {setting}")
            raw.commit()

        @event.listens_for(engine, "checkout")
        def renew(_raw: object, record: Any, _borrowed: object) -> None:
            if record.info["generation"] != database.generation:
                raise sa.exc.DisconnectionError  # the pool makes a new one

        return database

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

    def lock_owners(self, session: Session) -> Sequence[str]:
        return [
            f"server process {pid}, {name or 'unnamed'} at {host or 'this machine'}, "
            f"{state or 'doing what is not told'}"
            + (f", in a transaction for {seconds} s" if seconds is not None else "")
            for pid, name, host, state, seconds in session.rows(_HOLDERS)
        ]

    def commit(self, session: Session) -> None:
        warnings: list[str] = []

        def listen(notice: Any) -> None:
            # It can be read only now: what it lies in is freed when this returns.
            if notice.severity_nonlocalized == "WARNING":
                warnings.append(f"{notice.message_primary} ({notice.message_detail})")

        session.raw.add_notice_handler(listen)
        try:
            session.execute("COMMIT")
        finally:
            session.raw.remove_notice_handler(listen)
        if warnings:
            # A wait for the standby that was cancelled, say: committed here, and
            # answered like any commit, but not as durable as it is asked to be.
            dbapi: Any = self.engine.dialect.loaded_dbapi
            raise dbapi.OperationalError(warnings[0])

    def renew(self) -> None:
        self.generation += 1

    def rollback(self, session: Session) -> None:
        raw = session.raw
        if raw.closed:
            raise StoreUnavailableError(f"{self.location}: the connection is closed")
        if raw.info.transaction_status != 0:  # IDLE
            raw.execute("ROLLBACK")


def _has_several_hosts(url: sa.URL) -> bool:
    hosts = url.query.get("host", url.host or "")
    return not isinstance(hosts, str) or "," in hosts
