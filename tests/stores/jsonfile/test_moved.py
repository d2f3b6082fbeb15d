"""A directory removed, replaced or moved: no commit acknowledged afterwards is lost."""

from __future__ import annotations

import shutil

import pytest
from jsonfiles import FOLD, segments

from taskstore import StoreUnavailableError, TaskRegistry
from taskstore.testing.factories import create


@pytest.fixture
def backup(directory, open_):
    """A copy of all files, locks included, and a writer that stays open."""
    writer = open_()
    create(writer, task_id="before")
    copy = directory.with_name("backup")
    shutil.copytree(directory, copy)
    return writer, copy


@pytest.mark.parametrize("went_on", [False, True], ids=["same", "older"])
@pytest.mark.parametrize("moved", [False, True], ids=["removed", "moved away"])
def test_a_backup_that_was_put_in_place(backup, directory, open_, moved, went_on):
    writer, copy = backup
    if went_on:
        create(writer, task_id="lost by the restore")
    if moved:
        directory.rename(directory.with_name("old"))
    else:
        shutil.rmtree(directory)
    shutil.copytree(copy, directory)
    acknowledged = {create(writer).task_id for _ in range(5)}
    for instance in (writer, open_(), open_(read_only=True)):
        assert set(instance.load_snapshot().records) == acknowledged | {"before"}
        assert instance.head() == 6
        assert instance.verify().ok
    writer.compact(FOLD)
    assert open_().head() == 6


def test_files_that_were_put_back_under_the_same_lock(backup, directory, open_):
    writer, copy = backup
    create(writer, task_id="lost by the restore")
    [segment] = segments(directory)
    segment.unlink()
    shutil.copy2(copy / segment.name, segment)
    acknowledged = {create(writer).task_id for _ in range(3)}
    assert set(open_().load_snapshot().records) == acknowledged | {"before"}


@pytest.mark.parametrize("how", ["the directory", "its files", "the segment", "moved away"])
def test_a_missing_ledger_is_not_written(backup, directory, how):
    writer, _ = backup
    if how == "the directory":
        shutil.rmtree(directory)
    elif how == "moved away":
        directory.rename(directory.with_name("old"))
    elif how == "its files":
        for path in directory.iterdir():
            path.unlink()
    else:
        segments(directory)[0].unlink()
    for _ in range(2):
        with pytest.raises(StoreUnavailableError) as caught:
            create(writer)
        assert str(directory) in str(caught.value)
    assert not directory.exists() or not segments(directory)


def test_a_registry_continues_from_a_restored_backup(directory):
    with TaskRegistry.open(f"json:///{directory}") as registry:
        first = registry.create(runtime="cli", task="first")
        copy = directory.with_name("backup")
        shutil.copytree(directory, copy)
        lost = registry.create(runtime="cli", task="lost by the restore")
        shutil.rmtree(directory)
        shutil.copytree(copy, directory)
        mine = [registry.create(runtime="cli", task="after") for _ in range(3)]
        assert registry.find(lost.task_id) is None
    with TaskRegistry.open(f"json:///{directory}") as registry:
        for record in (first, *mine):
            assert registry.find(record.task_id) == record
