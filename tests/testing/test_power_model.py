"""The power loss model on small files, with all allowed states listed."""

from __future__ import annotations

from taskstore.testing.powerloss.model import BLOCK, Model
from taskstore.testing.powerloss.recorder import (
    Created,
    Expects,
    Removed,
    Renamed,
    Synced,
    Truncated,
    Written,
)

ROOT, FILE, OTHER = 1, 2, 3
FILE_EXISTS = (Created(ROOT, "file", FILE), Synced(ROOT))


def states_after(*log, max_states: int = 1000) -> set[tuple[tuple[str, bytes | None], ...]]:
    """Return every state after the last operation that is no sync."""
    *_, last = (
        (moment.exhaustive, {tuple(state.tree.items()) for state in moment.states})
        for moment in Model(max_states=max_states, seed=1).crash_points(log)
    )
    assert last[0]
    return last[1]


def contents(*log) -> set[bytes]:
    return {data for state in states_after(*FILE_EXISTS, *log) for _, data in state}


def test_a_write_leaves_its_data_or_nothing_or_zeros():
    assert contents(Written(FILE, 0, b"abc")) == {b"", b"abc", b"\0\0\0"}


def test_synced_data_is_present():
    log = (Written(FILE, 0, b"abc"), Synced(FILE), Written(FILE, 3, b"de"))
    assert contents(*log) == {b"abc", b"abcde", b"abc\0\0"}


def test_a_long_write_may_be_torn_at_every_block_in_any_order():
    one, two = b"1" * BLOCK, b"2" * BLOCK
    none = bytes(BLOCK)
    assert contents(Written(FILE, 0, one + two)) == {
        *(b"", one, none),
        *(one + two, one + none, none + two, none + none),
    }


def test_an_append_within_a_block_keeps_synced_data():
    old = b"o" * 300
    for data in contents(Written(FILE, 0, old), Synced(FILE), Written(FILE, 300, b"n" * 600)):
        assert data.startswith(old)


def test_truncated_data_may_reappear_and_mix_with_later_writes():
    log = (Written(FILE, 0, b"abcdef"), Truncated(FILE, 0), Written(FILE, 0, b"xy"))
    found = contents(*log)
    assert {b"", b"abcdef", b"xy", b"xy\0\0\0\0", b"ab"} <= found
    assert contents(*log, Synced(FILE), Written(FILE, 2, b"z")) == {b"xy", b"xyz", b"xy\0"}


def test_a_name_is_durable_only_after_a_directory_sync():
    log = (Created(ROOT, "file", FILE), Written(FILE, 0, b"abc"), Synced(FILE), Expects(None))
    assert states_after(*log) == {(), (("file", b"abc"),)}


def test_any_subset_of_atomic_renames_and_removals_may_be_durable():
    existing = (*FILE_EXISTS, Created(ROOT, "other", OTHER), Synced(ROOT))
    written = (Written(FILE, 0, b"1"), Synced(FILE), Written(OTHER, 0, b"2"), Synced(OTHER))
    both = (("file", b"1"), ("other", b"2"))
    assert states_after(*existing, *written, Renamed(ROOT, "file", "other", FILE)) == {
        both,
        (("other", b"1"),),
    }
    assert states_after(
        *existing, *written, Removed(ROOT, "file", FILE), Removed(ROOT, "other", OTHER)
    ) == {
        *(both, both[:1], both[1:], ()),
    }


def test_above_the_limit_the_model_draws_a_reproducible_sample():
    log = [*FILE_EXISTS, Written(FILE, 0, b"x" * 20 * BLOCK)]
    found = [list(Model(max_states=30, seed=7).crash_points(log))[-1] for _ in range(2)]
    assert not found[0].exhaustive
    assert found[0].possible == 21 * 2**20
    drawn = [[state.tree for state in moment.states] for moment in found]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 30
    assert {"file": b""} in drawn[0]
    assert {"file": b"x" * 20 * BLOCK} in drawn[0]
