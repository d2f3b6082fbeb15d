"""Compaction: copy all records into a snapshot, publish it, trim the journal.

The server copies one chunk of records per call; no record passes through this process.  Writers
continue during the copy.  The key *cut* contains the seq of the snapshot and the position that the
copy has reached in the index.  Before a writer changes a record that is not copied yet, the writer
appends the old record to the key *saved* (see apply.lua).  Therefore the snapshot contains the
records as of exactly one seq, each record is copied once, and *saved* contains only records that
changed during the copy.

A lease excludes other compactors.  The lease expires, but each step of a compaction renews the
lease.  A step fails if another compactor owns the lease.  The lease names a connection that its
owner keeps open: when this connection has ended, the owner is dead, and another compactor takes
the lease at once.  A killed compactor leaves a *cut*, staged chunks and untrimmed entries.  The
next writer removes the *cut*, and the next compaction removes the chunks and the entries.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from msgspec import Struct
from taskstore import CompactionPolicy, CompactionReport, StoreBusyError, TaskStoreError
from taskstore.store import Clock, JournalStats, SnapshotInfo

from taskstore_redis.layout import PublishedSnapshot, State, published_snapshots, raw_entry
from taskstore_redis.reading import Reader
from taskstore_redis.writing import Writer

LEASE_MS = 5000
"""How long a lease lasts after the last step of its owner, in milliseconds."""
LEASE_ATTEMPTS = 3
LEASE_RETRY_S = 0.02
"""The number of attempts to acquire the lease, and the seconds between two attempts: the server
may not have noticed yet that the owner's connection has ended."""
STEP_ROWS = 64
STEP_BYTES = 256 * 1024
"""The limits of one step in records and bytes; the last record of a step may exceed the byte
limit.  A step takes about half a millisecond of the server's time, during which writers wait."""
STEP_ENTRIES = 500
"""The number of entries that one step trims."""


class _Inputs(Struct):
    """The state of the ledger when the lease was acquired."""

    state: State
    snapshots: list[PublishedSnapshot]
    records: int
    oldest_at: int | None


class Compactor:
    """One compaction of one ledger."""

    def __init__(self, reader: Reader, writer: Writer) -> None:
        self._reader = reader
        self._writer = writer
        self._keys = reader.keys
        self._token = ""

    def compact(self, policy: CompactionPolicy, clock: Clock) -> CompactionReport:
        """Compact the ledger; see :meth:`SupportsCompaction.compact`."""
        started = time.monotonic()
        with self._reader.link.held_connection() as connection_id:
            self._token = f"{secrets.token_hex(16)}.{connection_id}"
            inputs = self._begin()
            try:
                self._trim()
                return self._compact(policy, clock(), inputs, started)
            finally:
                with suppress(TaskStoreError):  # the lease expires
                    self._reader.link.run("release", self._keys.named("lease"), self._token)

    def _compact(
        self, policy: CompactionPolicy, now: int, inputs: _Inputs, started: float
    ) -> CompactionReport:
        before = inputs.state.floor
        newest = inputs.snapshots[-1].seq if inputs.snapshots else 0
        stats = JournalStats(
            entries=inputs.state.head - max(newest, before - 1),
            records=inputs.records,
            now=now,
            oldest_at=inputs.oldest_at,
            newest_snapshot_seq=newest,
            floor=before,
        )
        reason = policy.due(stats)
        if reason is None:
            return CompactionReport(
                compacted=False,
                reason="not due",
                seq=newest,
                floor=before,
                records=inputs.records,
                snapshots=tuple(old.seq for old in inputs.snapshots),
                floor_at=next((old.at for old in inputs.snapshots if old.seq == before - 1), None),
                stats=stats,
            )
        seq, at, records, chunks = self._copy()
        snapshots = [SnapshotInfo(old.seq, old.at) for old in inputs.snapshots if old.seq != seq]
        snapshots.append(SnapshotInfo(seq, at))
        kept, floor = policy.retained(snapshots, head=seq, floor=before, now=now)
        self._step(
            "publish",
            self._keys.named("head", "lease", "cut", "saved", "snapshots", "staging", "journal"),
            self._keys.snapshot(""),
            *(seq, at, records, chunks, floor),
            *sorted(kept),
        )
        self._trim()
        return CompactionReport(
            compacted=True,
            reason=reason,
            seq=seq,
            floor=floor,
            records=records,
            trimmed=floor - before,
            snapshots=tuple(each.seq for each in snapshots if each.seq in kept),
            duration_s=time.monotonic() - started,
            stats=stats,
        )

    # -- steps ----------------------------------------------------------------------

    def _begin(self) -> _Inputs:
        """Acquire the lease, and delete expired staged content of other processes."""
        reply = self._acquire_lease()
        state = self._reader.checked(reply[1])
        snapshots = published_snapshots(reply[2])
        now = int(reply[5])
        published = {snapshot.token for snapshot in snapshots}
        for token, until in zip(reply[3][::2], reply[3][1::2], strict=True):
            if int(until) < now and token.decode() not in published:
                self._writer.discard_staged(token.decode())
        oldest = [raw_entry(entry, self._reader.location) for entry in reply[6]]
        return _Inputs(state, snapshots, int(reply[4]), oldest[0].at if oldest else None)

    def _acquire_lease(self) -> Any:
        """Acquire the lease, if it is free or its owner is dead; returns the script's reply."""
        keys = self._keys.named("head", "lease", "snapshots", "staging", "facts", "journal")
        dead_owner = ""
        for _ in range(LEASE_ATTEMPTS):
            reply = self._reader.link.run("acquire", keys, self._token, LEASE_MS, dead_owner)
            if reply[0] == b"ok":
                return reply
            owner = reply[1].decode()
            if self._reader.link.is_disconnected(int(owner.rpartition(".")[2])):
                dead_owner = owner
            else:
                time.sleep(LEASE_RETRY_S)
        raise StoreBusyError(
            f"{self._reader.location} is being compacted by another process",
            hint=f"try again later; if that process is dead, its lease ends in {int(reply[2])} ms",
        )

    def _copy(self) -> tuple[int, int, int, int]:
        """Copy all records; returns the snapshot's seq and time, and its numbers of records and
        chunks."""
        snapshot = self._keys.snapshot(self._token)
        cut = self._step(
            "cut",
            [*self._keys.named("head", "lease", "cut", "saved", "aside", "staging"), snapshot],
        )
        keys = [*self._keys.named("lease", "cut", "saved", "index", "rows", "facts"), snapshot]
        while True:
            reply = self._step("copy", keys, STEP_ROWS, STEP_BYTES)
            if reply[0] == b"done":
                return int(cut[1]), int(cut[2]), int(reply[1]), int(reply[2])

    def _trim(self) -> None:
        """Remove the journal entries and the deletions before the floor."""
        keys = self._keys.named("head", "lease", "journal", "deleted")
        while self._step("trim", keys, STEP_ENTRIES)[0] != b"done":
            pass

    def _step(self, name: str, keys: Sequence[bytes], *arguments: Any) -> Any:
        """Run one step; raises :class:`~taskstore.StoreBusyError` if the lease was lost."""
        reply = self._reader.link.run(name, keys, self._token, LEASE_MS, *arguments)
        if reply[0] == b"lost":
            raise StoreBusyError(
                f"{self._reader.location}: this compaction was overtaken by another one, "
                f"or by a saved snapshot",
                hint="no data is lost: compact again",
            )
        return reply
