"""Changes, plans, conflicts, snapshots and folds."""

from __future__ import annotations

from types import MappingProxyType

import pytest
from msgspec.structs import replace

from taskstore.errors import Conflict, ConflictError, CorruptStoreError, ValidationError
from taskstore.model.journal import (
    Commit,
    EntryKind,
    JournalEntry,
    Position,
    Put,
    Quarantined,
    Remove,
    Snapshot,
    entries_of,
    find_conflicts,
    fold,
    plan,
    validated_snapshot,
)
from taskstore.store.interface import check_net_changes
from taskstore.testing import make_put, make_record, next_of, removal_of


def entry(seq, record, *, at=0):
    return JournalEntry(seq, at, EntryKind.UPSERTED, record.task_id, record.revision, record)


def deletion(seq, record):
    return JournalEntry(seq, 0, EntryKind.DELETED, record.task_id, record.revision + 1, None)


# -- changes ----------------------------------------------------------------


def test_put_validates_and_converts():
    put = Put(make_record(status="running"))
    assert put.record.status.is_terminal is False
    assert (put.task_id, put.revision) == (put.record.task_id, 1)
    with pytest.raises(ValidationError):
        Put(make_record(label="\0"))
    with pytest.raises(ValidationError):
        Put({"task_id": "x"})


@pytest.mark.parametrize(
    ("task_id", "revision"), [("", 2), ("a\0", 2), (None, 2), ("a", 1), ("a", 0), ("a", True)]
)
def test_remove_validates(task_id, revision):
    with pytest.raises(ValidationError):
        Remove(task_id, revision)


def test_changes_are_frozen():
    with pytest.raises(AttributeError):
        make_put().record = make_record()
    with pytest.raises(AttributeError):
        Remove("a", 2).revision = 3


# -- plan -------------------------------------------------------------------


def test_a_plan_has_one_net_change_for_each_task():
    one, two = make_record(task_id="one", revision=4), make_record(task_id="two")
    changed = next_of(one, label="x")
    net_changes = plan([Put(one), Put(two), changed, removal_of(two)])
    assert [(s.task_id, s.expected_revision, s.revision, s.record) for s in net_changes] == [
        ("one", 3, 5, changed.record),
        ("two", 0, 2, None),
    ]


@pytest.mark.parametrize(
    ("changes", "conflict"),
    [
        ([(1,), (1,)], Conflict("t", 0, 1)),
        ([(1,), (3,)], Conflict("t", 2, 1)),
        ([(5,), (4,)], Conflict("t", 3, 5)),
        ([(4, "remove"), (5,)], Conflict("t", 4, 0, deleted=True)),
        ([(4, "remove"), (1,)], Conflict("t", 0, 0, deleted=True)),
        ([(4, "remove"), (5, "remove")], Conflict("t", 4, 0, deleted=True)),
        ([(4,), (4, "remove")], Conflict("t", 3, 4)),
    ],
)
def test_a_batch_with_contradicting_changes(changes, conflict):
    batch = [
        Remove("t", revision) if verb else make_put(task_id="t", revision=revision)
        for revision, *verb in changes
    ]
    with pytest.raises(ConflictError) as caught:
        plan([make_put(), *batch])
    assert caught.value.conflicts == (conflict,)


def test_two_tasks_with_one_dedup_key_in_a_batch():
    one, two = make_put(run_id="r", task_id="one"), make_put(run_id="r", task_id="two")
    with pytest.raises(ConflictError) as caught:
        plan([one, two])
    assert caught.value.conflicts == (Conflict("two", 0, 0, existing_task_id="one"),)
    assert len(plan([one, two, Remove("two", 2)])) == 2
    assert len(plan([one, Remove("one", 2), two])) == 2


def test_only_creations_claim_a_dedup_key():
    record = make_record(run_id="r")
    assert plan([Put(record)])[0].new_dedup_key == ("r", record.run_digest)
    assert plan([next_of(record)])[0].new_dedup_key is None
    assert plan([make_put()])[0].new_dedup_key is None
    assert plan([make_put(run_id="r", run_digest=None)])[0].new_dedup_key is None
    assert plan([Put(record), removal_of(record)])[0].new_dedup_key is None


@pytest.mark.parametrize("batch", [[], (), ["x"], [None], [make_record()]])
def test_invalid_batches(batch):
    with pytest.raises(ValidationError) as caught:
        plan(batch)
    assert caught.value.field == "changes"


def test_entries_of_a_commit():
    record = make_record()
    entries = entries_of([Put(record), removal_of(record)], Commit(7, 8, 99, "id"))
    assert [(e.seq, e.at, e.kind, e.revision, e.record, e.commit_id) for e in entries] == [
        (7, 99, EntryKind.UPSERTED, 1, record, "id"),
        (8, 99, EntryKind.DELETED, 2, None, "id"),
    ]


# -- snapshots --------------------------------------------------------------


def test_a_snapshot_copies_a_mutable_mapping():
    records = {"a": make_record(task_id="a")}
    snapshot = Snapshot(1, records)
    records.clear()
    assert list(snapshot.records) == ["a"]
    with pytest.raises(TypeError):
        snapshot.records["b"] = None
    proxied = {"a": make_record(task_id="a")}
    snapshot = Snapshot(1, MappingProxyType(proxied))
    proxied.clear()
    assert list(snapshot.records) == ["a"]


@pytest.mark.parametrize("seq", [-1, 1.0, "1", None, True, 2**53])
def test_a_snapshot_has_a_seq(seq):
    with pytest.raises(ValidationError):
        Snapshot(seq)


def test_a_snapshot_is_validated():
    record = make_record(status="running")
    checked = validated_snapshot(Snapshot(1, {record.task_id: record}, 5, ()))
    assert checked.records[record.task_id].status.is_terminal is False
    assert (checked.seq, checked.at) == (1, 5)
    mutable = {}
    assert validated_snapshot(Snapshot(1, MappingProxyType(mutable))).records is not mutable
    for records in (
        {"other": record},
        {record.task_id: make_record(task_id=record.task_id, label="\0")},
        {record.task_id: "record"},
        {t: make_record(task_id=t, run_id="r") for t in "ab"},
    ):
        with pytest.raises(ValidationError):
            validated_snapshot(Snapshot(1, records))


# -- fold -------------------------------------------------------------------


def test_fold():
    one, two = make_record(task_id="one"), make_record(task_id="two")
    changed = next_of(one, label="x").record
    before = Snapshot(4, {"one": one})
    after = fold(before, [entry(5, two, at=10), entry(6, changed, at=11), deletion(7, two)])
    assert (after.seq, after.at, dict(after.records)) == (7, 0, {"one": changed})
    assert dict(before.records) == {"one": one}


def test_fold_of_nothing():
    snapshot = Snapshot(4, {"one": make_record(task_id="one")}, 5)
    assert fold(snapshot, []) == snapshot


@pytest.mark.parametrize("seqs", [[6], [5, 7], [5, 5], [4], [5, 4]])
def test_fold_detects_a_gap(seqs):
    with pytest.raises(CorruptStoreError, match="follows seq"):
        fold(Snapshot(4), [entry(seq, make_record()) for seq in seqs])


def test_fold_keeps_quarantined_records():
    quarantined = Quarantined(b"?", "here", "why", "a", 3)
    anonymous = Quarantined(b"??", "here", "why")
    start = Snapshot(0, {}, 0, (quarantined, anonymous))
    other = make_record(task_id="b")
    assert fold(start, [entry(1, other)]).quarantined == (quarantined, anonymous)
    again = make_record(task_id="a", revision=4)
    assert fold(start, [entry(1, again)]).quarantined == (anonymous,)
    assert fold(start, [deletion(1, replace(again, revision=3))]).quarantined == (anonymous,)
    lost = replace(entry(1, other), record=None, quarantined=Quarantined(b"x", "w", "r", "b", 1))
    assert fold(start, [lost]).quarantined[-1].raw == b"x"
    assert dict(fold(start, [lost]).records) == {}


# -- checks of a store without a journal --------------------------------------


def test_check_net_changes():
    one, other = make_record(task_id="one", revision=3), make_record(task_id="two", run_id="r")
    stored = Snapshot(9, {"one": one, "two": other}, 0, (Quarantined(b"?", "w", "r", "bad", 5),))
    check_net_changes(plan([next_of(one), make_put(), removal_of(other)]), stored)
    check_net_changes(plan([make_put(task_id="bad", revision=6)]), stored)
    check_net_changes(plan([removal_of(other), make_put(run_id="r")]), stored)
    wrong = [
        next_of(one, revision=3),
        Remove("absent", 4),
        make_put(task_id="three", run_id="r"),
        make_put(task_id="bad"),
    ]
    with pytest.raises(ConflictError) as caught:
        check_net_changes(plan(wrong), stored)
    assert set(caught.value.conflicts) == {
        Conflict("one", 2, 3),
        Conflict("absent", 3, 0),
        Conflict("three", 0, 0, existing_task_id="two"),
        Conflict("bad", 0, 5),
    }


STORED = {"a": 3, "bad": 0}


@pytest.mark.parametrize(
    ("change", "conflict"),
    [
        (make_put(task_id="new"), None),
        (Remove("a", 4), None),
        (make_put(task_id="a"), Conflict("a", 0, 3)),
        (Remove("a", 3), Conflict("a", 2, 3)),
        (Remove("b", 2), Conflict("b", 1, 0)),
        (make_put(task_id="gone"), Conflict("gone", 0, 0, deleted=True)),
        # A quarantined record occupies its id, and no change applies over it.
        (make_put(task_id="bad"), Conflict("bad", 0, 0)),
        (Remove("bad", 2), Conflict("bad", 1, 0)),
        (
            make_put(task_id="new", run_id="r", run_digest="k"),
            Conflict("new", 0, 0, existing_task_id="a"),
        ),
        (make_put(task_id="new", run_id="r", run_digest="other"), None),
    ],
)
def test_conflicts_between_net_changes_and_stored_revisions(change, conflict):
    found = find_conflicts(plan([change]), STORED, {"gone"}, {("r", "k"): "a"})
    assert found == ([] if conflict is None else [conflict])


def test_a_removal_frees_the_dedup_key():
    net_changes = plan([make_put(task_id="new", run_id="r", run_digest="k"), Remove("a", 4)])
    assert find_conflicts(net_changes, STORED, (), {("r", "k"): "a"}) == []


def test_a_superseded_image_is_dropped_with_its_task_only():
    one = make_record(task_id="a")
    old = Quarantined(b"?", "here", "why", "a", 1, superseded=True)
    base = Snapshot(1, {"a": one}, 0, (old,))
    assert fold(base, [entry(2, next_of(one).record)]).quarantined == (old,)
    assert fold(base, [deletion(2, one)]).quarantined == ()


def test_a_cursor_that_was_cut_at_its_colon_is_refused():
    for cut in ("1:", "0:", ":", ":0f"):
        with pytest.raises(ValidationError, match="the whole cursor"):
            Position.of(cut)
    assert Position.of("1:0f") == Position(1, "0f")


def test_the_cursor_of_a_store_without_commit_ids_is_a_seq():
    for position in (Position(7), Position(7, "0f")):
        assert Position.of(str(position)) == position
    assert str(Position(7)) == "7"
