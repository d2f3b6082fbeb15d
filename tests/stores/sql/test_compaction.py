"""Compaction in the tables: small steps, leases, leftovers, and erased bytes."""

from __future__ import annotations

import subprocess
import threading

import pytest
import sqlalchemy as sa
from sqlkit import in_process

from taskstore.errors import StoreBusyError
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.ids import system_clock
from taskstore.model.journal import Put, fold
from taskstore.stores.sql import compaction, snapshots
from taskstore.stores.sql.dialects import open_database
from taskstore.testing.factories import create, delete, make_record, next_of, update

ALL = CompactionPolicy(force=True, history_s=0, history_entries=0, keep_snapshots=1)
KEEP = CompactionPolicy(force=True, keep_snapshots=9)


def count(url: str, table: str) -> int:
    database = open_database(url)
    with database.engine.connect() as connection:
        found = connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one()
    database.close()
    return int(found)


def run(url: str, statement: str) -> None:
    database = open_database(url)
    with database.engine.begin() as connection:
        connection.execute(sa.text(statement))
    database.close()


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(compaction, "ENTRIES_PER_STEP", 7)
    monkeypatch.setattr(compaction, "CHUNKS_PER_STEP", 2)
    monkeypatch.setattr(snapshots, "CHUNK_RECORDS", 3)


def fill(store, tasks: int = 20, rounds: int = 3) -> None:
    batch = [Put(make_record()) for _ in range(tasks)]
    store.apply(batch)
    for number in range(rounds):
        batch = [next_of(put.record, label=str(number)) for put in batch]
        store.apply(batch)


def test_every_step_is_a_small_transaction(store, spy, small_steps):
    fill(store)
    spy.statements.clear()
    report = store.compact(ALL)
    assert (report.seq, report.floor, report.trimmed, report.records) == (80, 81, 80, 20)
    transactions = " ".join(spy.statements).split("COMMIT")
    assert len(transactions) > 15
    # Each transaction renews the lease and makes one change.
    assert max(text.count("DELETE") + text.count("INSERT INTO") for text in transactions) <= 2


def test_a_writer_commits_between_the_steps(store, url, open_, small_steps):
    fill(store)
    other, stop, written = open_(url), threading.Event(), []

    def write():
        while not stop.is_set():
            written.append(create(other))
            stop.wait(0.002)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(50):
            fill(store, tasks=5, rounds=1)
            before = len(written)
            store.compact(ALL)
            if len(written) > before:
                break
        else:
            pytest.fail("no writer ever got in between")
    finally:
        stop.set()
        thread.join()
    assert store.verify().ok
    records = store.load_snapshot().records
    assert {record.task_id for record in written} <= set(records)


def test_readers_see_old_or_new_and_nothing_between(store, url, open_, small_steps):
    fill(store)
    expected = store.load_snapshot().records
    reader, stop, wrong = open_(url, read_only=True), threading.Event(), []

    def read():
        while not stop.is_set():
            floor = reader.floor()
            snapshot = reader.read_snapshot(floor - 1)
            if floor > 1 and snapshot is None:
                # A newer snapshot may have replaced it since.
                if reader.floor() == floor:
                    wrong.append(floor)
                continue
            if not reader.verify().ok:
                wrong.append(reader.verify())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(4):
            fill(store, tasks=3, rounds=2)
            store.compact(ALL)
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert expected.items() <= store.load_snapshot().records.items()


# -- the lease ------------------------------------------------------------------


def test_one_compactor_at_a_time(store, url, open_, monkeypatch):
    fill(store)
    other = open_(url)
    tried = []

    def second(*arguments):
        try:
            other.compact(ALL)
        except StoreBusyError as error:
            tried.append(error)
        return real(*arguments)

    real = compaction.SQLCompactionSteps.publish
    monkeypatch.setattr(compaction.SQLCompactionSteps, "publish", second)
    store.compact(ALL)
    assert len(tried) == 1
    assert "compacted by another process" in str(tried[0])
    monkeypatch.undo()
    fill(other)
    assert other.compact(ALL).compacted


def test_a_dead_compactors_lease_runs_out(store, url):
    fill(store)
    until = system_clock() + 1_000_000
    run(url, f"UPDATE taskstore_head SET lease_owner = 'dead', lease_until = {until}")
    with pytest.raises(StoreBusyError):
        store.compact(ALL)
    run(url, "UPDATE taskstore_head SET lease_until = 1")
    assert store.compact(ALL).compacted


def test_a_lease_from_a_wrong_clock_is_not_waited_for(store, url):
    fill(store)
    until = system_clock() + 3650 * 86_400_000
    run(url, f"UPDATE taskstore_head SET lease_owner = 'dead', lease_until = {until}")
    assert store.compact(ALL).compacted


def test_a_compactor_that_lost_the_lease_stops(store, url, open_, monkeypatch):
    fill(store)
    other = open_(url)
    real = compaction.SQLCompactionSteps._move_floor

    def too_late(*arguments):
        run(url, "UPDATE taskstore_head SET lease_owner = 'thief'")
        return real(*arguments)

    monkeypatch.setattr(compaction.SQLCompactionSteps, "_move_floor", too_late)
    with pytest.raises(StoreBusyError, match="taken over"):
        store.compact(ALL)
    monkeypatch.undo()
    assert other.floor() == 1
    assert other.verify().ok
    run(url, "UPDATE taskstore_head SET lease_owner = NULL")
    create(other)
    assert other.compact(ALL).floor == 82


def test_content_that_was_replaced_is_not_compacted(store, url, open_, monkeypatch):
    fill(store)
    other = open_(url)
    real = compaction.SQLCompactionSteps._move_floor

    def replaced(*arguments):
        other.save_snapshot(type(other.load_snapshot())(1000))
        return real(*arguments)

    monkeypatch.setattr(compaction.SQLCompactionSteps, "_move_floor", replaced)
    with pytest.raises(StoreBusyError):
        store.compact(ALL)
    assert (other.head(), other.floor(), other.verify().ok) == (1000, 1001, True)


# -- killed ---------------------------------------------------------------------

KILLED = """
import os, signal, sys
from taskstore import open_store
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.stores.sql import compaction, snapshots
compaction.ENTRIES_PER_STEP, compaction.CHUNKS_PER_STEP, snapshots.CHUNK_RECORDS = 7, 2, 3
steps, real = int(sys.argv[2]), compaction.CompactionLease.run
def run(self, work):
    global steps
    steps -= 1
    if steps < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, work)
compaction.CompactionLease.run = run
entries = int(sys.argv[3])
policy = CompactionPolicy(force=True, history_s=0, history_entries=entries, keep_snapshots=1)
open_store(sys.argv[1]).compact(policy)
"""


@pytest.mark.parametrize("entries", [0, 30])
@pytest.mark.parametrize("steps", [0, 1, 3, 9, 10, 11, 14, 20])
def test_killed_at_any_step_it_changed_no_answer(store, url, small_steps, steps, entries):
    fill(store)
    before = store.load_snapshot()
    process = in_process(KILLED, url, steps, entries)
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert store.load_snapshot() == before
    assert store.verify().ok
    floor = store.floor()
    base = store.read_snapshot(floor - 1)
    entries = store.read_journal(floor - 1, 1000)
    if base is not None:
        assert fold(base, entries).records == before.records
    # A later compaction acquires the expired lease, and deletes the leftovers.
    run(url, "UPDATE taskstore_head SET lease_until = 1")
    create(store)
    assert store.compact(ALL).compacted
    assert store.verify().ok
    assert count(url, "task_journal") == 1  # the row that keeps the commit id
    assert count(url, "task_snapshots") == 1
    assert count(url, "task_snapshot_chunks") == 7


def test_retained_snapshots_answer_for_the_past(store):
    fill(store, tasks=4, rounds=2)
    states = {}
    for _ in range(3):
        record = create(store)
        states[store.head()] = dict(store.load_snapshot().records)
        assert store.compact(KEEP).compacted
        update(store, record, label="later")
    assert store.floor() == 1
    for seq, records in states.items():
        snapshot = store.read_snapshot(seq)
        assert snapshot is not None
        assert snapshot.seq == seq
        assert dict(snapshot.records) == records


# -- erasing --------------------------------------------------------------------

SECRETS = [f"the launch code number {number} is {number:04}-{number:04}" for number in range(300)]


def files_hold(path, needles: list[str]) -> list[str]:
    """The needles that are in the database's files, read in another process."""
    script = """
import json, sys
data = b"".join(open(sys.argv[1] + end, "rb").read() for end in ("", "-wal"))
print(json.dumps([text for text in json.load(sys.stdin) if text.encode() in data]))
"""
    import json
    import sys

    process = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        input=json.dumps(needles),
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[str] = json.loads(process.stdout)
    return found


@pytest.mark.parametrize("size", [1, 40, 400], ids=["in a page", "some", "overflowing"])
def test_erased_bytes_are_not_in_the_files(sqlite_path, open_, size):
    store = open_(f"sqlite:///{sqlite_path}")
    kept = [create(store, task="kept " * size) for _ in range(20)]
    gone = []
    for start in range(0, len(SECRETS), 30):
        batch = [Put(make_record(task=text * size)) for text in SECRETS[start : start + 30]]
        store.apply(batch)
        gone += [put.record for put in batch]
    # Some text is overwritten, not deleted; an earlier compaction removes some.
    gone = [update(store, record, task="overwritten") for record in gone[:20]] + gone[20:]
    delete(store, *gone[:100])
    store.compact(ALL)
    delete(store, *gone[100:])
    assert files_hold(sqlite_path, SECRETS)
    report = store.compact(CompactionPolicy(erase_deleted=True))
    assert report.floor == store.head() + 1
    assert files_hold(sqlite_path, SECRETS) == []
    assert dict(store.load_snapshot().records) == {record.task_id: record for record in kept}


def test_a_reader_that_keeps_the_log_is_named(sqlite_path, open_, monkeypatch):
    url = f"sqlite:///{sqlite_path}"
    store = open_(url)
    monkeypatch.setattr(type(store._database.maintenance), "erase_timeout_s", 0.2)
    create(store)
    reader = in_process(
        """
import sys
from taskstore import open_store
store = open_store(sys.argv[1], read_only=True)
def hold(session):
    session.rows("SELECT * FROM tasks")
    print("held", flush=True)
    sys.stdin.readline()
store._transactions.read(hold, in_transaction=True)
""",
        url,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "held\n"
    with pytest.raises(StoreBusyError, match="write-ahead log"):
        store.compact(CompactionPolicy(erase_deleted=True))
    reader.communicate("go\n")
    store.compact(CompactionPolicy(erase_deleted=True))
