"""The retry policy for storage errors: backoff, circuit breaker, contention.

Conflicts between writers (:class:`~taskstore.ConflictError`) are retried in ``registry/commit.py``,
not in this module.  The SQL store runs each call in a loop of attempts::

    for attempt in policy.attempts():
        with attempt:
            return work()

If an attempt fails with a storage error that a retry can resolve, the :class:`RetryState` sleeps
and suppresses the error; the loop then continues.  If a retry cannot resolve the storage error, or
the retry timeout has expired, the :class:`RetryState` translates the driver's error and raises the
store's own error.  The :class:`RetryState` catches only storage errors.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from itertools import repeat
from typing import NoReturn, Protocol

from taskstore.errors import StoreBusyError, StoreUnavailableError, TaskStoreError
from taskstore.stores.common.locks import describe_owners

BUSY_TIMEOUT_S = 30.0
"""How long a write waits for other writers that make no progress, in seconds."""
RECONNECT_S = 30.0
"""How long a server can be unavailable before calls raise an error, in seconds."""
PROBE_INTERVAL_S = 0.25
"""Once the retry timeout has expired, the interval between two attempts to reach a server, in
seconds."""


class Backoff:
    """Pauses that grow from ``first_s`` to ``longest_s`` seconds, with jitter.

    Without jitter, processes that collided once would collide again at each attempt.
    """

    __slots__ = ("_first_s", "_growth", "_longest_s", "_next_s")

    def __init__(self, first_s: float, longest_s: float, growth: float = 2.0) -> None:
        self._first_s = first_s
        self._growth = growth
        self._longest_s = longest_s
        self._next_s = first_s

    def next_s(self) -> float:
        """Return the next pause in seconds: a random value from 50 to 100 % of the nominal
        pause."""
        pause = self._next_s
        self._next_s = min(self._growth * pause, self._longest_s)
        return random.uniform(pause / 2, pause)  # noqa: S311 - jitter is no secret

    def sleep(self) -> None:
        """Pause before the next attempt."""
        time.sleep(self.next_s())

    def reset(self) -> None:
        """Make the next pause the shortest pause again."""
        self._next_s = self._first_s


class CircuitBreaker:
    """The state of a server's outage, shared by all calls of a store.

    During an outage, a call retries until ``timeout_s`` seconds after the first failure of the
    outage, even if the call started later than this failure.  A call that first had to wait for
    another call therefore does not wait for the full timeout again.  After the timeout the circuit
    is open: for ``PROBE_INTERVAL_S`` seconds after each failed attempt, calls fail without an
    attempt to connect, because an attempt can take seconds.
    """

    def __init__(self, location: str, timeout_s: float) -> None:
        self._location = location
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._message = ""
        self.outage: tuple[float, float] | None = None
        """The start of the outage and the time of the last failed attempt, in monotonic seconds;
        ``None`` while the server answers."""

    def check(self) -> None:
        """Raise :class:`~taskstore.StoreUnavailableError` if the retry timeout has expired and the
        most recent attempt failed less than ``PROBE_INTERVAL_S`` seconds ago."""
        with self._lock:
            if self.outage is None:
                return
            began, failed = self.outage
            now = time.monotonic()
            if failed - began >= self._timeout_s and now - failed < PROBE_INTERVAL_S:
                raise StoreUnavailableError(
                    f"{self._location} has been unavailable for {now - began:.1f} s: "
                    f"{self._message}"
                )

    def record_failure(self, attempted_at: float, message: str) -> bool:
        """Record that an attempt, made at ``attempted_at`` (monotonic seconds), has failed with
        the driver's ``message``; return whether the retry timeout of this outage has expired."""
        now = time.monotonic()
        with self._lock:
            began, failed = self.outage or (now, now)
            if attempted_at - failed > max(self._timeout_s, PROBE_INTERVAL_S):
                began = now  # a failure after a long time without failures begins a new outage
            self.outage, self._message = (began, now), message
            return now - began >= self._timeout_s

    def close(self) -> None:
        """Record that the server has answered.  If there was an outage, the outage has ended."""
        with self._lock:
            self.outage = None


class Contention:
    """Shows a waiting caller whether the other writers make progress.

    ``position`` returns a value that changes with each commit of another writer, or
    ``None`` if the value cannot be read.
    """

    def __init__(self, position: Callable[[], object]) -> None:
        self._position = position
        self._last_position: object = None

    def made_progress(self) -> bool:
        """Return whether another writer has committed since the previous call of this method.

        If the position cannot be read, the result is false.  Otherwise the first call returns true:
        the caller then waits for one more timeout.
        """
        position = self._position()
        if position is None:
            return False
        moved, self._last_position = position != self._last_position, position
        return moved


class FailureKind(Enum):
    """The kind of a storage error.  The kind decides whether, and how often, the call is
    retried."""

    PERMANENT = "permanent"
    """A retry would fail in the same way."""
    LOCK_BUSY = "lock busy"
    """Another process owns a lock that has no queue of waiters: the call must be retried soon and
    often."""
    LOCK_TIMEOUT = "lock timeout"
    """The server waited for a lock until the server's own lock timeout expired."""
    SERIALIZATION = "serialization"
    """A deadlock or serialization failure: the transaction must run again."""
    UNAVAILABLE = "unavailable"
    """The server does not answer, or accepts no writes."""


class UnconfirmedCommitError(Exception):
    """A COMMIT was sent, but the server did not answer; the cause is the driver's error."""


class ErrorTranslation(Protocol):
    """The functions by which a store classifies and translates the errors of its driver."""

    errors: tuple[type[Exception], ...]
    """The exception types of the driver."""

    def failure_kind(self, error: BaseException) -> FailureKind:
        """Return the kind of a driver's error."""

    def translate(self, error: BaseException) -> TaskStoreError:
        """Return the store's own error for a driver's error."""

    def cause(self, error: BaseException) -> BaseException | None:
        """Return the exception to set as the cause of the store's error; ``None`` for no cause."""

    def text(self, error: BaseException) -> str:
        """Return the driver's message on one line."""


class RetryPolicy:
    """Decides whether the calls of one store are retried, and for how long.

    All calls share the retry timeout of a server outage.  A write that waits for other writers is
    retried as long as the other writers make progress.  ``position`` has the same meaning as in
    :class:`Contention`; ``owners`` returns the lock owners, or ``None`` if the lock owners are
    unknown.
    """

    def __init__(
        self,
        translation: ErrorTranslation,
        breaker: CircuitBreaker,
        *,
        position: Callable[[], object] | None = None,
        owners: Callable[[], Sequence[str] | None] = lambda: None,
    ) -> None:
        self.translation = translation
        self.breaker = breaker
        self.position = position
        self.owners = owners

    def attempts(self, *, reads_back: bool = False) -> Iterator[RetryState]:
        """Return the attempts of one call; an attempt raises an error if a retry is not allowed.

        If ``reads_back`` is false, an unconfirmed COMMIT is retried like any other work.  If
        ``reads_back`` is true, the caller must check :attr:`RetryState.unconfirmed`; if this is
        true, the caller must read from the database whether the COMMIT succeeded.
        """
        return repeat(RetryState(self, reads_back))

    def raise_translated(self, error: BaseException) -> NoReturn:
        """Raise the store's own error for an error of the driver."""
        own = self.translation.translate(error)
        if isinstance(own, StoreBusyError) and own.hint is None and self.position is not None:
            owners = tuple(self.owners() or ())
            own = StoreBusyError(
                f"{own.message}; {describe_owners(owners)}",
                hint="try again; if this fails too, check what the lock owner is doing",
                owners=owners,
            )
        raise own from self.translation.cause(error)


class RetryState:
    """The state of all attempts of one call: a context manager that is entered once for each
    attempt."""

    def __init__(self, policy: RetryPolicy, reads_back: bool) -> None:  # noqa: FBT001 - hot path
        self._policy = policy
        self._reads_back = reads_back
        self._waiting_since = self._attempted_at = time.monotonic()
        self._backoff: Backoff | None = None
        self._contention: Contention | None = None
        self.unconfirmed = False
        """True if the most recent attempt sent a COMMIT and received no answer from the server."""

    def __enter__(self) -> None:
        self.unconfirmed = False
        if self._policy.breaker.outage is not None:
            self._policy.breaker.check()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        policy = self._policy
        if error is None:
            if policy.breaker.outage is not None:
                policy.breaker.close()
            return False
        if isinstance(error, UnconfirmedCommitError) and error.__cause__ is not None:
            self.unconfirmed, error = True, error.__cause__
        elif not isinstance(error, policy.translation.errors):
            return False
        self._pause_or_raise(error)
        return True

    def _pause_or_raise(self, error: BaseException) -> None:
        """Sleep before the next attempt, or raise an error if the call must not be retried."""
        policy = self._policy
        if self.unconfirmed and self._reads_back:
            return  # the caller reads back the outcome of the COMMIT before it retries
        kind = policy.translation.failure_kind(error)
        if kind is FailureKind.PERMANENT:
            expired = True
        elif kind is FailureKind.UNAVAILABLE:
            message = policy.translation.text(error)
            expired = policy.breaker.record_failure(self._attempted_at, message)
        else:
            expired = self._expired(0.0 if kind is FailureKind.LOCK_TIMEOUT else BUSY_TIMEOUT_S)
        if expired:
            policy.raise_translated(error)
        if self._backoff is None:
            # The pauses double from half a millisecond, so that colliding writers spread out.
            # A lock without a queue is free only for short times: a caller that waits for this lock
            # must retry often, or the caller starves.
            self._backoff = Backoff(0.0005, 0.002 if kind is FailureKind.LOCK_BUSY else 0.1)
        self._backoff.sleep()
        self._attempted_at = time.monotonic()

    def _expired(self, timeout_s: float) -> bool:
        """Return whether this call has waited for ``timeout_s`` seconds without progress."""
        position = self._policy.position
        if position is None:
            return time.monotonic() - self._waiting_since >= timeout_s
        # Two readings of the position, half a timeout apart, show whether writers make progress.
        if time.monotonic() - self._waiting_since < timeout_s / 2:
            return False
        if self._contention is None:
            self._contention = Contention(position)
        if not self._contention.made_progress():
            return True
        self._waiting_since = time.monotonic()
        return False
