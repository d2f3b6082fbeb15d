"""The integrity check accepts every real ledger and finds every single change to one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from taskstore.model.journal import EntryKind, JournalEntry, Snapshot
from taskstore.stores.common.integrity import IntegrityCheck
from taskstore.stores.memory import MemoryStore
from taskstore.testing import Model
from taskstore.testing.factories import play


def a_history() -> tuple[Model, list[JournalEntry]]:
    with MemoryStore() as store:
        model = play(store)
        return model, list(store.read_journal(0, model.head))


MODEL, JOURNAL = a_history()
SEQS = st.integers(1, MODEL.head)


def snapshot(seq: int) -> Snapshot:
    return Snapshot(seq, MODEL.states[seq], JOURNAL[seq - 1].at if seq else 0)


def problems(entries, floor, retained, current=None):
    retained = {floor - 1, *retained}
    check = IntegrityCheck(floor, {seq: f"snapshot {seq}" for seq in retained}, snapshot)
    check.journal(entries[floor - 1 :], MODEL.head)
    check.compare("tasks", snapshot(MODEL.head) if current is None else current)
    return check.report().problems


@given(SEQS, st.sets(SEQS))
def test_a_good_ledger_has_no_problems_from_any_floor(floor, retained):
    assert problems(JOURNAL, floor, retained) == ()


@given(SEQS, st.sets(SEQS), st.sampled_from(["seq", "revision", "at", "record", "kind"]))
def test_any_entry_that_is_changed_is_found(seq, retained, field):
    entries, entry = list(JOURNAL), JOURNAL[seq - 1]
    if field == "record" and entry.record is not None:
        value = replace(entry.record, label="something else")
    elif field == "kind":
        value = EntryKind.DELETED if entry.kind is EntryKind.UPSERTED else EntryKind.UPSERTED
    elif field == "at":
        value = -1
    else:
        field, value = ("revision", entry.revision + 1) if field != "seq" else ("seq", seq + 1)
    changed = replace(entry, **{field: value})
    if field == "kind":
        record = None if changed.kind is EntryKind.DELETED else MODEL.states[seq - 1][entry.task_id]
        changed = replace(changed, record=record)
    entries[seq - 1] = changed
    # Only a snapshot in between compares a record that a later entry replaces.
    assert problems(entries, 1, retained | {seq})


@given(SEQS, st.data())
def test_any_record_that_is_changed_is_found(floor, data):
    right = snapshot(MODEL.head)
    task_id = data.draw(st.sampled_from(sorted(right.records)))
    records = dict(right.records)
    if data.draw(st.booleans()):
        del records[task_id]
    else:
        records[task_id] = replace(records[task_id], label="something else")
    (problem,) = problems(JOURNAL, floor, (), replace(right, records=records))
    assert repr(task_id) in problem
