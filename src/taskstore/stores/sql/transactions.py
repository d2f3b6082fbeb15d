"""Transactions on one database, and its connection pool.

The body of ``with transactions.write() as tx`` is one write transaction.  The
transaction is committed at the end of the body, or rolled back if the body raises.
The caller runs the ``with`` statement in a retry loop, so the body can run several times::

    for attempt in transactions.attempts():
        with attempt, transactions.write() as tx:
            return tx.row(...)

If the answer to COMMIT is lost, the attempt ends with ``UnconfirmedCommitError``.  The caller of
the transaction then calls :meth:`Transactions.read_back_commit`, which locks the head row and looks
for the commit id in the journal.  If the journal contains the commit id, the caller returns the
commit.  If the journal does not contain the commit id, the caller retries the batch of changes.  If
the server stays unreachable, ``read_back_commit`` raises :class:`~taskstore.OutcomeUnknownError`.
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
    UnconfirmedCommitError,
)
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import DriverSession
from taskstore.stores.sql.errors import UNREACHABLE, ErrorKind
from taskstore.stores.sql.rows import HeadRow

_T = TypeVar("_T")


class ConnectionPool:
    """Connections that threads acquire and release.

    If the store created the engine, the pool keeps one connection for writes.
    If the engine belongs to a host, each call acquires and releases a connection.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.write_session: DriverSession | None = None
        """The connection that the pool keeps for writes; ``None`` before the first write."""
        self._lock = threading.Lock()
        self._in_use = 0
        self._closed = False

    def acquire(self) -> DriverSession:
        """Return a connection; the caller must release the connection with :meth:`release`."""
        database = self.database
        with self._lock:
            if self._closed:
                raise StoreClosedError(f"the store {database.location} is closed")
            self._in_use += 1
        connection = None
        try:
            connection = database.engine.connect()
            if not database.owned:
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            session = DriverSession(connection, database)
            if not database.owned:
                database.configure_borrowed_connection(session)
        except BaseException:
            self._return_connection(connection)
            raise
        return session

    def release(self, session: DriverSession, *, broken: bool = False) -> None:
        """Return a connection to the engine; invalidate a ``broken`` connection.

        If the connection is the write connection and is not broken, the pool keeps it.  Before the
        method returns a host's connection, it restores the connection's settings.
        """
        if session is self.write_session:
            if not broken:
                return
            self.write_session = None
        elif not broken:
            try:
                session.restore_settings()
            except Exception:  # noqa: BLE001 - a broken driver can raise any error
                broken = True
        if broken:
            with suppress(Exception):
                session.connection.invalidate()
        self._return_connection(session.connection)

    def acquire_writer(self) -> DriverSession:
        """Return the connection for writes; the caller must release the connection with
        :meth:`release`.

        The caller must run only one transaction at a time on this connection.
        """
        if self.write_session is None:
            session = self.acquire()
            if not self.database.owned:
                return session
            self.write_session = session
            self.database.configure_writer(session)
        return self.write_session

    def writer_backend_pid(self) -> int | None:
        """Return the id of the PostgreSQL process of the write connection; ``None`` if unknown."""
        session = self.write_session
        with suppress(Exception):
            return int(session.raw.info.backend_pid) if session is not None else None
        return None

    def close(self) -> None:
        """Release the write connection.  If the engine belongs to the store, the engine is disposed
        of when the last acquired connection is released."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._in_use += 1
        session, self.write_session = self.write_session, None
        if session is not None:
            self.release(session)
        self._return_connection(None)

    def terminate(self) -> None:
        """Close the pool without running a statement on the write connection: the server possibly
        does not answer."""
        if self.write_session is not None:
            self.release(self.write_session, broken=True)
        self.close()

    def _return_connection(self, connection: sa.Connection | None) -> None:
        try:
            if connection is not None:
                with suppress(Exception):
                    connection.close()
        finally:
            with self._lock:
                self._in_use -= 1
                last = self._closed and not self._in_use
            if last:
                self.database.close()


class Transactions:
    """The transactions of one open store, on the connections of its pool.

    If the server is down for longer than ``reconnect_s`` seconds, calls raise
    :class:`~taskstore.StoreUnavailableError`.
    """

    def __init__(self, pool: ConnectionPool, reconnect_s: float = RECONNECT_S) -> None:
        database = pool.database
        self.pool = pool
        self.database = database
        # Reads have their own circuit breaker: without a primary, a standby can serve reads.
        self._read_retry = RetryPolicy(
            database.translator, CircuitBreaker(database.location, reconnect_s)
        )
        writes = RetryPolicy(
            database.translator,
            CircuitBreaker(database.location, reconnect_s),
            position=self._read_head,
            owners=self._read_lock_owners,
        )
        self.attempts = writes.attempts
        """Returns the attempts of a write; see :meth:`RetryPolicy.attempts`.

        If ``reads_back`` is false, the body of an attempt must be idempotent.
        """
        self._lock = threading.RLock()
        self._writing = False
        # The open transaction of exclusive() until a write uses it, and the thread that called
        # exclusive().
        self._exclusive_tx: DriverSession | None = None
        self._tx_thread = 0
        self._refusal_reason: str | None = None

    # -- writes -----------------------------------------------------------

    @contextmanager
    def write(self) -> Iterator[DriverSession]:
        """Open a write transaction for a ``with`` block.

        The transaction is committed at the end of the block, or rolled back if the block raises an
        error.  Inside :meth:`exclusive`, the first call uses the transaction that ``exclusive``
        began.
        """
        pool, database = self.pool, self.database
        with self._lock:
            if self._writing or self._refusal_reason is not None:
                raise self._refusal_error()
            self._writing = True
            session, self._exclusive_tx = self._exclusive_tx, None
            try:
                if session is None:
                    session = pool.write_session or pool.acquire_writer()
                    database.begin_write(session)
                yield session
                if database.guard is not None:
                    database.guard.check()
                try:
                    database.commit(session)
                except database.translator.errors as error:
                    self._handle_commit_error(error)
                    raise
            except BaseException as error:
                if session is not None:
                    self._roll_back(session, error)
                raise
            finally:
                self._writing = False
            if session is not pool.write_session:
                pool.release(session)

    def run(self, work: Callable[[DriverSession], _T]) -> _T:
        """Run ``work`` in one write transaction, and return its result.

        ``work`` can run several times, so it must be idempotent.
        """
        for attempt in self.attempts():
            with attempt, self.write() as tx:
                return work(tx)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def read_back_commit(self, is_committed: Callable[[DriverSession], bool]) -> bool:
        """Return whether a COMMIT has taken effect; the answer to this COMMIT was lost.

        ``is_committed`` reads in a transaction that has locked the head row.  The lock of the
        head row proves that the transaction of the lost connection has ended and that no writer
        is active.  Raises :class:`~taskstore.OutcomeUnknownError` if the outcome cannot be read
        back.
        """

        def work(tx: DriverSession) -> bool:
            tx.rows(self.database.sql.lock_head)
            # After a restart, a primary can show commits that its standby does not have.
            # The COMMIT of this transaction waits until the standby has all earlier commits.
            return is_committed(tx)

        try:
            return self.run(work)
        except (StoreBusyError, StoreUnavailableError) as final:
            raise OutcomeUnknownError(
                f"{self.database.location}: the connection broke during a commit, and "
                f"the outcome of the commit cannot be read back: {final}",
                hint="when the server answers again, load the records again",
            ) from final

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Begin a write transaction; the next :meth:`write` of this thread uses this
        transaction."""
        with self._lock:
            self._check_no_write()
            try:
                for attempt in self.attempts():
                    with attempt:
                        self._begin_exclusive()
                        break
                yield
            finally:
                session, self._exclusive_tx = self._exclusive_tx, None
                if session is not None:
                    self._roll_back(session)

    def _check_no_write(self) -> None:
        if self._writing or self._exclusive_tx is not None or self._refusal_reason is not None:
            raise self._refusal_error()

    def _begin_exclusive(self) -> None:
        session = self.pool.acquire_writer()
        try:
            self.database.begin_write(session)
            session.rows(self.database.sql.lock_head)  # on a database server, BEGIN takes no lock
            self._tx_thread = threading.get_ident()
            self._exclusive_tx = session
        except BaseException as error:
            self._roll_back(session, error)
            raise

    def scrub_deleted(self) -> None:
        """Erase the bytes of deleted rows from the files of the database."""
        with self._lock, self.database.translator:
            session = self.pool.acquire()
            try:
                self.database.maintenance.scrub_deleted(session)
            finally:
                self.pool.release(session)

    def _handle_commit_error(self, error: Exception) -> None:
        """Raise an error if the outcome of a failed COMMIT is unknown."""
        translator = self.database.translator
        kind = translator.error_kind(error)
        if kind is ErrorKind.CONNECTION_LOST:
            raise UnconfirmedCommitError from error
        if kind is ErrorKind.FSYNC_FAILED:
            # The operating system can have dropped the pages from the page cache without writing
            # them to disk, so a later read by this instance can return wrong data.
            self._refusal_reason = "a commit could not be flushed to disk"
            raise OutcomeUnknownError(
                f"{translator.location}: it is unknown whether the last commit reached the disk: "
                f"{translator.text(error)}",
                hint="check the disk, and open the store again",
            ) from translator.cause(error)

    def _refusal_error(self) -> TaskStoreError:
        if self._refusal_reason is None:
            return StoreBusyError(
                f"{self.database.location}: this thread has not finished another write",
                hint="do not write from a signal handler",
            )
        return StoreUnavailableError(
            f"{self.database.location}: this instance refuses writes: {self._refusal_reason}",
            hint="check the disk, and open the store again",
        )

    # -- reads ------------------------------------------------------------

    def read(self, work: Callable[[DriverSession], _T], *, in_transaction: bool = False) -> _T:
        """Call ``work`` with a connection, and return the result.  If ``in_transaction`` is true,
        ``work`` runs in one read transaction.

        Driver errors are translated, and a read on a lost connection is retried.  If
        ``in_transaction`` is false inside :meth:`exclusive`, ``work`` runs in the transaction that
        ``exclusive`` began.
        """
        tx = self._exclusive_tx
        if tx is not None and self._tx_thread == threading.get_ident() and not in_transaction:
            try:
                result = work(tx)
                if self.database.guard is not None:
                    self.database.guard.check()
            except self.database.translator.errors as error:
                # The transaction of exclusive() and its lock are lost.  The connection can be lost
                # too.  The read can be repeated on another connection.
                self._exclusive_tx = None
                self._roll_back(tx, error)
            else:
                return result
        for attempt in self._read_retry.attempts():
            with attempt, self.reading(in_transaction=in_transaction) as session:
                return work(session)
        raise AssertionError("no attempt returned or raised an error")

    @contextmanager
    def reading(self, *, in_transaction: bool = False) -> Iterator[DriverSession]:
        """Acquire a connection for reads.  If ``in_transaction`` is true, the body of the ``with``
        statement is one read transaction."""
        session = self.pool.acquire()
        try:
            if in_transaction:
                for statement in self.database.begin_read:
                    session.execute(statement)
            yield session
            if in_transaction:
                session.execute("COMMIT")
            # The guard must check the file before the connection is released.  If the store was
            # closed meanwhile, the release closes the only open connection, and SQLite then removes
            # its log files.
            if self.database.guard is not None:
                self.database.guard.check()
        except BaseException as error:
            self._roll_back(session, error)
            raise
        self.pool.release(session)

    def _read_head(self) -> int | None:
        """Return the head seq, read without retries; ``None`` if the read fails."""
        with suppress(Exception), self.reading() as session:
            return HeadRow(*session.row(self.database.sql.head)).head_seq
        return None

    def _read_lock_owners(self) -> Sequence[str] | None:
        with suppress(Exception), self.reading() as session:
            return self.database.lock_owners(session)
        return None

    # -- rollback ---------------------------------------------------------

    def _roll_back(self, session: DriverSession, error: BaseException | None = None) -> None:
        """Roll back and release a connection.  Errors of the rollback are suppressed, because
        the caller raises ``error``.

        A connection is discarded if one of these is true: (a) its rollback fails; (b) its server
        is unreachable, shuts down or is not the primary; (c) a pooler shares the server's session.
        If an SQLite file was replaced, the guard raises an error.
        """
        database = self.database
        if isinstance(error, UnconfirmedCommitError):
            error = error.__cause__
        kind = None
        if isinstance(error, database.translator.errors):
            kind = database.translator.error_kind(error)
        if kind is ErrorKind.POOLED:
            database.use_pooler()
        broken = kind in UNREACHABLE or kind is ErrorKind.POOLED
        try:
            if broken:
                database.invalidate_connections()
            else:
                database.rollback(session)
        except Exception:  # noqa: BLE001 - a broken driver can raise any error
            broken = True
        try:
            if kind is not None and database.guard is not None:
                database.guard.check_fully()
        finally:
            self.pool.release(session, broken=broken)

    def close(self) -> None:
        """Wait until the current write has ended, then close the pool."""
        with self._lock:
            self.pool.close()
