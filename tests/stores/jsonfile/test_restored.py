"""A backup is restored while a writer has the ledger open: by a move, and in place."""

from __future__ import annotations

import shutil

import pytest

from taskstore import Restored, StoreUnavailableError, TaskNotFound, TaskRegistry


def content(directory):
    return [path for path in directory.iterdir() if ".json" in path.suffix]


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "ledger"


@pytest.fixture
def events():
    return []


@pytest.fixture
def live(ledger, events, tmp_path):
    """A registry with six tasks, of which the backup has three."""
    with TaskRegistry.open(f"json:///{ledger}", hooks=[events.append]) as registry:
        for number in range(3):
            registry.create(runtime="cli", task=f"base {number}")
        (tmp_path / "backup").mkdir()
        for path in content(ledger):
            shutil.copy2(path, tmp_path / "backup")
        registry.lost = [registry.create(runtime="cli", task=f"lost {n}") for n in range(3)]
        events.clear()
        yield registry


def move_away(ledger):
    moved = ledger.with_name("moved")
    moved.mkdir()
    for path in content(ledger):
        path.rename(moved / path.name)


def restore(ledger):
    for path in content(ledger.with_name("backup")):
        shutil.copy2(path, ledger)


def tasks_of(ledger):
    with TaskRegistry.open(f"json:///{ledger}") as registry:
        assert not registry.store.verify().problems
        return sorted(task.task for task in registry.list())


def test_the_files_were_moved_and_a_backup_was_restored(live, ledger, events):
    move_away(ledger)
    restore(ledger)
    live.create(runtime="cli", task="acknowledged")
    assert isinstance(events[0], Restored)
    assert live.seq == 4
    assert tasks_of(ledger) == ["acknowledged", "base 0", "base 1", "base 2"]


def test_the_files_were_moved_and_not_restored(live, ledger):
    move_away(ledger)
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="are gone"):
            live.create(runtime="cli", task="not acknowledged")
    assert content(ledger) == []


@pytest.mark.parametrize("count", [0, 2, 3, 4])
def test_restored_in_place_and_other_writers_have_continued(live, ledger, events, count):
    restore(ledger)
    with TaskRegistry.open(f"json:///{ledger}") as others:
        for number in range(count):
            others.create(runtime="cli", task=f"next {number}")
    with pytest.raises(TaskNotFound):
        live.finish(live.lost[0].task_id, "succeeded")
    assert isinstance(events[0], Restored)
    live.create(runtime="cli", task="acknowledged")
    assert tasks_of(ledger) == sorted(
        ["acknowledged", "base 0", "base 1", "base 2", *(f"next {n}" for n in range(count))]
    )
