"""How a store on a database hears of what other processes commit.

Each dialect names its watch; one that names none asks for the head.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from taskstore.errors import TaskStoreError
from taskstore.stores.feed import Naps, PollingWatch, Watch, WatchBrokenError
from taskstore.stores.sql.pool import ConnectionPool
from taskstore.stores.sql.rows import Head
from taskstore.stores.sql.session import Session

SAFETY_S = 1.0
"""How often the head is looked at, in seconds, although nothing was heard: behind some
poolers nothing ever is, and a version of taskstore before this one says nothing."""

SQLITE_NAP_S = 0.02
"""The longest pause between two looks at an SQLite file, in seconds."""


def polling_watch(_connections: ConnectionPool, head: Callable[[], int]) -> Watch:
    """A watch that asks for the head."""
    return PollingWatch(head)


class _Held:
    """A watch with a connection of its own."""

    def __init__(self, connections: ConnectionPool) -> None:
        self._connections = connections
        self._session = self._guarded(connections.acquire)
        self._broken = False

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """Do ``work``: trouble with the connection makes the watch a broken one."""
        try:
            return work()
        except self._connections.database.translator.errors as error:
            self._broken = True
            raise WatchBrokenError from error

    def _release(self) -> None:
        self._connections.release(self._session, broken=self._broken)


class DataVersionWatch(_Held):
    """SQLite tells a connection cheaply whether another one has committed."""

    def __init__(self, connections: ConnectionPool, head: Callable[[], int]) -> None:
        super().__init__(connections)
        self._polling = PollingWatch(head, self._version, longest_nap_s=SQLITE_NAP_S)

    def _version(self) -> object:
        row = self._guarded(lambda: self._session.row("PRAGMA data_version"))
        guard = self._connections.database.guard
        if guard is not None:
            guard.check()
        return row[0]

    def look(self) -> int | None:
        return self._polling.look()

    def pause(self, seconds: float) -> None:
        self._polling.pause(seconds)

    def wake(self) -> None:
        self._polling.wake()

    def close(self) -> None:
        self._release()


class ListeningWatch(_Held):
    """PostgreSQL tells who listens.

    While it listens it holds an advisory lock, by which a writer sees that a
    notification is wanted: see ``PostgreSQLStatements``.  A writer whose
    transaction began before the lock was got says nothing, so the head is
    polled until then, and looked at once more after.
    """

    def __init__(self, connections: ConnectionPool, head: Callable[[], int]) -> None:
        del head  # it is read here, on the connection that listens
        super().__init__(connections)
        self._naps = Naps()
        self._database = connections.database
        self._sql: Any = connections.database.sql
        self._generation = self._database.generation
        self._channel = ""
        self._locked = self._deaf = self._heard = False
        self._seen: int | None = None
        self._looked_at = 0.0
        self._hearing, self._waking = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        try:
            self._guarded(self._listen)
        except BaseException:
            self._broken = True
            self.close()
            raise

    def _listen(self) -> None:
        session: Session = self._session
        row = session.row(self._sql.head)
        if row is None:
            raise WatchBrokenError
        self._channel = self._sql.channel_of(Head(*row).ledger_id)
        # What is heard in the middle of another statement is taken in with its
        # answer: without a handler it would be gone.
        session.raw.add_notify_handler(self._hear)
        session.execute(f'LISTEN "{self._channel}"')
        for end in (self._hearing, self._waking):
            end.settimeout(0)
        self._selector.register(self._hearing, selectors.EVENT_READ)
        self._selector.register(session.raw.fileno(), selectors.EVENT_READ)

    def _hear(self, note: Any) -> None:
        """Take in what was heard in the middle of another statement."""
        self._note(note.channel, note.pid)

    def _note(self, channel: str, pid: int) -> None:
        # Of our own commits everybody has been told.
        if channel == self._channel and pid != self._connections.writing_pid():
            self._heard, self._deaf = True, False

    def look(self) -> int | None:
        if self._generation != self._database.generation:
            # The server that we listen to may no longer be the one that is written to.
            self._broken = True
            raise WatchBrokenError
        if not (self._heard or self._rest() <= 0):
            return None
        return int(self._guarded(self._look))

    def _look(self) -> int:
        session: Session = self._session
        locked = self._locked
        if not locked:
            [self._locked] = session.row(self._sql.be_heard, (self._channel,))
        heard, self._heard = self._heard, False
        row = session.row(self._sql.head)
        if row is None:
            raise WatchBrokenError
        head = Head(*row).head_seq
        if self._seen is not None and head != self._seen:
            self._naps.shorten()
            # Somebody has committed whom we cannot hear.
            self._deaf = self._deaf or (locked and not heard and not self._heard)
        self._seen, self._looked_at = head, time.monotonic()
        return head

    def _rest(self) -> float:
        """How long until the head is looked at although nothing was heard."""
        period = SAFETY_S if self._locked and not self._deaf else self._naps.next_s
        return self._looked_at + period - time.monotonic()

    def pause(self, seconds: float) -> None:
        if self._heard:
            return
        ready = self._selector.select(max(0.0, min(seconds, self._rest())))
        self._naps.lengthen()
        for key, _ in ready:
            if key.fileobj is self._hearing:
                with suppress(OSError):
                    self._hearing.recv(64)
            else:
                self._guarded(self._take_in)

    def _take_in(self) -> None:
        connection = self._session.raw.pgconn
        connection.consume_input()
        while (note := connection.notifies()) is not None:
            self._note(note.relname.decode(), note.be_pid)

    def wake(self) -> None:
        with suppress(OSError):
            self._waking.send(b"\0")

    def close(self) -> None:
        with suppress(Exception):
            self._session.raw.remove_notify_handler(self._hear)
        if not self._broken:
            try:
                self._session.execute(f'UNLISTEN "{self._channel}"')
                if self._locked:
                    self._session.row(self._sql.be_quiet, (self._channel,))
            except Exception:  # noqa: BLE001 - whatever a broken driver raises
                self._broken = True
        self._selector.close()
        self._hearing.close()
        self._waking.close()
        with suppress(TaskStoreError):
            self._release()
