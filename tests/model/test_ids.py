"""Task ids increase strictly, even if the clock does not."""

from __future__ import annotations

import re
import threading
import time
import uuid
from itertools import count

import pytest

from taskstore.model.ids import UUIDv7, is_seal_broken, new_commit_id, new_task_id, system_clock

FORM = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z")


def test_the_system_clock_is_in_milliseconds():
    before = time.time() * 1000
    assert before - 1 <= system_clock() <= time.time() * 1000
    assert type(system_clock()) is int


def test_ids_are_uuids_of_version_7():
    for _ in range(100):
        made = new_task_id()
        assert FORM.match(made)
        assert uuid.UUID(made).version == 7
        assert uuid.UUID(made).variant == uuid.RFC_4122
        assert str(uuid.UUID(made)) == made


def test_ids_carry_the_time():
    made = UUIDv7(lambda: 0x0123456789AB)()
    assert made.startswith("01234567-89ab-7")


STEPS = count()
CLOCKS = {
    "running": count(1_700_000_000_000).__next__,
    "standing": lambda: 1_700_000_000_000,
    "at zero": lambda: 0,
    "going back": lambda: 1_700_000_000_000 - next(STEPS) * 1000,
    "jumping": lambda: 1_700_000_000_000 + (next(STEPS) * 7919) % 1000,
}


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
def test_ids_strictly_increase(clock):
    source = UUIDv7(clock)
    made = [source() for _ in range(5000)]
    assert made == sorted(set(made))
    assert all(FORM.match(each) for each in made)


def test_an_overflow_continues_in_the_next_millisecond():
    source = UUIDv7(lambda: 5)
    first = source()
    source._random = (1 << 74) - 1
    second = source()
    assert first < second
    assert second.startswith("00000000-0006-7")
    assert source() > second


def test_ids_increase_in_every_thread():
    source = UUIDv7(lambda: 1_700_000_000_000)
    made = [[] for _ in range(4)]
    barrier = threading.Barrier(4)

    def make(ids):
        barrier.wait()
        ids.extend(source() for _ in range(2000))

    threads = [threading.Thread(target=make, args=(ids,)) for ids in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ids in made:
        assert ids == sorted(ids)
    assert len({each for ids in made for each in ids}) == 8000


def test_two_sources_do_not_make_the_same_ids():
    one, two = UUIDv7(lambda: 1), UUIDv7(lambda: 1)
    assert not {one() for _ in range(100)} & {two() for _ in range(100)}


def test_a_sealed_commit_id_matches_only_its_time():
    at = 1_700_000_000_000
    commit_id = new_commit_id(at)
    assert len(commit_id) == 30
    assert not is_seal_broken(commit_id, at)
    assert is_seal_broken(commit_id, at + 1)
    for index, char in enumerate(commit_id):
        other = "0" if char != "0" else "1"
        assert is_seal_broken(commit_id[:index] + other + commit_id[index + 1 :], at)
    assert is_seal_broken("\udcff" + commit_id[1:], at)


def test_an_unsealed_commit_id_is_not_checked():
    assert len(new_commit_id()) == 32
    assert not is_seal_broken(new_commit_id(), 0)
