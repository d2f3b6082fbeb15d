"""A place in line, for locks that have no queue of their own.

Whoever has to look again and again whether a lock is free loses it to whoever
just gave it back and asks for it at once; with a few busy writers that can go
on for a long time.  So waiters look one at a time: the first stands in the
turnstile, the others wait for that place, and so does whoever just had the
lock.  It is an order, not a protection: nothing relies on it, and nobody
waits for somebody who stands there and does not move.
"""

from __future__ import annotations

import fcntl
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 0.25
"""How long one waits behind others before one goes past them, in seconds."""

_LONGEST_PAUSE_S = 0.01


class Turnstile:
    """The line before a lock, at the file ``path``, which is made when somebody first has to wait.

    Threads that share an instance have to exclude each other themselves.
    """

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)  # in a third of the time
        self._descriptor = -1
        self._owner = 0
        self._stuck = False

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
        """Take the first place, if it is free; whether we have it."""
        if self._descriptor < 0:
            return True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        self._stuck = False
        return True

    def _step_out(self) -> None:
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)


def _pause(waited: float) -> float:
    """How long to sleep before looking again, in seconds.

    Whoever has waited long looks no less often than whoever has just come,
    or it would wait for ever longer; only where somebody holds on for longer
    than commits take does looking become rare.
    """
    pause = 0.0002 if waited < PATIENCE_S else min(waited / 100, _LONGEST_PAUSE_S)
    return pause * random.uniform(0.5, 1)  # noqa: S311 (jitter)
