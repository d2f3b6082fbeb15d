"""What the model allows a power loss to leave, on files small enough to count."""

from __future__ import annotations

from taskstore.testing.powerloss.model import BLOCK, Model
from taskstore.testing.powerloss.recorder import (
    Made,
    Removed,
    Renamed,
    Said,
    Synced,
    Truncated,
    Wrote,
)

ROOT, FILE, OTHER = 1, 2, 3
FILE_IS_THERE = (Made(ROOT, "file", FILE), Synced(ROOT))


def left(*log, most: int = 1000) -> set[tuple[tuple[str, bytes | None], ...]]:
    """Every state after the last operation that is no sync."""
    *_, last = (
        (moment.exhaustive, {tuple(state.tree.items()) for state in moment.states})
        for moment in Model(most=most, seed=1).moments(log)
    )
    assert last[0]
    return last[1]


def contents(*log) -> set[bytes]:
    return {data for state in left(*FILE_IS_THERE, *log) for _, data in state}


def test_what_is_written_is_there_or_not_or_as_long_without_it():
    assert contents(Wrote(FILE, 0, b"abc")) == {b"", b"abc", b"\0\0\0"}


def test_what_is_synced_is_there():
    log = (Wrote(FILE, 0, b"abc"), Synced(FILE), Wrote(FILE, 3, b"de"))
    assert contents(*log) == {b"abc", b"abcde", b"abc\0\0"}


def test_a_long_write_is_torn_at_every_block_and_out_of_order():
    one, two = b"1" * BLOCK, b"2" * BLOCK
    none = bytes(BLOCK)
    assert contents(Wrote(FILE, 0, one + two)) == {
        *(b"", one, none),
        *(one + two, one + none, none + two, none + none),
    }


def test_an_append_within_a_block_leaves_what_was_synced():
    old = b"o" * 300
    for data in contents(Wrote(FILE, 0, old), Synced(FILE), Wrote(FILE, 300, b"n" * 600)):
        assert data.startswith(old)


def test_what_was_truncated_may_come_back_and_mix_with_what_is_written_then():
    log = (Wrote(FILE, 0, b"abcdef"), Truncated(FILE, 0), Wrote(FILE, 0, b"xy"))
    found = contents(*log)
    assert {b"", b"abcdef", b"xy", b"xy\0\0\0\0", b"ab"} <= found
    assert contents(*log, Synced(FILE), Wrote(FILE, 2, b"z")) == {b"xy", b"xyz", b"xy\0"}


def test_a_name_is_there_only_when_its_directory_was_synced():
    log = (Made(ROOT, "file", FILE), Wrote(FILE, 0, b"abc"), Synced(FILE), Said(None))
    assert left(*log) == {(), (("file", b"abc"),)}


def test_any_subset_of_renames_and_removals_has_happened_and_a_rename_is_one_step():
    there = (*FILE_IS_THERE, Made(ROOT, "other", OTHER), Synced(ROOT))
    written = (Wrote(FILE, 0, b"1"), Synced(FILE), Wrote(OTHER, 0, b"2"), Synced(OTHER))
    both = (("file", b"1"), ("other", b"2"))
    assert left(*there, *written, Renamed(ROOT, "file", "other", FILE)) == {
        both,
        (("other", b"1"),),
    }
    assert left(*there, *written, Removed(ROOT, "file", FILE), Removed(ROOT, "other", OTHER)) == {
        *(both, both[:1], both[1:], ()),
    }


def test_where_there_is_too_much_some_are_drawn_always_the_same():
    log = [*FILE_IS_THERE, Wrote(FILE, 0, b"x" * 20 * BLOCK)]
    found = [list(Model(most=30, seed=7).moments(log))[-1] for _ in range(2)]
    assert not found[0].exhaustive
    assert found[0].allowed == 21 * 2**20
    drawn = [[state.tree for state in moment.states] for moment in found]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 30
    assert {"file": b""} in drawn[0]
    assert {"file": b"x" * 20 * BLOCK} in drawn[0]
