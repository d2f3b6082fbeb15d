"""Database faults at every SQL statement and every new connection of a driver.

Where possible, the injected errors are real errors of the database.  A PostgreSQL or MariaDB server
raises each error itself, so the error class, the error code and the transaction state are real.  To
simulate a lost connection, a second connection terminates the connection of the store.  To simulate
a lost response, the connection is terminated after the statement has run; the store gets the
driver's error for the terminated connection.  SQLite cannot raise errors on request, so this module
builds SQLite errors from the codes and texts of the SQLite library.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import MappingProxyType
from typing import Any, ClassVar, Protocol
from unittest import mock

from taskstore.testing.faults.injection import DELAY, Call, Fault, Inject, InjectionPoint, Step

RETRY_TIMEOUT_S = 0.1
"""The retry timeout of a store under test, in seconds (the default is 30 s)."""

_TABLE = re.compile(r"\b(?:INTO|UPDATE|FROM|TABLE|INDEX)\s+[\"`]?(\w+)", re.IGNORECASE)
_LOCKING = re.compile(r"\bFOR UPDATE\b")


def step_of(sql: Any, connection: Any) -> Step:
    """Return the step for an SQL statement; ``detail`` has the verb and the table."""
    text = str(sql)
    verb = text.split(None, 1)[0].rstrip(";").upper() if text.strip() else ""
    table = _TABLE.search(text)
    locking = " FOR UPDATE" if _LOCKING.search(text) else ""
    name = "commit" if verb == "COMMIT" else "execute"
    detail = "" if verb == "COMMIT" else f"{verb} {table[1] if table else ''}{locking}".strip()
    return Step(name, detail, connection)


def _statement(step: Step) -> bool:
    return step.name in {"commit", "execute"}


def _commit(step: Step) -> bool:
    return step.name == "commit"


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Shorten the timeouts of stores: a call under a persistent fault must end within 30 s."""
    from taskstore.stores.common import retry
    from taskstore.stores.sql import open_sql
    from taskstore.stores.sql.dialects import base, sqlite

    waits = ((retry, "BUSY_TIMEOUT_S"), (sqlite, "WRITE_LOCK_TIMEOUT_S"), (base, "LOCK_TIMEOUT_S"))
    with ExitStack() as stack:
        for module, name in waits:
            stack.enter_context(mock.patch.object(module, name, RETRY_TIMEOUT_S))
        stack.enter_context(mock.patch.object(retry, "PROBE_INTERVAL_S", 0.0))
        stack.enter_context(mock.patch.dict(open_sql.__kwdefaults__, reconnect_s=RETRY_TIMEOUT_S))
        yield


class Driver(Protocol):
    """Passes each statement and each new connection of a driver to an injection point."""

    faults: Sequence[Fault]

    def installed(self) -> AbstractContextManager[None]:
        """Intercept statements and new connections while the ``with`` body runs."""
        ...


# -- SQLite ----------------------------------------------------------------------


class SQLite:
    """Intercepts the statements of the SQLite module that the store uses."""

    def __init__(self, injection: InjectionPoint) -> None:
        from taskstore.stores.sql.sqlite_library import sqlite_module

        self._module = sqlite_module()
        self._injection = injection
        busy = self._fail(5, "database is locked")
        full = self._fail(13, "database or disk is full")
        io_error = self._fail(10, "disk I/O error", rolled_back=True)
        write_error = self._fail(778, "disk I/O error", rolled_back=True)
        sync_error = self._fail(1034, "disk I/O error")
        self.faults: Sequence[Fault] = (
            Fault("BUSY", "before", busy),
            Fault("BUSY, persistent", "before", busy, persistent=True),
            Fault("FULL", "before", full),
            Fault("FULL, persistent", "before", full, persistent=True),
            Fault("IOERR", "before", io_error, fails_sync=_commit),
            Fault("IOERR_WRITE", "before", write_error),
            Fault("IOERR_FSYNC", "before", sync_error, _commit, _commit),
            Fault("IOERR_FSYNC", "after", self._sync_error_after, _commit, _commit),
            DELAY,
        )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Intercept new connections and their statements while the ``with`` body runs."""
        module, injection, real = self._module, self._injection, self._module.connect

        # The base classes come from the SQLite module that the store uses.
        class Cursor(module.Cursor):  # type: ignore[name-defined,misc]
            def execute(self, sql: str, parameters: Any = ()) -> Any:
                connection = self.connection
                step = step_of(sql, connection)
                if step.name == "commit" and not connection.writes:
                    step = Step("execute", "COMMIT, nothing written", connection)
                elif sql.startswith("BEGIN"):
                    connection.writes = "IMMEDIATE" in sql
                return injection.run_step(step, super().execute, sql, parameters)

        class Connection(module.Connection):  # type: ignore[name-defined,misc]
            writes = False

            def cursor(self, factory: Any = Cursor) -> Any:
                return super().cursor(factory)

        def connect(*arguments: Any, **options: Any) -> Any:
            def call(*rest: Any) -> Any:
                return real(*rest, factory=Connection, **options)

            return injection.run_step(Step("connect", ""), call, *arguments)

        with mock.patch.object(module, "connect", connect):
            yield

    def _error(self, code: int, text: str) -> Exception:
        error: Exception = self._module.OperationalError(text)
        error.sqlite_errorcode = code  # type: ignore[attr-defined]  # real errors have it
        return error

    def _fail(self, code: int, text: str, *, rolled_back: bool = False) -> Inject:
        def inject(step: Step, _call: Call, _arguments: tuple[Any, ...]) -> Any:
            # SQLite itself rolls back the transaction on some errors: simulate the rollback.
            if rolled_back and step.resource is not None and step.resource.in_transaction:
                step.resource.execute("ROLLBACK")
            raise self._error(code, text)

        return inject

    def _sync_error_after(self, _step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
        call(*arguments)
        raise self._error(1034, "disk I/O error")


# -- servers ---------------------------------------------------------------------


class _Server(ABC):
    """Intercepts the statements and new connections of a driver for a database server."""

    errors: ClassVar[Mapping[str, Any]]
    """Maps the name of each fault to the code of the error that the server raises."""

    def __init__(self, injection: InjectionPoint) -> None:
        self._injection = injection
        self._admin: Any = None
        self.faults: Sequence[Fault] = (
            *(Fault(name, "before", self._server_error(name), _statement) for name in self.errors),
            Fault("lost", "before", self._connection_lost),
            Fault("lost", "after", self._response_lost, _statement),
            Fault("lost, persistent", "before", self._connection_lost, persistent=True),
            Fault("lost, persistent", "after", self._response_lost, persistent=True),
            DELAY,
        )

    @abstractmethod
    def _raise_error(self, name: str, connection: Any) -> None:
        """Make the server raise the error of the fault ``name`` on a connection."""

    @abstractmethod
    def _terminate(self, connection: Any) -> None:
        """Terminate a connection of the store by a statement on a second connection."""

    @abstractmethod
    def _connect_refused(self) -> None:
        """Connect to a port without a server; the driver then raises its connection error."""

    @abstractmethod
    def _ping(self, connection: Any) -> None:
        """Run a statement; the statement must fail if the connection is terminated."""

    def _server_error(self, name: str) -> Inject:
        def inject(step: Step, _call: Call, _arguments: tuple[Any, ...]) -> Any:
            self._raise_error(name, step.resource)
            raise AssertionError(f"the server did not raise {name}")

        return inject

    def _connection_lost(self, step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
        if step.name == "connect":
            self._connect_refused()
        self._terminate(step.resource)
        return call(*arguments)

    def _response_lost(self, step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
        if step.name == "connect":
            self._connect_refused()
        call(*arguments)
        self._terminate(step.resource)
        self._ping(step.resource)
        raise AssertionError("the connection was not terminated")

    def close(self) -> None:
        """Close the second connection, which was used to terminate connections of the store."""
        if self._admin is not None:
            with suppress(Exception):
                self._admin.close()
            self._admin = None


class PostgreSQL(_Server):
    """Intercepts the statements and new connections of the PostgreSQL driver psycopg."""

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
    def installed(self) -> Iterator[None]:
        """Intercept statements and new connections while the ``with`` body runs."""
        import psycopg

        injection = self._injection
        self._connect = connect = psycopg.connect
        execute = psycopg.Cursor.execute

        def intercepted_execute(cursor: Any, query: Any, *arguments: Any, **options: Any) -> Any:
            def call(*rest: Any) -> Any:
                return execute(cursor, *rest, **options)

            return injection.run_step(step_of(query, cursor.connection), call, query, *arguments)

        def intercepted_connect(*arguments: Any, **options: Any) -> Any:
            self._connect_arguments = (arguments, options)
            step = Step("connect", "")
            return injection.run_step(step, lambda *rest: connect(*rest, **options), *arguments)

        with (
            mock.patch.object(psycopg.Cursor, "execute", intercepted_execute),
            mock.patch.object(psycopg, "connect", intercepted_connect),
        ):
            try:
                yield
            finally:
                self.close()

    def _raise_error(self, name: str, connection: Any) -> None:
        state = self.errors[name]
        connection.execute(
            f"DO $$ BEGIN RAISE EXCEPTION '{name}, injected' USING ERRCODE = '{state}'; END $$"
        )

    def _terminate(self, connection: Any) -> None:
        if connection.closed:
            return
        pid = connection.info.backend_pid
        if self._admin is None:
            arguments, options = self._connect_arguments
            self._admin = self._connect(*arguments, **options)
            self._admin.autocommit = True
        self._admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))

    def _connect_refused(self) -> None:
        self._connect("host=127.0.0.1 port=1 connect_timeout=1")

    def _ping(self, connection: Any) -> None:
        connection.execute("SELECT 1")


class MariaDB(_Server):
    """Intercepts the statements and new connections of the MariaDB driver PyMySQL."""

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
    def installed(self) -> Iterator[None]:
        """Intercept statements and new connections while the ``with`` body runs."""
        import pymysql

        injection = self._injection
        self._connect = connect = pymysql.connect
        execute = pymysql.cursors.Cursor.execute

        def intercepted_execute(cursor: Any, query: Any, arguments: Any = None) -> Any:
            def call(*rest: Any) -> Any:
                return execute(cursor, *rest)

            return injection.run_step(step_of(query, cursor.connection), call, query, arguments)

        def intercepted_connect(*arguments: Any, **options: Any) -> Any:
            self._connect_arguments = (arguments, options)
            step = Step("connect", "")
            return injection.run_step(step, lambda *rest: connect(*rest, **options), *arguments)

        with (
            mock.patch.object(pymysql.cursors.Cursor, "execute", intercepted_execute),
            mock.patch.object(pymysql, "connect", intercepted_connect),
        ):
            try:
                yield
            finally:
                self.close()

    def _raise_error(self, name: str, connection: Any) -> None:
        state, number = self.errors[name]
        with connection.cursor() as cursor:
            if number == 1213:
                cursor.execute("ROLLBACK")  # a real deadlock rolls back the transaction
            cursor.execute(
                f"SIGNAL SQLSTATE '{state}' SET MYSQL_ERRNO = {number}, "
                f"MESSAGE_TEXT = '{name}, injected'"
            )

    def _terminate(self, connection: Any) -> None:
        if not connection.open:
            return
        if self._admin is None:
            arguments, options = self._connect_arguments
            self._admin = self._connect(*arguments, **options)
        with self._admin.cursor() as cursor, suppress(Exception):
            cursor.execute(f"KILL CONNECTION {connection.thread_id()}")

    def _connect_refused(self) -> None:
        self._connect(host="127.0.0.1", port=1)

    def _ping(self, connection: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
