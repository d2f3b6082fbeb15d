"""Time and ids.

All times are integer Unix milliseconds in UTC.  Ids are UUIDv7 (RFC 9562),
strictly increasing within a process: time-ordered keys are appended to a
B-tree instead of scattered over it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Returns the current time in Unix milliseconds, UTC."""

_RANDOM_BITS = 74
_STEP_BITS = 32


def system_clock() -> int:
    """The machine's wall clock in Unix milliseconds, UTC."""
    return time.time_ns() // 1_000_000


class UUIDv7:
    """A source of UUIDv7 strings, each greater than all before it.

    RFC 9562 section 6.2, method 2: within one millisecond (and while the
    clock stands still or steps back) the 74 random bits are raised by a
    random step instead of drawn anew.  The step comes from the operating
    system, so that a forked child does not repeat its parent's ids.
    """

    def __init__(self, clock: Clock = system_clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ms = 0
        self._random = 0

    def __call__(self) -> str:
        """Return the next id (``str`` of 36 characters)."""
        with self._lock:
            now = self._clock()
            if now > self._ms:
                self._ms = now
                # One bit of headroom, so that stepping rarely overflows.
                self._random = secrets.randbits(_RANDOM_BITS - 1)
            else:
                self._random += 1 + secrets.randbits(_STEP_BITS)
                if self._random >> _RANDOM_BITS:
                    self._ms += 1
                    self._random = secrets.randbits(_RANDOM_BITS - 1)
            ms, random = self._ms, self._random
        high, low = random >> 62, random & ((1 << 62) - 1)
        digits = f"{(ms << 80) | (7 << 76) | (high << 64) | (2 << 62) | low:032x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


new_task_id = UUIDv7()
"""The process-wide source of task ids: ``new_task_id() -> str``."""


def new_commit_id() -> str:
    """Return 32 random hexadecimal digits: what tells one commit from every other."""
    return secrets.token_hex(16)
