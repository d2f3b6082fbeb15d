"""The Redis store: one open ledger on a Redis server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import MappingProxyType

from taskstore import (
    Change,
    Commit,
    CompactionPolicy,
    CompactionReport,
    CursorExpiredError,
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
from taskstore.store import clock_notices

from taskstore_redis import querying
from taskstore_redis.compaction import Compactor
from taskstore_redis.layout import Keys
from taskstore_redis.link import Link
from taskstore_redis.reading import Reader
from taskstore_redis.server import read_server_info
from taskstore_redis.urls import Target, parse
from taskstore_redis.verify import verify
from taskstore_redis.writing import Writer

TIMEOUT_S = 10.0


class RedisStore(TaskRegistryStore):
    """A ledger on a Redis server (6.2 or newer), in its own namespace.

    Any number of store instances, in any number of processes and machines, may share the ledger: a
    commit is one script, and the server runs one script at a time.  ``timeout_s`` is the number of
    seconds to wait for an answer of the server.

    **The server's configuration decides what an acknowledged change survives.** ``durability`` is
    the actual durability, which can differ from the requested durability: ``full`` if the server
    has ``appendonly yes`` and ``appendfsync always``, otherwise ``process``.  The first of
    ``report().notices`` describes the actual durability.  If the server dies, the invariants 2 and
    4 hold only with ``full``.  A server with ``process`` may restart without the changes of its
    last second, or of its last hours.  The server then gives acknowledged seqs to other changes.
    If a store instance has read the lost commits, the instance adds a notice, and raises
    :class:`~taskstore.CursorExpiredError` for readers that continue from these commits, so that a
    registry reloads its records.  If the writing process dies, no acknowledged change is lost,
    whatever the server's configuration is.  Therefore the *crash-safe* level of the contract
    passes.  A compaction can move the floor only to the seq of an earlier compaction, so the store
    does not guarantee *exact-history*.
    """

    unsupported_guarantees = MappingProxyType(
        {"exact-history": "the floor moves only to the snapshots of earlier compactions"}
    )

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
            info = read_server_info(self._link)
            self._reader = Reader(self._link, Keys(target.namespace), self.location)
            self._writer = Writer(self._reader)
            state = self._reader.state()
        except BaseException:
            self._link.close()
            raise
        self._reader.known_commits.add(state.head, state.commit)
        self.durability = info.durability
        self._notices = info.notices(durability)
        self._release_when_dropped(self._link.close)

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
        notices = (*self._notices, *self._reader.known_commits.notices)
        late = clock_notices(self._reader.last_at, self.clock)
        return StoreReport(self._quarantined, (*notices, *late))

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

    def commit_id(self, seq: int) -> str:
        self._check_open()
        state = self._reader.state()
        if seq == state.floor - 1:
            return state.base
        try:
            entries = self._reader.journal(seq - 1, 1)
        except CursorExpiredError:
            return ""
        return entries[0].commit_id if entries else ""

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
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return False
            # The ids of the stream are seqs.  So XREAD returns at once for a commit
            # that was made after the head was read.
            self._link.wait(self._reader.keys["commits"], after, remaining_s)
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
        return querying.run_query(self._reader, query)

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

    A URL with ``rediss:`` uses TLS.  The default namespace is ``taskstore``.  User and password are
    percent-decoded.  ``migrate`` has no effect, because the first commit creates the keys.
    """
    del migrate
    return RedisStore(parse(url), durability=durability, read_only=read_only, timeout_s=timeout_s)
