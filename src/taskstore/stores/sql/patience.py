"""How long trouble with a database is nobody's trouble yet: it is tried again."""

from __future__ import annotations

import random
import threading
import time

import sqlalchemy as sa

from taskstore.errors import StoreUnavailableError
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.errors import GONE, Fault
from taskstore.stores.sql.rivals import Rivals

BUSY_S = 30.0
"""How long a write waits for other writers that make no progress, in seconds."""
RECONNECT_S = 30.0
"""How long a server may be away before callers hear of it, in seconds."""
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

    def has_lasted(self, tried_at: float, said: str) -> bool:
        """Note that an attempt, made at ``tried_at`` (monotonic seconds), has failed, and what
        the driver ``said``; whether the patience is at an end."""
        now = time.monotonic()
        with self._lock:
            began, failed = self._span or (now, now)
            if tried_at - failed > max(self._patience_s, PROBE_S):
                began = now  # nobody has looked for as long: this is another one
            self._span, self._said = (began, now), said
            return now - began >= self._patience_s

    def end(self) -> None:
        """Note that the server answers."""
        if self._span is not None:
            with self._lock:
                self._span = None


class Trouble:
    """How long one call goes on trying, and how it waits between tries.

    The patience with a server that is away is shared by all calls: it is
    ``outage`` that knows since when.  A write goes on as long as its
    ``rivals``, the other writers, make progress.
    """

    def __init__(self, database: Database, outage: Outage, *, rivals: Rivals | None = None) -> None:
        outage.check()
        self._database = database
        self._outage = outage
        self._rivals = rivals
        self._started = self._tried_at = time.monotonic()
        self._tries = 0

    def pause_or_raise(self, error: BaseException) -> None:
        """Sleep a little before the next try; raise ``error``, translated, when
        trying again cannot help or has gone on long enough."""
        database = self._database
        translator = database.translator
        fault = translator.fault_of(error)
        if isinstance(error, sa.exc.TimeoutError):
            enough = True
        elif fault in GONE:
            enough = self._outage.has_lasted(self._tried_at, translator.text(error))
        else:
            patience = {
                Fault.BUSY: 0.0 if database.waits_for_locks or database.read_only else BUSY_S,
                Fault.RETRY: BUSY_S,
            }.get(fault, 0.0)
            enough = self._has_waited(patience, for_others=fault in (Fault.BUSY, Fault.RETRY))
        if enough:
            told = translator.translate(error)
            if self._rivals is not None:
                told = self._rivals.explain(told)
            raise told from translator.cause(error)
        # Doubling from half a millisecond, with jitter, so that writers that met
        # once do not keep meeting.  Who waits for a lock without a queue has to look
        # often: others leave it free for moments only, and would starve him.
        ceiling = min(0.0005 * 2 ** min(self._tries, 12), 0.002 if fault is Fault.BUSY else 0.1)
        self._tries += 1
        time.sleep(random.uniform(ceiling / 4, ceiling))  # noqa: S311 - not a secret
        self._tried_at = time.monotonic()

    def _has_waited(self, patience_s: float, *, for_others: bool) -> bool:
        rivals = self._rivals if for_others else None
        if rivals is not None:
            patience_s /= 2  # it takes two looks at them to see whether they make progress
        now = time.monotonic()
        if now - self._started < patience_s:
            return False
        if rivals is not None and rivals.go_on():
            self._started = now
            return False
        return True
