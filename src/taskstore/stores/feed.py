"""Waiting for commits: the part that stores have in common.

A :class:`Feed` is what stands behind ``wait_for``.  However many threads wait,
one of them at a time looks out for what other processes commit, through a
:class:`Watch`, and tells the others; it does so in its own thread, so that
there is none that could be left behind.  Own commits are announced and wake
everybody at once.

Nothing is missed, because a watch is set up before the head is looked at: what
was committed before is seen by that look, and what comes later by the watch.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from taskstore.errors import StoreClosedError

LINGER_S = 2.0
"""How long a watch outlives the last one who waited, in seconds: who waits in
slices need not set it up again for each."""

RETRY_S = 5.0
"""How long we poll, in seconds, before a watch that broke is set up again."""

SHORTEST_NAP_S = 0.001
LONGEST_NAP_S = 0.05
_LONGEST_WAIT_S = 3600.0


class WatchBrokenError(Exception):
    """A watch cannot be set up, or is of no use any more: look at the head, then try again."""


class Watch(Protocol):
    """Looks out for the commits of others.  Used by one thread at a time, but for ``wake``."""

    def look(self) -> int | None:
        """Return the head if it may have moved since the last look, else ``None``; cheap then."""
        ...

    def pause(self, seconds: float) -> None:
        """Sleep until another look may be worth it, or :meth:`wake` is called; at most so long."""
        ...

    def wake(self) -> None:
        """End a pause, the current one or the next.  Never blocks, never raises."""
        ...

    def close(self) -> None:
        """Give back what is held.  Never raises."""
        ...


class Naps:
    """Pauses that grow from 1 ms as long as nothing happens."""

    def __init__(self, longest_s: float = LONGEST_NAP_S) -> None:
        self._longest_s = longest_s
        self._woken = threading.Event()
        self.shorten()

    def shorten(self) -> None:
        """Something happened: more of it may follow soon."""
        self.next_s = SHORTEST_NAP_S

    def take(self, at_most_s: float) -> None:
        """Sleep, or come back at once when woken."""
        self._woken.wait(min(self.next_s, at_most_s))
        self._woken.clear()
        self.lengthen()

    def lengthen(self) -> None:
        """Nothing happened: take it easier."""
        self.next_s = min(self.next_s * 1.5, self._longest_s)

    def wake(self) -> None:
        """End a nap."""
        self._woken.set()


class PollingWatch:
    """Asks for the head, ever more rarely.  ``sign``, if given, is something cheap that
    differs whenever the head does; without it the head itself is asked for each time."""

    def __init__(
        self,
        head: Callable[[], int],
        sign: Callable[[], object] | None = None,
        *,
        longest_nap_s: float = LONGEST_NAP_S,
    ) -> None:
        self._head = head
        self._sign = sign
        self._naps = Naps(longest_nap_s)
        self._seen: object = None
        self._known = False

    def look(self) -> int | None:
        # The sign is read first: what is committed in between is then seen next time.
        sign = self._sign() if self._sign is not None else self._head()
        if self._known and sign == self._seen:
            return None
        head = self._head() if self._sign is not None else sign
        assert isinstance(head, int)
        self._seen, self._known = sign, True
        self._naps.shorten()
        return head

    def pause(self, seconds: float) -> None:
        self._naps.take(seconds)

    def wake(self) -> None:
        self._naps.wake()

    def close(self) -> None:
        pass


class Feed:
    """Everybody who waits for a commit of one store.

    ``head`` reads the head, with the patience and the errors of the store;
    ``watch`` sets up what looks out for the commits of others, or raises
    :class:`WatchBrokenError`: then the head is polled for a while.
    """

    def __init__(
        self,
        head: Callable[[], int],
        watch: Callable[[], Watch],
        location: str,
        *,
        linger_s: float = LINGER_S,
    ) -> None:
        self._head = head
        self._set_up = watch
        self._location = location
        self._linger_s = linger_s
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        # Taken by itself: unlike the condition, it cannot be interrupted as it is.
        self._gate = threading.RLock()
        self._changed = threading.Condition(self._gate)
        self._waiting = 0
        self._leader: object = None
        self._watch: Watch | None = None
        self._polls_until: float | None = None
        self._looks = 0
        self._news = 0
        self._left_at = 0.0
        self._clearing: threading.Timer | None = None

    def wait_for(self, after: int, timeout: float) -> bool:
        """Wait until the head exceeds ``after``, at most ``timeout`` seconds; whether it does."""
        deadline = time.monotonic() + timeout
        self._check_process()
        with self._present():
            while True:
                looks = self._looks
                if self._head() > after:
                    return True
                answer = self._wait(after, looks, deadline)
                if answer is not None:
                    return answer

    def announce(self, seq: int) -> None:
        """Tell everybody who waits that we have committed up to ``seq``."""
        self._check_process()
        with self._gate:
            self._publish(seq)
            if self._watch is not None and self._leader is not None:
                self._watch.wake()

    def close(self) -> None:
        """Wake everybody who waits: they raise :class:`~taskstore.StoreClosedError`."""
        self._check_process()
        with self._gate:
            self._closed = True
            self._changed.notify_all()
            if self._clearing is not None:
                self._clearing.cancel()
                self._clearing = None
            if self._leader is not None:
                # Who uses the watch gives it back.
                if self._watch is not None:
                    self._watch.wake()
                return
        self._drop()

    def _check_process(self) -> None:
        """Begin anew after a fork: threads and watch are the parent's."""
        if self._pid != os.getpid():
            self._begin()

    # -- one who waits ------------------------------------------------------

    def _wait(self, after: int, looks: int, deadline: float) -> bool | None:
        """The answer, or ``None`` when the head has to be looked at again."""
        me = object()
        while True:
            try:
                with self._gate:
                    answer = self._answer(after, looks, deadline)
                    if answer is not None:
                        return answer
                    if self._leader is not None:
                        self._changed.wait(_left(deadline))
                        continue
                    self._leader = me
                if not self._lead(after, looks, deadline):
                    return None
            finally:
                if self._leader is me:
                    with self._gate:
                        self._leader = None
                        self._changed.notify_all()

    def _answer(self, after: int, looks: int, deadline: float) -> bool | None:
        """What can be said by now.  Under the lock."""
        if self._closed:
            raise StoreClosedError(f"the store {self._location} is closed")
        if self._looks != looks and self._news > after:
            return True
        return False if time.monotonic() >= deadline else None

    def _publish(self, head: int) -> None:
        # The number of looks tells who waits that this one came after his own.
        self._looks += 1
        self._news = head
        self._changed.notify_all()

    # -- the one who looks out for all ----------------------------------------

    def _lead(self, after: int, looks: int, deadline: float) -> bool:
        """Look out until one's own wait is over; ``False`` when the watch broke."""
        try:
            while True:
                watch = self._current()
                head = watch.look()
                with self._gate:
                    if head is not None:
                        self._publish(head)
                    if self._answer(after, looks, deadline) is not None:
                        return True
                watch.pause(_left(deadline))
        except BaseException as error:
            # Also an interrupt: nobody knows what it left the watch in.
            self._drop()
            if isinstance(error, WatchBrokenError):
                self._polls_until = time.monotonic() + RETRY_S
                return False
            raise

    def _current(self) -> Watch:
        """The watch; for some time after it broke, one that polls."""
        if self._polls_until is not None and time.monotonic() >= self._polls_until:
            self._polls_until = None
            self._drop()
        if self._watch is None:
            watch = self._set_up() if self._polls_until is None else PollingWatch(self._head)
            with self._gate:
                self._watch = watch
        return self._watch

    def _drop(self) -> None:
        with self._gate:
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    # -- coming and going -----------------------------------------------------

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Count who waits: the watch goes some time after the last one."""
        with self._gate:
            self._waiting += 1
        try:
            yield
        finally:
            with self._gate:
                self._waiting -= 1
                self._left_at = time.monotonic()
            self._clear()

    def _clear(self) -> None:
        """Give the watch back if nobody has waited for long enough; if not yet, do it later."""
        with self._gate:
            if self._waiting or self._watch is None:
                return
            rest = self._left_at + self._linger_s - time.monotonic()
            if rest > 0 and not self._closed:
                if self._clearing is None:
                    timer = threading.Timer(rest, self._clear_later)
                    timer.daemon = True
                    # Where no thread can be started, it stays until somebody waits again.
                    with suppress(RuntimeError):
                        timer.start()
                        self._clearing = timer
                return
            watch, self._watch = self._watch, None
        watch.close()

    def _clear_later(self) -> None:
        with self._gate:
            self._clearing = None
        self._clear()


def _left(deadline: float) -> float:
    """How long there is to wait, in seconds: no more than what every lock takes."""
    return max(0.0, min(deadline - time.monotonic(), _LONGEST_WAIT_S))
