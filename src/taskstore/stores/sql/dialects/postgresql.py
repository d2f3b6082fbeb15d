"""The PostgreSQL dialect, through psycopg 3."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql.expression import Executable

from taskstore.errors import StoreUnavailableError, ValidationError
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
    check_driver_arguments,
    column_declaration,
    index_declaration,
    indexed_columns,
    integer_option,
    require_user,
    schema_option,
)
from taskstore.stores.sql.errors import postgresql_error_kind
from taskstore.stores.sql.rows import ClaimedSeqs
from taskstore.stores.sql.statements import Statements
from taskstore.stores.sql.tables import ONLY_ON, SCHEMA_EPOCH, metadata

_CHANNEL = "taskstore_"
_LISTENER_KEY = "hashtextextended({}, 0)"

_LOCK_OWNERS = """
SELECT DISTINCT held.pid, activity.application_name, host(activity.client_addr), activity.state,
    extract(epoch FROM clock_timestamp() - activity.xact_start)::int
FROM pg_locks AS held LEFT JOIN pg_stat_activity AS activity ON activity.pid = held.pid
WHERE held.relation = %s::regclass AND held.granted
    AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND held.mode <> 'AccessShareLock' AND held.pid <> pg_backend_pid()
    AND NOT EXISTS (SELECT FROM pg_locks AS wait WHERE wait.pid = held.pid AND NOT wait.granted)
"""
"""Selects server processes that own a row or table lock on the head table and wait for no lock."""

_COLUMNS = """
SELECT class.relname::text, attr.attname::text, format_type(attr.atttypid, attr.atttypmod),
    coll.collname::text, NOT attr.attnotnull
FROM pg_attribute AS attr JOIN pg_class AS class ON class.oid = attr.attrelid
LEFT JOIN pg_collation AS coll ON coll.oid = attr.attcollation
WHERE attr.attrelid = to_regclass(%s) AND attr.attnum > 0 AND NOT attr.attisdropped
"""
"""Selects the table, the name, the type, the collation and the nullability of each column of a
table."""

_INDEXES = """
SELECT class.relname::text, CASE WHEN item.indisprimary THEN '' ELSE index.relname::text END,
    key.columns || CASE WHEN item.indisvalid AND item.indisready THEN '' ELSE ', invalid' END,
    item.indisunique, pg_get_expr(item.indpred, item.indrelid)
FROM pg_index AS item JOIN pg_class AS class ON class.oid = item.indrelid
JOIN pg_class AS index ON index.oid = item.indexrelid
CROSS JOIN LATERAL (
    SELECT string_agg(
        coalesce(attr.attname::text, 'an expression')
        || coalesce(' COLLATE ' || coll.collname::text, '')
        || CASE WHEN item.indoption[n] <> 0 THEN ' DESC' ELSE '' END, ', ' ORDER BY n
    )
    FROM generate_series(0, item.indnkeyatts - 1) AS n LEFT JOIN pg_attribute AS attr
        ON attr.attrelid = item.indrelid AND attr.attnum = item.indkey[n]
    LEFT JOIN pg_collation AS coll
        ON coll.oid = item.indcollation[n] AND coll.oid <> attr.attcollation
) AS key (columns)
WHERE item.indrelid = to_regclass(%s)
"""
"""Selects the table, the name, the columns, the uniqueness and the condition of each index of a
table.  The name of a primary key is empty.  A collation or an order that is not the default is part
of the columns, and so is the mark of an index that the server does not use."""


class PostgreSQLStatements(Statements):
    """The statements of PostgreSQL.  If there is a listener, the claim of seqs also sends a NOTIFY.

    A transaction with a NOTIFY owns a server-wide lock while the server flushes its COMMIT to disk.
    A ledger without listeners avoids this cost.  Each listener owns a shared advisory lock, and a
    claim tries to take this lock exclusively.  If the claim gets the advisory lock, there is no
    listener.  The claiming transaction then owns the advisory lock until the transaction ends.  A
    new listener can get the advisory lock only after this transaction has ended.  After the
    listener has got the advisory lock, the listener reads the head.
    """

    @cached_property
    def claim(self) -> str:
        """Return the statement that claims seqs.

        The result has two columns more than in other dialects: the notification, which callers
        ignore, and the id of the server process.
        """
        channel = f"'{_CHANNEL}' || taskstore_head.ledger_id"
        notification: sa.ColumnElement[Any] = sa.literal_column(
            f"CASE WHEN pg_try_advisory_xact_lock({_LISTENER_KEY.format(channel)}) THEN NULL "
            f"ELSE CAST(pg_notify({channel}, '') AS text) END"
        )
        return self._claim_returning(notification, sa.func.pg_backend_pid())

    lock_as_listener = f"SELECT pg_try_advisory_lock_shared({_LISTENER_KEY.format('%s')})"
    """Takes a listener's shared advisory lock.  While a listener owns this lock, writers send
    notifications.  The parameter is the name of the channel."""
    unlock_as_listener = f"SELECT pg_advisory_unlock_shared({_LISTENER_KEY.format('%s')})"
    """Releases a listener's shared advisory lock.  The parameter is the name of the channel."""

    @staticmethod
    def channel_of(ledger_id: str) -> str:
        """Return the name of the channel for the notifications of a ledger."""
        return _CHANNEL + ledger_id


_CONNECT_DEFAULTS: dict[str, object] = {
    "application_name": "taskstore",
    # A host can disappear without closing its connections.  With these options, a new
    # connection fails after 5 s per host, and an open connection fails after 25 s.  With the
    # default options, a connection fails only after hours.
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
"""Default values for connection options of the driver.  An option in the URL overrides its
default."""


_BEGIN_WRITE = "BEGIN ISOLATION LEVEL READ COMMITTED"

_AUTOMATIC = -1
"""Means that the URL has no prepare threshold: statements are prepared unless there is a pooler."""


def _prepare_threshold(text: str) -> int | None:
    """Parse the option ``prepare_threshold``: the number of executions before a statement is
    prepared.

    Returns ``None`` if statements are never prepared.
    """
    if text.lower() in ("0", "none"):
        return None
    try:
        return int(integer_option(1)(text))
    except ValueError:
        raise ValueError("must be '0' or 'none' (prepare nothing), or a positive integer") from None


def _utf8(text: str) -> str:
    if text.lower().replace("-", "") != "utf8":
        raise ValueError("must be 'utf8'")
    return text


def _ports(text: str) -> str:
    """Check the ports of one or several hosts.  An empty port is the default port."""
    for port in filter(None, map(str.strip, text.split(","))):
        integer_option(*PORTS)(port)
    return text


def _hosts(text: str) -> str:
    """Check the ports in the names of one or several hosts.  SQLAlchemy ignores the port 0."""
    for host in text.split(","):
        name, colon, port = host.rpartition(":")
        if colon and port.isdecimal() and (":" not in name or name.endswith("]")):
            integer_option(*PORTS)(port)
    return text


def _host_addresses(text: str) -> str:
    """Check the IP addresses of one or several hosts.  libpq looks up a host without an address."""
    for address in filter(None, map(str.strip, text.split(","))):
        try:
            socket.getaddrinfo(address, None, flags=socket.AI_NUMERICHOST)  # as in libpq
        except OSError:
            raise ValueError("must be an IP address") from None
    return text


def _no_replication(_text: str) -> str:
    raise ValueError("must not be used: a replication connection cannot read or write a ledger")


_OPTIONS: dict[str, URLOption] = {
    "host": _hosts,
    "port": _ports,
    "hostaddr": _host_addresses,
    "replication": _no_replication,
    "prepare_threshold": _prepare_threshold,
    "schema": schema_option,
    "client_encoding": _utf8,
    **dict.fromkeys(
        (
            "connect_timeout",
            "keepalives",
            "keepalives_idle",
            "keepalives_interval",
            "keepalives_count",
            "tcp_user_timeout",
        ),
        integer_option(),
    ),
}
"""The options of a URL that libpq does not know, or that libpq does not check in every case."""


_BY_INDEX = (("seqscan", "bitmapscan", "sort", "incremental_sort"), ("indexscan", "indexonlyscan"))
_BY_TABLE = (("indexscan", "indexonlyscan", "bitmapscan"), ("seqscan",))
"""The planner settings to switch off, and the planner settings to switch on.  With ``_BY_INDEX``, a
query in the order of an index reads this index.  With ``_BY_TABLE``, the query reads the whole
table."""


class PostgreSQLMaintenance(Maintenance):
    """The maintenance of a PostgreSQL database."""

    has_primary_key_index = True

    def declarations(self, session: DriverSession) -> Declarations:
        found: Declarations = {}
        for table in metadata.sorted_tables:
            name = (_qualified(table.name, session.database.schema),)
            found |= (
                column_declaration(of, column, _spelled(kind), collation, nullable=nullable)
                for of, column, kind, collation, nullable in session.rows(_COLUMNS, name)
            )
            found |= (
                index_declaration(of, index, columns, unique=unique, condition=condition)
                for of, index, columns, unique, condition in session.rows(_INDEXES, name)
            )
        return found

    def index_digests(
        self, session: DriverSession, index: sa.Index
    ) -> tuple[Digest, Digest] | None:
        names = session.database.names
        if names[0] not in ONLY_ON.get(str(index.name), names):
            return None
        condition = index.dialect_options["postgresql"]["where"]
        rows = sa.select(*indexed_columns(index)).offset(sa.literal_column("0"))
        if condition is not None:
            rows = rows.where(condition)
        found = []
        # Each query reads the rows in the order in which they are stored, so no query sorts them.
        for (off, on), query in ((_BY_INDEX, rows.order_by(*index.columns)), (_BY_TABLE, rows)):
            for name in (*off, *on):
                session.execute(f"SET LOCAL enable_{name} = {'off' if name in off else 'on'}")
            found.append(tuple(session.select(_digest_of(query))[0]))
        return found[0], found[1]


def _digest_of(rows: sa.Select[Any]) -> Executable:
    """Return the query for the digest of the rows of a query."""
    indexed = rows.subquery("indexed")
    # The 64-bit hash of the text of a whole row.
    row = sa.cast(sa.literal_column(indexed.name), sa.Text)
    hashed = sa.func.hashtextextended(row, sa.literal_column("0"))
    return sa.select(sa.func.count(), sa.func.sum(hashed)).select_from(indexed)


class PostgreSQLDatabase(Database):
    """A PostgreSQL database."""

    names = ("postgresql",)
    maintenance = PostgreSQLMaintenance()
    extra = "postgres"
    space_hint = "the owner of the tables can run VACUUM FULL in the database"
    driver = "psycopg"
    has_schemas = True
    statements = PostgreSQLStatements
    sql: PostgreSQLStatements
    # The constructors of SQLAlchemy's dialects have no type annotations.
    sa_dialect = PGDialect_psycopg(paramstyle="format")  # type: ignore[no-untyped-call]
    begin_read = ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",)
    error_kind = staticmethod(postgresql_error_kind)
    _begin_write = _BEGIN_WRITE
    _synchronous_commit: tuple[str, ...] = ()
    _prepares = True
    """False if the driver must not prepare statements: each prepared statement belongs to one
    server session."""

    @classmethod
    def url_options(cls) -> Mapping[str, URLOption]:
        from psycopg import pq

        names = (option.keyword.decode() for option in pq.Conninfo.get_defaults())
        return {**dict.fromkeys(names, str), **_OPTIONS}

    @classmethod
    def connect(
        cls, url: sa.URL, options: Mapping[str, Any], *, durability: str, read_only: bool
    ) -> PostgreSQLDatabase:
        from psycopg import pq

        defaults = {**_CONNECT_DEFAULTS}
        if _has_several_hosts(url):
            defaults["target_session_attrs"] = "read-write"
        arguments = {name: defaults[name] for name in defaults.keys() - url.query.keys()}
        threshold = options.get("prepare_threshold", _AUTOMATIC)
        if threshold is not _AUTOMATIC:
            arguments["prepare_threshold"] = threshold
        url = url.difference_update_query(["prepare_threshold", "schema"])
        if "service" not in options:
            [user] = [item.val for item in pq.Conninfo.get_defaults() if item.keyword == b"user"]
            require_user(url, user)
        try:
            engine = sa.create_engine(
                url,
                isolation_level="AUTOCOMMIT",
                client_encoding="utf8",
                hide_parameters=True,
                connect_args=arguments,
            )
            driver_arguments = engine.dialect.create_connect_args(url)[1]
        except (sa.exc.ArgumentError, ValueError) as error:
            raise ValidationError("url", f"has an invalid option 'host': {error}") from None
        _check_connection(url, driver_arguments)
        database = cls(
            engine,
            owned=True,
            durability=durability,
            read_only=read_only,
            schema=options.get("schema"),
        )
        if threshold is None:
            database.use_pooler()
        check_driver_arguments(database, url)
        database._configure_connections(prepares=threshold is not _AUTOMATIC)
        return database

    def _configure_connections(self, *, prepares: bool) -> None:
        """Configure each new connection of an owned engine.

        If a pooler is detected, ``prepares`` is passed to :meth:`use_pooler`.
        """

        @event.listens_for(self.engine, "connect")
        def configure(raw: Any, record: Any) -> None:
            record.info["generation"] = self.generation
            if self.is_behind_pooler(raw):
                self.use_pooler(prepares=prepares)
            if not self.pooled:
                raw.execute("; ".join(f"SET {setting}" for setting in _write_settings()))
            raw.commit()

        @event.listens_for(self.engine, "checkout")
        def discard_old(_raw: object, record: Any, _proxy: object) -> None:
            if record.info["generation"] != self.generation:
                raise sa.exc.DisconnectionError  # the pool makes a new connection

    def is_behind_pooler(self, raw: Any) -> bool:
        """Return whether a pooler is between this connection and the server.

        For cancel requests, a pooler gives each client a process id that is not the id of a server
        process.
        """
        [pid] = raw.execute("SELECT pg_backend_pid()").fetchone()
        return bool(pid != raw.info.backend_pid)

    def use_pooler(self, *, prepares: bool = False) -> None:
        """Stop relying on server sessions, because a pooler was detected; see :attr:`pooled`.

        If ``prepares`` is true, the driver still prepares statements: the pooler supports prepared
        statements.
        """
        self.pooled, self._prepares = True, prepares and self._prepares
        self._set_begin_write()

    def cursor(self, raw: Any) -> Any:
        from psycopg.rows import tuple_row

        if not self._prepares:
            # The connection of a host keeps this setting: a statement that the host itself
            # prepares would fail behind the pooler too.
            raw.prepare_threshold = None
        # With binary results, the server does not encode bytes in hexadecimal.
        return raw.cursor(binary=True, row_factory=tuple_row)

    def configure(self, session: DriverSession) -> None:
        [encoding] = session.row("SHOW server_encoding")
        if encoding != "UTF8":
            raise StoreUnavailableError(
                f"{self.location} has the encoding {encoding}, which cannot encode every text",
                hint="use a database with the encoding UTF8",
            )
        [synchronous] = session.row("SHOW synchronous_commit")
        wanted = synchronous
        if self.durability == "process":
            wanted = "off"
        elif synchronous == "off":
            wanted = "on"
        if wanted != synchronous:
            self._synchronous_commit = (f"synchronous_commit = {wanted}",)
        if not self.owned and self.is_behind_pooler(session.raw):
            self.use_pooler()
        self._set_begin_write()
        [fsync] = session.row("SHOW fsync")
        if fsync == "off" and not self.read_only:
            self.add_notice(
                f"{self.location}: the server runs with fsync=off, so no commit survives power loss"
            )

    def _set_begin_write(self) -> None:
        """Choose the statements that begin a write transaction.

        If other programs can use the same session, the statements change settings only for the
        transaction, so that the session keeps its own settings.
        """
        shared = self.pooled or not self.owned
        settings = (*(_write_settings() if shared else ()), *self._synchronous_commit)
        begin = f"{_BEGIN_WRITE} READ ONLY" if self.read_only else _BEGIN_WRITE
        self._begin_write = "; SET LOCAL ".join((begin, *settings))

    def begin_write(self, session: DriverSession) -> None:
        # The text can contain two statements, for one round trip; such a text cannot be prepared.
        session.raw.execute(self._begin_write, prepare=False)

    def claim_seqs(
        self, session: DriverSession, count: int, now: int, base: int
    ) -> ClaimedSeqs | None:
        rows = session.rows(self.sql.claim, (count, now, now, SCHEMA_EPOCH, base))
        if rows and not self.pooled and rows[0][-1] != session.raw.info.backend_pid:
            # The transaction runs in another session than the connection began with.  There, the
            # prepared statements of this connection can be those of another connection.
            dbapi: Any = self.engine.dialect.loaded_dbapi
            raise dbapi.errors.InvalidSqlStatementName(
                "this connection is served by another PostgreSQL process than before"
            )
        return ClaimedSeqs(*rows[0][:4]) if rows else None

    def lock_owners(self, session: DriverSession) -> Sequence[str]:
        return [
            f"server process {pid}, {name or 'unnamed'} at {host or 'this machine'}, "
            f"{state or 'in an unknown state'}"
            + (f", in a transaction for {seconds} s" if seconds is not None else "")
            for pid, name, host, state, seconds in session.rows(_LOCK_OWNERS, (self._head_table(),))
        ]

    def _head_table(self) -> str:
        return _qualified("taskstore_head", self.schema)

    def use_schema(self, connection: sa.Connection) -> None:
        if self.schema is not None:
            path = sa.func.set_config("search_path", _quoted(self.schema), sa.true())
            connection.execute(sa.select(path))

    def create_schema(self, connection: sa.Connection) -> None:
        if self.schema is None or sa.inspect(connection).has_schema(self.schema):
            return
        try:
            connection.execute(sa.schema.CreateSchema(self.schema))
        except sa.exc.ProgrammingError as error:
            raise StoreUnavailableError(
                f"{self.location}: the schema does not exist and cannot be created: "
                f"{self.translator.text(error)}",
                hint=f"let an administrator run: CREATE SCHEMA {_quoted(self.schema)} "
                "AUTHORIZATION ..., with the name of this user",
            ) from self.translator.cause(error)

    def lock_schema(self, connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")
        # A host's connection waits without a timeout.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'")
        self.use_schema(connection)
        # Ledgers in two schemas do not wait for each other.
        name = sa.func.coalesce(self.schema, sa.func.current_schema(), "")
        key = sa.func.hashtextextended(sa.literal("taskstore.").concat(name), 0)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))

    def commit(self, session: DriverSession) -> None:
        warnings: list[str] = []

        def collect_warning(notice: Any) -> None:
            # The fields must be read here: libpq frees the notice after this call.
            if notice.severity_nonlocalized == "WARNING":
                warnings.append(f"{notice.message_primary} ({notice.message_detail})")

        session.raw.add_notice_handler(collect_warning)
        try:
            session.execute("COMMIT")
        finally:
            session.raw.remove_notice_handler(collect_warning)
        if warnings:
            # The server reports success, but the commit does not have the requested durability,
            # for example because the wait for a synchronous standby was canceled.
            dbapi: Any = self.engine.dialect.loaded_dbapi
            raise dbapi.OperationalError(warnings[0])

    def invalidate_connections(self) -> None:
        self.generation += 1

    def rollback(self, session: DriverSession) -> None:
        raw = session.raw
        if raw.closed:
            raise StoreUnavailableError(f"{self.location}: the connection is closed")
        if raw.info.transaction_status != 0:  # IDLE
            raw.execute("ROLLBACK")


def _check_connection(url: sa.URL, arguments: Mapping[str, Any]) -> None:
    """Raise :class:`~taskstore.ValidationError` for options of a URL that libpq refuses before it
    contacts a server.  ``arguments`` are the arguments of the driver that the URL gives."""
    hosts, addresses = (str(arguments.get(name, "")).split(",") for name in ("host", "hostaddr"))
    if "host" in arguments and "hostaddr" in arguments and len(hosts) != len(addresses):
        raise ValidationError(
            "url",
            f"has an invalid option 'hostaddr': it has {len(addresses)} addresses, but the URL "
            f"has {len(hosts)} hosts",
        )
    given = {name: arguments[name] for name in url.query if name not in _UNREACHABLE}
    accepted = _refusal({})
    reason = _refusal(given)
    if reason == accepted:
        return
    names = [
        name
        for name in given
        if _refusal({other: given[other] for other in given if other != name}) == accepted
    ] or [name for name in given if _refusal({name: given[name]}) != accepted]
    for name, value in given.items():
        if _SECRET.search(name):
            reason = reason.replace(str(value), "***")
    shown = " or ".join(map(repr, names or given))
    raise ValidationError("url", f"has an invalid option {shown}: {reason}")


_UNREACHABLE: dict[str, str] = {
    "host": "127.0.0.1",
    "hostaddr": "",
    # libpq refuses this port after it has checked all options, and before it contacts the host.
    "port": "0",
    # Without a user name, libpq asks the system for the name; without a password, libpq reads the
    # file of the user's passwords.
    "user": "taskstore",
    "password": "taskstore",
    "dbname": "taskstore",
}
"""Parameters of a connection to no server."""

_SECRET = re.compile("key|pass|secret")
"""Matches the name of an option whose value can be a secret."""


def _refusal(arguments: Mapping[str, Any]) -> str:
    """Return libpq's reason to refuse a connection to no server that has these arguments.

    If libpq accepts the arguments, the reason is always the same: the server.  The language of
    libpq's messages is therefore not relevant.
    """
    from psycopg import Error, conninfo, pq

    try:
        text = conninfo.make_conninfo("", **arguments, **_UNREACHABLE)
    except Error as error:
        return " ".join(str(error).split())
    connection = pq.PGconn.connect_start(text.encode())
    try:
        return " ".join(connection.get_error_message().split())
    finally:
        connection.finish()


def _write_settings() -> tuple[str, ...]:
    """Return the settings of a connection for writes."""
    return (
        f"lock_timeout = '{WRITE_LOCK_TIMEOUT_S}s'",
        f"idle_in_transaction_session_timeout = '{LOCK_TIMEOUT_S}s'",
        # A COMMIT that does not have the requested durability gives a warning.
        "client_min_messages = warning",
    )


def _quoted(name: str) -> str:
    """Return a name as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _spelled(column_type: str) -> str:
    """Return SQLAlchemy's spelling of the type of a column."""
    return column_type.upper().replace("CHARACTER VARYING", "VARCHAR")


def _qualified(table: str, schema: str | None) -> str:
    return table if schema is None else f"{_quoted(schema)}.{table}"


def _has_several_hosts(url: sa.URL) -> bool:
    hosts = url.query.get("host", url.host or "")
    return not isinstance(hosts, str) or "," in hosts
