"""Lending the connections of an engine, and going on with a file that took the place of ours."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import sqlalchemy as sa

from taskstore.errors import StoreClosedError
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.errors import ReplacedError
from taskstore.stores.sql.session import Session


class Lending:
    """Connections that are borrowed and given back, from any thread.

    ``check`` refuses a database that has taken the place of ours.  The engine
    is given up when the last one is back after closing.
    """

    def __init__(self, database: Database, check: Callable[[Database], None]) -> None:
        self.database = database
        self._check = check
        self._reopening = threading.Lock()
        self._gate = threading.Lock()
        self._borrowed = 0
        self._closed = False

    def prepare(self) -> None:
        """Look at the database, and set it up, once its schema is known to be ours."""
        with self.database.translator:
            session = self._connect()
            try:
                self.database.prepare(session)
            except BaseException:
                self.give_back(session, broken=True)
                raise
            self._release(session)

    def reopen(self) -> None:
        """Go on with the file that has taken the place of ours: see :meth:`Database.reopen`."""
        self._count()
        try:
            with self._reopening, self.database.translator:
                self.database.reopen(self._set_up)
        finally:
            self._give_back(None)

    def _set_up(self, fresh: Database) -> None:
        self._check(fresh)
        Lending(fresh, self._check).prepare()

    def borrow(self) -> Session:
        """A connection for longer than one call; see :meth:`give_back`."""
        while True:
            try:
                return self._connect()
            except ReplacedError:
                self.reopen()

    def give_back(self, session: Session, *, broken: bool = False) -> None:
        """Return what was borrowed, ``broken`` if nobody is to use it any more."""
        if broken:
            with suppress(Exception):
                session.connection.invalidate()
        with suppress(Exception):
            self._release(session)

    def _connect(self) -> Session:
        database = self.database
        self._count()
        connection = None
        try:
            connection = database.engine.connect()
            if not database.owned:
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            raw = connection.connection.driver_connection
            cursor = database.cursor(raw)
            file = connection.info.get("file")
            return Session(connection, raw, cursor, database.compiler, file)
        except BaseException:
            self._give_back(connection)
            raise

    def _count(self) -> None:
        """Note one more who uses the database, until :meth:`_give_back`."""
        with self._gate:
            if self._closed:
                raise StoreClosedError(f"the store {self.database.location} is closed")
            self._borrowed += 1

    def _release(self, session: Session) -> None:
        if session.file is not self.database.file:
            with suppress(Exception):
                session.connection.invalidate()
        self._give_back(session.connection)

    def _give_back(self, connection: sa.Connection | None) -> None:
        try:
            if connection is not None:
                connection.close()
        finally:
            with self._gate:
                self._borrowed -= 1
                last = self._closed and not self._borrowed
            if last:
                self.database.close()
