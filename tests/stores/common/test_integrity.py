"""The integrity check: one problem for each kind of damage, none for a good ledger."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from taskstore.errors import CorruptStoreError
from taskstore.model.journal import (
    Commit,
    EntryKind,
    JournalEntry,
    Put,
    Quarantined,
    Remove,
    Snapshot,
    entries_of,
    fold,
)
from taskstore.stores.common.integrity import MAX_PROBLEMS, IntegrityCheck
from taskstore.testing import make_record

FIRST, SECOND = make_record(task_id="a", label="1"), make_record(task_id="b", label="1")
CHANGES = [
    Put(FIRST),
    Put(SECOND),
    Put(replace(FIRST, revision=2, label="2")),
    Remove("b", 2),
    Put(replace(FIRST, revision=3, label="3")),
    Put(make_record(task_id="c")),
]


def journal() -> list[JournalEntry]:
    """Six entries, one per commit and second: three of ``a``, two of ``b``, one of ``c``."""
    return [
        entry
        for seq, change in enumerate(CHANGES, 1)
        for entry in entries_of([change], Commit(seq, seq, 1000 * seq))
    ]


def as_of(seq: int) -> Snapshot:
    return fold(Snapshot(0), journal()[:seq])


def damaged(seq: int) -> CorruptStoreError:
    return CorruptStoreError(f"snapshot {seq}", "is damaged")


def found_in(entries, *, floor=1, head=6, snapshots=None, current=None) -> tuple[str, ...]:
    """The problems of a ledger; ``snapshots`` are those retained, ``None`` for a damaged one."""
    snapshots = {seq: as_of(seq) for seq in (2, 4)} if snapshots is None else snapshots

    def read(seq: int) -> Snapshot:
        if snapshots[seq] is None:
            raise damaged(seq)
        return snapshots[seq]

    check = IntegrityCheck(floor, {seq: f"snapshot {seq}" for seq in snapshots}, read)
    check.journal(entries, head)
    check.compare("tasks", as_of(6) if current is None else current)
    return check.report().problems


def changed(seq: int, **fields: object) -> list[JournalEntry]:
    entries = journal()
    entries[seq - 1] = replace(entries[seq - 1], **fields)
    return entries


def without(snapshot: Snapshot, *task_ids: str) -> Snapshot:
    kept = {key: record for key, record in snapshot.records.items() if key not in task_ids}
    return replace(snapshot, records=kept)


def test_a_good_ledger_has_no_problems():
    assert found_in(journal()) == ()
    assert found_in(journal()[2:], floor=3) == ()
    assert found_in([], floor=7, snapshots={6: as_of(6)}) == ()


def test_the_report_counts():
    check = IntegrityCheck(3, {2: "snapshot 2"}, as_of)
    check.journal(journal()[2:])
    report = check.report()
    assert (report.seq, report.records, report.entries, report.ok) == (6, 2, 4, True)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (changed(3, at=500), "seq 3, task 'a': the time goes back from 2000 to 500"),
        (
            changed(6, revision=4, record=replace(CHANGES[5].record, revision=4)),
            "seq 6, task 'c': revision 4 follows revision 0",
        ),
        (
            changed(5, revision=7, record=replace(CHANGES[4].record, revision=7)),
            "seq 5, task 'a': revision 7 follows revision 2",
        ),
        (changed(4, revision=3), "seq 4, task 'b': revision 3 follows revision 1"),
        (
            changed(6, task_id="b", record=SECOND),
            "seq 6, task 'b': a change after its deletion",
        ),
        (changed(6, record=SECOND), "seq 6, task 'c': the entry's record is 'b' at revision 1"),
    ],
    ids=["time", "creation", "revision", "deletion", "after deletion", "record"],
)
def test_an_entry_that_does_not_follow(entries, problem):
    assert found_in(entries, current=fold(Snapshot(0), entries)) == (problem,)


@pytest.mark.parametrize("seq", range(1, 6))
def test_a_missing_seq_is_reported_once(seq):
    entries = journal()
    del entries[seq - 1]
    assert found_in(entries) == (f"the entries from seq {seq} to {seq} are missing",)


def test_a_duplicate_seq():
    entries = journal()
    entries.insert(6, entries[5])
    assert "seq 6, task 'c': this entry follows seq 6" in found_in(entries)


def test_a_missing_end():
    assert found_in(journal()[:4]) == ("the journal ends at seq 4, but the head is 6",)


def test_a_snapshot_ahead_of_the_head():
    snapshots = {9: as_of(6)}
    assert found_in(journal(), snapshots=snapshots) == ("snapshot 9 is ahead of head 6",)
    # Without a known head, it shows that the end of the journal is missing.
    assert found_in(journal(), head=None, snapshots=snapshots) == (
        "the journal ends at seq 6, but the head is 9",
    )


@pytest.mark.parametrize("rest", [[], journal()[3:]], ids=["at the end", "in between"])
def test_unreadable_entries_are_reported_once(rest):
    error = CorruptStoreError("file", "does not match")
    assert found_in([*journal()[:2], error, *rest]) == (str(error),)


@pytest.mark.parametrize("place", ["snapshot 4", "tasks"])
@pytest.mark.parametrize("kind", ["lacks", "has", "disagrees"])
def test_stored_content_that_differs_from_the_journal(place, kind):
    right = as_of(4 if place == "snapshot 4" else 6)
    wrong, problem = {
        "lacks": (without(right, "a"), "lacks tasks of the journal (1): 'a'"),
        "has": (
            replace(right, records={**right.records, "b": SECOND}),
            "has tasks not in the journal (1): 'b'",
        ),
        "disagrees": (
            replace(right, records={**right.records, "a": replace(right.records["a"], label="x")}),
            "disagrees with the journal on tasks (1): 'a'",
        ),
    }[kind]
    given = {"snapshots": {4: wrong}} if place == "snapshot 4" else {"current": wrong}
    assert found_in(journal(), **given) == (f"{place} {problem}",)


def test_a_gap_does_not_hide_damage_after_it():
    missing = "the entries from seq 2 to 2 are missing"
    entries = journal()
    del entries[1]
    assert found_in(entries, current=without(as_of(6), "c")) == (
        missing,
        "tasks lacks tasks of the journal (1): 'c'",
    )
    # Without a snapshot after the gap, only tasks with an entry there are known.
    beyond = {"a": as_of(6).records["a"], "b": SECOND, "c": as_of(6).records["c"]}
    assert found_in(entries, snapshots={}) == (missing,)
    assert found_in(entries, snapshots={}, current=replace(as_of(6), records=beyond)) == (
        missing,
        "tasks has tasks not in the journal (1): 'b'",
    )
    assert found_in(entries, snapshots={}, current=without(as_of(6), "a")) == (
        missing,
        "tasks lacks tasks of the journal (1): 'a'",
    )


@pytest.mark.parametrize(
    ("snapshots", "problem"),
    [
        ({4: as_of(4)}, "there is no snapshot at seq 2, before the floor"),
        ({2: None, 4: as_of(4)}, str(damaged(2))),
    ],
    ids=["missing", "damaged"],
)
def test_without_the_first_snapshot_the_check_continues_from_the_next_one(snapshots, problem):
    entries = journal()[2:]
    assert found_in(entries, floor=3, snapshots=snapshots) == (problem,)
    assert found_in(entries, floor=3, snapshots=snapshots, current=without(as_of(6), "a", "c")) == (
        problem,
        "tasks lacks tasks of the journal (2): 'a', 'c'",
    )


def test_a_damaged_later_snapshot():
    assert found_in(journal(), snapshots={4: None}) == (str(damaged(4)),)


def quarantined(task_id: str | None, revision: int | None, raw: bytes = b"junk", **fields: bool):
    return Quarantined(raw, "there", "no JSON", task_id, revision, **fields)


def test_a_quarantined_record_is_compared_as_bytes():
    entries = changed(6, record=None, quarantined=quarantined("c", 1))
    current = without(as_of(6), "c")
    assert found_in(entries, current=replace(current, quarantined=(quarantined("c", 1),))) == ()
    for other in ((), (quarantined("c", 1, b"other"),), (quarantined("c", 1, superseded=True),)):
        assert len(found_in(entries, current=replace(current, quarantined=other))) == 1


@pytest.mark.parametrize(("revision", "ok"), [(8, True), (7, False), (0, True), (None, True)])
def test_a_quarantined_record_has_its_known_revision(revision, ok):
    base = Snapshot(10, {}, 5, (quarantined("a", revision), quarantined(None, None, b"unknown")))
    record = make_record(task_id="a", revision=9)
    entry = JournalEntry(11, 5, EntryKind.UPSERTED, "a", 9, record)
    problems = found_in(
        [entry], floor=11, head=11, snapshots={10: base}, current=fold(base, [entry])
    )
    assert problems == (() if ok else ("seq 11, task 'a': revision 9 follows revision 7",))


def test_a_superseded_record_is_not_compared():
    old = quarantined("a", 1, superseded=True)
    base = replace(as_of(2), quarantined=(old,))
    current = replace(as_of(6), quarantined=(old,))
    assert found_in(journal()[2:], floor=3, snapshots={2: base}, current=current) == ()


def test_many_problems_are_counted():
    entries = [
        JournalEntry(seq, 0, EntryKind.DELETED, f"task {seq}", 2, None)
        for seq in range(1, MAX_PROBLEMS + 21)
    ]
    problems = found_in(
        entries, head=MAX_PROBLEMS + 20, current=Snapshot(MAX_PROBLEMS + 20), snapshots={}
    )
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1] == "and 20 more problems"
