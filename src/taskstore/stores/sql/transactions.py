"""Transactions on one database, and the connections that they run on.

The body of ``with transactions.write() as tx`` is one write transaction, which
is committed where the body ends and rolled back where it raises.  Around it
stands the loop of a retry policy::

    for attempt in transactions.attempts():
        with attempt, transactions.write() as tx:
            tx.execute(...)
            return
so that the body may run several times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import sqlalchemy as sa

from taskstore.errors import (
    OutcomeUnknownError,
    StoreBusyError,
    StoreClosedError,
    StoreUnavailableError,
    TaskStoreError,
)
from taskstore.stores.common.retry import (
    RECONNECT_S,
    CircuitBreaker,
    RetryPolicy,
    UnansweredError,
)
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import Session
from taskstore.stores.sql.errors import GONE, Fault
from taskstore.stores.sql.rows import Head

_T = TypeVar("_T")


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


class Transactions:
    """The transactions of one open store, on the connections of its pool.

    ``reconnect_s`` is how long a server may be away before callers hear of it.
    """

    def __init__(self, pool: ConnectionPool, reconnect_s: float = RECONNECT_S) -> None:
        database = pool.database
        self.pool = pool
        self.database = database
        # A standby may answer readers while there is nobody to write to.
        self._reads = RetryPolicy(
            database.translator, CircuitBreaker(database.location, reconnect_s)
        )
        writes = RetryPolicy(
            database.translator,
            CircuitBreaker(database.location, reconnect_s),
            position=self._position,
            owners=self._lock_owners,
        )
        self.attempts = writes.attempts
        """Attempts at a write; see :meth:`RetryPolicy.attempts`.

        Unless the caller ``reads_back``, doing the work twice has to be the same as once.
        """
        self._lock = threading.RLock()
        self._writing = False
        # A transaction that exclusive() has begun and no write has used yet, and its thread.
        self._begun: Session | None = None
        self._begun_by = 0
        self._refused: str | None = None

    # -- writing ----------------------------------------------------------

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One write transaction: committed at the end of the body, rolled back where it raises.

        Inside :meth:`exclusive`, the first one is the transaction that was begun there.
        """
        pool, database = self.pool, self.database
        with self._lock:
            if self._writing or self._refused is not None:
                raise self._refusal()
            self._writing = True
            session, self._begun = self._begun, None
            try:
                if session is None:
                    session = pool.writing or pool.writer()
                    database.begin_write(session)
                yield session
                if database.guard is not None:
                    database.guard.check()
                try:
                    database.commit(session)
                except database.translator.errors as error:
                    self._raise_unconfirmed(error)
                    raise
            except BaseException as error:
                if session is not None:
                    self._roll_back(session, error)
                raise
            finally:
                self._writing = False
            if session is not pool.writing:
                self._release(session)

    def run(self, work: Callable[[Session], _T]) -> _T:
        """Do ``work`` in one write transaction.

        It may run several times: doing it twice has to be the same as once.
        """
        for attempt in self.attempts():
            with attempt, self.write() as tx:
                return work(tx)
        raise AssertionError("attempts end by raising")

    def read_back(self, happened: Callable[[Session], bool]) -> bool:
        """Find out what became of a COMMIT that was not answered.

        ``happened`` looks, on a connection that has locked the head row: no other
        writer, and no transaction of a connection that is lost, is under way then.
        Raises :class:`~taskstore.OutcomeUnknownError` if it cannot be found out.
        """

        def look(tx: Session) -> bool:
            tx.rows(self.database.sql.lock_head)
            # A primary that died while it waited for its standby shows, once it is
            # back, what the standby may not have.  This commit waits for all before it.
            return happened(tx)

        try:
            return self.run(look)
        except (StoreBusyError, StoreUnavailableError) as final:
            raise OutcomeUnknownError(
                f"{self.database.location}: the connection broke during a commit, and "
                f"whether it happened cannot be read back: {final}",
                hint="read the store again when it can be reached",
            ) from final

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Begin a write transaction, which the next :meth:`write` of this thread uses."""
        with self._lock:
            self._check_idle()
            try:
                for attempt in self.attempts():
                    with attempt:
                        self._begin()
                        break
                yield
            finally:
                session, self._begun = self._begun, None
                if session is not None:
                    self._roll_back(session)

    def _check_idle(self) -> None:
        if self._writing or self._begun is not None or self._refused is not None:
            raise self._refusal()

    def _begin(self) -> None:
        session = self.pool.writer()
        try:
            self.database.begin_write(session)
            session.rows(self.database.sql.lock_head)  # where beginning keeps nobody out
            self._begun_by = threading.get_ident()
            self._begun = session
        except BaseException as error:
            self._roll_back(session, error)
            raise

    def erase(self) -> None:
        """Get rid of deleted bytes that the database still keeps in its files."""
        with self._lock, self.database.translator:
            session = self.pool.acquire()
            try:
                self.database.erase(session)
            finally:
                self._release(session)

    def _raise_unconfirmed(self, error: Exception) -> None:
        """Raise where a failed COMMIT leaves open whether it happened."""
        translator = self.database.translator
        fault = translator.fault_of(error)
        if fault is Fault.LOST:
            raise UnansweredError from error
        if fault is Fault.SYNC:
            # What the system failed to write, it may have dropped from its
            # cache as if written: nothing that this instance sees can be trusted.
            self._refused = "a commit could not be forced to disk"
            raise OutcomeUnknownError(
                f"{translator.location}: whether the last commit reached the disk is unknown: "
                f"{translator.text(error)}",
                hint="check the disk, and open the store again",
            ) from translator.cause(error)

    def _refusal(self) -> TaskStoreError:
        if self._refused is None:
            return StoreBusyError(
                f"{self.database.location}: this thread is in the middle of another write",
                hint="do not write from a signal handler",
            )
        return StoreUnavailableError(
            f"{self.database.location} takes no more writes from this instance: {self._refused}",
            hint="check the disk, and open the store again",
        )

    # -- reading ----------------------------------------------------------

    def read(self, work: Callable[[Session], _T], *, one_moment: bool = False) -> _T:
        """Run ``work`` on a connection, with ``one_moment`` in one read transaction.

        Driver errors are translated; a lost connection is tried again.  Inside
        :meth:`exclusive`, it runs in the transaction that was begun there.
        """
        begun = self._begun
        if begun is not None and self._begun_by == threading.get_ident() and not one_moment:
            try:
                result = work(begun)
                if self.database.guard is not None:
                    self.database.guard.check()
            except self.database.translator.errors as error:
                # The transaction is lost, and with it what kept others out; the
                # connection may be lost too, which is no reason not to read.
                self._begun = None
                self._roll_back(begun, error)
            else:
                return result
        for attempt in self._reads.attempts():
            with attempt, self.reading(one_moment=one_moment) as session:
                return work(session)
        raise AssertionError("attempts end by raising")

    @contextmanager
    def reading(self, *, one_moment: bool = False) -> Iterator[Session]:
        """A connection to read on, with ``one_moment`` in one read transaction."""
        session = self.pool.acquire()
        try:
            if one_moment:
                for statement in self.database.begin_read:
                    session.execute(statement)
            yield session
            if one_moment:
                session.execute("COMMIT")
            # Before it is released: with the last connection of a store that is closed
            # meanwhile, SQLite itself removes the logs.
            if self.database.guard is not None:
                self.database.guard.check()
        except BaseException as error:
            self._roll_back(session, error)
            raise
        self.pool.release(session)

    def _position(self) -> int | None:
        """How far all writers have come, at one attempt; ``None`` if that cannot be read."""
        with suppress(Exception), self.reading() as session:
            return Head(*session.row(self.database.sql.head)).head_seq
        return None

    def _lock_owners(self) -> Sequence[str] | None:
        with suppress(Exception), self.reading() as session:
            return self.database.lock_owners(session)
        return None

    # -- ending -----------------------------------------------------------

    def _roll_back(self, session: Session, error: BaseException | None = None) -> None:
        """Roll back and release, quietly: the ``error`` that led here is the one to report.

        A connection that cannot even do that is not used again, nor is one to
        a server that is going, or that is not the one to write to.  Trouble with
        a file that was replaced is reported as that.
        """
        database = self.database
        if isinstance(error, UnansweredError):
            error = error.__cause__
        fault = None
        if isinstance(error, database.translator.errors):
            fault = database.translator.fault_of(error)
        broken = fault in GONE
        try:
            if broken:
                database.renew()
            else:
                database.rollback(session)
        except Exception:  # noqa: BLE001 - whatever a broken driver raises
            broken = True
        try:
            if fault is not None and database.guard is not None:
                database.guard.look()
        finally:
            self._release(session, broken=broken)

    def _release(self, session: Session, *, broken: bool = False) -> None:
        """Release a connection, a host's as it was."""
        try:
            if session is not self.pool.writing and not broken:
                session.set_back()
        except Exception:  # noqa: BLE001 - whatever a broken driver raises
            broken = True
        self.pool.release(session, broken=broken)

    def close(self) -> None:
        """Close the pool, once no write is under way."""
        with self._lock:
            self.pool.close()
