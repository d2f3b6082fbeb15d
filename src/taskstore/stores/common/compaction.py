"""The steps of a compaction, in the same order for every store.

A store implements each step in :class:`CompactionSteps`; this module fixes the order of the steps
and applies the policy.  If the process is killed between two steps, the ledger stays intact.  Every
published snapshot is complete.  After the new snapshot is published, no reader uses the entries
that will be trimmed.

The new floor follows exactly the last entry that the policy trims; if there is no snapshot at this
entry, the store makes one.  A commit is trimmed as a whole or not at all.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from contextlib import AbstractContextManager
from typing import NamedTuple

from taskstore.model.compaction_policy import (
    CompactionPolicy,
    CompactionReport,
    HistoryLimit,
    JournalStats,
    SnapshotInfo,
)
from taskstore.model.ids import Clock


class EntryCommit(NamedTuple):
    """The time (Unix milliseconds) and the id of the commit that contains an entry."""

    at: int
    commit_id: str


class CompactionPoint(NamedTuple):
    """The seq and the time (Unix milliseconds) of the newest commit in the new snapshot, and the
    floor and the published snapshots at the start of the compaction."""

    seq: int
    at: int
    floor: int
    snapshots: tuple[SnapshotInfo, ...]


class Retained(NamedTuple):
    """The floor after the compaction, and the seqs of all retained snapshots, including the new
    one.

    ``base_snapshot`` describes the snapshot directly before the floor if the store must make this
    snapshot.  ``base_snapshot`` is ``None`` if this snapshot already exists, is the new snapshot,
    or is not needed because no entry is trimmed.
    """

    seqs: frozenset[int]
    floor: int
    base_snapshot: SnapshotInfo | None = None


class CompactionSteps(ABC):
    """The steps of a compaction, implemented by one store."""

    @abstractmethod
    def stats(self, now: int, most_bytes: int) -> JournalStats:
        """Return the size of the journal, without taking the compaction lock.

        If the history has at most ``most_bytes`` bytes, ``history_bytes`` is exact; otherwise
        ``history_bytes`` is any number above ``most_bytes``."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[object]:
        """Take the compaction lock; raise :class:`~taskstore.StoreBusyError` if another compactor
        owns it.

        If the store also takes the compaction lock for short work of a writer, this method waits
        for some seconds before it raises the error.
        """

    @abstractmethod
    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """Return the published snapshots, in ascending order of seq; needs no lock."""

    @abstractmethod
    def begin(self) -> CompactionPoint:
        """Return the compaction point; after the call, no journal entry up to this point
        changes."""

    @abstractmethod
    def commit_of(self, seq: int) -> EntryCommit:
        """Return the time and the id of the commit that contains a retained entry."""

    @abstractmethod
    def seq_within(self, size: int, head: int) -> int:
        """Return the lowest seq S from floor - 1 on for which the entries from S + 1 to ``head``
        have at most ``size`` bytes."""

    @abstractmethod
    def publish(self, point: CompactionPoint, retained: Retained) -> int:
        """Write the snapshots and move the floor; return the number of records in the new
        snapshot.

        If ``retained.base_snapshot`` is set, the store also makes the snapshot that
        ``retained.base_snapshot`` describes.  The store makes it from an older snapshot (the newest
        one before ``retained.base_snapshot``, or the empty ledger) and the entries after this older
        snapshot."""

    @abstractmethod
    def trim(self, point: CompactionPoint, retained: Retained) -> None:
        """Remove the entries below the floor and the snapshots that are not retained."""


def compact(steps: CompactionSteps, policy: CompactionPolicy, clock: Clock) -> CompactionReport:
    """Implement :meth:`taskstore.SupportsCompaction.compact`."""
    started = time.monotonic()
    stats = steps.stats(clock(), policy.history_bytes)
    reason = policy.due(stats)
    if reason is None and not (policy.force and stats.newest_snapshot_seq):
        return _nothing_done(steps, stats, _NOTHING_NEW if policy.force else "not due")
    with steps.lock():
        if reason is None:
            # There is no entry after the newest snapshot, but there can be history to trim.
            stats = steps.stats(clock(), policy.history_bytes)
            limit = _limit_of(
                steps, policy, stats, stats.newest_snapshot_seq + stats.entries, stats.floor
            )
            if not stats.entries and limit.seq < stats.floor:
                return _nothing_done(steps, stats, _NOTHING_NEW, limit.reason)
            reason = "compaction was forced"
        point = steps.begin()
        limit = _limit_of(steps, policy, stats, point.seq, point.floor)
        snapshots = _snapshots(steps, point, limit.seq)
        base = next((s for s in snapshots if s.seq == limit.seq), None)
        made = {snapshot.seq for snapshot in point.snapshots} | {point.seq}
        retained = Retained(
            policy.thinned(snapshots, limit.seq, now=clock()),
            limit.seq + 1,
            base if base is not None and base.seq not in made else None,
        )
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
        floor_at=base.at if base is not None else None,
        floor_reason=limit.reason,
        stats=stats,
    )


_NOTHING_NEW = "there is no new entry, and no more history to trim"
_NEVER_TRIMMED = "no entry has been trimmed"
_TRIMMED_EARLIER = "an earlier compaction trimmed the older entries"


def _nothing_done(
    steps: CompactionSteps, stats: JournalStats, reason: str, floor_reason: str = ""
) -> CompactionReport:
    snapshots = steps.snapshots()
    return CompactionReport(
        compacted=False,
        reason=reason,
        seq=stats.newest_snapshot_seq,
        floor=stats.floor,
        records=stats.records,
        snapshots=tuple(snapshot.seq for snapshot in snapshots),
        floor_at=next((s.at for s in snapshots if s.seq == stats.floor - 1), None),
        floor_reason=floor_reason or (_TRIMMED_EARLIER if stats.floor > 1 else _NEVER_TRIMMED),
        stats=stats,
    )


def _limit_of(
    steps: CompactionSteps, policy: CompactionPolicy, stats: JournalStats, head: int, floor: int
) -> HistoryLimit:
    """Return the seq of the last entry to trim.  This entry is always the last one of its commit.
    If no entry is to be trimmed, return ``floor`` - 1."""
    if policy.erase_deleted:
        return HistoryLimit(head, "deleted records were erased, with all history")
    seqs = range(floor, head + 1)
    limit = policy.trimmable(
        head=head, floor=floor, now=stats.now, at=lambda seq: steps.commit_of(seq).at
    )
    if limit.seq in seqs[:-1]:
        # Entries of one commit have the same time, but ``history_entries`` can divide a commit.
        limit = limit._replace(seq=_last_whole_commit(steps, seqs, limit.seq))
    if stats.history_bytes > policy.history_bytes:
        first = steps.seq_within(policy.kept_bytes, head)
        if first > limit.seq:
            limit = policy.history_bytes_limit(_end_of_commit(steps, seqs, first))
    if limit.seq < floor and floor > 1:
        limit = limit._replace(reason=_TRIMMED_EARLIER)
    return limit


def _last_whole_commit(steps: CompactionSteps, seqs: range, seq: int) -> int:
    """Return the last seq at or before ``seq`` at which a commit ends; ``seqs.start`` - 1 if none
    ends."""
    commit_id = steps.commit_of(seq + 1).commit_id
    if not commit_id or steps.commit_of(seq).commit_id != commit_id:
        return seq
    earlier = range(seqs.start, seq)
    same = bisect_left(earlier, x=True, key=lambda s: steps.commit_of(s).commit_id == commit_id)
    return seqs.start + same - 1


def _end_of_commit(steps: CompactionSteps, seqs: range, seq: int) -> int:
    """Return the seq of the last entry of the commit that contains ``seq``."""
    commit_id = steps.commit_of(seq).commit_id
    later = range(seq + 1, seqs.stop)
    if not commit_id:
        return seq
    other = bisect_left(later, x=True, key=lambda s: steps.commit_of(s).commit_id != commit_id)
    return seq + other


def _snapshots(steps: CompactionSteps, point: CompactionPoint, oldest: int) -> list[SnapshotInfo]:
    """Return the published snapshots, the new snapshot and a snapshot at seq ``oldest``,
    ascending."""
    snapshots = {snapshot.seq: snapshot for snapshot in point.snapshots}
    snapshots[point.seq] = SnapshotInfo(point.seq, point.at)
    if oldest >= point.floor and oldest not in snapshots:
        snapshots[oldest] = SnapshotInfo(oldest, steps.commit_of(oldest).at)
    return [snapshots[seq] for seq in sorted(snapshots)]
