"""The compaction policy: when compaction is due and what compaction retains.

Every store asks a :class:`CompactionPolicy` whether compaction is due and which snapshots
to retain.  The methods of a policy are pure functions.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from msgspec import Struct
from msgspec.structs import replace

from taskstore.errors import ValidationError
from taskstore.model.ids import CLOCK_TOLERANCE_MS
from taskstore.model.records import TaskRecord
from taskstore.model.validation import check_seconds

_DAY_S = 24 * 60 * 60
_COUNTS = (
    "min_entries",
    "max_bytes",
    "history_entries",
    "ageless_entries",
    "history_bytes",
    "keep_snapshots",
)
"""The fields of a :class:`CompactionPolicy` that are integers."""
_FREED_PART = 4
"""A compaction that is due because of ``history_bytes`` makes room for one part in this number.
Without this room, each later commit would exceed the limit and start a compaction."""


class SnapshotInfo(NamedTuple):
    """The seq of a stored snapshot, and the time of the commit at that seq (Unix ms)."""

    seq: int
    at: int


class HistoryLimit(NamedTuple):
    """The highest seq that a compaction trims, and the reason why it trims no later entry."""

    seq: int
    reason: str


class JournalStats(Struct, frozen=True, kw_only=True):
    """The journal statistics from which a policy decides whether compaction is due.

    ``entries`` is the number of journal entries after the newest snapshot.  ``bytes`` is the size
    in bytes of the entries after the newest snapshot (0 if unknown).  ``oldest_at`` is the time of
    the oldest entry after the newest snapshot (Unix ms).  ``records`` is the number of live
    records.  ``now`` is the current time (Unix ms).  ``newest_snapshot_seq`` is the seq of the
    newest snapshot (0 if there is no snapshot).  ``floor`` is the first retained seq.
    ``history_bytes`` is the size in bytes of all retained entries (0 if unknown); a store can stop
    counting when the size exceeds the policy's ``history_bytes``.
    """

    entries: int
    records: int
    now: int
    bytes: int = 0
    oldest_at: int | None = None
    newest_snapshot_seq: int = 0
    floor: int = 1
    history_bytes: int = 0


class CompactionPolicy(Struct, frozen=True, kw_only=True):
    """The rules that decide when compaction is due and how much history compaction retains.

    Compaction is *due* if one of these conditions is true.  In the conditions, "entries"
    are the journal entries after the newest snapshot.

    - There are at least ``min_entries`` entries, and at least ``ratio`` entries per record of
      the ledger.  This condition keeps the amortized cost of snapshots per change constant.
    - The entries have at least ``max_bytes`` bytes in total.  Only the JSON store counts these
      bytes, because it reads all these entries when it is opened.
    - The oldest entry is at least ``max_age_s`` seconds old.  Because of this condition, an
      idle ledger is compacted too and does not keep deleted text for ever.
    - All retained entries together have more than ``history_bytes`` bytes.
    - ``force`` is set, and the ledger has at least one such entry, or has history that can be
      trimmed.

    Compaction *retains* the newest ``history_s`` seconds of history or the newest
    ``history_entries`` entries, whichever is more, but never more than ``history_bytes`` bytes of
    entries.  With the defaults, a follower can pause for a weekend and then continue.  The bytes
    of snapshots do not count toward ``history_bytes``: the size of a snapshot depends on the live
    records, not on the history.  If the entries have more than ``history_bytes`` bytes, compaction
    trims them to three quarters of ``history_bytes`` (with ``force``: only to ``history_bytes``).
    Therefore compaction is not due because of ``history_bytes`` again before a quarter of
    ``history_bytes`` is written.  Each compaction writes all records, so choose a
    ``history_bytes`` that is not small compared with the size of the live records.

    If the time of an entry is more than an hour after ``now``, a clock was wrong.  Such an entry
    has no age: only numbers of entries and ``history_bytes`` decide how long it is retained.  Of
    the entries without an age, compaction retains those among the newest ``history_entries`` or
    among the newest ``ageless_entries`` entries; ``ageless_entries`` retains no entry that has an
    age.  If ``history_s`` is 0, the times of entries and ``ageless_entries`` have no effect on what
    compaction retains.

    Compaction also retains the newest ``keep_snapshots`` snapshots, because the newest snapshot
    can be damaged.  With ``erase_deleted``, compaction is always due and retains only the new
    snapshot: the ledger's files then contain no text of deleted tasks.

    Every limit is a number from 0 on; ``max_age_s`` and ``history_s`` can be infinite.  Another
    value raises :class:`~taskstore.ValidationError`.
    """

    min_entries: int = 10_000
    ratio: float = 1.0
    max_bytes: int = 64 * 1024 * 1024
    max_age_s: float = 24 * 60 * 60
    history_s: float = 7 * 24 * 60 * 60
    history_entries: int = 10_000
    ageless_entries: int = 0
    history_bytes: int = 1024 * 1024 * 1024
    keep_snapshots: int = 2
    force: bool = False
    erase_deleted: bool = False

    def __post_init__(self) -> None:
        for field in _COUNTS:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValidationError(field, f"must be an integer, not {_shown(value)}")
            if value < 0:
                raise ValidationError(field, f"must be 0 or more, not {value}")
        check_seconds("max_age_s", self.max_age_s, 0, math.inf)
        check_seconds("history_s", self.history_s, 0, math.inf)
        ratio: object = self.ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float):
            raise ValidationError("ratio", f"must be a number, not {_shown(ratio)}")
        if not 0 <= ratio < math.inf:
            raise ValidationError("ratio", f"must be a finite number from 0 on, not {ratio}")

    def forced(self) -> Self:
        """Return a copy of this policy with ``force`` set."""
        return replace(self, force=True)

    def due(self, stats: JournalStats) -> str | None:
        """Return the reason (``str``) why compaction is due, or ``None`` if compaction is
        not due.

        The statistics do not say whether history can be trimmed.  If ``force`` is set and there are
        no entries, the method therefore returns ``None``, and the caller must look for history that
        can be trimmed.
        """
        if self.erase_deleted:
            return "deleted records must be erased"
        if stats.history_bytes > self.history_bytes:
            return f"more than {_size(self.history_bytes)} of history"
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

    def trimmable(
        self, *, head: int, floor: int, now: int, at: Callable[[int], int]
    ) -> HistoryLimit:
        """Return the last entry that ``history_s``, ``history_entries`` and ``ageless_entries``
        allow a compaction to trim.

        ``at`` returns the time of the entry at a seq; times never decrease from entry to entry.
        The seq in the result is at least ``floor`` - 1 and at most ``head``.  While an entry
        within the window of ``history_s`` exists, no later entry can be trimmed.
        """
        last = head - self.history_entries
        if last < floor:
            return HistoryLimit(floor - 1, self._reason())
        if self.history_s > 0:
            seqs = range(floor, last + 1)
            old = floor - 1 + bisect_right(seqs, now - self.history_s * 1000, key=at)
            if old < last and not self._has_no_age(at(old + 1), now):
                return HistoryLimit(old, _window(self.history_s))
            if old < last:  # times never decrease: no later entry has an age
                seq = min(last, max(old, head - self.ageless_entries))
                newest = max(self.history_entries, self.ageless_entries)
                return HistoryLimit(seq, _LATER_THAN_THE_CLOCK.format(newest))
        return HistoryLimit(last, self._reason())

    def _reason(self) -> str:
        """Return the reason why the newest entries are not trimmed if all entries have an age."""
        if self.history_entries:
            return f"the newest {self.history_entries:,} entries are kept"
        return _window(self.history_s) if self.history_s > 0 else "no history is kept"

    @property
    def kept_bytes(self) -> int:
        """The size in bytes to which a compaction trims the entries if they have more than
        ``history_bytes`` bytes."""
        if self.force:
            return self.history_bytes
        return self.history_bytes - self.history_bytes // _FREED_PART

    def history_bytes_limit(self, seq: int) -> HistoryLimit:
        """Return a :class:`HistoryLimit` at ``seq``, with ``history_bytes`` as its reason."""
        return HistoryLimit(seq, f"at most {_size(self.history_bytes)} of entries are kept")

    def retained(
        self, snapshots: Sequence[SnapshotInfo], *, head: int, floor: int, now: int
    ) -> tuple[frozenset[int], int]:
        """Return the seqs of the snapshots to retain, and the new floor.

        This method is for stores that can move the floor only to a stored snapshot.
        ``snapshots`` lists the stored snapshots in ascending order of seq, including the new
        snapshot.  The new floor is never below ``floor``.  The snapshot directly before the new
        floor is always retained, so that the records at every later seq can be computed.
        """
        if self.erase_deleted:
            newest = snapshots[-1].seq
            return frozenset({newest}), newest + 1
        oldest = floor - 1
        for snapshot in snapshots:
            newer = head - snapshot.seq
            if newer < self.history_entries or self._is_retained_by_time(snapshot.at, newer, now):
                break
            oldest = max(oldest, snapshot.seq)
        return self.thinned(snapshots, oldest, now=now), oldest + 1

    def _is_retained_by_time(self, at: int, newer: int, now: int) -> bool:
        """Return whether ``history_s`` or ``ageless_entries`` retains an entry with the time ``at``
        that ``newer`` entries follow."""
        if self.history_s <= 0:
            return False
        if self._has_no_age(at, now):
            return newer < self.ageless_entries
        return at > now - self.history_s * 1000

    @staticmethod
    def _has_no_age(at: int, now: int) -> bool:
        return at > now + CLOCK_TOLERANCE_MS

    def thinned(
        self, snapshots: Sequence[SnapshotInfo], oldest: int, *, now: int
    ) -> frozenset[int]:
        """Return the seqs of the snapshots to retain if the new floor is ``oldest`` + 1."""
        if self.erase_deleted:
            return frozenset({snapshots[-1].seq})
        window_ms = self.history_s * 1000
        retained = {snapshot.seq for snapshot in snapshots[-max(self.keep_snapshots, 1) :]}
        # Some snapshots after the oldest snapshot are retained, so that the records at a seq can
        # be computed from few entries.  The distance between two of these snapshots is at least
        # a quarter of the history window, which limits their number.
        # Snapshots without an age are only limited by the number of entries between them.
        ageless_distance = max(self.history_entries, self.ageless_entries) / 4
        last = SnapshotInfo(oldest, 0)
        for snapshot in snapshots:
            if snapshot.seq == oldest:
                retained.add(oldest)
                last = snapshot
            elif snapshot.seq > oldest:
                if self._has_no_age(snapshot.at, now):
                    far = snapshot.seq - last.seq >= ageless_distance
                else:
                    far = (
                        snapshot.seq - last.seq >= self.history_entries / 4
                        and snapshot.at - last.at >= window_ms / 4
                    )
                if far:
                    retained.add(snapshot.seq)
                    last = snapshot
        return frozenset(seq for seq in retained if seq >= oldest)


class CompactionReport(Struct, frozen=True, kw_only=True):
    """The result of a compaction.

    ``compacted`` says whether a compaction was made.  ``reason`` says why a compaction was made,
    or why not.  ``seq`` is the seq of the newest snapshot.  ``records`` is the number of records
    in the newest snapshot, including quarantined records; if no compaction was made, ``records``
    is the number of live records.  ``floor`` is the first retained seq.  ``floor_at`` is the time
    of the commit at ``floor`` - 1 (Unix ms), the earliest time at which the records are still
    known.  ``floor_at`` is ``None`` if no entry was trimmed or the time was not read.
    ``floor_reason`` says why history begins at ``floor`` (empty if unknown).  ``trimmed`` is the
    number of trimmed journal entries.  ``snapshots`` contains the seqs of the retained snapshots.
    ``duration_s`` is the duration of the compaction.  ``stats`` are the statistics from which the
    policy decided (``None`` if the store does not report them).
    """

    compacted: bool
    reason: str
    seq: int
    floor: int
    records: int = 0
    trimmed: int = 0
    snapshots: tuple[int, ...] = ()
    duration_s: float = 0.0
    floor_at: int | None = None
    floor_reason: str = ""
    stats: JournalStats | None = None


def approximate_size(record: TaskRecord | None) -> int:
    """Return the approximate size in bytes of a change's journal entry, without encoding the
    record."""
    if record is None:
        return _ENTRY_BYTES
    texts = (record.task, record.error, record.progress_summary, record.terminal_summary)
    size = _ENTRY_BYTES + len(bytes(record.metadata_json))
    for text in texts:
        size += len(text.encode(errors="replace")) if text else 0
    return size


_ENTRY_BYTES = 400

_LATER_THAN_THE_CLOCK = "entries later than the clock have no age; the newest {:,} of them are kept"


def _window(seconds: float) -> str:
    """Return the reason why the entries of the last ``seconds`` seconds are not trimmed."""
    if seconds == math.inf:
        return "entries of any age are kept"
    duration = f"{seconds / _DAY_S:g} days" if seconds >= _DAY_S else f"{seconds:g} seconds"
    return f"the entries of the last {duration} are kept"


def _shown(value: object) -> str:
    """Return a number as it is, and any other value as the name of its type."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value}" if number else type(value).__name__


def _size(size: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size % 1024 or not size:
            return f"{size:,} {unit}"
        size //= 1024
    return f"{size:,} GiB"
