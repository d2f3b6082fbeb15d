"""The pool of connections of one open store."""

from __future__ import annotations

import threading
from contextlib import suppress

import sqlalchemy as sa

from taskstore.errors import StoreClosedError
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.session import Session


class ConnectionPool:
    """Connections that are acquired and released, from any thread.

    With an engine of our own, one connection is kept for writing; from a host's
    engine, each call acquires one and releases it, because that pool is not ours.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.writing: Session | None = None
        """The connection that is kept for writing, once there is one."""
        self._gate = threading.Lock()
        self._in_use = 0
        self._closed = False

    def acquire(self) -> Session:
        """A connection, which :meth:`release` returns."""
        database = self.database
        with self._gate:
            if self._closed:
                raise StoreClosedError(f"the store {database.location} is closed")
            self._in_use += 1
        connection = None
        try:
            connection = database.engine.connect()
            if not database.owned:
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            raw = connection.connection.driver_connection
            return Session(connection, raw, database.cursor(raw), database.compiler)
        except BaseException:
            self._return(connection)
            raise

    def release(self, session: Session, *, broken: bool = False) -> None:
        """Return a connection; one that is ``broken`` is not used again.

        The one that is kept for writing stays, unless it is broken.
        """
        if session is self.writing:
            if not broken:
                return
            self.writing = None
        if broken:
            with suppress(Exception):
                session.connection.invalidate()
        self._return(session.connection)

    def writer(self) -> Session:
        """The connection to write on, for :meth:`release` as every other.

        The caller sees to it that only one transaction at a time uses it.
        """
        if self.writing is None:
            session = self.acquire()
            if not self.database.owned:
                return session
            self.writing = session
            self.database.dedicate(session)
        return self.writing

    def writing_pid(self) -> int | None:
        """The server's process behind the connection that is kept for writing, if told."""
        session = self.writing
        with suppress(Exception):
            return int(session.raw.info.backend_pid) if session is not None else None
        return None

    def close(self) -> None:
        """Return what is kept.  An engine of our own is disposed of, once calls that are
        under way in other threads have released their connections."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._in_use += 1
        kept, self.writing = self.writing, None
        if kept is not None:
            self.release(kept)
        self._return(None)

    def _return(self, connection: sa.Connection | None) -> None:
        try:
            if connection is not None:
                with suppress(Exception):
                    connection.close()
        finally:
            with self._gate:
                self._in_use -= 1
                last = self._closed and not self._in_use
            if last:
                self.database.close()
