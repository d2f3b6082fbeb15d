"""The connections to the server, and what happens when they break.

Commands go out as they are and answers come back as bytes and lists.  redis-py
is never left to try again by itself: it cannot know that a command which may
have happened must not be sent twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry
from taskstore import StoreClosedError, TaskStoreError

from taskstore_redis.errors import ERRORS, NETWORK, NOT_RUN, REFUSED, Translator
from taskstore_redis.scripts import Script, script
from taskstore_redis.urls import Target

PATIENCE_S = 5.0
"""How long a broken connection is tried again, in seconds."""
WAIT_SLICE_S = 2.0
"""How long the server is asked to wait for a commit at a time, in seconds."""
MAX_CONNECTIONS = 10_000
"""As many as the threads that use the store at once."""

_T = TypeVar("_T")


class AnswerLostError(Exception):
    """A command was sent, or may have been, and no answer came."""


class Link:
    """What one store has open to its server.

    ``timeout_s`` is how long an answer may take, in seconds.  Errors of the
    driver come out translated.
    """

    def __init__(self, target: Target, timeout_s: float) -> None:
        self.translate = Translator(target.location, target.password)
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._pool = self._make_pool(target, timeout_s)
        # Those who wait block their connection for longer than an answer takes.
        self._waiting = self._make_pool(target, timeout_s + WAIT_SLICE_S)

    def _make_pool(self, target: Target, timeout_s: float) -> redis.ConnectionPool:
        return redis.ConnectionPool(
            connection_class=redis.SSLConnection if target.tls else redis.Connection,
            host=target.host,
            port=target.port,
            db=target.db,
            username=target.username,
            password=target.password,
            socket_timeout=timeout_s,
            socket_connect_timeout=self._timeout_s,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            client_name="taskstore",
            max_connections=MAX_CONNECTIONS,
        )

    def call(self, *command: Any) -> Any:
        """Send a command that may be sent twice, and return its answer.

        A broken connection is tried again for some seconds.
        """
        return self._translated(lambda: self._again(lambda: self._exchange(self._pool, command)))

    def call_now(self, *command: Any) -> Any:
        """Send a command, without patience for a server that is not there."""
        return self._translated(lambda: self._exchange(self._pool, command))

    def run(self, name: str, keys: Sequence[bytes], *arguments: Any) -> Any:
        """Run a script that may be run twice, and return its answer."""
        return self._translated(
            lambda: self._again(
                lambda: self._run(script(name), keys, arguments, self._exchange_any)
            )
        )

    def run_once(self, name: str, keys: Sequence[bytes], *arguments: Any) -> Any:
        """Run a script that must not be run twice.

        Raises :class:`AnswerLostError` if it was sent and no answer came.
        """
        return self._translated(
            lambda: self._run(script(name), keys, arguments, self._exchange_once)
        )

    def wait(self, stream: bytes, after: int, timeout_s: float) -> bool:
        """Wait until a stream has an entry after ``<after>-0``; returns whether it has."""
        milliseconds = max(1, int(min(timeout_s, WAIT_SLICE_S) * 1000))
        command = ("XREAD", "COUNT", 1, "BLOCK", milliseconds, "STREAMS", stream, f"{after}-0")
        return bool(
            self._translated(lambda: self._again(lambda: self._exchange(self._waiting, command)))
        )

    @contextmanager
    def presence(self) -> Iterator[int]:
        """Keep a connection open, whose end tells others that we are gone; its id."""
        with self._translator():
            connection = self._again(self._pool.get_connection)
        try:
            with self._translator():
                number = int(_ask(connection, ("CLIENT", "ID")))
            yield number
        finally:
            self._pool.release(connection)

    def is_gone(self, number: int) -> bool:
        """Whether the server knows that a connection has ended; ``False`` if it does not tell."""
        try:
            return not self.call("CLIENT", "LIST", "ID", number).strip()
        except TaskStoreError:
            return False

    def close(self) -> None:
        """Close every connection; who waits on one is told."""
        self._closed.set()
        self._waiting.disconnect()
        self._pool.disconnect()

    # -- within ---------------------------------------------------------------

    def _run(
        self,
        wanted: Script,
        keys: Sequence[bytes],
        arguments: Sequence[Any],
        exchange: Callable[[Sequence[Any]], Any],
    ) -> Any:
        rest = (len(keys), *keys, *arguments)
        try:
            return exchange(("EVALSHA", wanted.digest, *rest))
        except NoScriptError:
            # The server was restarted, or its scripts were flushed: nothing has run.
            return exchange(("EVAL", wanted.source, *rest))

    def _exchange_any(self, command: Sequence[Any]) -> Any:
        return self._exchange(self._pool, command)

    def _exchange_once(self, command: Sequence[Any]) -> Any:
        """Connect, with patience; then send, once."""

        def attempt() -> Any:
            connection = self._pool.get_connection()
            try:
                return _ask(connection, command)
            except NOT_RUN:
                raise
            except NETWORK as error:
                raise AnswerLostError(self.translate.text(error)) from self.translate.cause(error)
            finally:
                self._pool.release(connection)

        return self._again(attempt)

    def _exchange(self, pool: redis.ConnectionPool, command: Sequence[Any]) -> Any:
        connection = pool.get_connection()
        try:
            return _ask(connection, command)
        finally:
            pool.release(connection)

    def _again(self, attempt: Callable[[], _T]) -> _T:
        """Try until it works, the trouble is another one, or patience has run out."""
        deadline = time.monotonic() + PATIENCE_S
        pause_s = 0.02
        while True:
            try:
                return attempt()
            except REFUSED:
                raise
            except NETWORK:
                if time.monotonic() + pause_s > deadline or self._closed.wait(pause_s):
                    raise
                pause_s = min(pause_s * 2, 0.5)

    def _translated(self, work: Callable[[], _T]) -> _T:
        with self._translator():
            return work()

    @contextmanager
    def _translator(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._closed.is_set():
                # Closing takes connections from under who uses them, and a
                # driver may say anything about that.
                raise StoreClosedError(f"{self.translate.location} was closed") from None
            if isinstance(error, ERRORS):
                raise self.translate(error) from self.translate.cause(error)
            raise


def _ask(connection: Any, command: Sequence[Any]) -> Any:
    connection.send_command(*command)
    return connection.read_response()
