"""The connections to the server: pools, retries, translated errors.

Answers are bytes and lists.  The retries of redis-py are disabled, because redis-py cannot know
which commands are safe to send twice.
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

from taskstore_redis.errors import ERRORS, NETWORK, NOT_EXECUTED, REFUSED, Translator
from taskstore_redis.scripts import Script, script
from taskstore_redis.urls import Target

RETRY_TIMEOUT_S = 5.0
"""How long an operation is retried on a broken connection, in seconds."""
BLOCK_S = 2.0
"""How long one XREAD blocks, in seconds."""
MAX_CONNECTIONS = 10_000
"""The maximum number of connections of a pool.  This number is larger than the number of
threads that use the store at once, because a pool must not refuse a connection."""

_T = TypeVar("_T")


class AnswerLostError(Exception):
    """A command was sent, at least in part, and no answer was received."""


class Link:
    """The connections of one store to its server.

    ``timeout_s`` is the number of seconds to wait for an answer of the server.  Methods raise
    errors of taskstore instead of the driver's errors.
    """

    def __init__(self, target: Target, timeout_s: float) -> None:
        self.translate = Translator(target.location, target.password)
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._pool = self._make_pool(target, timeout_s)
        # XREAD blocks a connection for longer than the timeout of an answer.
        self._blocking_pool = self._make_pool(target, timeout_s + BLOCK_S)

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

        If the connection breaks, the command is retried for ``RETRY_TIMEOUT_S`` seconds.
        """
        return self._translated(lambda: self._retry(lambda: self._exchange(self._pool, command)))

    def call_without_retry(self, *command: Any) -> Any:
        """Send a command once, and return its answer."""
        return self._translated(lambda: self._exchange(self._pool, command))

    def run(self, name: str, keys: Sequence[bytes], *arguments: Any) -> Any:
        """Run a script that may be run twice, and return its answer."""
        return self._translated(
            lambda: self._retry(
                lambda: self._run(script(name), keys, arguments, self._exchange_any)
            )
        )

    def run_once(self, name: str, keys: Sequence[bytes], *arguments: Any) -> Any:
        """Run a script that must not be run twice.

        Raises :class:`AnswerLostError` if the script was sent and no answer was received.
        """
        return self._translated(
            lambda: self._run(script(name), keys, arguments, self._exchange_once)
        )

    def wait(self, stream: bytes, after: int, timeout_s: float) -> bool:
        """Wait for an entry after ``<after>-0`` in a stream; returns whether such an entry
        exists."""
        milliseconds = max(1, int(min(timeout_s, BLOCK_S) * 1000))
        command = ("XREAD", "COUNT", 1, "BLOCK", milliseconds, "STREAMS", stream, f"{after}-0")
        return bool(
            self._translated(
                lambda: self._retry(lambda: self._exchange(self._blocking_pool, command))
            )
        )

    @contextmanager
    def held_connection(self) -> Iterator[int]:
        """Keep a connection open while the caller owns a lease; yields the id of the connection.

        If the caller dies, the server closes the connection: see :meth:`is_disconnected`.
        """
        with self._translator():
            connection = self._retry(self._pool.get_connection)
        try:
            with self._translator():
                connection_id = int(_request(connection, ("CLIENT", "ID")))
            yield connection_id
        finally:
            self._pool.release(connection)

    def is_disconnected(self, connection_id: int) -> bool:
        """Whether a connection has ended; ``False`` if the server refuses CLIENT LIST."""
        try:
            return not self.call("CLIENT", "LIST", "ID", connection_id).strip()
        except TaskStoreError:
            return False

    def close(self) -> None:
        """Close every connection; pending calls raise :class:`~taskstore.StoreClosedError`."""
        self._closed.set()
        self._blocking_pool.disconnect()
        self._pool.disconnect()

    # -- connections and retries ----------------------------------------------

    def _run(
        self,
        script_: Script,
        keys: Sequence[bytes],
        arguments: Sequence[Any],
        exchange: Callable[[Sequence[Any]], Any],
    ) -> Any:
        rest = (len(keys), *keys, *arguments)
        try:
            return exchange(("EVALSHA", script_.digest, *rest))
        except NoScriptError:
            # The server was restarted, or its script cache was flushed: nothing was run.
            return exchange(("EVAL", script_.source, *rest))

    def _exchange_any(self, command: Sequence[Any]) -> Any:
        return self._exchange(self._pool, command)

    def _exchange_once(self, command: Sequence[Any]) -> Any:
        """Connect, with retries; then send the command once."""

        def attempt() -> Any:
            connection = self._pool.get_connection()
            try:
                return _request(connection, command)
            except NOT_EXECUTED:
                raise
            except NETWORK as error:
                raise AnswerLostError(self.translate.text(error)) from self.translate.cause(error)
            finally:
                self._pool.release(connection)

        return self._retry(attempt)

    def _exchange(self, pool: redis.ConnectionPool, command: Sequence[Any]) -> Any:
        connection = pool.get_connection()
        try:
            return _request(connection, command)
        finally:
            pool.release(connection)

    def _retry(self, attempt: Callable[[], _T]) -> _T:
        """Retry network errors with a backoff, until ``RETRY_TIMEOUT_S`` has passed."""
        deadline = time.monotonic() + RETRY_TIMEOUT_S
        backoff_s = 0.02
        while True:
            try:
                return attempt()
            except REFUSED:
                raise
            except NETWORK:
                if time.monotonic() + backoff_s > deadline or self._closed.wait(backoff_s):
                    raise
                backoff_s = min(backoff_s * 2, 0.5)

    def _translated(self, work: Callable[[], _T]) -> _T:
        with self._translator():
            return work()

    @contextmanager
    def _translator(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._closed.is_set():
                # close() ends connections that are in use; the driver may raise any
                # error for them.
                raise StoreClosedError(f"{self.translate.location} was closed") from None
            if isinstance(error, ERRORS):
                raise self.translate(error) from self.translate.cause(error)
            raise


def _request(connection: Any, command: Sequence[Any]) -> Any:
    connection.send_command(*command)
    return connection.read_response()
