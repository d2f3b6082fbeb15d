"""Compaction, the same for every store: due, lock, publish, retain, trim, report.

A store says in :class:`CompactionSteps` how it does each of these; in which
order they come, and what the policy decides, stands here.  The process may be
killed between any two steps: what is published is whole, and what is trimmed
is what no reader has seen since the snapshot was published.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import NamedTuple

from taskstore.model.ids import Clock
from taskstore.model.policies import CompactionPolicy, CompactionReport, JournalStats, SnapshotInfo


class CompactionPoint(NamedTuple):
    """The moment that the new snapshot is of: its seq and time (Unix milliseconds), and the
    floor and the published snapshots as they are then."""

    seq: int
    at: int
    floor: int
    marks: tuple[SnapshotInfo, ...]


class Retained(NamedTuple):
    """What stays: the seqs of the snapshots, the new one among them, and the new floor."""

    seqs: frozenset[int]
    floor: int


class CompactionSteps(ABC):
    """What one store does in each step of a compaction."""

    @abstractmethod
    def stats(self, now: int) -> JournalStats:
        """Look how much there is to compact, without the lock."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[object]:
        """Keep other compactors out; :class:`~taskstore.StoreBusyError` while one is at work."""

    @abstractmethod
    def begin(self) -> CompactionPoint:
        """Fix the moment of the snapshot: nothing that it will hold changes any more."""

    @abstractmethod
    def publish(self, point: CompactionPoint, retained: Retained) -> int:
        """Write the snapshot, move the floor; returns how many records the snapshot holds."""

    @abstractmethod
    def trim(self, point: CompactionPoint, retained: Retained) -> None:
        """Remove the entries below the floor and the snapshots that are not retained."""


def compact(steps: CompactionSteps, policy: CompactionPolicy, clock: Clock) -> CompactionReport:
    """Do what :meth:`taskstore.SupportsCompaction.compact` promises."""
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
    """Which snapshots stay, the new one included, and the floor that follows."""
    marks = [mark for mark in point.marks if mark.seq != point.seq]
    marks.append(SnapshotInfo(point.seq, point.at))
    kept, floor = policy.retained(marks, head=point.seq, floor=point.floor, now=now)
    return Retained(kept & {mark.seq for mark in marks}, floor)
