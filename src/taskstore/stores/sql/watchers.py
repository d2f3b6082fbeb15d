"""How a store on a database hears of what other processes commit.

A dialect without a watch here asks for the head.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from taskstore.stores.common.change_feed import PollingWatcher, WatcherBrokenError, polling_backoff
from taskstore.stores.sql.rows import Head
from taskstore.stores.sql.transactions import ConnectionPool

SAFETY_S = 1.0
"""How often the head is looked at, in seconds, although nothing was heard: behind some
poolers nothing ever is, and a version of taskstore before this one says nothing."""

SQLITE_POLL_PAUSE_S = 0.025
"""The longest pause between two looks at an SQLite file, in seconds."""


class DataVersionWatcher(PollingWatcher):
    """SQLite tells a connection cheaply whether another one has committed."""

    def __init__(self, pool: ConnectionPool, head: Callable[[], int]) -> None:
        super().__init__(head, self._version, longest_pause_s=SQLITE_POLL_PAUSE_S)
        self._pool = pool
        self._session = pool.acquire()

    def _version(self) -> object:
        row = self._session.row("PRAGMA data_version")
        # A file that was opened as one that nobody writes says so if somebody does.
        guard = self._pool.database.guard
        if guard is not None:
            guard.check()
        return row[0]

    def close(self, *, broken: bool) -> None:
        self._pool.release(self._session, broken=broken)


class ListeningWatcher:
    """PostgreSQL tells who listens.

    While it listens it holds an advisory lock, by which a writer sees that a
    notification is wanted: see ``PostgreSQLStatements``.  A writer whose
    transaction began before the lock was got says nothing, so the head is
    polled until then, and looked at once more after.
    """

    def __init__(self, pool: ConnectionPool, head: Callable[[], int]) -> None:
        del head  # it is read here, on the connection that listens
        self._pool = pool
        self._database = pool.database
        self._sql: Any = self._database.sql
        self._generation = self._database.generation
        self._session = pool.acquire()
        self._channel = ""
        # Whether we hold the lock, whether writers commit without our hearing of it,
        # whether somebody else has told of a commit, and whether anybody has.
        self._locked = self._deaf = self._heard = self._told = False
        self._seen: int | None = None
        self._backoff = polling_backoff()
        self._due_at = 0.0
        self._hearing, self._waking = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        try:
            self._listen()
        except BaseException:
            self.close(broken=True)
            raise

    def _listen(self) -> None:
        session = self._session
        row = session.row(self._sql.head)
        if row is None:
            raise WatcherBrokenError
        self._channel = self._sql.channel_of(Head(*row).ledger_id)
        # What is heard in the middle of another statement is taken in with its
        # answer: without a handler it would be gone.
        session.raw.add_notify_handler(self._on_note)
        session.execute(f'LISTEN "{self._channel}"')
        for end in (self._hearing, self._waking):
            end.settimeout(0)
        self._selector.register(self._hearing, selectors.EVENT_READ)
        self._selector.register(session.raw.fileno(), selectors.EVENT_READ)

    def _on_note(self, note: Any) -> None:
        self._hear(note.channel, note.pid)

    def _hear(self, channel: str, pid: int) -> None:
        if channel == self._channel:
            self._told, self._deaf = True, False
            # Of our own commits the waiters know already.
            if pid != self._pool.writing_pid():
                self._heard = True

    def look(self) -> int | None:
        if self._generation != self._database.generation:
            # The server that we listen to may no longer be the one that is written to.
            raise WatcherBrokenError
        if not self._heard and time.monotonic() < self._due_at:
            return None
        return self._look()

    def _look(self) -> int:
        session, locked = self._session, self._locked
        if not locked:
            [self._locked] = session.row(self._sql.be_heard, (self._channel,))
        told, self._told, self._heard = self._told, False, False
        row = session.row(self._sql.head)
        if row is None:
            raise WatcherBrokenError
        head = Head(*row).head_seq
        if self._seen is not None and head != self._seen:
            self._backoff.reset()
            # Somebody has committed whom we cannot hear.
            self._deaf = self._deaf or (locked and not told and not self._told)
        self._seen = head
        period = SAFETY_S if self._locked and not self._deaf else self._backoff.next_s()
        self._due_at = time.monotonic() + period
        return head

    def pause(self, seconds: float) -> None:
        if self._heard:
            return
        rest = min(seconds, self._due_at - time.monotonic())
        for key, _ in self._selector.select(max(0.0, rest)):
            if key.fileobj is self._hearing:
                with suppress(OSError):
                    self._hearing.recv(64)
            else:
                self._take_in()

    def _take_in(self) -> None:
        connection = self._session.raw.pgconn
        connection.consume_input()
        while (note := connection.notifies()) is not None:
            self._hear(note.relname.decode(), note.be_pid)

    def wake(self) -> None:
        with suppress(OSError):
            self._waking.send(b"\0")

    def close(self, *, broken: bool) -> None:
        if not broken:
            try:
                self._session.raw.remove_notify_handler(self._on_note)
                self._session.execute(f'UNLISTEN "{self._channel}"')
                if self._locked:
                    self._session.row(self._sql.be_quiet, (self._channel,))
            except Exception:  # noqa: BLE001 - whatever a broken driver raises
                broken = True
        self._selector.close()
        self._hearing.close()
        self._waking.close()
        self._pool.release(self._session, broken=broken)
