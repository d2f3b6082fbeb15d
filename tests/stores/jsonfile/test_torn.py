"""A torn last line: writers cut and save it, readers ignore it, both report it."""

from __future__ import annotations

import pytest
from jsonfiles import FOLD, damaged, segments, state_of

from taskstore import CorruptStoreError
from taskstore.model.journal import Put
from taskstore.testing.factories import create, make_record, update


def torn_variants(line: bytes) -> dict[str, bytes]:
    return {
        "one byte": line[:1],
        "half": line[: len(line) // 2],
        "all but the newline": line[:-1],
        "a wrong byte": line[:40] + b"!" + line[41:],
        "zeros": b"\0" * len(line),
        "zeros and the end": b"\0" * 100 + line[100:],
        "only a newline": b"\n",
        "not JSON": b"hello\n",
    }


VARIANTS = list(torn_variants(b"x" * 200))


@pytest.fixture(params=VARIANTS)
def torn(request, directory, open_):
    """A ledger of two commits and a torn line after them: (the torn bytes, their offset)."""
    store = open_()
    create(store, label="one")
    create(store, label="two")
    offset = segments(directory)[0].stat().st_size
    create(store, label="three")
    store.close()
    data = segments(directory)[0].read_bytes()
    tail = torn_variants(data[offset:])[request.param]
    segments(directory)[0].write_bytes(data[:offset] + tail)
    return tail, offset


def test_a_writer_cuts_saves_and_reports_it(torn, directory, open_):
    tail, offset = torn
    store = open_()
    kept = directory / f"{segments(directory)[0].name}.{offset}.torn"
    assert kept.read_bytes() == tail
    assert segments(directory)[0].stat().st_size == offset
    (notice,) = store.report().notices
    assert str(segments(directory)[0]) in notice
    assert f"offset {offset}" in notice
    assert kept.name in notice
    assert "not completely written, or was damaged afterwards" in notice
    assert "acknowledged" not in notice
    assert store.head() == 2
    create(store, label="again")
    assert [record.label for record in open_().load_snapshot().records.values()] == [
        "one",
        "two",
        "again",
    ]
    assert store.verify().ok
    assert open_().report().notices == ()


def test_a_reader_ignores_it_and_does_not_cut_it(torn, directory, open_):
    before = state_of(directory)
    reader = open_(read_only=True)
    assert reader.head() == 2
    assert len(reader.load_snapshot().records) == 2
    assert len(reader.read_journal(0, 10)) == 2
    assert reader.verify().ok
    (notice,) = reader.report().notices
    tail, offset = torn
    assert (
        f"{segments(directory)[0]}: the last line ({len(tail)} bytes at offset {offset})" in notice
    )
    assert "damaged afterwards" in notice
    assert state_of(directory) == before


def test_a_torn_line_of_another_process_is_cut_at_the_next_commit(directory, open_):
    store = open_()
    create(store)
    with segments(directory)[0].open("ab") as file:
        file.write(b'{"crc":"0000')
    create(store)
    assert store.head() == 2
    assert len(store.report().notices) == 1
    assert open_().verify().ok


def test_the_same_offset_torn_twice_keeps_both(directory, open_):
    open_().close()
    for tail in (b"first", b"second"):
        with segments(directory)[0].open("ab") as file:
            file.write(tail)
        open_().close()
    kept = sorted(directory.glob("*.torn"))
    assert [path.read_bytes() for path in kept] == [b"second", b"first"]


def test_half_a_batch_is_never_kept(directory, open_):
    store = open_()
    create(store)
    store.apply([Put(make_record()) for _ in range(5)])
    store.close()
    segment = segments(directory)[0]
    segment.write_bytes(segment.read_bytes()[:-20])
    assert len(open_().load_snapshot().records) == 1


def test_a_complete_unacknowledged_line_is_committed(directory, open_):
    store = open_()
    task = create(store)
    store.close()
    before = segments(directory)[0].read_bytes()
    other = open_()
    update(other, task)
    other.close()
    after = segments(directory)[0].read_bytes()
    # The writer died after it wrote the line and before it returned.
    segments(directory)[0].write_bytes(before)
    survivor = open_()
    with segments(directory)[0].open("ab") as file:
        file.write(after[len(before) :])
    assert survivor.head() == 2
    create(survivor)
    assert survivor.head() == 3


def test_a_torn_line_before_the_last_segment_is_corruption(directory, open_):
    store = open_()
    create(store)
    create(store)
    store.compact(FOLD)
    store.close()
    first = segments(directory)[0]
    data = damaged(first, first.stat().st_size - 30)
    reader = open_()
    with pytest.raises(CorruptStoreError) as caught:
        reader.read_journal(0, 10)
    assert caught.value.where == str(first)
    assert first.read_bytes() == data
