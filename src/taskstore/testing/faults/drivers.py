"""Faults of databases: every statement on a driver's cursor, and every new connection.

What the drivers raise is real wherever that can be had.  PostgreSQL and
MariaDB are asked to raise the error themselves, so that the class, the code
and the state of the transaction are the server's own.  A connection is lost by
having the server end it from a second connection; when the answer is to be
lost, the statement is let through first, and what is raised is what the
driver says on the dead connection.  Only SQLite's errors are made by hand,
with the codes and texts of its library, because SQLite cannot be asked.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import MappingProxyType
from typing import Any, ClassVar, Protocol
from unittest import mock

from taskstore.testing.faults.door import DELAY, Call, Door, Fault, Step

PATIENCE_S = 0.1
"""How long a store tries again while a fault stays, in seconds, instead of half a minute."""

_TABLE = re.compile(r"\b(?:INTO|UPDATE|FROM|TABLE|INDEX)\s+[\"`]?(\w+)", re.IGNORECASE)
_LOCKING = re.compile(r"\bFOR UPDATE\b")


def step_of(sql: Any, connection: Any) -> Step:
    """A statement as a step: its verb and its table."""
    text = str(sql)
    verb = text.split(None, 1)[0].rstrip(";").upper() if text.strip() else ""
    table = _TABLE.search(text)
    locking = " FOR UPDATE" if _LOCKING.search(text) else ""
    name = "commit" if verb == "COMMIT" else "execute"
    about = "" if verb == "COMMIT" else f"{verb} {table[1] if table else ''}{locking}".strip()
    return Step(name, about, connection)


def _statement(step: Step) -> bool:
    return step.name in {"commit", "execute"}


def _commit(step: Step) -> bool:
    return step.name == "commit"


@contextmanager
def impatient() -> Iterator[None]:
    """Let stores give up soon, so that a fault that stays does not last half a minute."""
    from taskstore.stores.common import retry
    from taskstore.stores.sql import open_sql
    from taskstore.stores.sql.dialects import base, sqlite

    waits = ((retry, "BUSY_S"), (sqlite, "LOCK_WAIT_S"), (base, "LOCK_S"))
    with ExitStack() as stack:
        for module, name in waits:
            stack.enter_context(mock.patch.object(module, name, PATIENCE_S))
        stack.enter_context(mock.patch.object(retry, "PROBE_S", 0.0))
        stack.enter_context(mock.patch.dict(open_sql.__kwdefaults__, reconnect_s=PATIENCE_S))
        yield


class Driver(Protocol):
    """Has a driver's statements and connections go through a door."""

    faults: Sequence[Fault]

    def entered(self) -> AbstractContextManager[None]:
        """Do so while the body of the ``with`` runs."""
        ...


# -- SQLite ----------------------------------------------------------------------


class SQLite:
    """SQLite's statements, through the module that the store uses."""

    def __init__(self, door: Door) -> None:
        from taskstore.stores.sql.sqlite_library import sqlite_module

        self._module = sqlite_module()
        self._door = door
        self.faults: Sequence[Fault] = (
            Fault("BUSY", "before", self._fails(5, "database is locked")),
            Fault("BUSY stays", "before", self._fails(5, "database is locked"), stays=True),
            Fault("FULL", "before", self._fails(13, "database or disk is full")),
            Fault("FULL stays", "before", self._fails(13, "database or disk is full"), stays=True),
            Fault("IOERR", "before", self._fails(10, "disk I/O error", undone=True), grave=_commit),
            Fault("IOERR_WRITE", "before", self._fails(778, "disk I/O error", undone=True)),
            Fault("IOERR_FSYNC", "before", self._fails(1034, "disk I/O error"), _commit, _commit),
            Fault("IOERR_FSYNC", "after", self._failed, _commit, _commit),
            DELAY,
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have every new connection's statements go through the door while the body runs."""
        module, door, real = self._module, self._door, self._module.connect

        # Which module it is shows when this runs.
        class Cursor(module.Cursor):  # type: ignore[name-defined,misc]
            def execute(self, sql: str, parameters: Any = ()) -> Any:
                connection = self.connection
                step = step_of(sql, connection)
                if step.name == "commit" and not connection.writes:
                    step = Step("execute", "COMMIT, nothing written", connection)
                elif sql.startswith("BEGIN"):
                    connection.writes = "IMMEDIATE" in sql
                return door.through(step, super().execute, sql, parameters)

        class Connection(module.Connection):  # type: ignore[name-defined,misc]
            writes = False

            def cursor(self, factory: Any = Cursor) -> Any:
                return super().cursor(factory)

        def connect(*arguments: Any, **options: Any) -> Any:
            step = Step("connect", "")
            return door.through(
                step, lambda *a: real(*a, factory=Connection, **options), *arguments
            )

        with mock.patch.object(module, "connect", connect):
            yield

    def _error(self, code: int, text: str) -> Exception:
        error: Exception = self._module.OperationalError(text)
        error.sqlite_errorcode = code  # type: ignore[attr-defined]  # SQLite's errors have it
        return error

    def _fails(
        self, code: int, text: str, *, undone: bool = False
    ) -> Callable[[Step, Call, tuple[Any, ...]], Any]:
        def strike(step: Step, _call: Call, _arguments: tuple[Any, ...]) -> Any:
            # After some errors SQLite has ended the transaction by itself.
            if undone and step.on is not None and step.on.in_transaction:
                step.on.execute("ROLLBACK")
            raise self._error(code, text)

        return strike

    def _failed(self, _step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
        call(*arguments)
        raise self._error(1034, "disk I/O error")


# -- servers ---------------------------------------------------------------------


class _Server(ABC):
    """The statements of a driver that talks to a server."""

    errors: ClassVar[Mapping[str, Any]]
    """What the server is asked to raise, by name."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._helper: Any = None
        self.faults: Sequence[Fault] = (
            *(Fault(name, "before", self._asked(name), _statement) for name in self.errors),
            Fault("lost", "before", self._lost),
            Fault("lost", "after", self._answer_lost, _statement),
            Fault("lost, stays", "before", self._lost, stays=True),
            Fault("lost, stays", "after", self._answer_lost, stays=True),
            DELAY,
        )

    @abstractmethod
    def _provoke(self, name: str, connection: Any) -> None:
        """Have the server raise an error on a connection."""

    @abstractmethod
    def _end(self, connection: Any) -> None:
        """Have the server end a connection, from another one."""

    @abstractmethod
    def _refused(self) -> None:
        """Connect to where nobody listens."""

    @abstractmethod
    def _use(self, connection: Any) -> None:
        """Run a statement on a connection."""

    def _asked(self, name: str) -> Callable[[Step, Call, tuple[Any, ...]], Any]:
        def strike(step: Step, _call: Call, _arguments: tuple[Any, ...]) -> Any:
            self._provoke(name, step.on)
            raise AssertionError(f"the server did not raise {name}")

        return strike

    def _lost(self, step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
        if step.name == "connect":
            self._refused()
        self._end(step.on)
        return call(*arguments)

    def _answer_lost(self, step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
        if step.name == "connect":
            self._refused()
        call(*arguments)
        self._end(step.on)
        self._use(step.on)
        raise AssertionError("the connection is still there")

    def close(self) -> None:
        """Close the second connection."""
        if self._helper is not None:
            with suppress(Exception):
                self._helper.close()
            self._helper = None


class PostgreSQL(_Server):
    """PostgreSQL's statements, through psycopg."""

    errors = MappingProxyType(
        {
            "serialization": "40001",
            "deadlock": "40P01",
            "disk full": "53100",
            "lock timeout": "55P03",
            "I/O error": "58030",
        }
    )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have statements and new connections go through the door while the body runs."""
        import psycopg

        door = self._door
        self._connect = connect = psycopg.connect
        execute = psycopg.Cursor.execute

        def through(cursor: Any, query: Any, *arguments: Any, **options: Any) -> Any:
            def call(*again: Any) -> Any:
                return execute(cursor, *again, **options)

            return door.through(step_of(query, cursor.connection), call, query, *arguments)

        def connecting(*arguments: Any, **options: Any) -> Any:
            self._place = (arguments, options)
            return door.through(
                Step("connect", ""), lambda *again: connect(*again, **options), *arguments
            )

        with (
            mock.patch.object(psycopg.Cursor, "execute", through),
            mock.patch.object(psycopg, "connect", connecting),
        ):
            try:
                yield
            finally:
                self.close()

    def _provoke(self, name: str, connection: Any) -> None:
        state = self.errors[name]
        connection.execute(
            f"DO $$ BEGIN RAISE EXCEPTION '{name}, as asked for' USING ERRCODE = '{state}'; END $$"
        )

    def _end(self, connection: Any) -> None:
        if connection.closed:
            return
        pid = connection.info.backend_pid
        if self._helper is None:
            arguments, options = self._place
            self._helper = self._connect(*arguments, **options)
            self._helper.autocommit = True
        self._helper.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))

    def _refused(self) -> None:
        self._connect("host=127.0.0.1 port=1 connect_timeout=1")

    def _use(self, connection: Any) -> None:
        connection.execute("SELECT 1")


class MariaDB(_Server):
    """MariaDB's statements, through PyMySQL."""

    errors = MappingProxyType(
        {
            "deadlock": ("40001", 1213),
            "lock timeout": ("HY000", 1205),
            "table full": ("HY000", 1114),
            "record changed": ("HY000", 1020),
            "I/O error": ("HY000", 1030),
        }
    )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have statements and new connections go through the door while the body runs."""
        import pymysql

        door = self._door
        self._connect = connect = pymysql.connect
        execute = pymysql.cursors.Cursor.execute

        def through(cursor: Any, query: Any, arguments: Any = None) -> Any:
            def call(*again: Any) -> Any:
                return execute(cursor, *again)

            return door.through(step_of(query, cursor.connection), call, query, arguments)

        def connecting(*arguments: Any, **options: Any) -> Any:
            self._place = (arguments, options)
            return door.through(
                Step("connect", ""), lambda *again: connect(*again, **options), *arguments
            )

        with (
            mock.patch.object(pymysql.cursors.Cursor, "execute", through),
            mock.patch.object(pymysql, "connect", connecting),
        ):
            try:
                yield
            finally:
                self.close()

    def _provoke(self, name: str, connection: Any) -> None:
        state, number = self.errors[name]
        with connection.cursor() as cursor:
            if number == 1213:
                cursor.execute("ROLLBACK")  # a deadlock has undone the whole transaction
            cursor.execute(
                f"SIGNAL SQLSTATE '{state}' SET MYSQL_ERRNO = {number}, "
                f"MESSAGE_TEXT = '{name}, as asked for'"
            )

    def _end(self, connection: Any) -> None:
        if not connection.open:
            return
        if self._helper is None:
            arguments, options = self._place
            self._helper = self._connect(*arguments, **options)
        with self._helper.cursor() as cursor, suppress(Exception):
            cursor.execute(f"KILL CONNECTION {connection.thread_id()}")

    def _refused(self) -> None:
        self._connect(host="127.0.0.1", port=1)

    def _use(self, connection: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
