"""The store: one open ledger on a Redis server."""

from __future__ import annotations

import time
from collections.abc import Sequence

from taskstore import (
    Change,
    Commit,
    CompactionPolicy,
    CompactionReport,
    JournalEntry,
    Page,
    Quarantined,
    Snapshot,
    StoreReport,
    TaskQuery,
    TaskRegistryStore,
    ValidationError,
    VerifyReport,
)

from taskstore_redis import querying
from taskstore_redis.compaction import Compactor
from taskstore_redis.layout import Keys
from taskstore_redis.link import Link
from taskstore_redis.reading import Reader
from taskstore_redis.server import read_facts
from taskstore_redis.urls import Target, parse
from taskstore_redis.verify import verify
from taskstore_redis.writing import Writer

TIMEOUT_S = 10.0


class RedisStore(TaskRegistryStore):
    """A ledger on a Redis server (6.2 or newer), in a namespace of its own.

    Any number of instances, processes and machines may share it: a commit is
    one script, which the server runs alone.  ``timeout_s`` is how long an
    answer may take, in seconds.

    **What an acknowledged change survives is the server's setting, not ours.**
    ``durability`` says what it is, whatever was asked for: ``full`` with
    ``appendonly yes`` and ``appendfsync always``, else ``process``.  The first
    of ``report().notices`` says it in words.  So invariant 4 holds in full on
    a server that is set so.  On any other, the *crash-safe* level is declared
    as not given: our own death at any instruction loses nothing, but a server
    that dies may come back without its last second, or its last hours.  It
    then gives seqs again that it had acknowledged, which invariant 2 forbids;
    an instance that has seen them tells its reader
    :class:`~taskstore.CursorExpiredError`, so that a registry loads anew
    instead of diverging, and says so in its notices.
    """

    def __init__(
        self,
        target: Target,
        *,
        durability: str = "full",
        read_only: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        super().__init__(read_only=read_only)
        if not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
            raise ValidationError("timeout_s", f"must be seconds above 0, not {timeout_s!r}")
        self.location = target.location
        self._link = Link(target, timeout_s)
        self._quarantined: tuple[Quarantined, ...] = ()
        try:
            facts = read_facts(self._link)
            self._reader = Reader(self._link, Keys(target.namespace), self.location)
            self._writer = Writer(self._reader)
            state = self._reader.state()
        except BaseException:
            self._link.close()
            raise
        self._reader.trail.saw(state.head, state.commit)
        self.durability = facts.durability
        self._notices = facts.notices(durability)

    # -- content ------------------------------------------------------------------

    def load_snapshot(self) -> Snapshot:
        self._check_open()
        snapshot = self._reader.load()
        self._quarantined = snapshot.quarantined
        return snapshot

    def save_snapshot(self, snapshot: Snapshot) -> None:
        self._check_writable()
        self._writer.replace(snapshot)

    def apply(self, changes: Sequence[Change]) -> Commit:
        self._check_writable()
        return self._writer.commit(changes, self.clock)

    def report(self) -> StoreReport:
        return StoreReport(self._quarantined, (*self._notices, *self._reader.trail.losses))

    def close(self) -> None:
        if not self._closed:
            super().close()
            self._link.close()

    # -- journal --------------------------------------------------------------------

    def head(self) -> int:
        self._check_open()
        return self._reader.state().head

    def floor(self) -> int:
        self._check_open()
        return self._reader.state().floor

    def read_journal(self, after: int, limit: int) -> Sequence[JournalEntry]:
        self._check_open()
        return self._reader.journal(after, limit)

    def read_snapshot(self, at: int) -> Snapshot | None:
        self._check_open()
        return self._reader.snapshot(at)

    def wait_for(self, after: int, timeout: float) -> bool:
        self._check_open()
        deadline = time.monotonic() + timeout
        while self._reader.state().head <= after:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # On a connection of its own.  The stream is ordered by seq, so that a
            # commit between the two questions is not missed.
            self._link.wait(self._reader.keys["commits"], after, left)
            self._check_open()
        return True

    def read_history(self, task_id: str) -> Sequence[JournalEntry]:
        self._check_open()
        return self._reader.history(task_id)

    # -- compaction, query, integrity ---------------------------------------------

    def compact(self, policy: CompactionPolicy) -> CompactionReport:
        self._check_writable()
        return Compactor(self._reader, self._writer).compact(policy, self.clock)

    def query(self, query: TaskQuery) -> Page:
        self._check_open()
        return querying.run(self._reader, query)

    def verify(self) -> VerifyReport:
        self._check_open()
        return verify(self._reader)


def open_redis(
    url: str,
    *,
    durability: str = "full",
    migrate: str = "auto",
    read_only: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> RedisStore:
    """Open ``redis://[user:password@]host[:port][/db][?namespace=NAME]``.

    ``rediss:`` is the same over TLS.  The default namespace is ``taskstore``.
    User and password are percent-decoded.  Keys appear with the first commit,
    so ``migrate`` changes nothing.
    """
    del migrate
    return RedisStore(parse(url), durability=durability, read_only=read_only, timeout_s=timeout_s)
