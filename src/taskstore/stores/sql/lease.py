"""The lease of the one process that compacts a ledger, noted on the head row."""

from __future__ import annotations

import os
import secrets
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa

from taskstore.clock import system_clock
from taskstore.errors import OutcomeUnknownError, StoreBusyError, StoreUnavailableError
from taskstore.stores.sql.session import Session
from taskstore.stores.sql.tables import taskstore_head
from taskstore.stores.sql.transactions import Transactions

LEASE_MS = 20_000
"""How long a compactor that fell silent on another machine keeps others away, in milliseconds."""
PAUSE_S = 0.02
"""The longest pause between two steps, in seconds."""

_held_here: set[str] = set()
"""The leases that compactions of this process hold, or try to take."""


class Lease:
    """The right to compact.  It is renewed with every step, each of which fails once another
    process has taken the lease over."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._location = transactions.database.location
        self._owner = f"{_MACHINE}{os.getpid():08x}{secrets.token_hex(8)}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lease, if it is free, its holder's time is up, or its holder is dead.

        Raises :class:`~taskstore.StoreBusyError` otherwise.
        """
        _held_here.add(self._owner)
        try:
            if not self._take():
                raise StoreBusyError(
                    f"{self._location} is being compacted by another process",
                    hint="a compactor that was killed keeps others away for a short while",
                )
            yield
        finally:
            try:
                # Where that fails, our process knows it all the same; for others it runs out.
                with suppress(StoreBusyError, StoreUnavailableError, OutcomeUnknownError):
                    self._give_back()
            finally:
                _held_here.discard(self._owner)

    @contextmanager
    def step(self) -> Iterator[Session]:
        """One small write transaction under the lease, which it renews."""
        started = time.monotonic()
        with self._transactions.write() as tx:
            mine = taskstore_head.c.lease_owner == self._owner
            if not self._set(tx, self._owner, system_clock() + LEASE_MS, mine):
                raise StoreBusyError(
                    f"{self._location}: another process has taken over the compaction or "
                    "replaced the content"
                )
            yield tx
        # As long again for others: a writer that waits for SQLite's lock does so asleep,
        # and would not be awake in the moment between two of our steps.
        time.sleep(min(time.monotonic() - started, PAUSE_S))

    def _take(self) -> bool:
        head, now = taskstore_head.c, system_clock()
        for attempt in self._transactions.attempts():
            with attempt, self._transactions.write() as tx:
                holder = tx.scalar(sa.select(head.lease_owner))
                free = sa.or_(head.lease_owner.is_(None), head.lease_until < now)
                if holder is not None and (holder == self._owner or _is_dead(holder)):
                    # Mistaken or not, this is safe: each step of the other is fenced.
                    free = sa.or_(free, head.lease_owner == holder)
                return self._set(tx, self._owner, now + LEASE_MS, free)
        raise AssertionError("attempts end by raising")

    def _give_back(self) -> None:
        mine = taskstore_head.c.lease_owner == self._owner
        for attempt in self._transactions.attempts():
            with attempt, self._transactions.write() as tx:
                self._set(tx, None, None, mine)
                return

    @staticmethod
    def _set(
        tx: Session, owner: str | None, until: int | None, where: sa.ColumnElement[bool]
    ) -> bool:
        lease = {"lease_owner": owner, "lease_until": until}
        return tx.change(sa.update(taskstore_head).where(where).values(lease)) == 1


def _machine() -> str:
    """Where our process ids mean something, as 8 hexadecimal digits."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return f"{zlib.crc32(f'{socket.gethostname()} {namespace}'.encode()):08x}"


_MACHINE = _machine()


def _is_dead(owner: str) -> bool:
    """Whether a lease's holder is gone: its process, or in ours, its compaction."""
    if not owner.startswith(_MACHINE):
        return False
    try:
        pid = int(owner[8:16], 16)
        if pid == os.getpid():
            return owner not in _held_here
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        pass
    return False
