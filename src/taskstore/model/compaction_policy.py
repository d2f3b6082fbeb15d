"""The compaction policy: when compaction is due and what it retains.

Every store asks a :class:`CompactionPolicy` whether compaction is due and which
snapshots to retain.  Both methods are pure functions.
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
    """The statistics of a journal, from which the policy decides.

    ``entries`` and ``bytes`` are the size of the journal after the newest snapshot
    (``bytes`` is 0 if unknown).  ``oldest_at`` is the time of the first of these
    entries (Unix ms), ``records`` the number of live records, ``now`` the current
    time (Unix ms).  ``newest`` is the seq of the newest snapshot (0: none) and
    ``floor`` the first retained seq.
    """

    entries: int
    records: int
    now: int
    bytes: int = 0
    oldest_at: int | None = None
    newest: int = 0
    floor: int = 1


class CompactionPolicy(Struct, frozen=True, kw_only=True):
    """The rules that decide when compaction is due and how much history it retains.

    Only entries after the newest snapshot count.  Compaction is *due* when:

    - there are at least ``min_entries`` entries, and at least ``ratio`` entries per
      live record, so that the amortized cost of snapshots per change is constant;
    - or the entries have at least ``max_bytes`` bytes: the JSON store reads these
      bytes when it is opened;
    - or the oldest entry is at least ``max_age_s`` seconds old, so that an idle ledger
      is compacted too and does not keep deleted text for ever;
    - or ``force`` is set and there is at least one entry.

    Compaction *retains* the history of the last ``history_s`` seconds or the last
    ``history_entries`` entries, whichever is longer, so that a follower may pause
    for a weekend.  It also retains the newest ``keep_snapshots`` snapshots, because
    a snapshot may be damaged.  ``erase_deleted`` implies ``force`` and retains only
    the new snapshot: the ledger's files then contain no text of deleted tasks.
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
        """Return the same policy with ``force`` set."""
        return replace(self, force=True)

    def due(self, stats: JournalStats) -> str | None:
        """Return the reason why compaction is due (``str``), or ``None`` if it is not due."""
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

        ``snapshots`` are in ascending order of seq and include the snapshot that was
        just published.  The new floor is never below the old floor.  The snapshot at
        floor - 1 is always retained, so that the state at every later seq can be computed.
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
        # Some snapshots after the oldest are retained, so that a later compaction can raise
        # the floor to one of these snapshots.  Two of these snapshots are at least a quarter
        # of the window apart, which limits their number.
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

    ``compacted`` says whether compaction was due, ``reason`` says why or why not.
    ``seq`` is the seq of the new snapshot, ``records`` the number of its records
    (including quarantined records), ``floor`` the first retained seq, ``trimmed`` the
    number of trimmed entries, ``snapshots`` the seqs of the retained snapshots, and
    ``duration_s`` the duration of the compaction.
    """

    compacted: bool
    reason: str
    seq: int
    floor: int
    records: int = 0
    trimmed: int = 0
    snapshots: tuple[int, ...] = ()
    duration_s: float = 0.0
