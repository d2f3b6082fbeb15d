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
from taskstore.model.policies import CompactionPolicy, CompactionReport, JournalStats, SnapshotMark


class Cut(NamedTuple):
    """The moment that the new snapshot is of: its seq and time (Unix milliseconds), and the
    floor and the published snapshots as they are then."""

    seq: int
    at: int
    floor: int
    marks: tuple[SnapshotMark, ...]


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
    def cut(self) -> Cut:
        """Fix the moment of the snapshot: nothing that it will hold changes any more."""

    @abstractmethod
    def publish(self, cut: Cut, retained: Retained) -> int:
        """Write the snapshot, move the floor; returns how many records the snapshot holds."""

    @abstractmethod
    def trim(self, cut: Cut, retained: Retained) -> None:
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
        cut = steps.cut()
        retained = _retained(policy, cut, clock())
        records = steps.publish(cut, retained)
        steps.trim(cut, retained)
    return CompactionReport(
        compacted=True,
        reason=reason,
        seq=cut.seq,
        floor=retained.floor,
        records=records,
        trimmed=retained.floor - cut.floor,
        snapshots=tuple(sorted(retained.seqs)),
        duration_s=time.monotonic() - started,
    )


def _retained(policy: CompactionPolicy, cut: Cut, now: int) -> Retained:
    """Which snapshots stay, the new one included, and the floor that follows."""
    marks = [mark for mark in cut.marks if mark.seq != cut.seq]
    marks.append(SnapshotMark(cut.seq, cut.at))
    kept, floor = policy.retained(marks, head=cut.seq, floor=cut.floor, now=now)
    return Retained(kept & {mark.seq for mark in marks}, floor)
