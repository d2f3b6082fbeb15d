"""Damage from outside the store: found, reported, kept, never dropped."""

from __future__ import annotations

import hashlib

import pytest
import sqlalchemy as sa

from taskstore.errors import CorruptStoreError
from taskstore.model.codec import checksum, encode_record
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.query import TaskQuery
from taskstore.stores.sql.dialects import open_database
from taskstore.testing.factories import create, delete, update

ALL = CompactionPolicy(force=True, history_s=0, history_entries=0, keep_snapshots=1)

DAMAGE = {
    "flipped bit": b'{"v":"1.1","task_id":"x","revision":1,"runtime":"cli","tbsk":""}',
    "no JSON": b"\x00\xff\xfe garbage \n\n with lines",
    "empty": b"",
    "an array": b"[1,2]",
}


def run(url: str, statement: str, **parameters: object) -> None:
    database = open_database(url)
    with database.engine.begin() as connection:
        connection.execute(sa.text(statement), parameters)
    database.close()


def put_payload(url, task_id, payload, *, fitting=False):
    statement = "UPDATE tasks SET payload = :payload WHERE task_id = :task_id"
    run(url, statement, payload=payload, task_id=task_id)
    if fitting:
        run(
            url,
            "UPDATE tasks SET checksum = :crc WHERE task_id = :task_id",
            crc=checksum(payload),
            task_id=task_id,
        )


@pytest.mark.parametrize("fitting", [False, True], ids=["wrong checksum", "right checksum"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_one_bad_row_does_not_hide_the_rest(url, open_, damage, fitting):
    store = open_(url)
    records = [create(store, task_id=f"task-{number}") for number in range(3)]
    bad = records[1]
    put_payload(url, bad.task_id, DAMAGE[damage], fitting=fitting)

    for others in ({"task-0", "task-2"}, {"task-0", "task-2", "later"}):
        loaded = store.load_snapshot()
        assert set(loaded.records) == others
        [aside] = loaded.quarantined
        assert (aside.raw, aside.task_id, aside.revision) == (DAMAGE[damage], "task-1", 1)
        assert "task-1" in aside.where
        assert store.report().quarantined == (aside,)
        # Compaction keeps its bytes, and the next load finds it again.
        report = store.compact(ALL)
        assert report.records == len(others) + 1
        kept = store.read_snapshot(report.seq)
        assert kept is not None
        assert [item.raw for item in kept.quarantined] == [DAMAGE[damage]]
        assert set(kept.records) == others
        if "later" not in others:
            create(store, task_id="later")
    assert any("task-1" in problem for problem in store.verify().problems)
    with pytest.raises(CorruptStoreError, match="task-1"):
        open_(url, strict=True).load_snapshot()


def test_pages_leave_bad_rows_out_and_report_them(store, url):
    for number in range(6):
        create(store, task_id=f"task-{number}", owner_key="me")
    put_payload(url, "task-4", b"garbage")
    page = store.query(TaskQuery(owner_key="me", limit=2))
    assert [record.task_id for record in page] == ["task-5", "task-3"]
    assert page.seq == 6
    rest = store.query(TaskQuery(owner_key="me", limit=3, after=page.next_cursor))
    assert [record.task_id for record in rest] == ["task-2", "task-1", "task-0"]
    assert rest.next_cursor is None
    assert [item.task_id for item in store.report().quarantined] == ["task-4"]


def test_two_rows_with_one_payload_do_not_become_one(store, url):
    first, second = create(store), create(store)
    put_payload(url, second.task_id, encode_record(first), fitting=True)
    loaded = store.load_snapshot()
    assert dict(loaded.records) == {first.task_id: first}
    assert [item.task_id for item in loaded.quarantined] == [second.task_id]


def test_a_wrong_projection_is_reported_and_not_used(store, url):
    record = create(store, owner_key="me")
    run(url, "UPDATE tasks SET owner_key = 'you'")
    assert list(store.query(TaskQuery(owner_key="you", limit=5))) == []
    assert dict(store.load_snapshot().records) == {record.task_id: record}
    [problem] = store.verify().problems
    assert "column owner_key" in problem
    # The next change of the task repairs it.
    update(store, record, label="x")
    assert store.verify().ok


def test_a_text_payload_is_read_as_bytes(sqlite_path, open_):
    url = f"sqlite:///{sqlite_path}"
    store = open_(url)
    good, bad = create(store), create(store)
    run(
        url,
        "UPDATE tasks SET payload = CAST(payload AS TEXT) WHERE task_id = :id",
        id=good.task_id,
    )
    run(url, "UPDATE tasks SET payload = 'garbage' WHERE task_id = :id", id=bad.task_id)
    loaded = store.load_snapshot()
    assert dict(loaded.records) == {good.task_id: good}
    assert [item.raw for item in loaded.quarantined] == [b"garbage"]
    assert list(store.query(TaskQuery(limit=5))) == [good]


def test_a_damaged_entry_is_returned_as_bytes(store, url):
    record = create(store)
    update(store, record, label="x")
    run(url, "UPDATE task_journal SET payload = :bad WHERE seq = 1", bad=b"garbage")
    first, second = store.read_journal(0, 10)
    assert first.record is None
    assert first.quarantined is not None
    assert first.quarantined.raw == b"garbage"
    assert (first.task_id, first.revision) == (record.task_id, 1)
    assert second.record is not None
    assert any("seq 1" in problem for problem in store.verify().problems)


def test_a_gap_in_the_journal_is_an_error(store, url):
    for _ in range(5):
        create(store)
    run(url, "DELETE FROM task_journal WHERE seq = 3")
    assert len(store.read_journal(0, 2)) == 2
    for after, limit in ((0, 3), (2, 1), (2, 10), (0, 100)):
        with pytest.raises(CorruptStoreError, match="seq 3 is missing"):
            store.read_journal(after, limit)
    assert not store.verify().ok


def test_a_missing_last_entry_is_an_error(store, url):
    for _ in range(3):
        create(store)
    run(url, "DELETE FROM task_journal WHERE seq = 3")
    with pytest.raises(CorruptStoreError, match="seq 3 is missing"):
        store.read_journal(2, 10)
    assert "the journal ends at seq 2, but the head is 3" in store.verify().problems


def test_a_damaged_chunk_is_named(store, url):
    create(store)
    store.compact(ALL)
    run(url, "UPDATE task_snapshot_chunks SET payload = :bad", bad=b"garbage")
    with pytest.raises(CorruptStoreError, match="seq 1, chunk 0"):
        store.read_snapshot(10)
    assert any("chunk 0" in problem for problem in store.verify().problems)
    run(url, "DELETE FROM task_snapshot_chunks")
    with pytest.raises(CorruptStoreError, match="is missing"):
        store.read_snapshot(10)


def test_a_chunk_without_a_number_stops_a_compaction(sqlite_path, open_):
    url = f"sqlite:///{sqlite_path}"
    store = open_(url)
    create(store)
    store.compact(ALL)
    create(store)
    run(url, "UPDATE task_snapshot_chunks SET chunk = x'fffe'")
    run(url, "DELETE FROM task_snapshots")
    with pytest.raises(CorruptStoreError, match="has the number"):
        store.compact(ALL)


def test_a_head_that_was_set_back_stops_writers(store, url):
    create(store)
    create(store)
    run(url, "UPDATE taskstore_head SET head_seq = 1")
    with pytest.raises(CorruptStoreError, match="taskstore verify"):
        create(store)
    assert len(store.load_snapshot().records) == 2


def test_a_missing_head_row(store, url):
    create(store)
    run(url, "DELETE FROM taskstore_head")
    for action in (store.head, store.load_snapshot, lambda: store.query(TaskQuery(limit=1))):
        with pytest.raises(CorruptStoreError, match="head row"):
            action()


def test_rows_without_journal_entries(store, url):
    lost, other = create(store), create(store)
    run(url, "DELETE FROM tasks WHERE task_id = :id", id=lost.task_id)
    run(url, "UPDATE tasks SET task_id = 'renamed' WHERE task_id = :id", id=other.task_id)
    problems = "\n".join(store.verify().problems)
    both = ", ".join(sorted([repr(lost.task_id), repr(other.task_id)]))
    assert f"the table tasks lacks tasks of the journal (2): {both}" in problems
    assert "payload belongs to task" in problems


def test_deletions_stay_known_until_they_are_trimmed(store, url):
    record = create(store)
    delete(store, record)
    # An entry below the floor is a leftover of a trim, and is ignored.
    run(url, "UPDATE taskstore_head SET floor = 3")
    create(store, task_id=record.task_id)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"this is no database, but long enough to be one" * 100, "not a database"),
        (lambda data: data[:5000] + b"\xa5" * 9000 + data[14000:], "malformed|disk image"),
        (lambda data: data[: len(data) // 2 + 100], "was cut"),
    ],
    ids=["another file", "overwritten pages", "cut off"],
)
def test_a_damaged_file_stays_as_it_is(sqlite_path, open_, damage, reason):
    url = f"sqlite:///{sqlite_path}"
    with open_(url) as store:
        for _ in range(40):
            create(store, task="x" * 2000)
    damaged = damage(sqlite_path.read_bytes())
    sqlite_path.write_bytes(damaged)
    before = hashlib.sha256(damaged).hexdigest()
    for read_only in (True, False):
        with pytest.raises(CorruptStoreError, match=reason) as caught:
            open_(url, read_only=read_only).load_snapshot()
        assert str(sqlite_path) in str(caught.value)
        assert caught.value.hint is not None
    assert hashlib.sha256(sqlite_path.read_bytes()).hexdigest() == before
