"""The change feed: threads wait for commits of other processes.

A :class:`ChangeFeed` implements ``wait_for`` for a store.  A call of ``wait_for`` that waits is a
waiter.  While there are waiters, one thread of the feed uses a :class:`Watcher` to poll for the
commits of other processes, and wakes the waiters.  After each of its own commits, the store calls
:meth:`ChangeFeed.announce`, which wakes the waiters at once.

The feed misses no commit.  A waiter registers before the waiter reads the head, and the thread
starts its watcher before the thread reads the head.  The read of the head finds every commit before
the read; the watcher finds every commit after the read.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol, TypeAlias

from taskstore.errors import StoreClosedError, StoreUnavailableError
from taskstore.stores.common.retry import Backoff

IDLE_TIMEOUT_S = 2.0
"""How long the watching thread runs without a waiter, in seconds.  Because of this time, a caller
that repeats short waits does not cause a new watcher for each wait."""

RETRY_S = 5.0
"""How long the feed polls the head after a watcher has failed, in seconds.  Then the feed starts a
new watcher."""

CLOSE_TIMEOUT_S = 1.0
"""How long :meth:`ChangeFeed.close` waits for the thread to close its watcher, in seconds."""

LONGEST_PAUSE_S = 1.0
"""The longest pause of the watching thread between two polls, in seconds."""

LONGEST_POLL_PAUSE_S = 0.06


class WatcherBrokenError(Exception):
    """The error of a watcher that cannot start or has failed; the feed then polls the head for a
    while."""


class Watcher(Protocol):
    """Polls for commits of other processes.  Only one thread uses a watcher, but any thread can
    call ``wake``."""

    def poll(self) -> int | None:
        """Return the head if the head has possibly changed since the previous poll, else ``None``.

        The first poll returns the head.  A poll that returns ``None`` must be cheap.
        """
        ...

    def pause(self, seconds: float) -> None:
        """Sleep at most ``seconds``; return early after a possible commit or a :meth:`wake`."""
        ...

    def wake(self) -> None:
        """End the current :meth:`pause`.  If no pause is active, end the next pause.  This method
        never blocks and never raises an error."""
        ...

    def close(self, *, broken: bool) -> None:
        """Release all resources.  If ``broken`` is true, another watcher must not reuse these
        resources.  This method never raises an error."""
        ...


def polling_backoff(longest_s: float = LONGEST_POLL_PAUSE_S) -> Backoff:
    """Return the growing pauses between polls: each pause is about half the time since the newest
    commit."""
    return Backoff(0.001, longest_s, growth=1.5)


class PollingWatcher:
    """Reads the head at growing intervals.  ``version``, if given, is a cheap function whose value
    changes whenever the head changes; without ``version``, each poll reads the head."""

    def __init__(
        self,
        head: Callable[[], int],
        version: Callable[[], object] | None = None,
        *,
        longest_pause_s: float = LONGEST_POLL_PAUSE_S,
    ) -> None:
        self._head = head
        self._version = version or head
        self._last_version: object = None
        self._backoff = polling_backoff(longest_pause_s)
        self._woken = threading.Event()

    def poll(self) -> int | None:
        # The version is read before the head: the next poll detects a commit between the reads.
        version = self._version()
        if version == self._last_version:
            return None
        self._last_version = version
        self._backoff.reset()
        return self._head()

    def pause(self, seconds: float) -> None:
        self._woken.wait(min(self._backoff.next_s(), seconds))
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def close(self, *, broken: bool) -> None:
        pass


_Waiter: TypeAlias = "SimpleQueue[BaseException | None]"
"""The queue of one waiting call.  The call returns when its queue receives ``None``, and raises the
error when its queue receives an error.  The queue type is written in C; therefore an interrupt
cannot damage the queue."""


class ChangeFeed:
    """The waiting calls of one store (``waiters``), and the thread that wakes them.

    ``head`` is a function that returns the head; the function retries and raises errors as other
    calls of the store do.  ``start_watcher`` returns a new watcher.  If ``start_watcher`` or the
    watcher raises :class:`WatcherBrokenError` or one of ``errors``, the feed polls the head for a
    while.  The thread ends after ``idle_timeout_s`` seconds without a waiter.
    """

    def __init__(
        self,
        head: Callable[[], int],
        start_watcher: Callable[[], Watcher],
        location: str,
        *,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self._head = head
        self._start_watcher = start_watcher
        self._location = location
        self._idle_timeout_s = idle_timeout_s
        self._broken_errors: tuple[type[Exception], ...] = (WatcherBrokenError, *errors)
        self._lock = threading.RLock()
        # Maps each waiting call to the seq that the head must exceed.
        self.waiters: dict[_Waiter, int] = {}
        self._thread: threading.Thread | None = None
        self._watcher: Watcher | None = None
        self._closed = False

    def wait_for(self, after: int, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds; return whether the head exceeds ``after``."""
        deadline = time.monotonic() + timeout
        waiter: _Waiter = SimpleQueue()
        try:
            self.waiters[waiter] = after
            if self._head() > after:
                return True
            if timeout <= 0:
                return False
            self._start()
            left = max(0.0, deadline - time.monotonic())
            error = waiter.get(timeout=min(left, threading.TIMEOUT_MAX))
        except Empty:
            return False
        finally:
            # This statement is first and is a single call: an interrupt cannot stop it half-way.
            self.waiters.pop(waiter, None)
            if not (self._idle_timeout_s or self.waiters):
                self._wake()
        if error is None:
            return True
        try:
            raise error
        finally:
            del error  # the error refers to this frame: ``del`` ends the reference cycle

    def announce(self, seq: int) -> None:
        """Wake each call of :meth:`wait_for` that waits with an ``after`` below ``seq``, the newest
        committed seq.

        A store does not need to call this method while ``waiters`` is empty.
        """
        for waiter, after in list(self.waiters.items()):
            if seq > after:
                waiter.put(None)

    def close(self) -> None:
        """End all waits: the waiters raise :class:`~taskstore.StoreClosedError`."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._fail_waiters(StoreClosedError(f"the store {self._location} is closed"))
        self._wake()
        if thread is not None:
            thread.join(CLOSE_TIMEOUT_S)

    def _fail_waiters(self, error: BaseException) -> None:
        for waiter in list(self.waiters):
            waiter.put(error)
            self.waiters.pop(waiter, None)

    def _wake(self) -> None:
        watcher = self._watcher
        if watcher is not None:
            watcher.wake()

    # -- the watching thread ------------------------------------------------

    def _start(self) -> None:
        """Start the watching thread if it is not running."""
        with self._lock:
            if self._closed:
                raise StoreClosedError(f"the store {self._location} is closed")
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="taskstore-watcher", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise StoreUnavailableError(
                    f"{self._location}: the thread that watches for commits cannot be started: "
                    f"{error}",
                    hint="raise the limit of threads for this process, or poll the head instead",
                ) from error
            self._thread = thread

    def _run(self) -> None:
        retry_at = -math.inf
        while self._keep_thread():
            try:
                if time.monotonic() < retry_at:
                    self._watch(PollingWatcher(self._head), retry_at)
                else:
                    self._watch(self._start_watcher())
            except self._broken_errors:
                retry_at = time.monotonic() + RETRY_S
            except BaseException as error:  # noqa: BLE001 - the waiting calls raise it
                self._fail_waiters(error)

    def _keep_thread(self) -> bool:
        """Return whether this thread must continue.  If the result is false, this thread ends, and
        the next waiter starts a new thread."""
        with self._lock:
            # If the caller that started this thread was interrupted, ``self._thread`` can be unset.
            me = threading.current_thread()
            if self._thread is None:
                self._thread = me
            if self._thread is not me:
                return False
            if self.waiters and not self._closed:
                return True
            self._thread = None
            return False

    def _watch(self, watcher: Watcher, until: float = math.inf) -> None:
        """Poll ``watcher`` while there are waiters, but not after ``until`` (monotonic seconds)."""
        needed_at = time.monotonic()
        broken = True
        try:
            self._watcher = watcher
            while not self._closed and (now := time.monotonic()) < until:
                if self.waiters:
                    needed_at = now
                    remaining = LONGEST_PAUSE_S
                else:
                    remaining = needed_at + self._idle_timeout_s - now
                if remaining <= 0:
                    break
                head = watcher.poll()
                if head is not None:
                    self.announce(head)
                watcher.pause(min(remaining, until - now))
            broken = False
        finally:
            self._watcher = None
            watcher.close(broken=broken)
