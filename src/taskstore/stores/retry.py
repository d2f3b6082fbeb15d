"""Trying again: pauses between attempts."""

from __future__ import annotations

import random
import time


class Backoff:
    """Pauses that double from ``first_s`` to ``longest_s`` seconds, with jitter.

    Jitter keeps processes that met once from meeting again at each attempt.
    """

    __slots__ = ("_first_s", "_longest_s", "_next_s")

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_s = first_s

    def next_s(self) -> float:
        """The length of the next pause in seconds: from half of what is due to all of it."""
        pause = self._next_s
        self._next_s = min(2 * pause, self._longest_s)
        return random.uniform(pause / 2, pause)  # noqa: S311 - jitter is no secret

    def sleep(self) -> None:
        """Pause before the next attempt."""
        time.sleep(self.next_s())

    def reset(self) -> None:
        """Begin with the shortest pause again."""
        self._next_s = self._first_s
