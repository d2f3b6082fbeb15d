"""Compaction: copy the records of one seq into a snapshot, publish it, trim.

The server copies, a chunk per call, and nothing goes through this process.
Writers go on meanwhile; the *cut* tells them which seq the picture is of and
how far it has come in the order of the index.  Before a writer changes a
record that the picture has not come to, it puts the old one into *saved*
(apply.lua).  So the snapshot is of exactly one seq, each record is copied
once, and what is held besides the snapshot is only what changed meanwhile.

One compactor at a time: a lease with an expiry, renewed by each step, and
each step fails once it is somebody else's.  The lease names a connection that
its holder keeps open: when the server knows that it is gone, so is the
holder, and the lease may be taken over at once.  One that was killed leaves a
cut that the next writer removes, and staged chunks and untrimmed entries that
the next compaction clears.
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
"""How long a compactor may be silent before another one takes over, in milliseconds."""
LEASE_ATTEMPTS = 3
LEASE_RETRY_S = 0.02
"""How often, and how far apart in seconds, it is tried: the server may be about
to find out that a holder is gone."""
STEP_ROWS = 64
STEP_BYTES = 256 * 1024
"""What one step copies at most (one record more may make it larger): about half
a millisecond of the server's time, for so long does a writer wait."""
STEP_ENTRIES = 500
"""How many entries one step trims."""


class _Inputs(Struct):
    """What there is to compact."""

    state: State
    marks: list[PublishedSnapshot]
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
        """Do what :meth:`SupportsCompaction.compact` promises."""
        started = time.monotonic()
        with self._reader.link.held_connection() as connection_id:
            self._token = f"{secrets.token_hex(16)}.{connection_id}"
            found = self._begin()
            try:
                self._trim()
                return self._compact(policy, clock(), found, started)
            finally:
                with suppress(TaskStoreError):  # it ends by itself
                    self._reader.link.run("release", self._keys.named("lease"), self._token)

    def _compact(
        self, policy: CompactionPolicy, now: int, found: _Inputs, started: float
    ) -> CompactionReport:
        before = found.state.floor
        newest = found.marks[-1].seq if found.marks else 0
        stats = JournalStats(
            entries=found.state.head - max(newest, before - 1),
            records=found.records,
            now=now,
            oldest_at=found.oldest_at,
        )
        reason = policy.due(stats)
        if reason is None:
            return CompactionReport(compacted=False, reason="not due", seq=newest, floor=before)
        seq, at, records, chunks = self._copy()
        marks = [SnapshotInfo(mark.seq, mark.at) for mark in found.marks if mark.seq != seq]
        marks.append(SnapshotInfo(seq, at))
        kept, floor = policy.retained(marks, head=seq, floor=before, now=now)
        self._step(
            "publish",
            self._keys.named("head", "lease", "cut", "saved", "snapshots", "staging"),
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
            snapshots=tuple(mark.seq for mark in marks if mark.seq in kept),
            duration_s=time.monotonic() - started,
        )

    # -- steps ----------------------------------------------------------------------

    def _begin(self) -> _Inputs:
        """Take the lease, clear what others left, and see what there is."""
        reply = self._acquire_lease()
        state = self._reader.checked(reply[1])
        marks = published_snapshots(reply[2])
        now = int(reply[5])
        published = {mark.token for mark in marks}
        for token, until in zip(reply[3][::2], reply[3][1::2], strict=True):
            if int(until) < now and token.decode() not in published:
                self._writer.discard_staged(token.decode())
        oldest = [raw_entry(entry, self._reader.location) for entry in reply[6]]
        return _Inputs(state, marks, int(reply[4]), oldest[0].at if oldest else None)

    def _acquire_lease(self) -> Any:
        """Take the lease, from nobody or from one who is gone; what there is to compact."""
        keys = self._keys.named("head", "lease", "snapshots", "staging", "facts", "journal")
        gone = ""
        for _ in range(LEASE_ATTEMPTS):
            reply = self._reader.link.run("acquire", keys, self._token, LEASE_MS, gone)
            if reply[0] == b"ok":
                return reply
            holder = reply[1].decode()
            if self._reader.link.is_disconnected(int(holder.rpartition(".")[2])):
                gone = holder
            else:
                time.sleep(LEASE_RETRY_S)
        raise StoreBusyError(
            f"{self._reader.location} is being compacted by another",
            hint=f"if that one is gone, its lease ends in {int(reply[2])} ms",
        )

    def _copy(self) -> tuple[int, int, int, int]:
        """Copy everything: seq and time of the picture, its records and chunks."""
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
        """Remove everything before the floor."""
        keys = self._keys.named("head", "lease", "journal", "deleted")
        while self._step("trim", keys, STEP_ENTRIES)[0] != b"done":
            pass

    def _step(self, name: str, keys: Sequence[bytes], *arguments: Any) -> Any:
        """Run one step, if the lease is still ours."""
        reply = self._reader.link.run(name, keys, self._token, LEASE_MS, *arguments)
        if reply[0] == b"lost":
            raise StoreBusyError(
                f"{self._reader.location}: this compaction was overtaken by another, "
                f"or by a snapshot that was saved",
                hint="nothing is lost: compact again",
            )
        return reply
