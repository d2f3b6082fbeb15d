"""The MariaDB dialect, through PyMySQL.

PyMySQL inserts the parameter values into the text of a statement.  This text must fit into one
network packet.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam, event
from sqlalchemy.dialects.mysql.mariadb import MariaDBDialect
from sqlalchemy.dialects.mysql.pymysql import MySQLDialect_pymysql
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.expression import FromClause

from taskstore.errors import StoreBusyError, StoreUnavailableError, ValidationError
from taskstore.stores.sql.dialects.base import (
    LOCK_TIMEOUT_S,
    PORTS,
    WRITE_LOCK_TIMEOUT_S,
    Database,
    Declarations,
    Digest,
    DriverSession,
    Maintenance,
    URLOption,
    boolean_option,
    check_driver_arguments,
    column_declaration,
    flat_parameters,
    index_declaration,
    indexed_columns,
    integer_option,
    require_user,
    row_groups,
)
from taskstore.stores.sql.errors import UNREACHABLE, mariadb_error_kind
from taskstore.stores.sql.rows import ClaimedSeqs
from taskstore.stores.sql.statements import (
    CLAIM_COLUMNS,
    Statements,
    advance_head,
    parameters,
)
from taskstore.stores.sql.tables import ONLY_ON, SCHEMA_EPOCH, metadata, task_journal, tasks

MIN_VERSION = (10, 6)
"""The first MariaDB version in which CREATE TABLE is atomic."""

COLLATION = "utf8mb4_nopad_bin"
"""The collation that ``tables.py`` uses; it orders texts by code point, and trailing spaces count
in comparisons."""

_SQL_MODE = "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'"
"""With this ``sql_mode``, the server raises an error if a value does not fit into its column, and
uses MariaDB's own syntax."""

_READ_SESSION = "SELECT @@sql_mode, @@innodb_lock_wait_timeout, @@lock_wait_timeout"
_RESTORE_SESSION = (
    "SET SESSION sql_mode = '{}', innodb_lock_wait_timeout = {}, lock_wait_timeout = {}"
)
"""``_READ_SESSION`` reads the settings that a write changes on a host's connection, and
``_RESTORE_SESSION`` restores these settings."""

_SERVER_SETTINGS = """
SELECT @@max_allowed_packet, @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog"""

_HOST_SETTINGS = """
SELECT @@character_set_client, @@character_set_connection, @@character_set_results, @@sql_mode"""

_LOCK_OWNERS = """
SELECT trx.trx_mysql_thread_id, conn.user, conn.host, conn.command,
    TIMESTAMPDIFF(SECOND, trx.trx_started, NOW())
FROM information_schema.innodb_trx AS trx
JOIN information_schema.processlist AS conn ON conn.id = trx.trx_mysql_thread_id
WHERE conn.db = DATABASE() AND conn.id <> CONNECTION_ID()
    AND trx.trx_rows_locked > 0 AND trx.trx_state <> 'LOCK WAIT'
"""
"""Selects the connections that own row locks in the database and wait for no lock.  The query needs
the privilege PROCESS."""

_COLUMNS = """
SELECT table_name, column_name, column_type, collation_name, is_nullable = 'YES'
FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = %s
"""
"""Selects the table, the name, the type, the collation and the nullability of each column of a
table."""

_INDEXES = """
SELECT table_name, IF(index_name = 'PRIMARY', '', index_name),
    CONCAT(
        GROUP_CONCAT(
            column_name, IFNULL(CONCAT('(', sub_part, ')'), ''), IF(collation = 'D', ' DESC', '')
            ORDER BY seq_in_index SEPARATOR ', '
        ),
        IF(ignored = 'YES', ', ignored', '')
    ),
    non_unique = 0
FROM information_schema.statistics WHERE table_schema = DATABASE() AND table_name = %s
GROUP BY table_name, index_name, non_unique, ignored
"""
"""Selects the table, the name, the columns and the uniqueness of each index of a table.  The name
of a primary key is empty.  The columns contain the length of a prefix, a descending order, and the
mark of an index that the server does not use."""

_WIDTH = re.compile(r"(?<=INT)\(\d+\)")
"""Matches the display width of an integer type, which does not limit its values."""

_INCOMPATIBLE_SQL_MODES = {"EMPTY_STRING_IS_NULL", "ORACLE"}
"""The values of ``sql_mode`` with which the store refuses a host's engine.  These values change the
meaning of statements, and a read transaction does not set ``sql_mode``."""

_SCHEMA_LOCK = "CONCAT('taskstore.', MD5(DATABASE()))"

_MAX_ROW_BYTES = 16_000
"""The maximum number of bytes that a row without its payload needs in the text of a statement."""

_DEFAULT_PACKET = 16 * 1024 * 1024
_CLIENT_FOUND_ROWS = 2


def _utf8mb4(text: str) -> str:
    if text.lower() != "utf8mb4":
        raise ValueError("must be 'utf8mb4'")
    return text


def _true(text: str) -> bool:
    if not boolean_option(text):
        raise ValueError("must be 'true': the store reads text, not bytes")
    return True


def _no_schema(_text: str) -> str:
    raise ValueError("a database of MariaDB has no schemas; name another database in the URL")


def _collation(text: str) -> str:
    if not text.lower().startswith("utf8mb4_"):
        raise ValueError("must be a collation of utf8mb4")
    return text


def _path(text: str) -> str:
    if not os.access(text, os.R_OK):
        raise ValueError("names a file that cannot be read")
    return text


def _ip_address(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("must be an IP address of this machine") from None
    return text


_OPTIONS: dict[str, URLOption] = {
    "schema": _no_schema,
    "charset": _utf8mb4,
    "collation": _collation,
    "port": integer_option(*PORTS),
    "connect_timeout": integer_option(1, 31_536_000),
    "read_timeout": integer_option(1),
    "write_timeout": integer_option(1),
    "max_allowed_packet": integer_option(1),
    "client_flag": integer_option(0),
    "use_unicode": _true,
    "bind_address": _ip_address,
    **dict.fromkeys(
        (
            "autocommit",
            "binary_prefix",
            "local_infile",
            "ssl_check_hostname",
            "ssl_disabled",
            "ssl_verify_cert",
            "ssl_verify_identity",
        ),
        boolean_option,
    ),
    **dict.fromkeys(("read_default_file", "ssl_ca", "ssl_capath", "ssl_cert", "ssl_key"), _path),
    **dict.fromkeys(
        (
            "database",
            "host",
            "init_command",
            "password",
            "program_name",
            "read_default_group",
            "sql_mode",
            "ssl_cipher",
            "ssl_key_password",
            "unix_socket",
            "user",
        ),
        str,
    ),
}
"""The options of PyMySQL that a URL can have, and the two ``ssl_`` options that SQLAlchemy adds."""


class _Dialect(MariaDBDialect, MySQLDialect_pymysql):
    supports_statement_cache = True


class MariaDBStatements(Statements):
    """The statements of MariaDB, which supports neither a CTE in UPDATE nor UPDATE … RETURNING."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__(dialect)
        self.count_deleted = cache(self._count_deleted)

    def _parameter_table(self, columns: Sequence[sa.Column[Any]], count: int) -> FromClause:
        rows = [
            sa.select(*(value.label(name) for name, value in parameters(columns, row).items()))
            for row in range(count)
        ]
        return (sa.union_all(*rows) if count > 1 else rows[0]).subquery("new")

    def _same_key(self, stored: sa.ColumnElement[Any], new: Any) -> sa.ColumnElement[bool]:
        # The collation is explicit, because a host's connection can have another collation.
        return stored == sa.collate(new, COLLATION)

    def _update_tasks(self, count: int) -> str:
        # MariaDB updates no index for an unchanged value: the wide statement serves several rows.
        return super()._update_tasks(1) if count == 1 else self._update_tasks_wide(count)

    def _count_deleted(self, count: int) -> str:
        """Return a query for the number of deletions since a seq, of ``count`` tasks together.  The
        parameters are the task ids, then the seq."""
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
        """Return the statement that claims ``count`` seqs; no row changes if the schema epoch is
        too new."""
        return self._compile(advance_head(), "count", "now", "now", "epoch")

    @cached_property
    def claimed(self) -> str:
        """Return the query that reads the head row after a claim, and the id of the commit at
        ``base``."""
        return self._compile(sa.select(*CLAIM_COLUMNS), "base")


class MariaDBMaintenance(Maintenance):
    """The maintenance of a MariaDB database."""

    def engine_problems(self, session: DriverSession) -> list[str]:
        names = ", ".join(table.name for table in metadata.sorted_tables)
        # Without QUICK, the check would block writers.  QUICK counts the rows of each index.
        rows = session.rows(f"CHECK TABLE {names} QUICK")
        return [
            f"the check of the table {table}: {kind}: {text}"
            for table, _, kind, text in rows
            if kind.lower() in ("error", "warning") or (kind == "status" and text != "OK")
        ]

    def declarations(self, session: DriverSession) -> Declarations:
        found: Declarations = {}
        for table in metadata.sorted_tables:
            found |= (
                column_declaration(of, column, _spelled(kind), collation, nullable=bool(nullable))
                for of, column, kind, collation, nullable in session.rows(_COLUMNS, (table.name,))
            )
            found |= (
                index_declaration(of, index, columns, unique=bool(unique))
                for of, index, columns, unique in session.rows(_INDEXES, (table.name,))
            )
        return found

    def index_digests(
        self, session: DriverSession, index: sa.Index
    ) -> tuple[Digest, Digest] | None:
        names = session.database.names
        if names[0] not in ONLY_ON.get(str(index.name), names):
            return None
        assert index.table is not None
        # The values are hashed in hexadecimal, in which no value contains a comma or a minus sign.
        values = [
            sa.func.ifnull(sa.func.hex(column), sa.literal_column("'-'"))
            for column in indexed_columns(index)
        ]
        hashed = sa.func.crc32(sa.func.concat_ws(sa.literal_column("','"), *values))
        digest = sa.select(sa.func.count(), sa.func.sum(hashed)).select_from(index.table)
        by_index, by_table = (
            tuple(session.select(digest.with_hint(index.table, f"FORCE INDEX ({name})"))[0])
            for name in (index.name, "PRIMARY")
        )
        return by_index, by_table


class MariaDBDatabase(Database):
    """A MariaDB database."""

    names = ("mysql", "mariadb")
    maintenance = MariaDBMaintenance()
    extra = "mysql"
    space_hint = "run OPTIMIZE TABLE for the tables of the ledger"
    driver = "pymysql"
    sa_dialect = _Dialect(paramstyle="format")
    statements = MariaDBStatements
    sql: MariaDBStatements
    error_kind = staticmethod(mariadb_error_kind)
    begin_read = (
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
    )
    ddl_autocommits = True

    _max_packet = _DEFAULT_PACKET

    @classmethod
    def url_options(cls) -> Mapping[str, URLOption]:
        return _OPTIONS

    @classmethod
    def connect(
        cls, url: sa.URL, options: Mapping[str, Any], *, durability: str, read_only: bool
    ) -> MariaDBDatabase:
        from pymysql import connections

        if not url.database:
            raise ValidationError("url", "names no database: write its name after the host")
        if "read_default_file" not in options:
            require_user(url, connections.DEFAULT_USER)
        defaults = {"charset": "utf8mb4", "connect_timeout": 10, "program_name": "taskstore"}
        typed = {name: value for name, value in options.items() if not isinstance(value, str)}
        engine = sa.create_engine(
            url.difference_update_query([*typed, "init_command"]),
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,
            # The store ends each transaction itself, so the pool needs no rollback.
            pool_reset_on_return=None,
            connect_args={
                **{name: defaults[name] for name in defaults.keys() - url.query.keys()},
                **typed,
            },
        )
        database = cls(engine, owned=True, durability=durability, read_only=read_only)
        check_driver_arguments(database, url)
        access = ", READ ONLY" if read_only else ""

        @event.listens_for(engine, "connect")
        def configure(raw: Any, _record: object) -> None:
            with raw.cursor() as cursor:
                if "init_command" in options:
                    database.run_init_command(cursor, options["init_command"])
                cursor.execute("SELECT VERSION()")
                check_version(cursor.fetchone()[0], database.location)
                cursor.execute(f"SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED{access}")
                cursor.execute(f"{_write_settings()}, idle_transaction_timeout = {LOCK_TIMEOUT_S}")

        return database

    def run_init_command(self, cursor: Any, command: str) -> None:
        """Execute the option ``init_command`` on a new connection.

        PyMySQL would execute the command while it connects, and its error would not say that the
        option is the cause.  Raises :class:`~taskstore.ValidationError` if the server refuses the
        command.
        """
        try:
            cursor.execute(command)
        except self.translator.errors as error:
            if self.translator.error_kind(error) in UNREACHABLE:
                raise
            text = self.translator.text(error)
            raise ValidationError(
                "url", f"has an option 'init_command' that the server refuses: {text}"
            ) from None

    def cursor(self, raw: Any) -> Any:
        from pymysql.cursors import Cursor

        return raw.cursor(Cursor)

    # -- checks of the server and its settings -----------------------------

    def check_server(self, connection: sa.Connection) -> None:
        if not self.owned:
            self._check_host_engine(connection)
        log = connection.exec_driver_sql("SELECT @@log_bin, @@binlog_format").one()
        if not self.read_only and log == (1, "STATEMENT"):
            raise StoreUnavailableError(
                f"{self.location}: the server writes a binary log with binlog_format=STATEMENT, "
                "so the server rejects writes at READ COMMITTED",
                hint="set binlog_format to MIXED or ROW",
            )

    def _check_host_engine(self, connection: sa.Connection) -> None:
        version = connection.exec_driver_sql("SELECT VERSION()").scalar_one()
        if not isinstance(version, str):
            raise ValidationError(
                "engine", "has use_unicode=0, so it reads bytes instead of text: remove the option"
            )
        check_version(version, self.location)
        *charsets, mode = connection.exec_driver_sql(_HOST_SETTINGS).one()
        if set(charsets) != {"utf8mb4"}:
            raise ValidationError(
                "engine",
                f"uses the charset {', '.join(sorted({str(name) for name in charsets}))}, which "
                "cannot encode every text: add 'charset=utf8mb4' to the engine's URL",
            )
        if modes := _INCOMPATIBLE_SQL_MODES & set(mode.split(",")):
            raise ValidationError(
                "engine", f"has the sql_mode {', '.join(sorted(modes))}: remove this mode"
            )
        raw: Any = connection.connection.driver_connection
        if not raw.client_flag & _CLIENT_FOUND_ROWS:
            raise ValidationError(
                "engine",
                "does not count matched rows that have not changed: connect with "
                "client_flag=CLIENT.FOUND_ROWS, which is SQLAlchemy's default",
            )

    def configure(self, session: DriverSession) -> None:
        packet, flush, binary_log, sync = session.row(_SERVER_SETTINGS)
        self._max_packet = int(packet)
        if self.read_only:
            return
        if self._max_packet < _DEFAULT_PACKET:
            self.add_notice(
                f"{self.location}: max_allowed_packet is {self._max_packet}, so records of several "
                f"MiB cannot be stored; the value {_DEFAULT_PACKET} is enough for every record"
            )
        if self.durability == "full":
            self.add_notice(self._durability_notice(int(flush), int(sync) if binary_log else 1))

    def _durability_notice(self, flush: int, sync: int) -> str | None:
        """Return a notice if the server can lose commits with the settings ``flush`` and ``sync``;
        otherwise ``None``."""
        settings = f"innodb_flush_log_at_trx_commit={flush}"
        if flush not in (1, 3):
            lost = "power loss" if flush == 2 else "a server crash"  # noqa: PLR2004 - MariaDB's
        elif sync != 1:
            settings, lost = f"a binary log and sync_binlog={sync}", "power loss"
        else:
            return None
        return (
            f"{self.location}: durability=full was requested, but the server runs with {settings}: "
            f"the last commits can be lost after {lost}"
        )

    # -- transactions --------------------------------------------------------

    def begin_write(self, session: DriverSession) -> None:
        # At READ COMMITTED, a statement reads the data that was committed when this statement
        # began.  A read after the head row was locked therefore sees the newest commit.  At
        # REPEATABLE READ, the read would see the older state from before the wait for the lock.
        if not self.owned:
            session.restore_later(_RESTORE_SESSION.format(*session.row(_READ_SESSION)))
            session.execute(_write_settings())
            session.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        session.execute("START TRANSACTION")

    def lock_owners(self, session: DriverSession) -> Sequence[str]:
        return [
            f"connection {number}, {user} at {host}, {command}, in a transaction for {seconds} s"
            for number, user, host, command, seconds in session.rows(_LOCK_OWNERS)
        ]

    def rollback(self, session: DriverSession) -> None:
        session.execute("ROLLBACK")

    def claim_seqs(
        self, session: DriverSession, count: int, now: int, base: int
    ) -> ClaimedSeqs | None:
        if not session.execute_dml(self.sql.claim, (count, now, now, SCHEMA_EPOCH)):
            return None
        return ClaimedSeqs(*session.row(self.sql.claimed, (base,)))

    def insert(self, session: DriverSession, rows: Sequence[tuple[Any, ...]], floor: int) -> int:
        # An existing id or dedup key violates a unique index; the caller handles the error.
        ids = [row[0] for row in rows]
        [deleted] = session.row(self.sql.count_deleted(len(ids)), (*ids, floor))
        if deleted:
            return 0
        return session.execute_dml(self.sql.insert[tasks](len(rows)), flat_parameters(rows))

    def row_groups(self, rows: Sequence[tuple[Any, ...]]) -> Iterable[Sequence[tuple[Any, ...]]]:
        for group in row_groups(rows):
            yield from self._split_to_packets(group)

    def _split_to_packets(
        self, rows: Sequence[tuple[Any, ...]]
    ) -> Iterator[Sequence[tuple[Any, ...]]]:
        """Halve a group of rows until each part fits into one packet; yield the parts.

        The number of rows in each part remains a power of two.
        """
        size = sum(map(_max_row_size, rows))
        if size <= self._max_packet:
            yield rows
        elif len(rows) == 1:
            raise StoreUnavailableError(
                f"{self.location}: a statement of up to {size} bytes can exceed the server's "
                f"max_allowed_packet={self._max_packet}; nothing was written",
                hint=f"set max_allowed_packet to {_DEFAULT_PACKET}",
            )
        else:
            half = len(rows) // 2
            yield from self._split_to_packets(rows[:half])
            yield from self._split_to_packets(rows[half:])

    # -- the schema ------------------------------------------------------------

    def lock_schema(self, connection: sa.Connection) -> None:
        # A DDL statement ends the transaction, so the schema lock must belong to the connection.
        lock = f"SELECT GET_LOCK({_SCHEMA_LOCK}, {LOCK_TIMEOUT_S})"
        if connection.exec_driver_sql(lock).scalar() != 1:
            raise StoreBusyError(f"{self.location}: another process is changing the schema")

    def unlock_schema(self, connection: sa.Connection, *, done: bool) -> None:
        del done
        connection.exec_driver_sql(f"DO RELEASE_LOCK({_SCHEMA_LOCK})")


def _write_settings() -> str:
    """Return the statement that sets the settings of a session for writes."""
    return (
        f"{_SQL_MODE}, innodb_lock_wait_timeout = {WRITE_LOCK_TIMEOUT_S}, "
        f"lock_wait_timeout = {LOCK_TIMEOUT_S}"
    )


def _spelled(column_type: str) -> str:
    """Return SQLAlchemy's spelling of the type of a column."""
    return re.sub(r"^INT\b", "INTEGER", _WIDTH.sub("", column_type.upper()))


def _max_row_size(row: tuple[Any, ...]) -> int:
    """Return the maximum size of a row in the text of a statement.

    In the text, a byte of the payload can need two characters.
    """
    return _MAX_ROW_BYTES + sum(2 * len(value) for value in row if isinstance(value, bytes))


def check_version(version: str, location: str) -> None:
    """Raise an error if the version text shows that the server is not MariaDB or is too old."""
    match = re.search(r"(\d+)\.(\d+)\.\d+-MariaDB", version)
    if match is None:
        problem = "is not MariaDB"
    elif (int(match[1]), int(match[2])) < MIN_VERSION:
        problem = "is too old"
    else:
        return
    needed = ".".join(map(str, MIN_VERSION))
    raise StoreUnavailableError(
        f"{location}: the server is {version}, which {problem}",
        hint=f"use MariaDB {needed} or later",
    )
