"""history, changes and as_of: the journal as the registry shows it."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest

from taskstore import (
    CompactionPolicy,
    CursorExpiredError,
    Snapshot,
    StoreClosedError,
    TaskRegistry,
    TaskRegistryStore,
    UnsupportedError,
    ValidationError,
    compact,
)
from taskstore.stores.memory import MemoryStore

KEEP_NOTHING = CompactionPolicy(history_s=0, history_entries=0, keep_snapshots=1).forced()


class OnlyLoadAndSave(TaskRegistryStore):
    """The smallest backend."""

    def __init__(self):
        super().__init__()
        self.kept = Snapshot(0)

    def load_snapshot(self):
        return self.kept

    def save_snapshot(self, snapshot):
        self.kept = snapshot


def lived(registry):
    task = registry.create(runtime="cli", task="x")
    registry.mark_running(task.task_id)
    registry.record_progress(task.task_id, "half")
    registry.finish(task.task_id, "succeeded")
    registry.delete(task.task_id)
    return task.task_id


def test_history_has_every_revision_of_a_deleted_task_too(registry):
    task_id = lived(registry)
    other = registry.create(runtime="cli", task="y")
    entries = registry.history(task_id)
    assert [entry.kind for entry in entries] == ["upserted"] * 4 + ["deleted"]
    assert [entry.revision for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[-1].record is None
    assert [entry.record.status for entry in entries[:-1]] == [
        "queued",
        "running",
        "running",
        "succeeded",
    ]
    assert [entry.seq for entry in registry.history(other.task_id)] == [6]
    assert list(registry.history("nobody")) == []


def test_changes_are_iterated_from_a_seq_and_end(registry):
    lived(registry)
    assert [entry.seq for entry in registry.changes()] == [1, 2, 3, 4, 5]
    assert [entry.seq for entry in registry.changes(after=3)] == [4, 5]
    assert list(registry.changes(after=5)) == []


def test_changes_with_wait(open_ledger):
    one, two = open_ledger(), open_ledger()
    lived(one)
    seen = []

    def follow():
        for entry in two.changes(after=4, wait=60):
            seen.append(entry.seq)
            if entry.seq == 6:
                return

    thread = threading.Thread(target=follow)
    thread.start()
    one.create(runtime="cli", task="late")
    thread.join()
    assert seen == [5, 6]
    assert list(two.changes(after=6, wait=0.01)) == []


def test_as_of_every_seq_from_the_floor_on(registry):
    lived(registry)
    registry.create(runtime="cli", task="y")
    counts = [len(registry.as_of(seq).records) for seq in range(7)]
    assert counts == [0, 1, 1, 1, 1, 0, 1]
    assert registry.as_of(3).seq == 3
    (record,) = registry.as_of(3).records.values()
    assert record.progress_summary == "half"
    with pytest.raises(ValidationError, match="beyond the head"):
        registry.as_of(7)


def test_as_of_a_time(open_ledger, ticker):
    registry = open_ledger(clock=ticker)
    lived(registry)
    entries = list(registry.changes())
    assert len({entry.at for entry in entries}) == 5
    for entry in entries:
        assert registry.as_of(entry.at).seq == entry.seq
        assert registry.as_of(entry.at - 1).seq == entry.seq - 1
    moment = datetime.fromtimestamp(entries[2].at / 1000, UTC)
    assert registry.as_of(moment) == registry.as_of(3)
    with pytest.raises(ValidationError, match="time zone"):
        registry.as_of(datetime(2024, 1, 1))  # noqa: DTZ001


def test_as_of_a_time_while_a_clock_was_wrong(open_ledger):
    """After one commit ten years ahead, all commits have its time: some times have no answer."""
    right, day = 1_700_000_000_000, 86_400_000
    now = right
    registry = open_ledger(clock=lambda: now)
    registry.create(runtime="cli", task="before")
    now = right + 3650 * day
    registry.create(runtime="cli", task="ahead")
    now = right + 30 * day
    registry.create(runtime="cli", task="after")
    assert registry.as_of(right).seq == 1
    for moment in (right + 1, right + 29 * day, now):
        with pytest.raises(ValidationError, match="from seq 2 on are later than the clock"):
            registry.as_of(moment)
    assert len(registry.as_of(3).records) == 3
    assert registry.as_of(right + 3650 * day).seq == 3
    now = right + 3650 * day
    assert registry.as_of(right + 29 * day).seq == 1


def test_compaction_moves_only_the_floor(registry):
    lived(registry)
    kept = registry.create(runtime="cli", task="y")
    before = {seq: registry.as_of(seq) for seq in range(7)}
    compact(registry.store, CompactionPolicy().forced())
    assert {seq: registry.as_of(seq) for seq in range(7)} == before
    report = compact(registry.store, KEEP_NOTHING)
    registry.mark_running(kept.task_id)
    report = compact(registry.store, KEEP_NOTHING)
    assert report.floor == 8
    with pytest.raises(CursorExpiredError) as raised:
        registry.as_of(6)
    assert (raised.value.after, raised.value.floor) == (6, 8)
    with pytest.raises(CursorExpiredError):
        registry.changes(after=3)
    assert registry.as_of(7).records[kept.task_id].status == "running"
    assert [entry.seq for entry in registry.changes(after=7)] == []


def test_a_store_without_a_journal_raises():
    registry = TaskRegistry(OnlyLoadAndSave())
    task = registry.create(runtime="cli", task="x", run_id="r")
    registry.mark_running(task.task_id)
    assert TaskRegistry(registry.store).get(task.task_id).status == "running"
    for ask in (
        registry.changes,
        lambda: registry.as_of(1),
        lambda: registry.history("x"),
    ):
        with pytest.raises(UnsupportedError):
            ask()
    assert registry.refresh() == 2
    with pytest.raises(UnsupportedError):
        compact(registry.store)


def test_as_of_during_a_compaction():
    class Racing(MemoryStore):
        """Compacts just after a read of the floor."""

        race = False

        def floor(self):
            floor = super().floor()
            if self.race:
                self.race = False
                compact(self, KEEP_NOTHING)
            return floor

    store = Racing()
    registry = TaskRegistry(store)
    for number in range(10):
        registry.create(runtime="cli", task=str(number))
    compact(store, KEEP_NOTHING)
    registry.create(runtime="cli", task="10")
    store.race = True
    assert registry.as_of(11).seq == 11
    assert store.floor() == 12, "it did not pass by"


def test_following_ends_when_the_registry_is_closed():
    registry = TaskRegistry(MemoryStore())
    following = registry.changes(wait=30)
    closing = threading.Timer(0.1, registry.close)
    closing.start()
    with pytest.raises(StoreClosedError):
        list(following)
    closing.join()
