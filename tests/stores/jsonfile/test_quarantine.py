"""Quarantined records: every operation keeps their bytes, and the store reports them."""

from __future__ import annotations

import pytest
from jsonfiles import FOLD, FOLD_AND_TRIM, forged, framed, segments, snapshots
from msgspec.structs import replace

from taskstore import ConflictError, CorruptStoreError
from taskstore.model.journal import EntryKind, Remove
from taskstore.testing.factories import create, make_put, next_of, update


@pytest.fixture
def broken(directory, open_):
    """A ledger of two tasks, one with an undecodable payload."""
    store = open_()
    good, bad = create(store, label="good"), create(store, label="bad")
    store.close()
    forged(segments(directory)[0], b'"label":"bad"', b'"label":[false]')
    return good, bad


def test_the_other_records_load_and_it_is_reported(broken, open_):
    good, bad = broken
    store = open_()
    snapshot = store.load_snapshot()
    assert snapshot.records == {good.task_id: good}
    (item,) = snapshot.quarantined
    assert (item.task_id, item.revision) == (bad.task_id, 1)
    assert b'"label":[false]' in item.raw
    assert "label" in item.reason
    assert store.report().quarantined == (item,)
    entry = store.read_journal(1, 1)[0]
    assert (entry.kind, entry.record, entry.quarantined) == (EntryKind.UPSERTED, None, item)
    assert store.verify().ok


def test_two_compactions_keep_its_bytes(broken, directory, open_):
    _, bad = broken
    store = open_()
    (before,) = store.load_snapshot().quarantined
    for _ in range(2):
        report = store.compact(FOLD_AND_TRIM)
        assert report.records == len(store.load_snapshot().records) + 1
        for instance in (store, open_()):
            (item,) = instance.load_snapshot().quarantined
            assert (item.raw, item.task_id, item.revision) == (before.raw, bad.task_id, 1)
            assert instance.read_snapshot(10**6).quarantined == (item,)
            assert instance.verify().ok
        create(store)
    assert len(segments(directory)) == 1


def test_compaction_keeps_one_without_an_id(directory, open_):
    store = open_()
    bad = create(store)
    store.close()
    text = b'"record":{"v":"1.1","task_id":"%b"' % bad.task_id.encode()
    forged(segments(directory)[0], text, b'"record":{"v":"1.1"')
    store = open_()
    (before,) = store.load_snapshot().quarantined
    assert (before.task_id, before.revision) == (bad.task_id, 1)
    for _ in range(2):
        create(store)
        store.compact(FOLD_AND_TRIM)
        (item,) = open_().load_snapshot().quarantined
        assert (item.raw, item.task_id, item.revision) == (before.raw, bad.task_id, 1)
    with pytest.raises(ConflictError):
        store.apply([make_put(task_id=bad.task_id)])
    assert store.verify().ok
    with pytest.raises(CorruptStoreError):
        open_(strict=True).load_snapshot()


def test_one_without_an_id_can_be_replaced_through_its_entry(directory, open_):
    store = open_()
    bad = create(store)
    store.close()
    text = b'"record":{"v":"1.1","task_id":"%b"' % bad.task_id.encode()
    forged(segments(directory)[0], text, b'"record":{"v":"1.1"')
    store = open_()
    fixed = update(store, bad)
    assert store.load_snapshot().quarantined == ()
    store.compact(FOLD_AND_TRIM)
    # The entry is trimmed, its bytes are kept; they do not conflict with the record.
    (kept,) = store.load_snapshot().quarantined
    assert (kept.superseded, kept.task_id) == (True, bad.task_id)
    assert store.load_snapshot().records == {fixed.task_id: fixed}
    assert store.verify().ok


@pytest.fixture
def superseded(directory, open_):
    """A task of three changes, the second in a future format, and another task."""
    store = open_()
    record = create(store, task_id="B", run_id="run-1")
    record = update(store, record, label="two")
    record = update(store, record, label="three")
    create(store, task_id="C")
    store.close()
    segment = segments(directory)[0]
    lines = segment.read_bytes().splitlines(keepends=True)
    lines[2] = framed(lines[2].replace(b'"v":"1.1"', b'"v":"2.0"')[18:-1])
    segment.write_bytes(b"".join(lines))
    return record


def test_a_superseded_record_is_quarantined_when_it_is_trimmed(superseded, open_):
    record = superseded
    store = open_()
    create(store)
    store.compact(FOLD)
    assert store.load_snapshot().quarantined == ()
    create(store)
    store.compact(FOLD_AND_TRIM)
    for number in range(3):
        for instance in (store, open_()):
            if number or instance is not store:
                instance.load_snapshot()
            (item,) = instance.report().quarantined
            assert b'"v":"2.0"' in item.raw
            assert (item.superseded, item.task_id, item.revision) == (True, "B", 2)
            assert "seq 2" in item.where
            assert instance.load_snapshot().records["B"] == record
            assert instance.verify().ok, instance.verify()
            with pytest.raises(ConflictError):
                instance.apply([make_put(run_id="run-1", run_digest=record.run_digest)])
        record = update(store, record, label=f"on {number}")
        update(open_(), record, label="and on")
        record = store.load_snapshot().records["B"]
        store.compact(FOLD_AND_TRIM)
    store.save_snapshot(replace(store.load_snapshot(), seq=500))
    record = update(store, record)
    update(open_(), record)


@pytest.mark.parametrize("before", [True, False])
def test_a_superseded_record_is_removed_when_its_task_is_deleted(before, superseded, open_):
    store = open_()
    if not before:
        store.compact(FOLD_AND_TRIM)
        assert len(store.load_snapshot().quarantined) == 1
    store.apply([Remove("B", superseded.revision + 1)])
    store.compact(FOLD_AND_TRIM)
    assert open_().load_snapshot().quarantined == ()


def test_compaction_keeps_one_without_an_id_in_a_snapshot(directory, open_):
    from zlib import crc32

    store = open_()
    bad = create(store)
    store.compact(FOLD_AND_TRIM)
    store.close()
    (path,) = snapshots(directory)
    body, _, _ = path.read_bytes().rpartition(b'"checksum"')
    body = body.replace(b'"task_id":"%b"' % bad.task_id.encode(), b'"task_id":7')
    path.write_bytes(body + b'"checksum":"%08x"}\n' % crc32(body))
    store = open_()
    (before,) = store.load_snapshot().quarantined
    assert before.task_id is None
    for _ in range(2):
        create(store)
        store.compact(FOLD_AND_TRIM)
        (item,) = store.load_snapshot().quarantined
        assert (item.raw, item.task_id) == (before.raw, None)


@pytest.mark.parametrize("reopened", [True, False])
def test_its_task_can_be_changed_with_the_right_revision(reopened, broken, open_):
    _, bad = broken
    store = open_()
    if reopened:
        store.compact(FOLD)
        store = open_()
    with pytest.raises(ConflictError):
        store.apply([make_put(task_id=bad.task_id)])
    with pytest.raises(ConflictError):
        update(store, next_of(bad).record)
    update(store, bad, label="fixed")
    assert store.load_snapshot().quarantined == ()
    assert store.load_snapshot().records[bad.task_id].label == "fixed"
    assert open_().verify().ok


def test_its_task_can_be_deleted(broken, open_):
    _, bad = broken
    store = open_()
    store.apply([Remove(bad.task_id, 2)])
    assert store.load_snapshot().quarantined == ()
    store.compact(FOLD_AND_TRIM)
    assert open_().load_snapshot().quarantined == ()


def test_strict_raises_instead(broken, open_):
    store = open_(strict=True)
    for work in (store.load_snapshot, lambda: store.read_journal(0, 10)):
        with pytest.raises(CorruptStoreError, match="label"):
            work()
    assert len(store.read_journal(0, 1)) == 1


def test_its_dedup_key_is_still_taken(directory, open_):
    store = open_()
    bad = create(store, run_id="run-1", label="bad")
    store.close()
    forged(segments(directory)[0], b'"label":"bad"', b'"label":[false]')
    for loaded in (False, True, False, True):
        store = open_()
        if loaded:
            store.load_snapshot()
        with pytest.raises(ConflictError) as caught:
            store.apply([make_put(run_id="run-1", run_digest=bad.run_digest)])
        assert caught.value.conflicts[0].existing_task_id == bad.task_id
        store.compact(FOLD_AND_TRIM)
        store.close()
    store = open_()
    store.save_snapshot(replace(store.load_snapshot(), seq=50))
    for instance in (store, open_()):
        with pytest.raises(ConflictError):
            instance.apply([make_put(run_id="run-1", run_digest=bad.run_digest)])


def test_a_newer_minor_version_keeps_its_members_through_a_compaction(directory, open_):
    store = open_()
    task = create(store, run_id="run-1")
    store.close()
    forged(segments(directory)[0], b'{"v":"1.1"', b'{"v":"1.7","colour":"red"')
    store = open_()
    store.compact(FOLD_AND_TRIM)
    assert b'"colour":"red"' in snapshots(directory)[0].read_bytes()
    (record,) = open_().load_snapshot().records.values()
    with pytest.raises(ConflictError):
        store.apply([make_put(run_id="run-1", run_digest=task.run_digest)])
    update(store, record, label="x")
    store.compact(FOLD_AND_TRIM)
    assert b'"colour":"red"' in snapshots(directory)[0].read_bytes()
