"""What every database has in common: the hooks that a dialect overrides."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import Dialect

from taskstore.stores.retry import Backoff
from taskstore.stores.sql.errors import Fault, Translator
from taskstore.stores.sql.rows import Claimed
from taskstore.stores.sql.session import Session
from taskstore.stores.sql.statements import Statements, flat, pieces
from taskstore.stores.sql.tables import SCHEMA_EPOCH

log = logging.getLogger("taskstore")

LOCK_S = 30
"""How long we wait for locks, and a server keeps our idle transactions, in seconds."""

LOCK_WAIT_S = 15
"""How long one attempt waits for the lock of the writers, in seconds: after the second,
the caller has seen whether they make progress."""


_PLACE = ("host", "port", "unix_socket")


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
            self.location, dbapi.Error, self.fault_of, _password(engine.url)
        )

    def __init_subclass__(cls) -> None:
        cls.sql = cls.statements(cls.compiler)

    def _location(self) -> str:
        url = self.engine.url
        place = {name: url.query[name] for name in _PLACE if name in url.query}
        return url.set(query=place).render_as_string(hide_password=True)

    @staticmethod
    def fault_of(error: BaseException) -> Fault:
        """Say what kind of trouble a driver's exception is."""
        raise AssertionError(error)

    def patiently(self, work: Callable[[], object]) -> None:
        """Do ``work``, again where the database says at once that a lock is not free."""
        started, backoff = time.monotonic(), Backoff(0.001, 0.02)
        while True:
            try:
                work()
            except self.translator.errors as error:
                busy = self.fault_of(error) is Fault.BUSY and not self.waits_for_locks
                if not busy or time.monotonic() - started > LOCK_S:
                    raise
                backoff.sleep()
            else:
                return

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

    def holders(self, session: Session) -> Sequence[str]:
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
