"""A place in line, for locks that have no queue of their own.

Whoever has to look again and again whether a lock is free loses it to whoever
just gave it back and asks for it at once; with a few busy writers that can go
on for a long time.  So waiters look one at a time: the first stands in the
turnstile, the others behind it in the order in which they came, and so does
whoever just had the lock.  It is an order, not a protection: nothing relies on it, and nobody
waits for somebody who stands there and does not move.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 0.25
"""How long one waits behind others before one goes past them, in seconds."""

_LONGEST_PAUSE_S = 0.01

_LAST = 15 if hasattr(fcntl, "F_OFD_SETLK") and sys.maxsize > 2**32 else 0
"""The place at which one joins the line; place 0 is in the turnstile.

On Linux a descriptor can lock single bytes of a file, one for each place.
"""

_FLOCK = struct.Struct("hhqqi4x")
"""C's ``struct flock`` where file offsets have 64 bits: type, whence, start, length, pid."""


class Turnstile:
    """The line before a lock, at the file ``path``, which is made when somebody first has to wait.

    Threads that share an instance have to exclude each other themselves.
    """

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)  # in a third of the time
        self._descriptor = -1
        self._owner = 0
        self._stuck = False
        # Where we stand; nowhere when it is None.
        self._place: int | None = None

    def wait(self, attempt: Callable[[], bool], timeout_s: float) -> bool:
        """Call ``attempt`` until it returns true, when it is our turn; whether it did.

        It gives up after ``timeout_s`` seconds.
        """
        # Without the file, nobody has ever had to wait here.
        if self._descriptor < 0 and not os.access(self._path, os.F_OK) and attempt():
            return True
        self._open()
        try:
            in_turn = self._step_in()
            if (in_turn or self._stuck) and attempt():
                return True
            return self._wait(attempt, timeout_s, in_turn=in_turn)
        finally:
            self._step_out()

    def _wait(self, attempt: Callable[[], bool], timeout_s: float, *, in_turn: bool) -> bool:
        started, waited = time.monotonic(), 0.0
        while waited < timeout_s:
            time.sleep(min(_pause(waited), timeout_s - waited))
            in_turn = in_turn or self._step_in()
            if not in_turn and waited > PATIENCE_S:
                self._stuck = True
            if (in_turn or self._stuck) and attempt():
                return True
            waited = time.monotonic() - started
        return False

    def close(self) -> None:
        """Leave the line for good.  Twice is fine."""
        descriptor, self._descriptor, self._owner = self._descriptor, -1, 0
        if descriptor >= 0:
            os.close(descriptor)

    def _open(self) -> None:
        """Open the file, or make it, if that is possible; the line is shorter without it."""
        if self._owner != os.getpid():
            # A forked child stands where its parent stands: it needs a place of its own.
            self.close()
            with suppress(OSError):
                flags = os.O_RDWR | os.O_CLOEXEC | os.O_CREAT
                self._descriptor = os.open(self._path, flags, 0o600)
                self._owner = os.getpid()

    def _step_in(self) -> bool:
        """Go forward in the line as far as it is free; whether that is to its head.

        Nobody passes anybody: who goes forward holds his place until he has the next.
        """
        if self._descriptor < 0:
            return True
        if _LAST == 0:
            return self._take_the_head()
        if self._place is None:
            if not _lock(self._descriptor, _LAST):
                return False
            self._place = _LAST
        while self._place and _lock(self._descriptor, self._place - 1):
            _unlock(self._descriptor, self._place)
            self._place -= 1
        if self._place == 0:
            self._stuck = False
        return self._place == 0

    def _take_the_head(self) -> bool:
        """Where a descriptor can lock a file as a whole only, the line is one place long."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        self._stuck = False
        return True

    def _step_out(self) -> None:
        if self._descriptor < 0:
            return
        if _LAST == 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        else:
            # All of them: an interrupt may have come between taking one and noting it.
            _unlock(self._descriptor, 0, _LAST + 1)
            self._place = None


def _lock(descriptor: int, place: int) -> bool:
    """Lock one byte of a file, for this descriptor; whether nobody else has it."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, place))
    except BlockingIOError:
        return False
    except OSError:  # a file system without such locks: then there is no line
        return True
    return True


def _unlock(descriptor: int, place: int, places: int = 1) -> None:
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, place, places))


def _flock(kind: int, place: int, places: int = 1) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, place, places, 0)


def _pause(waited: float) -> float:
    """How long to sleep before looking again, in seconds.

    Whoever has waited long looks no less often than whoever has just come,
    or it would wait for ever longer; only where somebody holds on for longer
    than commits take does looking become rare.
    """
    pause = 0.0002 if waited < PATIENCE_S else min(waited / 100, _LONGEST_PAUSE_S)
    return pause * random.uniform(0.5, 1)  # noqa: S311 (jitter)
