"""A server that is away: since when, and for how long that is nobody's trouble yet."""

from __future__ import annotations

import threading
import time

from taskstore.errors import StoreUnavailableError

PROBE_S = 0.25
"""How often a server is looked for that has been away for too long, in seconds."""


class Outage:
    """How long a server has been away, whoever noticed.

    Calls wait ``patience_s`` seconds, counted from the first failure and not
    from their own beginning: who queued behind a call that waited in vain does
    not wait as long again, and an attempt to connect, which may itself take
    seconds, is not made by each of them.
    """

    def __init__(self, location: str, patience_s: float) -> None:
        self._location = location
        self._patience_s = patience_s
        self._lock = threading.Lock()
        # When it began, and when somebody last failed; None while there is none.
        self._span: tuple[float, float] | None = None
        self._said = ""

    def check(self) -> None:
        """Raise :class:`~taskstore.StoreUnavailableError` if the patience with this outage
        was at an end only just now."""
        with self._lock:
            if self._span is None:
                return
            began, failed = self._span
            now = time.monotonic()
            if failed - began >= self._patience_s and now - failed < PROBE_S:
                raise StoreUnavailableError(
                    f"{self._location} has been away for {now - began:.1f} s: {self._said}"
                )

    def has_lasted(self, said: str) -> bool:
        """Note a failure, and what the driver ``said``; whether the patience is at an end."""
        now = time.monotonic()
        with self._lock:
            began, failed = self._span or (now, now)
            if now - failed > max(self._patience_s, PROBE_S):
                began = now  # nobody has looked for as long: this is another one
            self._span, self._said = (began, now), said
            return now - began >= self._patience_s

    def end(self) -> None:
        """Note that the server answers."""
        if self._span is not None:
            with self._lock:
                self._span = None
