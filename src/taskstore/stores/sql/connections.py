"""Connections, transactions, and what happens when they break.

Everything that talks to the database goes through :class:`Connections`:
``read`` and ``write`` run a function in one transaction and run it again
when the database asks for it, so these functions must bear repetition.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from taskstore.errors import (
    OutcomeUnknownError,
    StoreBusyError,
    StoreUnavailableError,
)
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.errors import GONE, Fault, ReplacedError
from taskstore.stores.sql.lending import Lending
from taskstore.stores.sql.patience import RECONNECT_S, Outage, Trouble
from taskstore.stores.sql.rivals import Rivals
from taskstore.stores.sql.rows import Head
from taskstore.stores.sql.session import Session

_T = TypeVar("_T")


class Connections(Lending):
    """The connections of one open store.

    With an engine of our own, one writing connection is held; with a host's,
    each call borrows one and gives it back, because the pool is not ours.
    ``reconnect_s`` is how long a server may be away before callers hear of it;
    ``check`` refuses a database that has taken the place of ours.
    """

    def __init__(
        self,
        database: Database,
        reconnect_s: float = RECONNECT_S,
        check: Callable[[Database], None] = lambda _database: None,
    ) -> None:
        super().__init__(database, check)
        # A standby may answer readers while there is nobody to write to.
        self._reading_outage = Outage(database.location, reconnect_s)
        self._writing_outage = Outage(database.location, reconnect_s)
        self._lock = threading.RLock()
        self._held: Session | None = None
        # A transaction that has begun and waits for its work, and whose thread that is.
        self._begun: Session | None = None
        self._begun_by = 0
        # A session that may be in a write transaction: looked up on the way out, because
        # an interrupt leaves no time to note anything.
        self._unfinished: Session | None = None
        self._refused: str | None = None

    # -- reading ----------------------------------------------------------

    def read(self, work: Callable[[Session], _T], *, one_moment: bool = False) -> _T:
        """Run ``work`` on a connection, with ``one_moment`` in one read transaction.

        Driver errors are translated; a lost connection is tried again.
        """
        begun = self._begun
        if begun is not None and self._begun_by == threading.get_ident() and not one_moment:
            try:
                return work(begun)
            except self.database.translator.errors as error:
                # The transaction is lost, and with it what kept others out; the
                # connection may be lost too, which is no reason not to read.
                self._begun = None
                self._abandon(begun, error)
        trouble = Trouble(self.database, self._reading_outage)
        while True:
            try:
                with self._reading(one_moment=one_moment) as session:
                    result = work(session)
                self.database.check_read(session)
            except ReplacedError:
                self.reopen()
            except self.database.translator.errors as error:
                trouble.pause_or_raise(error)
            else:
                self._reading_outage.end()
                return result

    @contextmanager
    def _reading(self, *, one_moment: bool) -> Iterator[Session]:
        session = self._connect()
        try:
            if one_moment:
                for statement in self.database.begin_read:
                    session.execute(statement)
            yield session
            if one_moment:
                session.execute("COMMIT")
        except BaseException as error:
            self._abandon(session, error)
            self._check_there(session, error)
            raise
        self._release(session)

    # -- writing ----------------------------------------------------------

    def write(
        self,
        work: Callable[[Session], _T],
        *,
        happened: Callable[[Session], _T | None] | None = None,
    ) -> _T:
        """Run ``work`` in one write transaction and commit it.

        When the connection dies during COMMIT, ``happened`` is asked on a new
        one, the head row locked: what it returns is the result, ``None``
        means that nothing was committed, and ``work`` runs again.  Without
        it, ``work`` must be such that doing it twice is the same.
        """
        with self._lock:
            try:
                result = self._write(work, happened)
            except BaseException:
                self._finish()
                raise
            return result

    def _write(
        self, work: Callable[[Session], _T], happened: Callable[[Session], _T | None] | None
    ) -> _T:
        trouble = Trouble(self.database, self._writing_outage, rivals=self._rivals())
        while True:
            self._check_trusted()
            try:
                result = self._write_once(work)
            except CommitBrokenError as broken:
                found = self._outcome(broken, trouble, happened)
                if found is not None:
                    return found
            except ReplacedError:
                self.reopen()
            except self.database.translator.errors as error:
                trouble.pause_or_raise(error)
            else:
                self._writing_outage.end()
                return result

    def _finish(self) -> None:
        """End the write transaction that nobody has ended, if there is one."""
        self._begun = None
        if self._unfinished is not None:
            self._abandon(self._unfinished)

    def _rivals(self) -> Rivals:
        database = self.database
        return Rivals(
            lambda: self._glance(lambda session: Head(*session.row(database.sql.head)).head_seq),
            lambda: self._glance(database.holders),
        )

    def _glance(self, work: Callable[[Session], _T]) -> _T | None:
        """Read something, at one attempt; ``None`` when it cannot be read."""
        with suppress(Exception), self._reading(one_moment=False) as session:
            return work(session)
        return None

    @contextmanager
    def exclusive(self, lock: Callable[[Session], object]) -> Iterator[None]:
        """Begin a write transaction in which the next :meth:`write` does its work.

        ``lock`` makes other writers wait, where beginning does not.
        """
        with self._lock:
            try:
                try:
                    self._begin_patiently(lock)
                    yield
                finally:
                    self._finish()
            except BaseException:
                # An interrupt may have struck as the first call began.
                self._finish()
                raise

    def _begin_patiently(self, lock: Callable[[Session], object]) -> None:
        trouble = Trouble(self.database, self._writing_outage, rivals=self._rivals())
        while self._begun is None:
            self._check_trusted()
            try:
                self._begin(lock)
            except ReplacedError:
                self.reopen()
            except self.database.translator.errors as error:
                trouble.pause_or_raise(error)

    def _begin(self, lock: Callable[[Session], object] | None = None) -> None:
        session = self._unfinished = self._writer()
        try:
            self._begun_by = threading.get_ident()
            self.database.begin_write(session)
            if lock is not None:
                lock(session)
        except BaseException as error:
            self._abandon(session, error)
            self._check_there(session, error)
            raise
        self._begun = session

    def _write_once(self, work: Callable[[Session], _T]) -> _T:
        if self._begun is None:
            self._begin()
        session, self._begun = self._begun, None
        assert session is not None
        try:
            result = work(session)
            self.database.check_there(session)
        except BaseException as error:
            self._abandon(session, error)
            self._check_there(session, error)
            raise
        try:
            self.database.commit(session)
        except self.database.translator.errors as error:
            fault = self.database.translator.fault_of(error)
            self._abandon(session, error)
            if fault in (Fault.LOST, Fault.SYNC):
                raise CommitBrokenError(fault, error) from error
            raise
        except BaseException as error:
            self._abandon(session, error)
            raise
        self._done(session)
        return result

    def _outcome(
        self,
        broken: CommitBrokenError,
        trouble: Trouble,
        happened: Callable[[Session], _T | None] | None,
    ) -> _T | None:
        """Find out what became of a COMMIT that was not answered."""
        translator = self.database.translator
        if broken.fault is Fault.SYNC:
            # What the system failed to write, it may have dropped from its
            # cache as if written: nothing that this instance sees can be trusted.
            self._refused = "a commit could not be forced to disk"
            raise OutcomeUnknownError(
                f"{translator.location}: whether the last commit reached the disk is unknown: "
                f"{translator.text(broken.error)}",
                hint="check the disk, and open the store again",
            ) from translator.cause(broken.error)
        if happened is None:
            trouble.pause_or_raise(broken.error)
            return None
        while True:
            try:
                return self._read_back(happened)
            except translator.errors as error:
                try:
                    trouble.pause_or_raise(error)
                except (StoreBusyError, StoreUnavailableError) as final:
                    raise OutcomeUnknownError(
                        f"{translator.location}: the connection broke during a commit, and "
                        f"whether it happened cannot be read back: {final}",
                        hint="read the store again when it can be reached",
                    ) from final

    def _read_back(self, happened: Callable[[Session], _T | None]) -> _T | None:
        session = self._unfinished = self._writer()
        try:
            self.database.begin_write(session)
            found = happened(session)
            if found is not None:
                # A primary that died while it waited for its standby shows, once it is
                # back, what the standby may not have.  A commit waits for all before it.
                self.database.commit(session)
        except BaseException as error:
            self._abandon(session, error)
            raise
        self._abandon(session)  # nothing was written; this gives the head row free
        return found

    def erase(self) -> None:
        """Get rid of deleted bytes that the database still keeps in its files."""
        with self._lock, self.database.translator:
            session = self._connect()
            try:
                self.database.erase(session)
            finally:
                self._abandon(session)

    # -- a file that was replaced ------------------------------------------

    def reopen(self) -> None:
        """Go on with the file that has taken the place of ours: see :meth:`Database.reopen`."""
        super().reopen()
        if self._lock.acquire(blocking=False):
            # Who is writing just now gives its connection up itself.
            try:
                if self._begun is None and self._unfinished is None:
                    self._drop_held()
            finally:
                self._lock.release()

    def _check_there(self, session: Session, error: BaseException) -> None:
        """See in trouble with a file that was replaced no trouble but that."""
        if isinstance(error, self.database.translator.errors):
            self.database.check_there(session)

    def _drop_held(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            with suppress(Exception):
                self._release(held)

    # -- connections ------------------------------------------------------

    def writing_pid(self) -> int | None:
        """The server's process behind the connection that is held for writing, if told."""
        held = self._held
        with suppress(Exception):
            return int(held.raw.info.backend_pid) if held is not None else None
        return None

    def _writer(self) -> Session:
        if self._held is not None and self._held.file is self.database.file:
            return self._held
        self._drop_held()
        session = self._connect()
        if self.database.owned:
            self._held = session
            self.database.dedicate(session)
        return session

    def _done(self, session: Session) -> None:
        if session is self._held:
            self._unfinished = None
            return
        self.database.after_write(session)
        self._unfinished = None
        self._release(session)

    def _abandon(self, session: Session, error: BaseException | None = None) -> None:
        """Roll back, quietly: the ``error`` that brought us here is the one to report.

        A connection that cannot even do that is not used again, nor is one to
        a server that is going, or that is not the one to write to.
        """
        held = session is self._held
        translator = self.database.translator
        gone = isinstance(error, translator.errors) and translator.fault_of(error) in GONE
        if gone:
            self.database.renew()
        else:
            try:
                self.database.rollback(session)
                if not held:
                    self.database.after_write(session)
            except Exception:  # noqa: BLE001 - whatever a broken driver raises
                gone = True
        if gone:
            if held:
                self._held, held = None, False
            with suppress(Exception):
                session.connection.invalidate()
        if session is self._unfinished:
            self._unfinished = None
        if not held:
            with suppress(Exception):
                self._release(session)

    def _check_trusted(self) -> None:
        if self._refused is not None:
            raise StoreUnavailableError(
                f"{self.database.location} takes no more writes from this instance: "
                f"{self._refused}",
                hint="check the disk, and open the store again",
            )

    def close(self) -> None:
        """Give back what is held; an engine of our own is disposed of, once calls
        that are under way in other threads have given back their connections."""
        with self._lock:
            with self._gate:
                if self._closed:
                    return
                self._closed = True
                self._borrowed += 1
            self._drop_held()
            self._give_back(None)


class CommitBrokenError(Exception):
    """COMMIT was sent and not answered, or the disk did not take it."""

    def __init__(self, fault: Fault, error: Exception) -> None:
        super().__init__(str(fault))
        self.fault = fault
        self.error = error
