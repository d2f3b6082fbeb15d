"""Watchers that notice commits of other processes, for SQLite and PostgreSQL.

When another process commits, a watcher wakes the store's change feed.  The change
feed then wakes followers and waiting calls.  For every other dialect, the store
polls the head.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from taskstore.stores.common.change_feed import (
    PollingWatcher,
    Watcher,
    WatcherBrokenError,
    polling_backoff,
)
from taskstore.stores.sql.rows import HeadRow
from taskstore.stores.sql.transactions import ConnectionPool

SAFETY_POLL_S = 1.0
"""The interval in seconds at which a PostgreSQL watcher polls the head even without a notification.
Some connection poolers drop notifications, and older versions of taskstore send no
notifications."""

SQLITE_POLL_PAUSE_S = 0.025
"""The longest pause between two polls of an SQLite file, in seconds."""


class DataVersionWatcher(PollingWatcher):
    """Polls SQLite's data version, which is cheap to read and changes at commits of other
    connections."""

    def __init__(self, pool: ConnectionPool, head: Callable[[], int]) -> None:
        super().__init__(head, self._data_version, longest_pause_s=SQLITE_POLL_PAUSE_S)
        self._pool = pool
        self._session = pool.acquire()

    def _data_version(self) -> object:
        row = self._session.row("PRAGMA data_version")
        # The guard raises an error if the database file was opened as immutable and has changed.
        guard = self._pool.database.guard
        if guard is not None:
            guard.check()
        return row[0]

    def close(self, *, broken: bool) -> None:
        self._pool.release(self._session, broken=broken)


class ListeningWatcher:
    """Receives PostgreSQL notifications of commits.

    Until a watcher owns an advisory lock, the watcher tries to acquire this lock at each poll.
    Writers send notifications only while a watcher owns the advisory lock: see
    ``PostgreSQLStatements``.  A writer that began its transaction before the watcher got the
    advisory lock sends no notification.  The watcher therefore polls the head until it owns the
    advisory lock, and then polls once more.
    """

    def __init__(self, pool: ConnectionPool, head: Callable[[], int]) -> None:
        del head  # the watcher reads the head on its own connection
        self._pool = pool
        self._database = pool.database
        self._sql: Any = self._database.sql
        self._generation = self._database.generation
        self._session = pool.acquire()
        self._channel = ""
        # _locked: this watcher owns the advisory lock.
        # _has_silent_writer: at least one writer does not send notifications.
        # _notified: a notification has arrived since the previous poll.
        # _notified_by_other: a notification from another process has arrived.
        self._locked = self._has_silent_writer = self._notified_by_other = self._notified = False
        self._last_head: int | None = None
        self._backoff = polling_backoff()
        self._next_poll_at = 0.0
        self._wake_receiver, self._wake_sender = socket.socketpair()
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
        self._channel = self._sql.channel_of(HeadRow(*row).ledger_id)
        # psycopg can receive a notification together with the result of a statement, and drops this
        # notification if no handler is registered.
        session.raw.add_notify_handler(self._on_notify)
        session.execute(f'LISTEN "{self._channel}"')
        for end in (self._wake_receiver, self._wake_sender):
            end.settimeout(0)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._selector.register(session.raw.fileno(), selectors.EVENT_READ)

    def _on_notify(self, note: Any) -> None:
        self._handle(note.channel, note.pid)

    def _handle(self, channel: str, pid: int) -> None:
        if channel == self._channel:
            self._notified, self._has_silent_writer = True, False
            # The store has already announced its own commits to the change feed.
            if pid != self._pool.writer_backend_pid():
                self._notified_by_other = True

    def poll(self) -> int | None:
        if self._generation != self._database.generation or self._database.pooled:
            # After a failover, this connection can still listen on the old primary.  Behind a
            # transaction pooler, LISTEN and the advisory lock belong to a shared session.
            raise WatcherBrokenError
        if not self._notified_by_other and time.monotonic() < self._next_poll_at:
            return None
        return self._poll_head()

    def _poll_head(self) -> int:
        session, locked = self._session, self._locked
        if not locked:
            [self._locked] = session.row(self._sql.lock_as_listener, (self._channel,))
        notified, self._notified, self._notified_by_other = self._notified, False, False
        row = session.row(self._sql.head)
        if row is None:
            raise WatcherBrokenError
        head = HeadRow(*row).head_seq
        if self._last_head is not None and head != self._last_head:
            self._backoff.reset()
            # If the head changed without a notification, at least one writer does not send
            # notifications.
            silent = locked and not notified and not self._notified
            self._has_silent_writer = self._has_silent_writer or silent
        self._last_head = head
        delay = (
            SAFETY_POLL_S
            if self._locked and not self._has_silent_writer
            else self._backoff.next_s()
        )
        self._next_poll_at = time.monotonic() + delay
        return head

    def pause(self, seconds: float) -> None:
        if self._notified_by_other:
            return
        timeout = min(seconds, self._next_poll_at - time.monotonic())
        for key, _ in self._selector.select(max(0.0, timeout)):
            if key.fileobj is self._wake_receiver:
                with suppress(OSError):
                    self._wake_receiver.recv(64)
            else:
                self._receive()

    def _receive(self) -> None:
        connection = self._session.raw.pgconn
        connection.consume_input()
        while (note := connection.notifies()) is not None:
            self._handle(note.relname.decode(), note.be_pid)

    def wake(self) -> None:
        with suppress(OSError):
            self._wake_sender.send(b"\0")

    def close(self, *, broken: bool) -> None:
        if not broken:
            try:
                self._session.raw.remove_notify_handler(self._on_notify)
                self._session.execute(f'UNLISTEN "{self._channel}"')
                if self._locked:
                    self._session.row(self._sql.unlock_as_listener, (self._channel,))
            except Exception:  # noqa: BLE001 - a broken driver can raise any error
                broken = True
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()
        self._pool.release(self._session, broken=broken)


_WATCHERS: dict[str, Callable[[ConnectionPool, Callable[[], int]], Watcher]] = {
    "sqlite": DataVersionWatcher,
    "postgresql": ListeningWatcher,
}
"""Maps a dialect to its watcher.  For a dialect without a watcher, the store polls the head."""


def start_watcher(pool: ConnectionPool, head: Callable[[], int]) -> Watcher:
    """Return a new watcher that notices commits of other processes to a database."""
    database = pool.database
    watcher = None if database.pooled else _WATCHERS.get(database.engine.dialect.name)
    return watcher(pool, head) if watcher else PollingWatcher(head)
