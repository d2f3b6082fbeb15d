"""Trying again: backoff, retry policy, circuit breaker, contention.

A store gives each of its calls a loop of attempts::

    for attempt in policy.attempts():
        with attempt:
            return work()

An attempt that fails with an error of the storage sleeps and is swallowed, so
that the loop goes on, or raises the store's own error when another attempt
cannot help or has gone on long enough.  Every other error passes through.
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

BUSY_S = 30.0
"""How long a write waits for other writers that make no progress, in seconds."""
RECONNECT_S = 30.0
"""How long a server may be away before callers hear of it, in seconds."""
PROBE_S = 0.25
"""How often a server is looked for that has been away for too long, in seconds."""


class Backoff:
    """Pauses that grow from ``first_s`` to ``longest_s`` seconds, with jitter.

    Jitter keeps processes that met once from meeting again at each attempt.
    """

    __slots__ = ("_first_s", "_growth", "_longest_s", "_next_s")

    def __init__(self, first_s: float, longest_s: float, growth: float = 2.0) -> None:
        self._first_s = first_s
        self._growth = growth
        self._longest_s = longest_s
        self._next_s = first_s

    def next_s(self) -> float:
        """The length of the next pause in seconds: from half of what is due to all of it."""
        pause = self._next_s
        self._next_s = min(self._growth * pause, self._longest_s)
        return random.uniform(pause / 2, pause)  # noqa: S311 - jitter is no secret

    def sleep(self) -> None:
        """Pause before the next attempt."""
        time.sleep(self.next_s())

    def reset(self) -> None:
        """Begin with the shortest pause again."""
        self._next_s = self._first_s


class CircuitBreaker:
    """How long a server has been away, whichever call noticed.

    Calls wait ``patience_s`` seconds, counted from the first failure and not
    from their own beginning: a call that queued behind one that waited in vain
    does not wait as long again, and an attempt to connect, which may itself take
    seconds, is not made by each of them.
    """

    def __init__(self, location: str, patience_s: float) -> None:
        self._location = location
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._said = ""
        self.outage: tuple[float, float] | None = None
        """When the outage began and when an attempt last failed, in monotonic seconds;
        ``None`` while the server answers."""

    def check(self) -> None:
        """Raise :class:`~taskstore.StoreUnavailableError` if the patience with this outage
        was at an end only just now."""
        with self._lock:
            if self.outage is None:
                return
            began, failed = self.outage
            now = time.monotonic()
            if failed - began >= self._patience_s and now - failed < PROBE_S:
                raise StoreUnavailableError(
                    f"{self._location} has been away for {now - began:.1f} s: {self._said}"
                )

    def failed(self, tried_at: float, said: str) -> bool:
        """Note that an attempt, made at ``tried_at`` (monotonic seconds), has failed, and what
        the driver ``said``; returns whether the patience is at an end."""
        now = time.monotonic()
        with self._lock:
            began, failed = self.outage or (now, now)
            if tried_at - failed > max(self._patience_s, PROBE_S):
                began = now  # no call has looked for as long: this is another outage
            self.outage, self._said = (began, now), said
            return now - began >= self._patience_s

    def close(self) -> None:
        """Note that the server answers."""
        with self._lock:
            self.outage = None


class Contention:
    """Whether the other writers make progress, for a caller that waits for them.

    ``position`` reads something that differs when another writer has
    committed; ``None`` when it cannot be read.
    """

    def __init__(self, position: Callable[[], object]) -> None:
        self._position = position
        self._seen: object = None

    def moves(self) -> bool:
        """Whether another writer has committed since the last look.

        At the first look that is not known: the others are given the same time again.
        """
        position = self._position()
        if position is None:
            return False
        moved, self._seen = position != self._seen, position
        return moved


class FailureKind(Enum):
    """What an error of the storage means for trying again."""

    PERMANENT = "permanent"
    """Another attempt meets the same."""
    LOCK_BUSY = "lock busy"
    """A lock without a queue is held by others: look again soon and often."""
    LOCK_TIMEOUT = "lock timeout"
    """The server has waited for a lock for as long as it was told to."""
    SERIALIZATION = "serialization"
    """A deadlock or serialization failure: run again."""
    UNAVAILABLE = "unavailable"
    """The server does not answer, or takes no writes."""


class UnansweredError(Exception):
    """COMMIT was sent and not answered; the cause is the driver's error."""


class ErrorTranslation(Protocol):
    """How a store reads the errors of its driver."""

    errors: tuple[type[Exception], ...]
    """What the driver raises."""

    def failure_kind(self, error: BaseException) -> FailureKind:
        """What an error means for trying again."""

    def translate(self, error: BaseException) -> TaskStoreError:
        """The store's own error."""

    def cause(self, error: BaseException) -> BaseException | None:
        """What the store's own error is raised from."""

    def text(self, error: BaseException) -> str:
        """What the driver said, on one line."""


class RetryPolicy:
    """When a call on one storage is tried again, and for how long.

    The patience with a server that is away is shared by all calls.  A write
    goes on as long as the other writers make progress: ``position`` reads how
    far they have come, and ``owners`` names the owners of the lock; ``None``
    when either cannot be told.
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

    def attempts(self, *, reads_back: bool = False) -> Iterator[Attempt]:
        """Attempts for one call, which end when one of them raises.

        A COMMIT that was not answered is tried again like any other work, unless
        the caller ``reads_back``: then it finds :attr:`Attempt.unanswered` set.
        """
        return repeat(Attempt(self, reads_back))

    def give_up(self, error: BaseException) -> NoReturn:
        """Raise the store's own error for one of its driver."""
        told = self.translation.translate(error)
        if isinstance(told, StoreBusyError) and told.hint is None and self.position is not None:
            owners = tuple(self.owners() or ())
            told = StoreBusyError(
                f"{told.message}; {describe_owners(owners)}",
                hint="try again, or see what that process is doing",
                owners=owners,
            )
        raise told from self.translation.cause(error)


class Attempt:
    """The attempts of one call: a context manager that is entered for each of them."""

    def __init__(self, policy: RetryPolicy, reads_back: bool) -> None:  # noqa: FBT001 - hot path
        self._policy = policy
        self._reads_back = reads_back
        self._began = self._tried_at = time.monotonic()
        self._backoff: Backoff | None = None
        self._contention: Contention | None = None
        self.unanswered = False
        """Whether the last attempt sent a COMMIT that was not answered."""

    def __enter__(self) -> None:
        self.unanswered = False
        if self._policy.breaker.outage is not None:
            self._policy.breaker.check()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        policy = self._policy
        if error is None:
            if policy.breaker.outage is not None:
                policy.breaker.close()
            return False
        if isinstance(error, UnansweredError) and error.__cause__ is not None:
            self.unanswered, error = True, error.__cause__
        elif not isinstance(error, policy.translation.errors):
            return False
        self._pause_or_raise(error)
        return True

    def _pause_or_raise(self, error: BaseException) -> None:
        """Sleep before the next attempt; raise when there is to be none."""
        policy = self._policy
        if self.unanswered and self._reads_back:
            return  # the caller finds out first what became of the commit
        kind = policy.translation.failure_kind(error)
        if kind is FailureKind.PERMANENT:
            enough = True
        elif kind is FailureKind.UNAVAILABLE:
            enough = policy.breaker.failed(self._tried_at, policy.translation.text(error))
        else:
            enough = self._has_waited(0.0 if kind is FailureKind.LOCK_TIMEOUT else BUSY_S)
        if enough:
            policy.give_up(error)
        if self._backoff is None:
            # Doubling from half a millisecond, so that writers that met once do not keep
            # meeting.  A caller that waits for a lock without a queue has to look often:
            # others leave it free for moments only, and would starve it.
            self._backoff = Backoff(0.0005, 0.002 if kind is FailureKind.LOCK_BUSY else 0.1)
        self._backoff.sleep()
        self._tried_at = time.monotonic()

    def _has_waited(self, patience_s: float) -> bool:
        """Whether others that hold what is needed have been waited for long enough."""
        position = self._policy.position
        if position is None:
            return time.monotonic() - self._began >= patience_s
        # It takes two looks at the others to see whether they make progress.
        if time.monotonic() - self._began < patience_s / 2:
            return False
        if self._contention is None:
            self._contention = Contention(position)
        if not self._contention.moves():
            return True
        self._began = time.monotonic()
        return False
