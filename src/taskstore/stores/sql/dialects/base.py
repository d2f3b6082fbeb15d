"""The base class of all dialects, and its connection wrapper."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote

import sqlalchemy as sa
from sqlalchemy import ColumnElement
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.expression import Executable

from taskstore.errors import StoreUnavailableError, UnsupportedError, ValidationError
from taskstore.store.opening import redacted, scheme_of
from taskstore.stores.sql.errors import ErrorKind, Translator
from taskstore.stores.sql.rows import ClaimedSeqs
from taskstore.stores.sql.statements import BATCH_SIZES, Statements, compile_for
from taskstore.stores.sql.tables import SCHEMA_EPOCH

log = logging.getLogger("taskstore")

LOCK_TIMEOUT_S = 30
"""The timeout of table and schema locks and of idle transactions, in seconds."""

WRITE_LOCK_TIMEOUT_S = 15
"""The timeout of one attempt to get the write lock, in seconds.  After two attempts, the retry
policy knows whether the other writers make progress."""

_LOCATION_OPTIONS = ("host", "port", "unix_socket")


_SEVERAL_HOSTS = re.compile(r"@[^/?@]*,[^/?@]*(/|\?|$)")
"""Matches a list of hosts in libpq's syntax, which SQLAlchemy does not parse."""


_Row = TypeVar("_Row")

Digest = tuple[Any, Any]
"""A digest of some rows: the number of the rows, and the sum of the hashes of the indexed
columns."""

Declarations = dict[str, str]
"""Maps each column and each index, for example ``the index ix_tasks_owner of the table tasks``, to
its declaration, for example ``(owner_key, created_at, task_id)``."""


def row_groups(rows: Sequence[_Row]) -> Sequence[Sequence[_Row]]:
    """Split rows into groups; the size of each group is one of ``BATCH_SIZES``."""
    if len(rows) == 1:
        return (rows,)
    groups: list[Sequence[_Row]] = []
    start, left = 0, len(rows)
    for size in BATCH_SIZES:
        while left >= size:
            groups.append(rows[start : start + size])
            start += size
            left -= size
    return groups


def flat_parameters(rows: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the parameters of a statement for several rows, as one tuple."""
    return rows[0] if len(rows) == 1 else tuple(chain.from_iterable(rows))


class DriverSession:
    """One connection in the driver's autocommit mode, and its driver cursor.

    All statements, including Core statements, run on this cursor.  Statements do not run through
    SQLAlchemy, because a host's engine can have listeners that begin a transaction of their own
    when SQLAlchemy begins a transaction.  ``restore_statements`` are the SQL statements that
    restore a host's connection after use.
    """

    __slots__ = ("connection", "cursor", "database", "raw", "restore_statements")

    def __init__(self, connection: sa.Connection, database: Database) -> None:
        self.connection = connection
        self.raw: Any = connection.connection.driver_connection
        self.cursor = database.cursor(self.raw)
        self.database = database
        self.restore_statements: tuple[str, ...] = ()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        """Run a statement."""
        self.cursor.execute(sql, parameters)

    def execute_dml(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run an INSERT, UPDATE or DELETE; return the number of affected rows."""
        self.cursor.execute(sql, parameters)
        count = int(self.cursor.rowcount)
        if count < 0:
            # The standard library's sqlite3 reports no count for a statement with a CTE.
            count = int(self.row("SELECT changes()")[0])
        return count

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Return all rows of a query.

        All rows are fetched at once, because SQLite keeps the read lock until the last row is
        fetched.
        """
        self.cursor.execute(sql, parameters)
        return list(self.cursor.fetchall())

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """Return the first row of a query, or ``None``."""
        rows = self.rows(sql, parameters)
        return rows[0] if rows else None

    def restore_later(self, *statements: str) -> None:
        """Add statements that restore settings when the connection is released.

        The statements of the most recent call run first.
        """
        self.restore_statements = (*statements, *self.restore_statements)

    def restore_settings(self) -> None:
        """Restore the settings that taskstore changed on a host's connection."""
        for statement in self.restore_statements:
            self.rows(statement)
        self.restore_statements = ()

    # -- Core statements ---------------------------------------------------

    def execute_core(self, statement: Executable) -> int:
        """Run a Core INSERT, UPDATE or DELETE; return the number of affected rows."""
        return self.execute_dml(*self._compiled(statement))

    def select(self, query: Executable) -> list[Any]:
        """Return all rows of a Core query, as tuples."""
        return self.rows(*self._compiled(query))

    def scalar(self, query: Executable) -> Any:
        """Return the first value of the first row of a Core query, or ``None``."""
        rows = self.select(query)
        return rows[0][0] if rows else None

    def _compiled(self, statement: Executable) -> tuple[str, tuple[Any, ...]]:
        compiled = compile_for(
            self.database.sa_dialect,
            self.database.schema,
            statement,
            compile_kwargs={"render_postcompile": True},
        )
        values = compiled.params
        return str(compiled), tuple(values[name] for name in compiled.positiontup or ())


class VacuumReport(NamedTuple):
    """The result of a vacuum, in bytes: the free space that the vacuum needed beside the file, the
    size of the file before the vacuum, and the size of the file after the vacuum."""

    needed_bytes: int
    before_bytes: int
    after_bytes: int


class Guard(Protocol):
    """Detects that an open database file was moved, removed, replaced or changed."""

    def check(self) -> None:
        """Raise :class:`~taskstore.StoreUnavailableError` if the file has changed.

        The check must be cheap, because the store checks before each commit and after each read.
        """

    def check_fully(self) -> None:
        """Check the files in every case; :meth:`check` can skip the files to save time."""


class Maintenance:
    """Maintains the files, and checks the indexes, of the databases of one dialect.

    An instance stores nothing about a database: each method gets a session of the database.
    """

    has_primary_key_index: ClassVar[bool] = False
    """True if the index of a primary key is separate from the rows of its table, so that
    :meth:`index_digests` can compare the two."""

    def freelist_count(self, session: DriverSession) -> int:
        """Return the number of unused pages that taskstore can remove from the database file."""
        del session
        return 0

    def release_pages(self, session: DriverSession) -> None:
        """Remove some unused pages from the database file, in a small write transaction."""

    def shorten_files(self, session: DriverSession) -> None:
        """Give the space of the removed pages back to the file system."""

    def engine_problems(self, session: DriverSession) -> list[str]:
        """Return the problems that the engine's own integrity check finds.

        The check takes no write lock.
        """
        del session
        return []

    def declarations(self, session: DriverSession) -> Declarations | None:
        """Return the declarations of all columns and indexes that the tables of the ledger have in
        the database.

        Returns ``None`` if :meth:`engine_problems` already compares the declarations.
        """
        del session
        return None

    def index_digests(
        self, session: DriverSession, index: sa.Index
    ) -> tuple[Digest, Digest] | None:
        """Return two digests: the digest of the rows that a read of an index gives, and the digest
        of the rows of the table that the index must contain.

        Returns ``None`` if :meth:`engine_problems` already compares each index with the table, or
        if this dialect does not have the index.

        The caller has begun a read transaction.  The method can change the settings of this
        transaction.
        """
        del session, index
        return None

    def scrub_deleted(self, session: DriverSession) -> None:
        """Erase deleted bytes that are still in the files of the database."""


class Database:
    """One database.  ``owned`` is true if taskstore made the engine, and false if a host did."""

    names: ClassVar[tuple[str, ...]]
    """The names that SQLAlchemy uses for this dialect."""
    dialects: ClassVar[dict[str, type[Database]]] = {}
    """Maps each name that SQLAlchemy uses for a dialect to the :class:`Database` subclass of the
    dialect."""
    extra: ClassVar[str] = ""
    """The name of taskstore's extra that installs the driver; empty if the driver needs no
    extra."""
    driver: ClassVar[str]
    """The driver for which the statements are compiled."""
    sa_dialect: ClassVar[Dialect]
    statements: ClassVar[type[Statements]] = Statements
    sql: Statements
    """The compiled statements.  All databases of the dialect that have no ``schema`` share this
    instance."""
    has_schemas: ClassVar[bool] = False
    """True if a database of this dialect has schemas: the caller can choose the schema for the
    tables."""
    begin_read: ClassVar[tuple[str, ...]] = ("BEGIN",)
    """The statements that begin a read-only transaction in which all reads see the same commits."""
    begin_schema: ClassVar[tuple[str, ...]] = ("BEGIN",)
    """The statements that begin a transaction in which no other process can change the schema."""
    maintenance: ClassVar[Maintenance] = Maintenance()
    space_hint: ClassVar[str | None] = None
    """A hint for the operator: how to give the free space of the tables back to the file system."""
    ddl_autocommits: ClassVar[bool] = False
    """True if the database commits each DDL statement separately.  On such a database, a killed
    migration leaves the effects of the completed statements behind."""
    waits_for_locks: ClassVar[bool] = True
    """True if the database itself waits until a lock is free; if false, the store retries."""
    pooled = False
    """True if a pooler between the client and the server can run each transaction of a connection
    in another server session.  If true, the store does not rely on a server session: the store uses
    no session settings, no prepared statements and no LISTEN."""
    generation = 0
    """The number of possible failovers of the server since this object was created."""
    guard: Guard | None = None
    url = ""
    """The URL as the caller gave it, with the password; empty for a host's engine."""
    links_allowed = False
    """True if the caller allows that the file of the database has several names."""
    temp_dir: Path | None = None
    """The directory for temporary files; ``None`` for the system's directory."""

    def __init__(
        self,
        engine: sa.Engine,
        *,
        owned: bool,
        durability: str = "full",
        read_only: bool = False,
        schema: str | None = None,
    ) -> None:
        self.engine = engine
        self.owned = owned
        self.durability = durability
        self.read_only = read_only
        self.schema = schema
        if schema is not None:
            self.sql = self.statements(self.sa_dialect, schema)
        self.notices: list[str] = []
        self.location = self._location()
        dbapi: Any = engine.dialect.loaded_dbapi
        self.translator = Translator(
            self.location,
            dbapi.Error,
            self.error_kind,
            _password(engine.url),
            waits=self.waits_for_locks or read_only,
        )

    @classmethod
    def open(cls, url: str, *, durability: str, read_only: bool) -> Database:
        """Return the database that a URL of this dialect names, with a new engine."""
        parsed = parse(url)
        try:
            options = url_options(url, cls.url_options())
            return cls.connect(parsed, options, durability=durability, read_only=read_only)
        except ImportError as error:
            raise StoreUnavailableError(
                f"the driver of {parsed.drivername} is not installed: {error}",
                hint=f"pip install 'taskstore[{cls.extra}]'",
            ) from error

    @classmethod
    def url_options(cls) -> Mapping[str, URLOption]:
        """Return the parser of each option that a server's URL can have, by option name."""
        raise AssertionError

    @classmethod
    def connect(
        cls, url: sa.URL, options: Mapping[str, Any], *, durability: str, read_only: bool
    ) -> Database:
        """Return the database of a server's URL, with a new engine.  ``options`` are the parsed
        options of the URL."""
        raise AssertionError(url, options, durability, read_only)

    def __init_subclass__(cls) -> None:
        Database.dialects.update(dict.fromkeys(cls.names, cls))
        cls.sql = cls.statements(cls.sa_dialect)

    def _location(self) -> str:
        url = self.engine.url
        options = {name: url.query[name] for name in _LOCATION_OPTIONS if name in url.query}
        if self.schema is not None:
            options["schema"] = self.schema
        return url.set(query=options).render_as_string(hide_password=True)

    @staticmethod
    def error_kind(error: BaseException) -> ErrorKind:
        """Classify a driver's exception."""
        raise AssertionError(error)

    @staticmethod
    def suffix(column: ColumnElement[str], length: int) -> ColumnElement[str]:
        """Return the expression for the last ``length`` characters of a text column."""
        return sa.func.right(column, length)

    def add_notice(self, text: str | None) -> None:
        """Add a notice to the store's list of notices, and log each notice once as a warning."""
        if text is not None and text not in self.notices:
            self.notices.append(text)
            log.warning("%s", text)

    def current_notices(self) -> tuple[str, ...]:
        """Return the added notices, and notices about the files as they are at this moment."""
        return tuple(self.notices)

    def cursor(self, raw: Any) -> Any:
        """Return a driver cursor that returns rows as tuples."""
        return raw.cursor()

    def check_server(self, connection: sa.Connection) -> None:
        """Raise an error if the server or a host's connection has unsupported settings."""

    def use_schema(self, connection: sa.Connection) -> None:
        """Until the transaction ends, let table names without a schema refer to ``schema``."""

    def create_schema(self, connection: sa.Connection) -> None:
        """Create ``schema`` in the database if it does not exist."""

    def lock_schema(self, connection: sa.Connection) -> None:
        """Take the schema lock.

        Other processes that take the schema lock wait until :meth:`unlock_schema` is called.
        """
        for statement in self.begin_schema:
            connection.exec_driver_sql(statement)

    def unlock_schema(self, connection: sa.Connection, *, done: bool) -> None:
        """Commit the schema changes and release the schema lock.

        If ``done`` is false, roll back the schema changes instead, except in a database that
        commits each DDL statement separately.
        """
        connection.exec_driver_sql("COMMIT" if done else "ROLLBACK")

    def register_open(self) -> None:
        """Register a store that opens the database.

        The store calls this method before it opens its first connection.
        """

    def configure(self, session: DriverSession) -> None:
        """Read and change the settings of the database.

        The store calls this method after the store has checked the schema.
        """

    def configure_borrowed_connection(self, session: DriverSession) -> None:
        """Limit the timeouts of a host's connection that was just acquired."""

    def configure_writer(self, session: DriverSession) -> None:
        """Configure the write connection of an engine that taskstore owns."""

    def begin_write(self, session: DriverSession) -> None:
        """Begin a write transaction."""
        raise AssertionError(session)

    def lock_owners(self, session: DriverSession) -> Sequence[str]:
        """Return the known owners of the write lock; the query must not wait for a lock."""
        del session
        return ()

    def commit(self, session: DriverSession) -> None:
        """Commit the transaction; return when the commit has the requested durability."""
        session.cursor.execute("COMMIT")

    def use_pooler(self) -> None:
        """Stop relying on server sessions, because a pooler was detected; see :attr:`pooled`."""

    def invalidate_connections(self) -> None:
        """Discard the pooled connections of an owned engine after a possible failover."""

    def rollback(self, session: DriverSession) -> None:
        """Roll back the transaction if one is open; raise an error if the connection is broken."""
        raise AssertionError(session)

    def claim_seqs(
        self, session: DriverSession, count: int, now: int, base: int
    ) -> ClaimedSeqs | None:
        """Claim seqs under the lock of the head row, and read the id of the commit at seq ``base``.

        Returns ``None`` if the schema epoch is too new for a write by this version of taskstore.
        """
        rows = session.rows(self.sql.claim, (count, now, now, SCHEMA_EPOCH, base))
        return ClaimedSeqs(*rows[0][:4]) if rows else None

    def insert(self, session: DriverSession, rows: Sequence[tuple[Any, ...]], floor: int) -> int:
        """Insert tasks (``rows`` is a group of :meth:`row_groups`); return the number of new rows.

        A task is inserted only if its id and its dedup key are free, and if the journal contains no
        deletion of its id at or after the seq ``floor``.
        """
        parameters = (*flat_parameters(rows), floor)
        return session.execute_dml(self.sql.insert_tasks(len(rows)), parameters)

    row_groups: ClassVar[Callable[..., Iterable[Sequence[Any]]]] = staticmethod(row_groups)
    """Splits rows into groups, so that one statement can write each group."""

    def check_integrity(self, connection: sa.Connection) -> None:
        """Raise :class:`~taskstore.CorruptStoreError` if the database file is damaged."""

    @classmethod
    def vacuum(cls, url: str) -> VacuumReport:
        """Rebuild the database file of a ledger; no other connection may have the file open."""
        raise UnsupportedError(
            f"{redacted(url)}: only an SQLite file can be rebuilt", hint=cls.space_hint
        )

    def close(self) -> None:
        """Dispose of the engine if taskstore owns the engine."""
        if self.owned:
            self.engine.dispose()


def indexed_columns(index: sa.Index) -> list[sa.Column[Any]]:
    """Return the columns of an index, and the columns of the primary key of its table."""
    assert index.table is not None
    return list(dict.fromkeys([*index.columns, *index.table.primary_key]))


def column_declaration(
    table: str, name: str, type_: str, collation: str | None, *, nullable: bool
) -> tuple[str, str]:
    """Return the item of ``Declarations`` for a column.  ``type_`` has SQLAlchemy's spelling."""
    words = [type_, f"COLLATE {collation}" if collation else "", "" if nullable else "NOT NULL"]
    return f"the column {name} of the table {table}", " ".join(filter(None, words))


def index_declaration(
    table: str, name: str, columns: str, *, unique: bool, condition: str | None = None
) -> tuple[str, str]:
    """Return the item of ``Declarations`` for an index.  The name of a primary key is empty.

    A server writes a condition in its own words.  Therefore the item contains the text of a
    condition only if the condition is ``COLUMN IS NOT NULL``, and ``...`` for another condition.
    """
    title = f"the index {name}" if name else "the primary key"
    words = [f"UNIQUE ({columns})" if unique else f"({columns})"]
    if condition is not None:
        match = _NOT_NULL.fullmatch(condition)
        words.append(f"WHERE {match[1] if match else '...'}")
    return f"{title} of the table {table}", " ".join(words)


_NOT_NULL = re.compile(r"\(?(\w+ IS NOT NULL)\)?")


def _password(url: sa.URL) -> str | None:
    password = url.password or url.query.get("password")
    return str(password) if password else None


def database_for_engine(
    engine: sa.Engine,
    *,
    durability: str = "full",
    read_only: bool = False,
    schema: str | None = None,
) -> Database:
    """Return the database of an engine that belongs to the host.

    Raises :class:`~taskstore.ValidationError` for an unsupported engine or schema.
    """
    if getattr(getattr(engine, "dialect", None), "is_async", False):
        raise _async_engine_error(engine)
    if not isinstance(engine, sa.Engine):
        raise ValidationError("engine", f"must be an Engine, not {type(engine).__name__}")
    dialect = Database.dialects.get(engine.dialect.name)
    if dialect is None or engine.dialect.driver != dialect.driver:
        known = ", ".join(f"{name}+{dialect.driver}" for name, dialect in Database.dialects.items())
        raise ValidationError(
            "engine",
            f"uses {engine.dialect.name}+{engine.dialect.driver}; supported engines: {known}",
        )
    _refuse_unescaped_at_sign("engine", engine.url)
    if schema is None:
        return dialect(engine, owned=False, durability=durability, read_only=read_only)
    if not dialect.has_schemas:
        raise ValidationError(
            "schema",
            f"is not possible: a database of {engine.dialect.name} has no schemas; "
            "use another database for the ledger",
        )
    try:
        schema = schema_option(schema)
    except ValueError as error:
        raise ValidationError("schema", str(error)) from None
    return dialect(engine, owned=False, durability=durability, read_only=read_only, schema=schema)


def _async_engine_error(engine: Any) -> ValidationError:
    """Return the error for an ``AsyncEngine``, or for the ``sync_engine`` of an ``AsyncEngine``."""
    dialect = Database.dialects.get(engine.dialect.name)
    # Only the default module of an SQLite engine, Python's sqlite3, is also the SQLite library of
    # aiosqlite.  Two SQLite libraries on one file lose data.
    scheme = engine.dialect.name + (f"+{dialect.driver}" if dialect and dialect.extra else "")
    return ValidationError(
        "engine",
        f"has the asynchronous driver {engine.dialect.driver}, and its sync_engine has the same "
        f"driver: pass sqlalchemy.create_engine('{scheme}://...'), a synchronous engine for the "
        "same database (AsyncTaskRegistry calls it in a worker thread)",
    )


def open_database(url: str, *, durability: str = "full", read_only: bool = False) -> Database:
    """Return the database of a URL.  If the URL names an SQLite file that does not exist, and
    ``read_only`` is false, the function creates the file.

    Raises :class:`~taskstore.ValidationError` for an unsupported URL, and
    :class:`~taskstore.StoreUnavailableError` for an unusable path.
    """
    dialect = Database.dialects.get(scheme_of(url).partition("+")[0])
    if dialect is None:
        parse(url)  # raises an error that names the reason
        raise AssertionError(url)
    database = dialect.open(url, durability=durability, read_only=read_only)
    database.url = url
    return database


def parse(url: str) -> sa.URL:
    """Parse the URL of a database server.

    Raises :class:`~taskstore.ValidationError` for every other URL.
    """
    try:
        parsed = sa.make_url(url)
        dialect = Database.dialects.get(parsed.get_backend_name())
        driver = parsed.get_driver_name()
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ValueError):
        # Raised from None, because the cause can contain the URL with the password.
        reason = "is not a database URL"
        if _SEVERAL_HOSTS.search(url):
            reason += "; write several hosts as '?host=one:5432&host=two:5432'"
        raise ValidationError("url", reason) from None
    _refuse_unescaped_at_sign("url", parsed)
    _check_address(url, parsed)
    if dialect is None or driver != dialect.driver:
        servers = (item for item in Database.dialects.items() if item[1].extra)
        known = ", ".join(["sqlite:", *(f"{name}+{kind.driver}:" for name, kind in servers)])
        raise ValidationError("url", f"uses '{parsed.drivername}:'; supported URLs: {known}")
    return parsed


def _refuse_unescaped_at_sign(name: str, url: sa.URL) -> None:
    if "@" in (url.host or ""):
        raise ValidationError(name, "has an '@' in its user name or password: write '%40' instead")


def _check_address(url: str, parsed: sa.URL) -> None:
    """Raise an error for a part of the address that SQLAlchemy or the driver would change."""
    # With each '%' escaped, the parts keep their percent-encoding.
    encoded = sa.make_url(url.replace("%", "%25"))
    for part in ("username", "password", "host", "database"):
        name = "user name" if part == "username" else part
        text = str(getattr(parsed, part) or "")
        try:
            if part != "host":  # SQLAlchemy does not decode a host
                unquote(str(getattr(encoded, part) or ""), errors="strict")
            _check_text(text)
        except UnicodeDecodeError:
            raise ValidationError("url", f"has a {name} that is not UTF-8") from None
        except ValueError as error:
            raise ValidationError("url", f"has a {name} that {error}") from None
    if parsed.port is not None:
        try:
            integer_option(*PORTS)(str(parsed.port))
        except ValueError as error:
            raise ValidationError("url", f"has an invalid port: {error}") from None


def _check_text(text: str) -> None:
    """Raise :class:`ValueError` with a reason if a driver would cut or cannot encode a text."""
    if "\0" in text:
        raise ValueError("must not contain NUL")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("must be UTF-8")


# -- the options of URLs ------------------------------------------------------

URLOption = Callable[[str], Any]
"""Parses the text of an option; raises :class:`ValueError` with the reason."""

_OPTIONS = re.compile(r"[^:]+://(?:[^:/]*(?::[^@]*)?@)?[^?]*\?(.*)", re.DOTALL)
"""Matches the options of a URL.  As in SQLAlchemy, a password can contain '/' and '?'."""

_REFUSED_OPTION = re.compile(
    "invalid|unrecognized configuration parameter|requires a value"
    "|unknown (collation|character set)|can't be set",
    re.IGNORECASE,
)
"""Matches the message of a driver or server that refuses an option."""

_MAX_NAME_BYTES = 63
"""The maximum length of a name in PostgreSQL, in bytes.  PostgreSQL truncates longer names."""

PORTS = (1, 65535)
"""The lowest and the highest number of a port."""

_REPEATABLE = frozenset({"host", "port"})
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def url_options(url: str, known: Mapping[str, URLOption]) -> dict[str, Any]:
    """Return the parsed options of a server's URL.

    If an option is unknown, repeated, empty or malformed, raises a
    :class:`~taskstore.ValidationError` that names the option.  The error does not show the value of
    the option, because the value can be a secret.
    """
    match = _OPTIONS.match(url)
    options: dict[str, Any] = {}
    pairs = parse_qsl(
        match[1] if match else "",
        keep_blank_values=True,
        errors="surrogateescape",  # _check_text refuses bytes that are not UTF-8
    )
    for name, text in pairs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            suggestion = f": did you mean {close[0]!r}?" if close else ""
            raise ValidationError("url", f"has the unknown option {name!r}{suggestion}")
        if name in options and name not in _REPEATABLE:
            raise ValidationError("url", f"has the option {name!r} more than once")
        if not text:
            raise ValidationError("url", f"has no value for the option {name!r}")
        try:
            _check_text(text)
            options[name] = known[name](text)
        except ValueError as error:
            raise ValidationError("url", f"has an invalid option {name!r}: {error}") from None
    return options


def integer_option(low: int = -(2**31), high: int = 2**31 - 1) -> URLOption:
    """Return the parser of an option that is an integer from ``low`` to ``high``."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return int(text)

    return parse


def schema_option(text: object) -> str:
    """Parse the name of a schema."""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("must be the name of a schema, as text")
    if len(text.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES or not text.isprintable():
        raise ValueError(f"must be printable text of at most {_MAX_NAME_BYTES} bytes")
    if text == "$user":
        raise ValueError("must not be '$user', which PostgreSQL replaces by the name of the user")
    if text.startswith("pg_") or text == "information_schema":
        raise ValueError("must not be a system schema, which the database keeps for itself")
    return text


def boolean_option(text: str) -> bool:
    """Parse an option that is true or false."""
    value = _BOOLEANS.get(text.lower())
    if value is None:
        raise ValueError("must be 'true' or 'false'")
    return value


def require_user(url: sa.URL, default: object) -> None:
    """Raise an error if neither the URL nor the driver's ``default`` names a user.

    The driver has no default if the system has no name for the user id of the process, for example
    in a container.
    """
    if not (url.username or url.query.get("user") or default):
        raise ValidationError(
            "url",
            f"names no user, and the system has no name for the user id {os.getuid()} of this "
            "process: write the name of the database's user and '@' before the host",
        )


def check_driver_arguments(database: Database, url: sa.URL) -> None:
    """Make the engine raise :class:`~taskstore.ValidationError` if the driver or the server refuses
    an option of the URL.

    Drivers check some options only when they connect.  For a refused option, drivers raise built-in
    errors of Python, or errors that look like the errors of an unreachable server.
    """

    @sa.event.listens_for(database.engine, "do_connect")
    def connect(dialect: Dialect, _record: object, args: Any, arguments: Any) -> Any:
        try:
            return dialect.connect(*args, **arguments)
        except database.translator.errors as error:
            text = database.translator.text(error)
            if _REFUSED_OPTION.search(text):
                for name in url.query:
                    if name in text or name == "options":
                        reason = f"has an invalid option {name!r}: {text}"
                        raise ValidationError("url", reason) from None
            raise
        except (OSError, TypeError, ValueError, LookupError) as error:
            text = database.translator.text(error)
            names = ", ".join(sorted(url.query))
            raise ValidationError(
                "url", f"has an option that the driver rejects (one of {names or 'none'}): {text}"
            ) from None
