"""Properties of retention: every seq from the floor is readable, and storage is bounded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskstore.model.compaction_policy import CompactionPolicy, SnapshotInfo
from taskstore.model.ids import CLOCK_TOLERANCE_MS

POLICIES = st.builds(
    CompactionPolicy,
    history_entries=st.sampled_from([0, 1, 4, 100, 10_000]),
    ageless_entries=st.sampled_from([0, 0, 2, 7, 10_000]),
    history_s=st.sampled_from([0, 1, 60, 3600, 7 * 24 * 3600]),
    keep_snapshots=st.integers(0, 5),
    erase_deleted=st.sampled_from([False, False, False, True]),
)
TRAFFIC = st.lists(
    st.tuples(st.sampled_from([1, 2, 50, 3000]), st.sampled_from([0, 1, 500, 60_000, 10**7])),
    min_size=1,
    max_size=60,
)


def compactions(policy, traffic, begin=0):
    """Compact after each burst; yield the snapshots that are retained."""
    head, now, floor, snapshots = begin, 1_700_000_000_000, begin + 1, []
    if begin:
        snapshots = [SnapshotInfo(begin, now)]
    for entries, pause_ms in traffic:
        head += entries
        now += pause_ms
        snapshots.append(SnapshotInfo(head, now))
        kept, floor_after = policy.retained(snapshots, head=head, floor=floor, now=now)
        yield head, now, floor, floor_after, snapshots, kept
        snapshots = [snapshot for snapshot in snapshots if snapshot.seq in kept]
        floor = floor_after


@given(POLICIES, TRAFFIC, st.sampled_from([0, 5]))
def test_invariants_of_retention(policy, traffic, begin):
    for head, now, before, floor, snapshots, kept in compactions(policy, traffic, begin):
        assert before <= floor <= head + 1
        assert kept <= {snapshot.seq for snapshot in snapshots}
        assert head in kept
        assert min(kept) >= floor - 1
        if floor > 1:
            assert floor - 1 in kept
        if policy.erase_deleted:
            assert (kept, floor) == ({head}, head + 1)
            continue
        newest = [snapshot.seq for snapshot in snapshots if snapshot.seq >= floor - 1]
        assert set(newest[-max(policy.keep_snapshots, 1) :]) <= kept
        if floor > before:
            anchor = next(snapshot for snapshot in snapshots if snapshot.seq == floor - 1)
            assert head - anchor.seq >= policy.history_entries
            assert anchor.at <= now - policy.history_s * 1000
        assert len(kept) <= policy.keep_snapshots + 8


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("policy", [CompactionPolicy(), CompactionPolicy(history_entries=500)])
def test_a_long_history_retains_few_snapshots(seed, policy):
    rng = random.Random(seed)
    traffic = [
        (rng.choice([1, 100, 10_000]), rng.choice([10, 60_000, 8 * 3600_000])) for _ in range(2000)
    ]
    most = 0
    for head, now, _, floor, snapshots, kept in compactions(policy, traffic):
        most = max(most, len(kept))
        outside_window = [
            snapshot
            for snapshot in snapshots
            if head - snapshot.seq >= policy.history_entries
            and snapshot.at <= now - policy.history_s * 1000
        ]
        # The retained history exceeds the window by at most a quarter of it, plus one pause
        # or burst, because there is no snapshot within one.
        assert (
            not outside_window
            or floor >= max(snapshot.seq for snapshot in outside_window if snapshot.seq in kept) + 1
        )
    assert floor > head / 2
    assert most <= policy.keep_snapshots + 8


@given(TRAFFIC)
def test_no_history_means_none(traffic):
    policy = CompactionPolicy(history_entries=0, history_s=0, keep_snapshots=1)
    for head, _, _, floor, _, kept in compactions(policy, traffic):
        assert (kept, floor) == ({head}, head + 1)


NOW = 1_700_000_000_000
TIMES = st.lists(
    st.sampled_from(
        [NOW - 10**10, NOW - 10**7, NOW - 10, NOW, NOW + 1000, NOW + 10**7, NOW + 10**11]
    ),
    max_size=40,
).map(sorted)


@given(POLICIES, TIMES, st.sampled_from([0, 7]))
def test_what_is_trimmable(policy, times, before):
    """Entry by entry: the newest entries and the young ones stay, with everything after them."""
    floor, head = before + 1, before + len(times)
    entries = dict(enumerate(times, floor))
    seq, reason = policy.trimmable(head=head, floor=floor, now=NOW, at=entries.__getitem__)
    assert floor - 1 <= seq <= head
    assert reason

    def stays(seq):
        at = entries[seq]
        has_age = at <= NOW + CLOCK_TOLERANCE_MS
        young = policy.history_s > 0 and has_age and at > NOW - policy.history_s * 1000
        ageless = policy.history_s > 0 and not has_age and seq > head - policy.ageless_entries
        return young or ageless or seq > head - policy.history_entries

    assert not any(stays(each) for each in range(floor, seq + 1))
    assert seq == head or stays(seq + 1)


@given(POLICIES, TRAFFIC)
def test_the_snapshot_before_the_floor_is_never_thinned_out(policy, traffic):
    for head, now, _, floor, snapshots, kept in compactions(policy, traffic):
        if floor > 1 and not policy.erase_deleted:
            assert floor - 1 in policy.thinned(snapshots, floor - 1, now=now)
            assert policy.thinned(snapshots, floor - 1, now=now) == kept
        assert head in kept
