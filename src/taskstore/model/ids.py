"""Time and ids.

All times are integer Unix milliseconds in UTC.  Ids are UUIDv7 (RFC 9562),
strictly increasing within a process: time-ordered keys are appended to a
B-tree instead of scattered over it.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Returns the current time in Unix milliseconds, UTC."""

_RANDOM_BITS = 74
_LOWER_62 = (1 << 62) - 1
_DRAWN_BYTES = 9
_STEP_BYTES = 4


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
        self._ms = 0
        self._random = 0
        self.unlock()

    def unlock(self) -> None:
        """Forget who is drawing an id: in a forked child, that thread is not there."""
        self._lock = threading.Lock()

    def __call__(self) -> str:
        """Return the next id (``str`` of 36 characters)."""
        with self._lock:
            now = self._clock()
            if now > self._ms:
                self._ms = now
                # Two bits of headroom, so that stepping rarely overflows.
                self._random = int.from_bytes(os.urandom(_DRAWN_BYTES))
            else:
                self._random += 1 + int.from_bytes(os.urandom(_STEP_BYTES))
                if self._random >> _RANDOM_BITS:
                    self._ms += 1
                    self._random = int.from_bytes(os.urandom(_DRAWN_BYTES))
            ms, random = self._ms, self._random
        # Version 7 stands before the upper 12 random bits, variant 2 before the other 62.
        bits = ms << 80 | 7 << 76 | random >> 62 << 64 | 2 << 62 | random & _LOWER_62
        text = bits.to_bytes(16).hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


new_task_id = UUIDv7()
"""The process-wide source of task ids: ``new_task_id() -> str``."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=new_task_id.unlock)


def new_commit_id() -> str:
    """Return 32 random hexadecimal digits: what tells one commit from every other."""
    return secrets.token_hex(16)
