"""Whose turn it is to write, among the threads of a process.

An interrupt, such as Ctrl-C, can strike between taking a lock and noting that
it is taken, and again there is no time to note anything on the way out.  So
nobody remembers whether it has the lock: that is looked up when it is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from taskstore.errors import StoreBusyError
from taskstore.stores.jsonfile.locks import patiently

_T = TypeVar("_T")


class Turn:
    """One operation that wants to write, and the thread that does it."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class Mutex:
    """Lets in one turn at a time; ``turn`` is the one that is in."""

    def __init__(self) -> None:
        # Unlike a plain lock, it can be given back by its thread only, so that
        # trying to do so harms nobody.
        self._lock = threading.RLock()
        self.turn: Turn | None = None

    def acquire(self, turn: Turn, timeout_s: float = -1) -> bool:
        """Let a turn in, waiting at most ``timeout_s`` seconds; whether it is."""
        if not self._lock.acquire(timeout=timeout_s):
            return False
        self.turn = turn
        return True

    def enter(self, turn: Turn, directory: Path, timeout_s: float) -> None:
        """Let a turn in, or raise :class:`StoreBusyError`.

        It waits ``timeout_s`` seconds, and on as long as the others get on.
        """
        inside = self.turn
        if inside is not None and inside.thread == turn.thread:
            raise StoreBusyError(f"the store {directory} is busy: this very thread writes")
        if self.acquire(turn, 0):
            return
        if not patiently(lambda for_s: self.acquire(turn, for_s), timeout_s, directory):
            raise StoreBusyError(
                f"the store {directory} is busy: another thread has written for {timeout_s:g} s"
            )

    def release(self, turn: Turn) -> None:
        """End a turn, whether it is in, half in, or never was."""
        if self.turn is turn:
            self.turn = None
        elif self.turn is not None:
            return
        try:
            self._lock.release()
        except RuntimeError:  # it is not this thread's
            return


def ending(work: Callable[[], _T], end: Callable[[], None]) -> _T:
    """Return what ``work`` does, and call ``end`` in any case, maybe twice."""
    try:
        try:
            return work()
        finally:
            end()
    except BaseException:
        # An interrupt may have struck as the first call began.
        end()
        raise
