"""A backup is restored under a live registry: it starts over, and nothing is mixed or skipped.

A standby that took over without the last commits looks the same from here.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from backups import DirectoryBackup, MemoryBackup, ServerBackup, SQLiteBackup

from taskstore import (
    CompactionPolicy,
    CursorExpiredError,
    InvalidTransition,
    Restored,
    TaskRegistry,
    Upserted,
    ValidationError,
)
from taskstore.aio import AsyncTaskRegistry
from taskstore.registry.history import JournalReader
from taskstore.stores.memory import MemoryStore
from taskstore.testing.threads import until


@pytest.fixture
def back_up(open_ledger, backend, ledger_url, tmp_path):
    def make(registry):
        if backend == "memory":
            return MemoryBackup(registry.store.storage)
        if backend == "json":
            return DirectoryBackup(tmp_path / "ledger")
        if backend == "sqlite":
            return SQLiteBackup(Path(tmp_path / "tasks.db"))
        return ServerBackup(ledger_url)

    return make


@pytest.fixture
def live(open_ledger, back_up):
    """A registry at seq 6, whose ledger was restored to seq 3: one task, at revision 3."""
    events = []
    registry = open_ledger(hooks=[events.append])
    registry.task = registry.create(runtime="cli", task="x", status="running")
    registry.update_metadata(registry.task.task_id, {"a": 1})
    registry.record_progress(registry.task.task_id, "saved")
    backup = back_up(registry)
    for step in ("lost 1", "lost 2", "lost 3"):
        registry.record_progress(registry.task.task_id, step)
    registry.last = list(registry.changes())[-1]
    backup.restore()
    registry.backup = backup
    registry.heard = events
    events.clear()
    return registry


def same_as_stored(registry):
    loaded = registry.store.load_snapshot()
    return (registry.seq, {task.task_id: task for task in registry.list()}) == (
        loaded.seq,
        dict(loaded.records),
    )


def others_go_on(open_ledger, registry, *steps):
    """Another writer commits to the restored ledger; returns its last record."""
    with_others = open_ledger()
    record = with_others.get(registry.task.task_id)
    for step in steps:
        record = with_others.record_progress(record.task_id, step)
    return record


def test_refresh_after_a_restored_backup(live):
    assert live.refresh() == 3
    assert live.get(live.task.task_id).progress_summary == "saved"
    assert same_as_stored(live)
    assert [type(event) for event in live.heard] == [Restored]


@pytest.mark.parametrize("count", [1, 3, 5], ids=["behind", "level", "ahead"])
def test_refresh_after_further_commits_of_others(live, open_ledger, count):
    theirs = others_go_on(open_ledger, live, *[f"theirs {n}" for n in range(count)])
    live.refresh()
    assert live.get(live.task.task_id) == theirs
    assert same_as_stored(live)
    assert isinstance(live.heard[0], Restored)


def test_a_restore_during_a_load(live, open_ledger, monkeypatch):
    load = live.store.load_snapshot
    others_go_on(open_ledger, live, "lost 1", "lost 2", "lost 3")

    def torn():
        snapshot = load()
        live.backup.restore()
        others_go_on(open_ledger, live, "theirs 1", "theirs 2", "theirs 3")
        return snapshot

    with monkeypatch.context() as patch:
        patch.setattr(live.store, "load_snapshot", torn)
        live.refresh()
    live.refresh()
    assert live.seq == 6
    assert same_as_stored(live)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4], ids="others-{}".format)
def test_the_first_write_applies_to_the_stored_records(live, open_ledger, count):
    theirs = others_go_on(open_ledger, live, *[f"theirs {n}" for n in range(count)])
    done = live.update_metadata(live.task.task_id, {"b": 2})
    expected = "saved" if theirs.revision == 3 else f"theirs {count - 1}"
    assert (done.progress_summary, done.revision) == (expected, theirs.revision + 1)
    assert done.metadata == {"a": 1, "b": 2}
    assert same_as_stored(live)
    kinds = [type(event) for event in live.heard]
    assert Restored in kinds
    assert kinds[-1] is Upserted


def test_a_late_success_does_not_overwrite_a_cancel_of_the_other_history(live, open_ledger):
    others = open_ledger()
    for step in ("one", "two"):
        others.record_progress(live.task.task_id, step)
    # Now the ledger and the task have the seq and revision of the live registry.
    cancelled = others.cancel(live.task.task_id, "enough")
    assert (others.seq, cancelled.revision) == (live.seq, live.get(live.task.task_id).revision)
    with pytest.raises(InvalidTransition):
        live.finish(live.task.task_id, "succeeded")
    assert live.get(live.task.task_id) == cancelled
    assert live.store.verify().ok


def test_a_create_that_fits_both_histories(live, open_ledger):
    others_go_on(open_ledger, live, "one", "two", "three")
    made = live.create(runtime="cli", task="new")
    assert same_as_stored(live)
    assert live.get(made.task_id) == made
    assert live.get(live.task.task_id).progress_summary == "three"


def test_a_batch_over_the_lost_history(live, open_ledger):
    others_go_on(open_ledger, live, "one", "two", "three")
    with live.batch():
        live.create(runtime="cli", task="new")
        live.update_metadata(live.task.task_id, {"c": 3})
    assert live.get(live.task.task_id).progress_summary == "three"
    assert same_as_stored(live)


def test_no_cursor_skips_an_entry(live, open_ledger):
    cursor, seq = live.last.cursor, live.last.seq
    for after in (cursor, seq):
        with pytest.raises(CursorExpiredError) as raised:
            live.changes(after=after)
        assert raised.value.replaced
    others = others_go_on(open_ledger, live, "one", "two", "three", "four")
    with pytest.raises(CursorExpiredError):
        live.changes(after=live.seq)
    with pytest.raises(CursorExpiredError, match="restored") as raised:
        live.changes(after=cursor)
    assert (raised.value.after, raised.value.replaced) == (seq, True)
    # A position that both histories have is valid.
    third = next(iter(live.changes(after=2)))
    assert [entry.seq for entry in live.changes(after=third.cursor)] == [4, 5, 6, 7]
    assert [entry.revision for entry in live.changes(after=third.cursor)][-1] == others.revision


def test_a_reader_of_changes_gets_an_error(open_ledger, back_up):
    registry = open_ledger()
    registry.create(runtime="cli", task="kept")
    backup = back_up(registry)
    registry.create(runtime="cli", task="lost")
    following = registry.changes(wait=30)
    assert [next(following).seq, next(following).seq] == [1, 2]
    backup.restore()
    with pytest.raises(CursorExpiredError):
        next(following)


def test_a_reader_from_a_seq_gets_an_error_too(open_ledger, back_up):
    registry = open_ledger()
    registry.create(runtime="cli", task="kept")
    backup = back_up(registry)
    for number in range(2):
        registry.create(runtime="cli", task=f"lost {number}")
    reader = JournalReader(registry.store, 2)
    reader.check()
    backup.restore()
    with open_ledger() as other:
        for number in range(3):
            other.create(runtime="cli", task=f"new {number}")
    with pytest.raises(CursorExpiredError):
        reader.next_page()


def test_a_follower_reloads(live, open_ledger):
    with live.follow():
        theirs = others_go_on(open_ledger, live, "one")
        until(lambda: live.get(live.task.task_id) == theirs)
    assert [type(event) for event in live.heard][:1] == [Restored]


@pytest.mark.parametrize(
    "after", ["", "x", "-1", "1.5", "²:a", ":a", "1:\0", "9" * 17, "1:" + "a" * 300]
)
def test_an_invalid_cursor_is_refused(registry, after):
    with pytest.raises(ValidationError, match="after"):
        registry.changes(after=after)


def test_a_cursor_in_asyncio():
    async def main():
        async with await AsyncTaskRegistry.over(MemoryStore()) as registry:
            for _ in range(3):
                await registry.create(runtime="cli", task="x")
            entries = [entry async for entry in registry.changes()]
            after = entries[0].cursor
            assert [entry.seq async for entry in registry.changes(after=after)] == [2, 3]
            with pytest.raises(CursorExpiredError):
                [entry async for entry in registry.changes(after="1:of another history")]

    asyncio.run(main())


def test_a_position_whose_entry_was_trimmed_is_accepted(open_ledger):
    registry: TaskRegistry = open_ledger()
    task = registry.create(runtime="cli", task="x")
    registry.store.save_snapshot(
        type(registry.store.load_snapshot())(5, registry.store.load_snapshot().records)
    )
    registry.refresh()
    assert registry.record_progress(task.task_id, "on").revision == 2
    assert registry.seq == 6


def test_a_cursor_of_another_history_before_the_floor(open_ledger):
    """After a compaction without history no entry is left whose commit id could be compared."""
    registry = open_ledger()
    for number in range(3):
        registry.create(runtime="cli", task=str(number))
    last = list(registry.changes())[-1]
    registry.store.compact(CompactionPolicy(history_s=0, history_entries=0).forced())
    foreign = f"{last.seq}:{'0' * 32}"
    for reader in (registry, open_ledger()):
        assert list(reader.changes(after=last.cursor)) == []
        with pytest.raises(CursorExpiredError) as caught:
            reader.changes(after=foreign)
        assert caught.value.replaced
    added = registry.create(runtime="cli", task="later")
    for reader in (registry, open_ledger()):
        assert [entry.task_id for entry in reader.changes(after=last.cursor)] == [added.task_id]
        with pytest.raises(CursorExpiredError):
            reader.changes(after=foreign)
