"""When compaction is due and what it retains."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from taskstore.errors import ValidationError
from taskstore.model.compaction_policy import CompactionPolicy, JournalStats, SnapshotInfo

HOUR_S = 3600


def stats(**fields):
    return JournalStats(**{"entries": 1, "records": 1, "now": 10_000_000, **fields})


def test_nothing_is_due_without_an_entry():
    policy = CompactionPolicy(min_entries=0, ratio=0, max_bytes=0, max_age_s=0, force=True)
    assert policy.due(stats(entries=0, oldest_at=0, bytes=5)) is None


def test_one_entry_is_not_due():
    assert CompactionPolicy().due(stats(oldest_at=10_000_000)) is None


@pytest.mark.parametrize(
    ("entries", "records", "due"),
    [(9_999, 5, False), (10_000, 5, True), (10_000, 10_001, False), (10_001, 10_001, True)],
)
def test_due_by_entries_and_ratio(entries, records, due):
    reason = CompactionPolicy().due(stats(entries=entries, records=records))
    assert (reason is not None) is due
    assert reason is None or str(entries) in reason


def test_due_by_bytes():
    policy = CompactionPolicy(max_bytes=100)
    assert policy.due(stats(bytes=99)) is None
    assert "100 bytes" in policy.due(stats(bytes=100))


def test_due_by_age():
    policy = CompactionPolicy(max_age_s=HOUR_S)
    now = 10 * HOUR_S * 1000
    assert policy.due(stats(now=now, oldest_at=now - HOUR_S * 1000 + 1)) is None
    assert "older" in policy.due(stats(now=now, oldest_at=now - HOUR_S * 1000))
    assert policy.due(stats(now=now, oldest_at=now + 5)) is None


def test_due_by_all_history():
    policy = CompactionPolicy(history_bytes=2 << 20)
    assert policy.due(stats(entries=0, history_bytes=2 << 20)) is None
    assert "2 MiB" in policy.due(stats(entries=0, history_bytes=(2 << 20) + 1))
    assert CompactionPolicy().history_bytes == 1 << 30


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (3, 3), (100, 75), (2**63, 3 * 2**61)])
def test_a_compaction_due_by_size_makes_room_for_later_entries(limit, kept):
    policy = CompactionPolicy(history_bytes=limit)
    assert policy.kept_bytes == kept
    assert policy.forced().kept_bytes == limit


def test_due_by_force():
    assert CompactionPolicy(force=True).due(stats()) == "compaction was forced"
    assert CompactionPolicy().forced().due(stats()) == "compaction was forced"
    assert CompactionPolicy(min_entries=5).forced() == CompactionPolicy(min_entries=5, force=True)
    assert "erased" in CompactionPolicy(erase_deleted=True).due(stats(entries=0))


COUNTS = (
    "min_entries",
    "max_bytes",
    "history_entries",
    "ageless_entries",
    "history_bytes",
    "keep_snapshots",
)
SECONDS = ("max_age_s", "history_s")


@pytest.mark.parametrize("field", [*COUNTS, *SECONDS, "ratio"])
@pytest.mark.parametrize("value", [-1, -0.5, math.nan, -math.inf, "1", None, True, 1j, [1]])
def test_a_limit_that_is_not_a_number_from_zero_on_is_refused(field, value):
    with pytest.raises(ValidationError) as caught:
        CompactionPolicy(**{field: value})
    assert caught.value.field == field
    with pytest.raises(ValidationError, match=field):
        replace(CompactionPolicy(), **{field: value})


@pytest.mark.parametrize("field", [*COUNTS, "ratio"])
def test_only_a_number_of_seconds_can_be_infinite(field):
    with pytest.raises(ValidationError, match=field):
        CompactionPolicy(**{field: math.inf})


@pytest.mark.parametrize("field", COUNTS)
def test_a_count_is_an_integer_of_any_size(field):
    assert getattr(CompactionPolicy(**{field: 2**63}), field) == 2**63
    with pytest.raises(ValidationError, match="must be an integer"):
        CompactionPolicy(**{field: 1e4})


def test_infinite_seconds_never_end():
    policy = CompactionPolicy(max_age_s=math.inf, history_s=math.inf, history_entries=1)
    assert policy.due(stats(now=10**15, oldest_at=0)) is None
    limit = policy.trimmable(head=9, floor=1, now=10**15, at=lambda seq: seq)
    assert limit == (0, "entries of any age are kept")
    assert policy.retained(snapshots((5, 0), (9, 1)), head=9, floor=1, now=10**15)[1] == 1


def snapshots(*pairs):
    return [SnapshotInfo(seq, at) for seq, at in pairs]


def test_erasing_keeps_the_newest_only():
    policy = CompactionPolicy(erase_deleted=True, keep_snapshots=5)
    kept = policy.retained(snapshots((5, 0), (9, 0)), head=9, floor=1, now=0)
    assert kept == (frozenset({9}), 10)


def test_history_within_the_window_is_retained():
    kept, floor = CompactionPolicy().retained(snapshots((5, 0), (9, 1)), head=9, floor=1, now=2)
    assert floor == 1
    assert 9 in kept


def test_the_snapshot_below_the_floor_is_retained():
    policy = CompactionPolicy(history_entries=100, keep_snapshots=1)
    kept, floor = policy.retained(snapshots((5, 0), (7, 0), (9, 1)), head=9, floor=6, now=2)
    assert floor == 6
    assert {5, 9} <= kept


def test_history_is_trimmed_only_outside_both_windows():
    old = snapshots((100, 0), (200, 10 * HOUR_S * 1000))
    now = 10 * HOUR_S * 1000
    by_both = CompactionPolicy(history_entries=100, history_s=HOUR_S, keep_snapshots=1)
    assert by_both.retained(old, head=200, floor=1, now=now)[1] == 101
    more_entries = CompactionPolicy(history_entries=101, history_s=HOUR_S, keep_snapshots=1)
    assert more_entries.retained(old, head=200, floor=1, now=now)[1] == 1
    more_time = CompactionPolicy(history_entries=100, history_s=11 * HOUR_S, keep_snapshots=1)
    assert more_time.retained(old, head=200, floor=1, now=now)[1] == 1


def test_no_history_at_all():
    policy = CompactionPolicy(history_entries=0, history_s=0, keep_snapshots=1)
    assert policy.retained(snapshots((5, 3), (9, 4)), head=9, floor=3, now=4) == (
        frozenset({9}),
        10,
    )


def test_snapshots_later_than_the_clock_have_no_age():
    hour = HOUR_S * 1000
    policy = CompactionPolicy(history_entries=100, history_s=HOUR_S, keep_snapshots=1)
    late = snapshots((100, 99 * hour), (200, 99 * hour))
    assert policy.retained(late, head=200, floor=1, now=5)[1] == 101
    # Clocks of two hosts can differ a little.
    near = snapshots((100, hour), (200, hour))
    assert policy.retained(near, head=200, floor=1, now=5)[1] == 1
    # What is younger than the window keeps everything after it.
    mixed = snapshots((50, 4), (100, 99 * hour), (200, 99 * hour))
    assert policy.retained(mixed, head=200, floor=1, now=5)[1] == 1
    no_times = CompactionPolicy(history_entries=100, history_s=0, keep_snapshots=1)
    assert no_times.retained(near, head=200, floor=1, now=5)[1] == 101


def test_entries_without_an_age_are_kept_by_their_own_number():
    hour = HOUR_S * 1000
    ages = {seq: 0 if seq <= 50 else 99 * hour for seq in range(1, 101)}
    late = snapshots((40, 0), (50, 0), (80, 99 * hour), (100, 99 * hour))
    for ageless, floor in ((0, 101), (20, 81), (50, 51), (70, 51)):
        policy = CompactionPolicy(
            history_entries=0, history_s=HOUR_S, ageless_entries=ageless, keep_snapshots=1
        )
        limit = policy.trimmable(head=100, floor=1, now=2 * hour, at=ages.__getitem__)
        assert limit.seq + 1 == floor
        assert f"later than the clock have no age; the newest {ageless} of" in limit.reason
        assert policy.retained(late, head=100, floor=1, now=2 * hour)[1] == floor
        # Without a window of time, times have no effect.
        limit = replace(policy, history_s=0).trimmable(
            head=100, floor=1, now=2 * hour, at=ages.__getitem__
        )
        assert limit == (100, "no history is kept")


def test_snapshots_without_an_age_are_few():
    hour = HOUR_S * 1000
    policy = CompactionPolicy(
        history_entries=0, history_s=HOUR_S, ageless_entries=100, keep_snapshots=1
    )
    late = snapshots(*((seq, 99 * hour) for seq in range(1, 101)))
    assert policy.thinned(late, 0, now=5) == {25, 50, 75, 100}


def test_the_reason_when_every_entry_is_older_than_the_window():
    policy = CompactionPolicy(history_entries=0, history_s=14 * 24 * HOUR_S)
    limit = policy.trimmable(head=9, floor=1, now=10**15, at=lambda seq: seq)
    assert limit == (9, "the entries of the last 14 days are kept")


def test_at_least_one_snapshot_is_retained():
    policy = CompactionPolicy(history_entries=0, history_s=0, keep_snapshots=0)
    assert policy.retained(snapshots((9, 4)), head=9, floor=1, now=4)[0] == frozenset({9})
