"""The change feed of a store: threads wait in it for commits.

A :class:`ChangeFeed` is what stands behind ``wait_for``.  While anybody waits, one
thread of the feed looks out for what other processes commit, through a
:class:`Watcher`, and wakes the waiters.  Own commits are announced and wake them
at once.

Nothing is missed: a waiter registers before it reads the head, and the thread
sets up its watch before it reads the head.  A commit before these reads is seen
by them; the watch sees a later one.
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

IDLE_S = 2.0
"""How long the thread goes on without a waiter, in seconds: a caller that waits in slices
need not pay for a new watch each time."""

RETRY_S = 5.0
"""How long the head is polled before a watch that broke is set up again, in seconds."""

CLOSE_S = 1.0
"""How long :meth:`ChangeFeed.close` lets the thread give its watch back, in seconds."""

LONGEST_PAUSE_S = 1.0
"""How long the thread pauses at most between two looks, in seconds."""

LONGEST_POLL_PAUSE_S = 0.06


class WatcherBrokenError(Exception):
    """A watch cannot be set up, or is of no use any more: the head is polled for a while."""


class Watcher(Protocol):
    """Looks out for the commits of others.  Used by one thread at a time, but for ``wake``."""

    def look(self) -> int | None:
        """Return the head if it may have moved since the last look, else ``None``; cheap then.

        The first look returns the head.
        """
        ...

    def pause(self, seconds: float) -> None:
        """Sleep until another look may be worth it, or :meth:`wake` is called; at most so long."""
        ...

    def wake(self) -> None:
        """End a pause, the current one or the next.  Never blocks, never raises."""
        ...

    def close(self, *, broken: bool) -> None:
        """Give back what is held, ``broken`` if nobody is to use it again.  Never raises."""
        ...


def polling_backoff(longest_s: float = LONGEST_POLL_PAUSE_S) -> Backoff:
    """Pauses between two looks: about half the time that nothing has come."""
    return Backoff(0.001, longest_s, growth=1.5)


class PollingWatcher:
    """Asks for the head, ever more rarely.  ``sign``, if given, is something cheap that
    differs whenever the head does; without it the head itself is asked for each time."""

    def __init__(
        self,
        head: Callable[[], int],
        sign: Callable[[], object] | None = None,
        *,
        longest_pause_s: float = LONGEST_POLL_PAUSE_S,
    ) -> None:
        self._head = head
        self._sign = sign or head
        self._seen: object = None
        self._backoff = polling_backoff(longest_pause_s)
        self._woken = threading.Event()

    def look(self) -> int | None:
        # The sign is read first: what is committed in between is then seen next time.
        sign = self._sign()
        if sign == self._seen:
            return None
        self._seen = sign
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
"""One waiting call: ``None`` tells it that the head moved, an error is what it raises.
The queue is written in C, so that an interrupt leaves none of it half-done."""


class ChangeFeed:
    """The waiting calls of one store (``waiters``), and the thread that watches for them.

    ``head`` reads the head, with the patience and the errors of the store;
    ``watch`` sets up what looks out for the commits of others.  When it raises
    :class:`WatcherBrokenError` or one of ``errors``, there or later, the head is
    polled for a while.  The thread ends when nobody has waited for ``idle_s``
    seconds.
    """

    def __init__(
        self,
        head: Callable[[], int],
        watch: Callable[[], Watcher],
        location: str,
        *,
        idle_s: float = IDLE_S,
        errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self._head = head
        self._set_up = watch
        self._location = location
        self._idle_s = idle_s
        self._broken: tuple[type[Exception], ...] = (WatcherBrokenError, *errors)
        self._lock = threading.RLock()
        # The waiting calls, and the seq that each has seen already.
        self.waiters: dict[_Waiter, int] = {}
        self._thread: threading.Thread | None = None
        self._watch: Watcher | None = None
        self._closed = False

    def wait_for(self, after: int, timeout: float) -> bool:
        """Wait until the head exceeds ``after``, at most ``timeout`` seconds; whether it does."""
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
            # First of all, and in one call, which an interrupt does not divide.
            self.waiters.pop(waiter, None)
            if not (self._idle_s or self.waiters):
                self._wake()
        if error is None:
            return True
        try:
            raise error
        finally:
            del error  # which refers to this frame

    def announce(self, seq: int) -> None:
        """Wake the waiters: somebody has committed up to ``seq``.

        A commit need not call this while there are no ``waiters``.
        """
        for waiter, after in list(self.waiters.items()):
            if seq > after:
                waiter.put(None)

    def close(self) -> None:
        """End each wait: the waiters raise :class:`~taskstore.StoreClosedError`."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._fail(StoreClosedError(f"the store {self._location} is closed"))
        self._wake()
        if thread is not None:
            thread.join(CLOSE_S)

    def _fail(self, error: BaseException) -> None:
        for waiter in list(self.waiters):
            waiter.put(error)
            self.waiters.pop(waiter, None)

    def _wake(self) -> None:
        watch = self._watch
        if watch is not None:
            watch.wake()

    # -- the watching thread ------------------------------------------------

    def _start(self) -> None:
        """Start the watching thread unless there is one."""
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
                    hint="let the process have more threads, or ask for the head now and then",
                ) from error
            self._thread = thread

    def _run(self) -> None:
        retry_at = -math.inf
        while self._goes_on():
            try:
                if time.monotonic() < retry_at:
                    self._serve(PollingWatcher(self._head), retry_at)
                else:
                    self._serve(self._set_up())
            except self._broken:
                retry_at = time.monotonic() + RETRY_S
            except BaseException as error:  # noqa: BLE001 - raised by the waiting calls
                self._fail(error)

    def _goes_on(self) -> bool:
        """Whether this thread is needed; if not, the next waiter starts another one."""
        with self._lock:
            # An interrupted caller may have started this thread without noting it.
            me = threading.current_thread()
            if self._thread is None:
                self._thread = me
            if self._thread is not me:
                return False
            if self.waiters and not self._closed:
                return True
            self._thread = None
            return False

    def _serve(self, watch: Watcher, until: float = math.inf) -> None:
        """Look out through ``watch`` while there is a waiter, at most ``until`` (monotonic)."""
        needed_at = time.monotonic()
        broken = True
        try:
            self._watch = watch
            while not self._closed and (now := time.monotonic()) < until:
                if self.waiters:
                    needed_at = now
                    rest = LONGEST_PAUSE_S
                else:
                    rest = needed_at + self._idle_s - now
                if rest <= 0:
                    break
                head = watch.look()
                if head is not None:
                    self.announce(head)
                watch.pause(min(rest, until - now))
            broken = False
        finally:
            self._watch = None
            watch.close(broken=broken)
