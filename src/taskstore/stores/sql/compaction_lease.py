"""The lease for a compaction, stored in the head row."""

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
from taskstore.model.ids import CLOCK_TOLERANCE_MS, system_clock
from taskstore.stores.sql.dialects.base import DriverSession
from taskstore.stores.sql.rows import damaged_head_error
from taskstore.stores.sql.tables import taskstore_head
from taskstore.stores.sql.transactions import Transactions

LEASE_MS = 20_000
"""The duration of the lease in milliseconds.  If a compactor dies on another machine,
its lease expires after this time."""
MAX_PAUSE_S = 0.02
"""The longest pause after a step of a compaction, in seconds."""

_T = TypeVar("_T")

_local_owners: set[str] = set()
"""The owner ids of the compactions in this process that own or try to acquire a lease."""


class CompactionLease:
    """The exclusive right to compact a ledger.  Every step of a compaction renews the lease, and
    fails if another process has taken over the lease."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._location = transactions.database.location
        self._owner = f"{_MACHINE_ID}{os.getpid():08x}{secrets.token_hex(8)}"
        self._own = taskstore_head.c.lease_owner == self._owner

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Acquire the lease if it is free or expired, or if its owner is dead; release it at
        the end of the ``with`` block.

        Raises :class:`~taskstore.StoreBusyError` if the lease cannot be acquired.  If the block
        raises this error, the lease is not released: the compaction has already waited for a lock
        of another program, and would wait for the same lock once more.  This process can acquire
        the lease again at once; other processes must wait until the lease expires.
        """
        _local_owners.add(self._owner)
        busy = False
        try:
            self._acquire()
            yield
        except StoreBusyError:
            busy = True
            raise
        finally:
            try:
                # If the release fails, other processes must wait until the lease expires.
                with suppress(StoreBusyError, StoreUnavailableError, OutcomeUnknownError):
                    if not busy:
                        self._transactions.run(self._release)
            finally:
                _local_owners.discard(self._owner)

    def _release(self, tx: DriverSession) -> None:
        tx.execute_core(_set_owner(None, self._own))

    def run(self, work: Callable[[DriverSession], _T]) -> _T:
        """Run ``work`` in one small write transaction that also renews the lease.

        ``work`` can run several times, so it must be idempotent.
        """
        started = time.monotonic()

        def fenced(tx: DriverSession) -> _T:
            if tx.execute_core(_set_owner(self._owner, self._own)) != 1:
                raise StoreBusyError(
                    f"{self._location}: another process has taken over the compaction, or has "
                    "replaced the content of the ledger"
                )
            return work(tx)

        result = self._transactions.run(fenced)
        # Pause for as long as the step of the compaction took.  In a shorter pause, a waiting
        # writer could miss SQLite's lock, because the writer sleeps between two attempts.
        time.sleep(min(time.monotonic() - started, MAX_PAUSE_S))
        return result

    def _acquire(self) -> None:
        if not self._transactions.run(self._try_acquire):
            raise StoreBusyError(
                f"{self._location} is being compacted by another process",
                hint="try again later; the lease of a killed process expires within "
                f"{LEASE_MS // 1000} s",
            )

    def _try_acquire(self, tx: DriverSession) -> bool:
        """Acquire the lease if it is free, expired or owned by a dead process; return whether it
        was acquired."""
        lease = taskstore_head.c
        owner = tx.scalar(sa.select(lease.lease_owner))
        if not isinstance(owner, str | None):
            raise damaged_head_error()
        now = system_clock()
        free = sa.or_(
            lease.lease_owner.is_(None),
            lease.lease_until < now,
            # Such a lease was acquired with a wrong clock, and would never expire.
            lease.lease_until > now + LEASE_MS + CLOCK_TOLERANCE_MS,
        )
        if owner is not None and (owner == self._owner or _is_dead(owner)):
            # If the previous owner is alive, the next step of its compaction fails: each step
            # checks the lease.
            free = sa.or_(free, lease.lease_owner == owner)
        return tx.execute_core(_set_owner(self._owner, free)) == 1


def _set_owner(owner: str | None, where: sa.ColumnElement[bool]) -> sa.Update:
    until = None if owner is None else system_clock() + LEASE_MS
    return sa.update(taskstore_head).where(where).values(lease_owner=owner, lease_until=until)


def _machine_id() -> str:
    """Return 8 hexadecimal digits that identify this machine and the process-id namespace."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return f"{zlib.crc32(f'{socket.gethostname()} {namespace}'.encode()):08x}"


_MACHINE_ID = _machine_id()


def _is_dead(owner: str) -> bool:
    """Return whether the process of a lease owner has ended.

    If the owner is a compaction in this process, return whether that compaction has ended.
    """
    if not owner.startswith(_MACHINE_ID):
        return False
    try:
        pid = int(owner[8:16], 16)
        if pid == os.getpid():
            return owner not in _local_owners
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        pass
    return False
