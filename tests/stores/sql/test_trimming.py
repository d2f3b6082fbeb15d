"""Trimming keeps damaged entries, and the last record of a task."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from taskstore.errors import CorruptStoreError
from taskstore.model.codec import checksum
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.journal import fold
from taskstore.stores.sql import compaction
from taskstore.stores.sql.dialects import open_database
from taskstore.testing.factories import create, delete, update

ALL = CompactionPolicy(force=True, history_s=0, history_entries=0, keep_snapshots=1)
SOME = CompactionPolicy(force=True)
ERASE = CompactionPolicy(force=True, erase_deleted=True)
JUNK = b"\x00junk\xff"


def run(url: str, statement: str, **parameters: object) -> None:
    database = open_database(url)
    with database.engine.begin() as connection:
        connection.execute(sa.text(statement), parameters)
    database.close()


def damage(url: str, *seqs: int) -> None:
    for seq in seqs:
        run(url, "UPDATE task_journal SET payload = :junk WHERE seq = :seq", junk=JUNK, seq=seq)


@pytest.fixture
def task(store):
    """A task with five changes, between two others."""
    create(store, task_id="A")
    record = create(store, task_id="B")
    create(store, task_id="C")
    for number in range(4):
        record = update(store, record, progress_summary=str(number))
    return record


def test_entries_that_do_not_decode_are_quarantined(store, url, open_, task):
    damage(url, 2, 5)
    before = dict(store.load_snapshot().records)
    report = store.compact(ALL)
    assert (report.floor, report.trimmed) == (8, 7)
    reported = store.report().quarantined
    assert [item.raw for item in reported] == [JUNK, JUNK]
    for item, seq, revision in zip(reported, (2, 5), (1, 3), strict=True):
        assert f"task_journal, seq {seq}" in item.where
        assert (item.superseded, item.task_id, item.revision) == (True, "B", revision)
        assert "checksum" in item.reason
    # They block no change, and every later compaction keeps them.
    for _ in range(3):
        for instance in (store, open_(url)):
            loaded = instance.load_snapshot()
            assert dict(loaded.records) == before
            assert loaded.quarantined == reported
            assert instance.report().quarantined == reported
            assert instance.verify().ok, instance.verify()
        task = update(store, task, label="on")
        before["B"] = task
        report = store.compact(ALL)
    kept = store.read_snapshot(report.seq)
    assert [item.raw for item in kept.quarantined] == [JUNK, JUNK]
    update(store, task, label="still on")
    assert fold(kept, store.read_journal(kept.seq, 9)).quarantined == reported


def test_other_content_with_a_right_checksum_is_quarantined_too(store, url, task):
    future = b'{"v":"9.0","task_id":"B","revision":2}'
    run(
        url,
        "UPDATE task_journal SET payload = :payload, checksum = :crc WHERE seq = 4",
        payload=future,
        crc=checksum(future),
    )
    run(url, "UPDATE task_journal SET kind = 'mystery' WHERE seq = 5")
    store.compact(ALL)
    first, second = store.report().quarantined
    assert first.raw == future
    assert b'"revision":3' in second.raw
    assert "mystery" in second.reason
    assert store.load_snapshot().records["B"] == task


def test_untrimmed_damage_stays_in_the_journal(store, url, task):
    damage(url, 5)
    assert store.compact(SOME).trimmed == 0
    assert store.report().quarantined == ()
    assert [entry.seq for entry in store.read_journal(0, 99) if entry.quarantined] == [5]
    create(store)
    store.compact(ALL)
    assert [item.raw for item in store.report().quarantined] == [JUNK]


def test_damage_that_is_also_in_the_row_is_kept_once(store, url, task):
    damage(url, 7)
    run(url, "UPDATE tasks SET payload = :junk WHERE task_id = 'B'", junk=JUNK)
    for _ in range(2):
        create(store)
        store.compact(ALL)
        [item] = store.load_snapshot().quarantined
        assert (item.raw, item.task_id) == (JUNK, "B")


def test_many_steps_and_a_killed_compaction(store, url, task, monkeypatch):
    monkeypatch.setattr(compaction, "ENTRIES_PER_STEP", 2)
    damage(url, 2, 4, 5)
    real, calls = compaction.trim_entries, []

    def dying(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(compaction, "trim_entries", dying)
    with pytest.raises(KeyboardInterrupt):
        store.compact(ALL)
    assert [item.raw for item in store.load_snapshot().quarantined] == [JUNK, JUNK]
    create(store)
    store.compact(ALL)
    assert [item.raw for item in store.load_snapshot().quarantined] == [JUNK, JUNK, JUNK]


def test_deletion_removes_the_damaged_entries_too(store, url, task):
    damage(url, 2)
    delete(store, task)
    store.compact(ALL)
    assert store.report().quarantined == store.load_snapshot().quarantined == ()


def test_quarantined_payloads_of_a_task_are_erased_with_it(store, url, task):
    damage(url, 1, 2, 5)
    store.compact(ALL)
    assert len(store.load_snapshot().quarantined) == 3
    delete(store, task)
    store.compact(ERASE)
    [item] = store.load_snapshot().quarantined
    assert (item.superseded, item.task_id) == (True, "A")


def test_the_last_record_of_a_task_is_not_trimmed(store, url, open_, task):
    run(url, "DELETE FROM tasks WHERE task_id = 'B'")
    for policy in (ALL, ERASE):
        with pytest.raises(CorruptStoreError, match=r"'B' \(seq 7\)") as caught:
            store.compact(policy)
        assert "nothing was trimmed" in caught.value.hint
        assert (store.floor(), store.read_snapshot(99)) == (1, None)
        assert len(store.read_journal(0, 99)) == 7
    # A compaction that trims nothing works; with the row restored, every one works.
    image = store.read_journal(6, 1)[0].record
    assert image == task
    assert store.compact(SOME).trimmed == 0
    other = open_(url)
    run(
        url,
        "INSERT INTO tasks (task_id, revision, created_at, status, runtime, payload, checksum, "
        "run_id, booking) SELECT task_id, revision, :created, :status, :runtime, payload, "
        "checksum, :run_id, :booking FROM task_journal WHERE seq = 7",
        created=task.created_at,
        status=task.status.value,
        runtime=task.runtime,
        run_id=task.run_id,
        booking=task.run_digest,
    )
    create(other)
    assert other.compact(ALL).floor == 9
    assert other.load_snapshot().records["B"] == task


def test_tasks_that_were_deleted_are_no_reason_to_refuse(store, task):
    delete(store, task)
    assert store.compact(ALL).floor == 9
    assert store.verify().ok
