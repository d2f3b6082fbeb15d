"""The steps of a compaction, in the same order for every store.

A store implements each step in :class:`CompactionSteps`; this module fixes their
order and applies the policy.  If the process is killed between two steps, the ledger stays intact.
A published snapshot is complete, and after a snapshot is published, no reader uses the entries that
will be trimmed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import NamedTuple

from taskstore.model.compaction_policy import (
    CompactionPolicy,
    CompactionReport,
    JournalStats,
    SnapshotInfo,
)
from taskstore.model.ids import Clock


class CompactionPoint(NamedTuple):
    """The seq and the time (Unix milliseconds) of the newest commit in the new snapshot, and the
    floor and the published snapshots at the start of the compaction."""

    seq: int
    at: int
    floor: int
    snapshots: tuple[SnapshotInfo, ...]


class Retained(NamedTuple):
    """The floor after the compaction, and the seqs of all retained snapshots (also the new one)."""

    seqs: frozenset[int]
    floor: int


class CompactionSteps(ABC):
    """The steps of a compaction, implemented by one store."""

    @abstractmethod
    def stats(self, now: int) -> JournalStats:
        """Return the size of the journal, without taking the compaction lock."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[object]:
        """Take the compaction lock, or raise :class:`~taskstore.StoreBusyError` if it is owned."""

    @abstractmethod
    def begin(self) -> CompactionPoint:
        """Return the compaction point; the journal entries up to its commit no longer change."""

    @abstractmethod
    def publish(self, point: CompactionPoint, retained: Retained) -> int:
        """Write the snapshot and move the floor; return the number of records in the snapshot."""

    @abstractmethod
    def trim(self, point: CompactionPoint, retained: Retained) -> None:
        """Remove the entries below the floor and the snapshots that are not retained."""


def compact(steps: CompactionSteps, policy: CompactionPolicy, clock: Clock) -> CompactionReport:
    """Implement :meth:`taskstore.SupportsCompaction.compact`."""
    started = time.monotonic()
    stats = steps.stats(clock())
    reason = policy.due(stats)
    if reason is None:
        return CompactionReport(
            compacted=False, reason="not due", seq=stats.newest, floor=stats.floor
        )
    with steps.lock():
        point = steps.begin()
        retained = _retained(policy, point, clock())
        records = steps.publish(point, retained)
        steps.trim(point, retained)
    return CompactionReport(
        compacted=True,
        reason=reason,
        seq=point.seq,
        floor=retained.floor,
        records=records,
        trimmed=retained.floor - point.floor,
        snapshots=tuple(sorted(retained.seqs)),
        duration_s=time.monotonic() - started,
    )


def _retained(policy: CompactionPolicy, point: CompactionPoint, now: int) -> Retained:
    """Return the snapshots to retain (including the new snapshot) and the floor that results."""
    snapshots = [snapshot for snapshot in point.snapshots if snapshot.seq != point.seq]
    snapshots.append(SnapshotInfo(point.seq, point.at))
    kept, floor = policy.retained(snapshots, head=point.seq, floor=point.floor, now=now)
    return Retained(kept & {snapshot.seq for snapshot in snapshots}, floor)
