"""The lease of the one process that compacts a ledger, noted on the head row."""

from __future__ import annotations

import os
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa

from taskstore.errors import OutcomeUnknownError, StoreBusyError, StoreUnavailableError
from taskstore.model.ids import system_clock
from taskstore.stores.sql.dialects.base import Session
from taskstore.stores.sql.tables import taskstore_head
from taskstore.stores.sql.transactions import Transactions

LEASE_MS = 20_000
"""How long a compactor that fell silent on another machine keeps others away, in milliseconds."""
PAUSE_S = 0.02
"""The longest pause between two steps, in seconds."""

_T = TypeVar("_T")

_held_here: set[str] = set()
"""The leases that compactions of this process hold, or try to take."""


class Lease:
    """The right to compact.  It is renewed with every step, each of which fails once another
    process has taken the lease over."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._location = transactions.database.location
        self._owner = f"{_MACHINE}{os.getpid():08x}{secrets.token_hex(8)}"
        self._mine = taskstore_head.c.lease_owner == self._owner

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lease, if it is free, its holder's time is up, or its holder is dead.

        Raises :class:`~taskstore.StoreBusyError` otherwise.
        """
        _held_here.add(self._owner)
        try:
            if not self._transactions.run(self._take):
                raise StoreBusyError(
                    f"{self._location} is being compacted by another process",
                    hint="a compactor that was killed keeps others away for a short while",
                )
            yield
        finally:
            try:
                # Where that fails, our process knows it all the same; for others it runs out.
                with suppress(StoreBusyError, StoreUnavailableError, OutcomeUnknownError):
                    self._transactions.run(lambda tx: tx.change(_change(None, self._mine)))
            finally:
                _held_here.discard(self._owner)

    def run(self, work: Callable[[Session], _T]) -> _T:
        """Do ``work`` in one small write transaction under the lease, which it renews.

        It may run several times: doing it twice has to be the same as once.
        """
        started = time.monotonic()

        def fenced(tx: Session) -> _T:
            if tx.change(_change(self._owner, self._mine)) != 1:
                raise StoreBusyError(
                    f"{self._location}: another process has taken over the compaction or "
                    "replaced the content"
                )
            return work(tx)

        result = self._transactions.run(fenced)
        # As long again for others: a writer that waits for SQLite's lock does so asleep,
        # and would not be awake in the moment between two of our steps.
        time.sleep(min(time.monotonic() - started, PAUSE_S))
        return result

    def _take(self, tx: Session) -> bool:
        """Take the lease if it may be taken; returns whether it is ours now."""
        lease = taskstore_head.c
        owner = tx.scalar(sa.select(lease.lease_owner))
        free = sa.or_(lease.lease_owner.is_(None), lease.lease_until < system_clock())
        if owner is not None and (owner == self._owner or _is_dead(owner)):
            # Mistaken or not, this is safe: each step of the other is fenced.
            free = sa.or_(free, lease.lease_owner == owner)
        return tx.change(_change(self._owner, free)) == 1


def _change(owner: str | None, where: sa.ColumnElement[bool]) -> sa.Update:
    until = None if owner is None else system_clock() + LEASE_MS
    return sa.update(taskstore_head).where(where).values(lease_owner=owner, lease_until=until)


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
