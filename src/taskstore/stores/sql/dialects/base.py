"""What every database has in common: the hooks that a dialect overrides."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.expression import Executable

from taskstore.errors import StoreUnavailableError, ValidationError
from taskstore.store.opening import scheme_of
from taskstore.stores.sql.errors import Fault, Translator
from taskstore.stores.sql.rows import Claimed
from taskstore.stores.sql.statements import SIZES, Statements
from taskstore.stores.sql.tables import SCHEMA_EPOCH

log = logging.getLogger("taskstore")

LOCK_S = 30
"""How long we wait for locks, and a server keeps our idle transactions, in seconds."""

LOCK_WAIT_S = 15
"""How long one attempt waits for the lock of the writers, in seconds: after the second,
the caller has seen whether they make progress."""

_PLACE = ("host", "port", "unix_socket")


_SEVERAL_HOSTS = re.compile(r"@[^/?@]*,[^/?@]*(/|\?|$)")
"""Hosts as libpq reads them, and SQLAlchemy does not."""


_Row = TypeVar("_Row")


def pieces(rows: Sequence[_Row]) -> Sequence[Sequence[_Row]]:
    """CompactionPoint rows into lots of the sizes that statements exist for."""
    if len(rows) == 1:
        return (rows,)
    lots: list[Sequence[_Row]] = []
    start, left = 0, len(rows)
    for size in SIZES:
        while left >= size:
            lots.append(rows[start : start + size])
            start += size
            left -= size
    return lots


def flat(rows: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The parameters of a statement over several rows."""
    return rows[0] if len(rows) == 1 else tuple(chain.from_iterable(rows))


class Session:
    """One connection, in the driver's autocommit, and a cursor of the driver on it.

    Everything runs on that cursor, also what is built with Core: a host's
    engine may have listeners that begin transactions when SQLAlchemy does.
    ``restore`` is what a host's connection is to be set back to afterwards.
    """

    __slots__ = ("_dialect", "connection", "cursor", "raw", "restore")

    def __init__(self, connection: sa.Connection, raw: Any, cursor: Any, dialect: Dialect) -> None:
        self.connection = connection
        self.raw = raw
        self.cursor = cursor
        self._dialect = dialect
        self.restore: tuple[str, ...] = ()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        """Run a statement."""
        self.cursor.execute(sql, parameters)

    def touch(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run an INSERT, UPDATE or DELETE; returns how many rows it touched."""
        self.cursor.execute(sql, parameters)
        count = int(self.cursor.rowcount)
        if count < 0:
            # The standard library's sqlite3 does not count where a WITH comes first.
            count = int(self.row("SELECT changes()")[0])
        return count

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query: SQLite holds its read lock until the last one is fetched."""
        self.cursor.execute(sql, parameters)
        return list(self.cursor.fetchall())

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row of a query, or ``None``."""
        rows = self.rows(sql, parameters)
        return rows[0] if rows else None

    def set_back(self) -> None:
        """Set a host's connection back to how it was."""
        for statement in self.restore:
            self.rows(statement)
        self.restore = ()

    # -- statements that are built where they are used ---------------------

    def change(self, statement: Executable) -> int:
        """Run a Core statement; returns how many rows it touched."""
        return self.touch(*self._compiled(statement))

    def ask(self, query: Executable) -> list[Any]:
        """All rows of a Core query, as tuples."""
        return self.rows(*self._compiled(query))

    def scalar(self, query: Executable) -> Any:
        """The first value of the first row of a Core query, or ``None``."""
        rows = self.ask(query)
        return rows[0][0] if rows else None

    def _compiled(self, statement: Executable) -> tuple[str, tuple[Any, ...]]:
        # An Executable that does not compile is none of ours.
        compiled = statement.compile(  # type: ignore[attr-defined]
            dialect=self._dialect, compile_kwargs={"render_postcompile": True}
        )
        values = compiled.params
        return str(compiled), tuple(values[name] for name in compiled.positiontup or ())


class Guard(Protocol):
    """Notices that what is read and written is not any more what was opened."""

    def check(self) -> None:
        """Raise a :class:`~taskstore.StoreUnavailableError` if so; cheap.

        It is called before each commit and after each read.
        """

    def look(self) -> None:
        """The same by a full look."""


class Database:
    """One database.  ``owned`` tells that the engine is ours and not a host's."""

    names: ClassVar[tuple[str, ...]]
    """SQLAlchemy's names for the dialect."""
    kinds: ClassVar[dict[str, type[Database]]] = {}
    """The dialects that there are, by these names."""
    extra: ClassVar[str] = ""
    """Our extra that installs the driver; empty where none is needed."""
    driver: ClassVar[str]
    """The driver that the statements are compiled for."""
    compiler: ClassVar[Dialect]
    statements: ClassVar[type[Statements]] = Statements
    sql: Statements
    """The compiled statements, shared by all databases of the dialect."""
    begin_read: ClassVar[tuple[str, ...]] = ("BEGIN",)
    """Begins a transaction that sees one moment and writes nothing."""
    begin_schema: ClassVar[tuple[str, ...]] = ("BEGIN",)
    """Begins the only transaction that changes the schema."""
    schema_commits: ClassVar[bool] = False
    """Whether each change of the schema commits by itself, so that a migration
    that is killed leaves what it had done."""
    waits_for_locks: ClassVar[bool] = True
    """Whether the database queues for locks; if not, trying again is left to us."""
    generation = 0
    """How often the server may have become another one."""
    guard: Guard | None = None
    url = ""
    """As it was given, password included; empty for a host's engine."""
    scratch: Path | None = None
    """A directory for temporary files; ``None`` is the system's."""

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
            self.location,
            dbapi.Error,
            self.fault_of,
            _password(engine.url),
            waits=self.waits_for_locks or read_only,
        )

    @classmethod
    def open(cls, url: str, *, durability: str, read_only: bool) -> Database:
        """The database that a URL of this dialect names, with an engine of our own."""
        parsed = parse(url)
        try:
            return cls.connect(parsed, durability=durability, read_only=read_only)
        except ImportError as error:
            raise StoreUnavailableError(
                f"the driver of {parsed.drivername} is not installed: {error}",
                hint=f"pip install 'taskstore[{cls.extra}]'",
            ) from error

    @classmethod
    def connect(cls, url: sa.URL, *, durability: str, read_only: bool) -> Database:
        """Make the engine of a server."""
        raise AssertionError(url, durability, read_only)

    def __init_subclass__(cls) -> None:
        Database.kinds.update(dict.fromkeys(cls.names, cls))
        cls.sql = cls.statements(cls.compiler)

    def _location(self) -> str:
        url = self.engine.url
        place = {name: url.query[name] for name in _PLACE if name in url.query}
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

    def examine(self, connection: sa.Connection) -> None:
        """Refuse a server, or a host's way to speak to it, that we cannot work with."""

    def lock_schema(self, connection: sa.Connection) -> None:
        """Begin to change the schema, others waiting for :meth:`unlock_schema`."""
        for statement in self.begin_schema:
            connection.exec_driver_sql(statement)

    def unlock_schema(self, connection: sa.Connection, *, done: bool) -> None:
        """Keep the changes of the schema, or undo them as far as the database can."""
        connection.exec_driver_sql("COMMIT" if done else "ROLLBACK")

    def hold(self) -> None:
        """Note that a store opens the database.  Before its first connection."""

    def prepare(self, session: Session) -> None:
        """Look at the database, and set it up, when its schema is known to be ours."""

    def dedicate(self, session: Session) -> None:
        """Set up the one connection of our own that writes."""

    def begin_write(self, session: Session) -> None:
        """Begin a transaction that writes."""
        raise AssertionError(session)

    def lock_owners(self, session: Session) -> Sequence[str]:
        """Name who keeps other writers out, as far as we are told; ``session`` waits for nobody."""
        del session
        return ()

    def commit(self, session: Session) -> None:
        """Commit; returns when the database vouches for it as it is set up to."""
        session.cursor.execute("COMMIT")

    def renew(self) -> None:
        """Note that the server may be another one now: of our own connections, none that
        was made before is lent again."""

    def rollback(self, session: Session) -> None:
        """End the transaction if there is one; raises when the connection is broken."""
        raise AssertionError(session)

    def claim(self, session: Session, count: int, now: int, over: int) -> Claimed | None:
        """Take seqs under the head lock, and look which commit is at seq ``over``.

        ``None`` when the schema epoch is not one that we may write.
        """
        rows = session.rows(self.sql.claim, (count, now, now, SCHEMA_EPOCH, over))
        return Claimed(*rows[0][:4]) if rows else None

    def insert(self, session: Session, rows: Sequence[tuple[Any, ...]], floor: int) -> int:
        """Insert new tasks whose ids and bookings are free and were not deleted since
        ``floor``; returns how many.  ``rows`` are as many as statements exist for."""
        return session.touch(self.sql.insert_tasks(len(rows)), (*flat(rows), floor))

    lots: ClassVar[Callable[..., Iterable[Sequence[tuple[Any, ...]]]]] = staticmethod(pieces)
    """Cuts rows into what one statement takes."""

    def check_sound(self, connection: sa.Connection) -> None:
        """Raise :class:`~taskstore.CorruptStoreError` if what looks strange is damage."""

    def erase(self, session: Session) -> None:
        """Get rid of deleted bytes that the database still keeps in its files."""

    def close(self) -> None:
        """Give up the engine, if it is ours."""
        if self.owned:
            self.engine.dispose()


def _password(url: sa.URL) -> str | None:
    found = url.password or url.query.get("password")
    return str(found) if found else None


def host_database(engine: sa.Engine, *, durability: str, read_only: bool) -> Database:
    """The database of an engine that belongs to the host.

    Raises :class:`~taskstore.ValidationError` for an engine that we cannot use.
    """
    if not isinstance(engine, sa.Engine):
        raise ValidationError("engine", f"must be an Engine, not {type(engine).__name__}")
    kind = Database.kinds.get(engine.dialect.name)
    if kind is None or engine.dialect.driver != kind.driver:
        known = ", ".join(f"{name}+{kind.driver}" for name, kind in Database.kinds.items())
        raise ValidationError(
            "engine", f"is of {engine.dialect.name}+{engine.dialect.driver}; supported: {known}"
        )
    _refuse_at_sign("engine", engine.url)
    return kind(engine, owned=False, durability=durability, read_only=read_only)


def open_database(url: str, *, durability: str = "full", read_only: bool = False) -> Database:
    """Make the engine for a URL.  A new SQLite file is created, empty and private.

    Raises :class:`~taskstore.ValidationError` for a URL that we do not
    understand, :class:`~taskstore.StoreUnavailableError` for a path that
    cannot be used.
    """
    kind = Database.kinds.get(scheme_of(url).partition("+")[0])
    if kind is None:
        parse(url)  # says what is wrong with it
        raise AssertionError(url)
    database = kind.open(url, durability=durability, read_only=read_only)
    database.url = url
    return database


def parse(url: str) -> sa.URL:
    """The URL of a server; raises :class:`~taskstore.ValidationError` for one that is none."""
    try:
        parsed = sa.make_url(url)
        kind = Database.kinds.get(parsed.get_backend_name())
        driver = parsed.get_driver_name()
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ValueError):
        # From None: the cause may repeat the URL with its password.
        reason = "is not a database URL"
        if _SEVERAL_HOSTS.search(url):
            reason += "; several hosts are written ?host=one:5432&host=two:5432"
        raise ValidationError("url", reason) from None
    _refuse_at_sign("url", parsed)
    if kind is None or driver != kind.driver:
        servers = [f"{name}+{kind.driver}:" for name, kind in Database.kinds.items() if kind.extra]
        known = ", ".join(["sqlite:", *servers])
        raise ValidationError("url", f"{parsed.drivername}: is not one of {known}")
    return parsed


def _refuse_at_sign(name: str, url: sa.URL) -> None:
    if "@" in (url.host or ""):
        raise ValidationError(name, "has an @ in its user name or password: write it as %40")
