"""The clock, and the generators of task ids and commit ids.

All times are integer Unix milliseconds in UTC.  Task ids are UUIDv7 (RFC 9562)
and strictly increase within a process, so that a database inserts new ids at the
end of a B-tree and not at random places.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import zlib
from collections.abc import Callable

Clock = Callable[[], int]
"""A function that returns the current time in Unix milliseconds, UTC."""

CLOCK_TOLERANCE_MS = 60 * 60 * 1000
"""How far the clocks of two hosts can differ, in ms.  If a stored time is later than the clock by
more than this difference, the stored time comes from a clock that was wrong."""

_RANDOM_BITS = 74
_LOWER_62 = (1 << 62) - 1
_RANDOM_BYTES = 9
_STEP_BYTES = 4


def system_clock() -> int:
    """Return the wall-clock time of the machine in Unix milliseconds, UTC."""
    return time.time_ns() // 1_000_000


class UUIDv7:
    """A generator of UUIDv7 strings, each greater than all earlier strings.

    The generator uses method 2 of RFC 9562, section 6.2.  If the clock has not advanced by
    a millisecond since the previous id, the generator adds a random step to the 74 random
    bits of the previous id.  The step comes from the operating system's random source, so
    that a forked child does not repeat its parent's ids.
    """

    def __init__(self, clock: Clock = system_clock) -> None:
        self._clock = clock
        self._ms = 0
        self._random = 0
        self.reset_lock()

    def reset_lock(self) -> None:
        """Replace the lock: a forked child has no thread that can release the old lock."""
        self._lock = threading.Lock()

    def __call__(self) -> str:
        """Return the next id (``str`` of 36 characters)."""
        with self._lock:
            now = self._clock()
            if now > self._ms:
                self._ms = now
                # Only 72 of the 74 bits are random, so that increments rarely overflow.
                self._random = int.from_bytes(os.urandom(_RANDOM_BYTES))
            else:
                self._random += 1 + int.from_bytes(os.urandom(_STEP_BYTES))
                if self._random >> _RANDOM_BITS:
                    self._ms += 1
                    self._random = int.from_bytes(os.urandom(_RANDOM_BYTES))
            ms, random = self._ms, self._random
        # The version 7 precedes the upper 12 random bits; the variant 2 precedes the lower 62 bits.
        bits = ms << 80 | 7 << 76 | random >> 62 << 64 | 2 << 62 | random & _LOWER_62
        text = bits.to_bytes(16).hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


new_task_id = UUIDv7()
"""The process-wide generator of task ids: ``new_task_id() -> str``."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=new_task_id.reset_lock)


_RANDOM_DIGITS = 22
_SEALED_DIGITS = _RANDOM_DIGITS + 8


def new_commit_id(at: int | None = None) -> str:
    """Return a new unique commit id: 32 random hexadecimal digits.

    If the commit time ``at`` (Unix milliseconds) is given, the id is sealed: it has 22 random
    digits, and 8 digits that are the CRC-32 of these digits and the time.  A store whose own
    checksums do not cover the commit id and the time uses sealed ids, so that the store's
    ``verify`` can detect damage of the commit id or of the time.
    """
    if at is None:
        return secrets.token_hex(16)
    digits = secrets.token_hex(_RANDOM_DIGITS // 2)
    return f"{digits}{zlib.crc32(f'{digits} {at}'.encode()):08x}"


def is_seal_broken(commit_id: str, at: int) -> bool:
    """Return whether a sealed commit id does not match the commit time.

    A sealed id is recognized by its length, so the result for an unsealed id is false.
    """
    if len(commit_id) != _SEALED_DIGITS:
        return False
    digits, seal = commit_id[:_RANDOM_DIGITS], commit_id[_RANDOM_DIGITS:]
    return seal != f"{zlib.crc32(f'{digits} {at}'.encode(errors='replace')):08x}"
