"""When to compact and what to keep: the decisions, without the doing.

Every store asks the same two questions of a :class:`CompactionPolicy`: is it
due, and which snapshots stay.  Both answers are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from msgspec import Struct
from msgspec.structs import replace


class SnapshotInfo(NamedTuple):
    """A snapshot that a store has: its seq, and the time of that commit (Unix ms)."""

    seq: int
    at: int


class JournalStats(Struct, frozen=True, kw_only=True):
    """What the policy looks at.

    ``entries`` and ``bytes`` count the journal since the newest snapshot
    (``bytes`` 0 where a store does not know), ``oldest_at`` is the time of
    the first of these entries (Unix ms), ``records`` the number of live ones,
    ``now`` the clock (Unix ms).  ``newest`` is the seq of that snapshot (0:
    none) and ``floor`` the first seq kept.
    """

    entries: int
    records: int
    now: int
    bytes: int = 0
    oldest_at: int | None = None
    newest: int = 0
    floor: int = 1


class CompactionPolicy(Struct, frozen=True, kw_only=True):
    """When compaction is due, and how much history it leaves.

    *Due* when ``min_entries`` entries have come since the newest snapshot
    and they are at least ``ratio`` times the live records (so that the cost
    of writing a snapshot, which grows with the records, stays a constant
    share of each event); or when they hold ``max_bytes`` bytes (what a
    restart of the JSON store has to read); or when the oldest of them is
    ``max_age_s`` seconds old (so that a quiet ledger is folded too, and
    deleted text does not stay for ever).  ``force`` makes it due whenever
    there is an entry at all.

    *Kept*: the history of the last ``history_s`` seconds and of at least the
    last ``history_entries`` entries, whichever reaches back further, because
    who follows the journal has to be able to stop for a weekend; and the
    newest ``keep_snapshots`` snapshots, because one may be found damaged.
    ``erase_deleted`` keeps nothing but the new snapshot, so that the text of
    deleted tasks is gone from the ledger's files when it returns; it implies
    ``force``.
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
        """The same policy, due whenever there is anything to fold."""
        return replace(self, force=True)

    def due(self, stats: JournalStats) -> str | None:
        """Say why compaction is due (``str``), or ``None`` when it is not."""
        if self.erase_deleted:
            return "deleted records are to be erased"
        if stats.entries == 0:
            return None
        if self.force:
            return "it was asked for"
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
        """Say which snapshots stay and what the floor becomes.

        ``snapshots`` are in ascending order of seq and include the one just
        published.  Returns their seqs and the new floor, never below the old
        one; the snapshot at floor - 1 always stays, so that every seq from
        there on can be answered.
        """
        if self.erase_deleted:
            newest = snapshots[-1].seq
            return frozenset({newest}), newest + 1
        window_ms = self.history_s * 1000
        old_enough = [
            mark
            for mark in snapshots
            if mark.seq >= floor - 1
            and head - mark.seq >= self.history_entries
            and mark.at <= now - window_ms
        ]
        anchor = old_enough[-1].seq if old_enough else floor - 1
        kept = {mark.seq for mark in snapshots[-max(self.keep_snapshots, 1) :]}
        # Between the anchor and the newest, a few are left for the anchor to
        # move to: a quarter of the window apart, so that their number is bounded.
        last = SnapshotInfo(anchor, 0)
        for mark in snapshots:
            if mark.seq == anchor:
                kept.add(anchor)
                last = mark
            elif (
                mark.seq > anchor
                and mark.seq - last.seq >= self.history_entries / 4
                and mark.at - last.at >= window_ms / 4
            ):
                kept.add(mark.seq)
                last = mark
        return frozenset(seq for seq in kept if seq >= anchor), anchor + 1


class CompactionReport(Struct, frozen=True, kw_only=True):
    """What a compaction did.

    ``compacted`` tells whether it was due, ``reason`` why or why not.
    ``seq`` is the new snapshot's, ``records`` how many it holds (with those
    set aside), ``floor`` the first seq kept afterwards, ``trimmed`` how many
    entries went, ``snapshots`` the seqs retained, ``duration_s`` seconds.
    """

    compacted: bool
    reason: str
    seq: int
    floor: int
    records: int = 0
    trimmed: int = 0
    snapshots: tuple[int, ...] = ()
    duration_s: float = 0.0
