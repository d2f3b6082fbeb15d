"""MariaDB, through PyMySQL.

PyMySQL writes the parameters into the statement, so what the server is sent is
text, and has to fit into one packet.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam, event
from sqlalchemy.dialects.mysql.mariadb import MariaDBDialect
from sqlalchemy.dialects.mysql.pymysql import MySQLDialect_pymysql
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.expression import FromClause

from taskstore.errors import StoreBusyError, StoreUnavailableError, ValidationError
from taskstore.stores.sql.dialects.base import LOCK_S, LOCK_WAIT_S, Database, Session, flat, pieces
from taskstore.stores.sql.errors import mariadb_fault
from taskstore.stores.sql.rows import Claimed
from taskstore.stores.sql.statements import (
    CLAIMED,
    Statements,
    advance_head,
    parameters,
)
from taskstore.stores.sql.tables import SCHEMA_EPOCH, task_journal, tasks

OLDEST = (10, 6)
"""The first version in which creating a table is all or nothing."""

COLLATION = "utf8mb4_nopad_bin"
"""The order of code points, to which trailing spaces matter: that of ``tables.py``."""

_MODE = "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'"
"""What does not fit is an error, and nothing means anything else than it says."""

_SERVER = """
SELECT @@max_allowed_packet, @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog"""

_HOST = """
SELECT @@character_set_client, @@character_set_connection, @@character_set_results, @@sql_mode"""

_HOLDERS = """
SELECT held.trx_mysql_thread_id, who.user, who.host, who.command,
    TIMESTAMPDIFF(SECOND, held.trx_started, NOW())
FROM information_schema.innodb_trx AS held
JOIN information_schema.processlist AS who ON who.id = held.trx_mysql_thread_id
WHERE who.db = DATABASE() AND who.id <> CONNECTION_ID()
    AND held.trx_rows_locked > 0 AND held.trx_state <> 'LOCK WAIT'
"""
"""Who has locked rows of the database, and waits for nobody; needs the privilege PROCESS."""

_OTHER_WORLDS = {"EMPTY_STRING_IS_NULL", "ORACLE"}
"""Modes in which our statements mean something else; reading does not change the mode."""

_LOCK = "CONCAT('taskstore.', MD5(DATABASE()))"

_ROW_BYTES = 16_000
"""What the columns of a row, but for its payload, come to at most as text, in bytes."""

_DEFAULT_PACKET = 16 * 1024 * 1024
_FOUND_ROWS = 2


class _Dialect(MariaDBDialect, MySQLDialect_pymysql):
    supports_statement_cache = True


class MariaDBStatements(Statements):
    """No CTE stands before an UPDATE here, and no UPDATE gives rows."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__(dialect)
        self.count_deleted = cache(self._count_deleted)

    def _rows(self, columns: Sequence[sa.Column[Any]], count: int) -> FromClause:
        rows = [
            sa.select(*(value.label(name) for name, value in parameters(columns, row).items()))
            for row in range(count)
        ]
        return (sa.union_all(*rows) if count > 1 else rows[0]).subquery("new")

    def _same(self, stored: sa.ColumnElement[Any], new: Any) -> sa.ColumnElement[bool]:
        # Said here, because the connection of a host may have another collation.
        return stored == sa.collate(new, COLLATION)

    def _update_tasks(self, count: int) -> str:
        # What stays as it is costs no index anything, so that the wide statement will do.
        return super()._update_tasks(1) if count == 1 else self._update_tasks_wide(count)

    def _count_deleted(self, count: int) -> str:
        """Count the deletions of tasks since a seq; parameters: ids, then the seq."""
        entry, order = task_journal.c, [f"task_id_{row}" for row in range(count)]
        ids = [bindparam(name, type_=entry.task_id.type) for name in order]
        return self._compile(
            sa.select(sa.func.count())
            .select_from(task_journal)
            .where(
                entry.task_id.in_(ids),
                entry.kind == sa.literal_column("'deleted'"),
                entry.seq >= bindparam("floor", type_=sa.BigInteger),
            ),
            *order,
            "floor",
        )

    @cached_property
    def claim(self) -> str:
        """Take ``count`` seqs, unless the schema epoch is too high."""
        return self._compile(advance_head(), "count", "now", "now", "epoch")

    @cached_property
    def claimed(self) -> str:
        """Read what the head row is after a claim, and the commit at seq ``over``."""
        return self._compile(sa.select(*CLAIMED), "over")


class MariaDBDatabase(Database):
    """A MariaDB database."""

    names = ("mysql", "mariadb")
    extra = "mysql"
    driver = "pymysql"
    compiler = _Dialect(paramstyle="format")
    statements = MariaDBStatements
    sql: MariaDBStatements
    fault_of = staticmethod(mariadb_fault)
    begin_read = (
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
    )
    schema_commits = True

    _packet = _DEFAULT_PACKET

    @classmethod
    def connect(cls, url: sa.URL, *, durability: str, read_only: bool) -> MariaDBDatabase:
        if not url.database:
            raise ValidationError("url", "names no database")
        defaults = {"charset": "utf8mb4", "connect_timeout": 10, "program_name": "taskstore"}
        if url.query.get("charset", "utf8mb4") != "utf8mb4":
            raise ValidationError("url", "asks for a charset that is not utf8mb4")
        try:
            engine = sa.create_engine(
                url,
                isolation_level="AUTOCOMMIT",
                hide_parameters=True,
                # We end our transactions ourselves: one round trip less for each read.
                pool_reset_on_return=None,
                connect_args={name: defaults[name] for name in defaults.keys() - url.query.keys()},
            )
        except (TypeError, ValueError):
            # From None: the cause may repeat the URL with its password.
            raise ValidationError("url", "has an option that its driver does not take") from None
        _check_options(engine, url)
        database = cls(engine, owned=True, durability=durability, read_only=read_only)
        access = ", READ ONLY" if read_only else ""

        @event.listens_for(engine, "connect")
        def configure(raw: Any, _record: object) -> None:
            with raw.cursor() as cursor:
                cursor.execute("SELECT VERSION()")
                refuse_version(cursor.fetchone()[0], database.location)
                cursor.execute(f"SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED{access}")
                cursor.execute(
                    f"{_MODE}, innodb_lock_wait_timeout = {LOCK_WAIT_S}, "
                    f"lock_wait_timeout = {LOCK_S}, idle_transaction_timeout = {LOCK_S}"
                )

        return database

    def cursor(self, raw: Any) -> Any:
        from pymysql.cursors import Cursor

        return raw.cursor(Cursor)

    # -- what there has to be ----------------------------------------------

    def examine(self, connection: sa.Connection) -> None:
        if not self.owned:
            self._examine_host(connection)
        log = connection.exec_driver_sql("SELECT @@log_bin, @@binlog_format").one()
        if not self.read_only and log == (1, "STATEMENT"):
            raise StoreUnavailableError(
                f"{self.location}: the server writes a binary log with binlog_format=STATEMENT, "
                "which does not take what is written at READ COMMITTED",
                hint="set binlog_format to MIXED or ROW",
            )

    def _examine_host(self, connection: sa.Connection) -> None:
        refuse_version(connection.exec_driver_sql("SELECT VERSION()").scalar_one(), self.location)
        *charsets, mode = connection.exec_driver_sql(_HOST).one()
        if set(charsets) != {"utf8mb4"}:
            raise ValidationError(
                "engine",
                f"speaks {', '.join(sorted({str(name) for name in charsets}))}, which cannot say "
                "every text: give its URL the option charset=utf8mb4",
            )
        if worlds := _OTHER_WORLDS & set(mode.split(",")):
            raise ValidationError(
                "engine", f"has the sql_mode {', '.join(sorted(worlds))}: we need one without"
            )
        raw: Any = connection.connection.driver_connection
        if not raw.client_flag & _FOUND_ROWS:
            raise ValidationError(
                "engine",
                "counts rows that changed, not those that it found: connect with "
                "client_flag=CLIENT.FOUND_ROWS, as SQLAlchemy does by itself",
            )

    def prepare(self, session: Session) -> None:
        packet, flush, binary_log, sync = session.row(_SERVER)
        self._packet = int(packet)
        if self.read_only:
            return
        if self._packet < _DEFAULT_PACKET:
            self.notice(
                f"{self.location}: max_allowed_packet is {self._packet}: the largest records, of "
                f"some MiB, cannot be stored; {_DEFAULT_PACKET} is enough for all"
            )
        if self.durability == "full":
            self.notice(self._survival(int(flush), int(sync) if binary_log else 1))

    def _survival(self, flush: int, sync: int) -> str | None:
        """What a commit does not survive with these settings, which are the server's."""
        settings = f"innodb_flush_log_at_trx_commit={flush}"
        if flush not in (1, 3):
            lost = "power loss" if flush == 2 else "the server's death"  # noqa: PLR2004 - MariaDB's
        elif sync != 1:
            settings, lost = f"sync_binlog={sync} and a binary log", "power loss"
        else:
            return None
        return (
            f"{self.location}: durability=full was asked for, but the server runs with {settings}: "
            f"the last commits may not survive {lost}"
        )

    # -- transactions --------------------------------------------------------

    def begin_write(self, session: Session) -> None:
        # Each statement sees what is committed when it begins, so that what is
        # read after the head row was locked is what the last writer left.  At
        # REPEATABLE READ it would be what there was before we waited.
        if not self.owned:
            [mode] = session.row("SELECT @@sql_mode")
            session.restore = (f"SET SESSION sql_mode = '{mode}'",)
            session.execute(_MODE)
            session.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        session.execute("START TRANSACTION")

    def lock_owners(self, session: Session) -> Sequence[str]:
        return [
            f"connection {number}, {user} at {host}, {command}, in a transaction for {seconds} s"
            for number, user, host, command, seconds in session.rows(_HOLDERS)
        ]

    def rollback(self, session: Session) -> None:
        session.execute("ROLLBACK")

    def claim(self, session: Session, count: int, now: int, over: int) -> Claimed | None:
        if not session.touch(self.sql.claim, (count, now, now, SCHEMA_EPOCH)):
            return None
        return Claimed(*session.row(self.sql.claimed, (over,)))

    def insert(self, session: Session, rows: Sequence[tuple[Any, ...]], floor: int) -> int:
        # What is there already is a violation of a unique index, which the
        # caller takes for what it is.
        ids = [row[0] for row in rows]
        [deleted] = session.row(self.sql.count_deleted(len(ids)), (*ids, floor))
        if deleted:
            return 0
        return session.touch(self.sql.insert[tasks](len(rows)), flat(rows))

    def lots(self, rows: Sequence[tuple[Any, ...]]) -> Iterable[Sequence[tuple[Any, ...]]]:
        for lot in pieces(rows):
            yield from self._fitting(lot)

    def _fitting(self, rows: Sequence[tuple[Any, ...]]) -> Iterator[Sequence[tuple[Any, ...]]]:
        """Halve what might not fit into a packet; sizes stay powers of two."""
        size = sum(map(_longest, rows))
        if size <= self._packet:
            yield rows
        elif len(rows) == 1:
            raise StoreUnavailableError(
                f"{self.location}: a statement of up to {size} bytes may be more than the server "
                f"takes, max_allowed_packet={self._packet}; nothing was written",
                hint=f"set max_allowed_packet to {_DEFAULT_PACKET}",
            )
        else:
            half = len(rows) // 2
            yield from self._fitting(rows[:half])
            yield from self._fitting(rows[half:])

    # -- the schema ------------------------------------------------------------

    def lock_schema(self, connection: sa.Connection) -> None:
        # Changes of the schema commit by themselves, so there is no transaction
        # to hold a lock; this one is the connection's.
        got = connection.exec_driver_sql(f"SELECT GET_LOCK({_LOCK}, {LOCK_S})").scalar()
        if got != 1:
            raise StoreBusyError(f"{self.location}: another process is changing the schema")

    def unlock_schema(self, connection: sa.Connection, *, done: bool) -> None:
        del done
        connection.exec_driver_sql(f"DO RELEASE_LOCK({_LOCK})")


def _longest(row: tuple[Any, ...]) -> int:
    """What a row comes to at most as text, in which a byte of its payload is two characters."""
    return _ROW_BYTES + sum(2 * len(value) for value in row if isinstance(value, bytes))


def refuse_version(version: str, location: str) -> None:
    """Refuse a server that is not MariaDB, or too old, by what it calls itself."""
    found = re.search(r"(\d+)\.(\d+)\.\d+-MariaDB", version)
    if found is None:
        problem = "is not MariaDB"
    elif (int(found[1]), int(found[2])) < OLDEST:
        problem = "is too old"
    else:
        return
    needed = ".".join(map(str, OLDEST))
    raise StoreUnavailableError(
        f"{location}: the server is {version}, which {problem}",
        hint=f"use MariaDB {needed} or later",
    )


def _check_options(engine: sa.Engine, url: sa.URL) -> None:
    """Refuse options that the driver does not know."""
    from pymysql.connections import Connection

    _, options = engine.dialect.create_connect_args(url)
    if unknown := options.keys() - inspect.signature(Connection).parameters.keys():
        raise ValidationError("url", f"has options that its driver does not know: {min(unknown)}")
