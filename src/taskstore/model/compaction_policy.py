"""The compaction policy: when compaction is due and what compaction retains.

Every store asks a :class:`CompactionPolicy` whether compaction is due and which snapshots
to retain.  The methods of a policy are pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from msgspec import Struct
from msgspec.structs import replace


class SnapshotInfo(NamedTuple):
    """The seq of a stored snapshot, and the time of the commit at that seq (Unix ms)."""

    seq: int
    at: int


class JournalStats(Struct, frozen=True, kw_only=True):
    """The statistics of a journal that a policy needs to decide whether compaction is due.

    ``entries`` is the number of journal entries after the newest snapshot.  ``bytes`` is the size
    in bytes of the entries after the newest snapshot (0 if unknown).  ``oldest_at`` is the time of
    the oldest entry after the newest snapshot (Unix ms).  ``records`` is the number of live
    records.  ``now`` is the current time (Unix ms).  ``newest`` is the seq of the newest snapshot
    (0 if there is no snapshot).  ``floor`` is the first retained seq.
    """

    entries: int
    records: int
    now: int
    bytes: int = 0
    oldest_at: int | None = None
    newest: int = 0
    floor: int = 1


class CompactionPolicy(Struct, frozen=True, kw_only=True):
    """The rules that decide when compaction is due and how much history compaction retains.

    Compaction is *due* if one of these conditions is true.  In the conditions, "entries"
    are the journal entries after the newest snapshot.

    - There are at least ``min_entries`` entries, and at least ``ratio`` entries per live
      record.  This condition keeps the amortized cost of snapshots per change constant.
    - The entries have at least ``max_bytes`` bytes in total.  The JSON store reads all
      these entries when the store is opened.
    - The oldest entry is at least ``max_age_s`` seconds old.  Because of this condition, an
      idle ledger is compacted too and does not keep deleted text for ever.
    - ``force`` is set and there is at least one entry.

    Compaction *retains* the newest ``history_s`` seconds of history or the newest
    ``history_entries`` entries, whichever is more.  With the defaults, a follower can pause for a
    weekend and then continue.  Compaction also retains the newest ``keep_snapshots`` snapshots,
    because the newest snapshot can be damaged.  With ``erase_deleted``, compaction is always due
    and retains only the new snapshot: the ledger's files then contain no text of deleted tasks.
    """

    min_entries: int = 10_000
    ratio: float = 1.0
    max_bytes: int = 64 * 1024 * 1024
    max_age_s: float = 24 * 60 * 60
    history_s: float = 7 * 24 * 60 * 60
    history_entries: int = 10_000
    keep_snapshots: int = 2
    force: bool = False
    erase_deleted: bool = False

    def forced(self) -> Self:
        """Return a copy of this policy with ``force`` set."""
        return replace(self, force=True)

    def due(self, stats: JournalStats) -> str | None:
        """Return the reason (``str``) why compaction is due, or ``None`` if compaction is
        not due."""
        if self.erase_deleted:
            return "deleted records must be erased"
        if stats.entries == 0:
            return None
        if self.force:
            return "compaction was forced"
        if stats.entries >= max(self.min_entries, self.ratio * stats.records):
            return f"{stats.entries} entries since the last snapshot"
        if stats.bytes >= self.max_bytes:
            return f"{stats.bytes} bytes since the last snapshot"
        if stats.oldest_at is not None and stats.now - stats.oldest_at >= self.max_age_s * 1000:
            return f"entries older than {self.max_age_s:g} s"
        return None

    def retained(
        self, snapshots: Sequence[SnapshotInfo], *, head: int, floor: int, now: int
    ) -> tuple[frozenset[int], int]:
        """Return the seqs of the snapshots to retain, and the new floor.

        ``snapshots`` lists the stored snapshots in ascending order of seq, including the new
        snapshot.  The new floor is never below ``floor``.  The snapshot directly before the new
        floor is always retained, so that the records at every later seq can be computed.
        """
        if self.erase_deleted:
            newest = snapshots[-1].seq
            return frozenset({newest}), newest + 1
        window_ms = self.history_s * 1000
        outside_window = [
            snapshot
            for snapshot in snapshots
            if snapshot.seq >= floor - 1
            and head - snapshot.seq >= self.history_entries
            and snapshot.at <= now - window_ms
        ]
        oldest = outside_window[-1].seq if outside_window else floor - 1
        retained = {snapshot.seq for snapshot in snapshots[-max(self.keep_snapshots, 1) :]}
        # Some snapshots after the oldest snapshot are retained, so that a later compaction
        # can raise the floor to one of these snapshots.  The distance between two of these
        # snapshots is at least a quarter of the history window, which limits their number.
        last = SnapshotInfo(oldest, 0)
        for snapshot in snapshots:
            if snapshot.seq == oldest:
                retained.add(oldest)
                last = snapshot
            elif (
                snapshot.seq > oldest
                and snapshot.seq - last.seq >= self.history_entries / 4
                and snapshot.at - last.at >= window_ms / 4
            ):
                retained.add(snapshot.seq)
                last = snapshot
        return frozenset(seq for seq in retained if seq >= oldest), oldest + 1


class CompactionReport(Struct, frozen=True, kw_only=True):
    """The result of a compaction.

    ``compacted`` says whether compaction was due.  ``reason`` says why compaction was due or not
    due.  ``seq`` is the seq of the new snapshot.  ``records`` is the number of records in the new
    snapshot, including quarantined records.  ``floor`` is the first retained seq.  ``trimmed`` is
    the number of trimmed journal entries.  ``snapshots`` contains the seqs of the retained
    snapshots.  ``duration_s`` is the duration of the compaction.
    """

    compacted: bool
    reason: str
    seq: int
    floor: int
    records: int = 0
    trimmed: int = 0
    snapshots: tuple[int, ...] = ()
    duration_s: float = 0.0
