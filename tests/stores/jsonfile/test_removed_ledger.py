"""A directory whose lock file outlived its ledger is not a new ledger."""

from __future__ import annotations

import os
import shutil

import pytest
from jsonfiles import names, segments, snapshots, state_of

from taskstore import CompactionPolicy, CorruptStoreError, StoreUnavailableError, TaskRegistry
from taskstore.store.disk import Disk
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing.crash.processes import Child
from taskstore.testing.factories import create

TRIM = CompactionPolicy(force=True, history_s=0, history_entries=0, keep_snapshots=1)


def remove_ledger(directory):
    for path in (*segments(directory), *snapshots(directory)):
        path.unlink()


@pytest.fixture(params=["full", "process"])
def durability(request):
    return request.param


@pytest.mark.parametrize("read_only", [False, True], ids=["writer", "reader"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "compacted"])
def test_a_removed_ledger_is_refused_and_nothing_is_changed(directory, durability, read_only, used):
    with JSONStore(directory, durability=durability) as store:
        if used:
            create(store)
            store.compact(TRIM)
    remove_ledger(directory)
    assert "lock" in names(directory)
    before = state_of(directory)
    for _ in range(2):
        with pytest.raises(CorruptStoreError) as caught:
            JSONStore(directory, durability=durability, read_only=read_only)
        assert str(directory) in str(caught.value)
        assert "restore" in caught.value.hint
        assert str(directory / "lock") in caught.value.hint
        assert state_of(directory) == before
    with pytest.raises(CorruptStoreError):
        TaskRegistry.open(f"json:///{directory}", read_only=read_only)
    assert state_of(directory) == before
    (directory / "lock").unlink()
    with JSONStore(directory) as store:
        assert store.head() == 0
        create(store)


@pytest.mark.parametrize(
    "line",
    [
        b"0000000123 00000000000001234568 00000000000000000000 00000000000000000000\n",
        # The generation is odd: the writer was killed while it changed the files.
        b"0000000123 00000000000001234567 00000000000000000000 00000000000000000000\n",
        b"0000000123 00000000000001234567 00000000000000000\n",  # not written completely
        b"0000000123 00000000000001234568\n",  # of taskstore 0.1.0
    ],
)
def test_the_lock_files_of_all_versions_are_known(directory, line):
    directory.mkdir()
    (directory / "lock").write_bytes(line)
    for read_only in (False, True):
        with pytest.raises(CorruptStoreError):
            JSONStore(directory, read_only=read_only)
    assert (directory / "lock").read_bytes() == line


@pytest.mark.parametrize("line", [b"", b"0000000000 00000000000000000000\n", b"\0" * 74, b"12"])
def test_a_lock_file_that_names_no_ledger_does_not_prevent_a_new_one(directory, line):
    directory.mkdir()
    (directory / "lock").write_bytes(line)
    (directory / "lock.turn").touch()
    (directory / "compact.lock").touch()
    with pytest.raises(StoreUnavailableError):
        JSONStore(directory, read_only=True)
    with JSONStore(directory) as store:
        create(store)


class KilledAt(Disk):
    """Kills the process before the operation with this number."""

    def __init__(self, number):
        self.left = number

    def __getattribute__(self, name):
        operations = ("open", "close", "pwrite", "sync_file", "sync_directory", "rename", "mkdir")
        if name in operations:
            self.left -= 1
            if not self.left:
                os._exit(1)
        return super().__getattribute__(name)


def test_a_creation_that_was_killed_at_any_step_is_repeated(directory, durability):
    for number in range(1, 60):

        def work(report, number=number):
            JSONStore(directory, durability=durability, disk=KilledAt(number))
            report("created")

        try:
            created = Child(work).finish() == ["created"]
        except AssertionError:  # the child ended with status 1
            created = False
        with JSONStore(directory, durability=durability) as store:
            create(store)
        with JSONStore(directory, read_only=True) as reader:
            assert reader.head() == 1
        shutil.rmtree(directory)
        if created:
            break
    assert created
    assert number > 10


class Paused(Disk):
    """Calls ``during`` before the first file is renamed to a segment."""

    def __init__(self, during):
        self.during = during

    def rename(self, old, new):
        if new.name.startswith("journal-") and self.during is not None:
            during, self.during = self.during, None
            during()
        super().rename(old, new)


def test_a_ledger_that_is_being_created_is_not_a_removed_one(directory):
    opened = []

    def during():
        with pytest.raises(StoreUnavailableError, match="there is no ledger"):
            JSONStore(directory, read_only=True)
        opened.append(Child(lambda report: create(JSONStore(directory))))

    with JSONStore(directory, disk=Paused(during)) as store:
        assert opened.pop().finish() == []
        assert store.head() == 1


def test_a_creation_during_the_opening_of_a_reader(directory, monkeypatch):
    """The reader finds no files; the ledger is created; then the reader reads the lock file."""
    from taskstore.stores.jsonfile import reading

    found = reading.read_layout

    def read_layout(path):
        layout = found(path)
        if layout.is_empty:
            JSONStore(directory).close()
        return layout

    directory.mkdir()
    monkeypatch.setattr(reading, "read_layout", read_layout)
    with JSONStore(directory, read_only=True) as reader:
        assert reader.head() == 0


def test_an_open_store_waits_for_the_restore(directory, open_):
    writer, reader = open_(), open_(read_only=True)
    create(writer)
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)
    remove_ledger(directory)
    for call in (lambda: create(writer), writer.load_snapshot, reader.load_snapshot, reader.head):
        with pytest.raises(StoreUnavailableError):
            call()
    for path in segments(copy):
        shutil.copy2(path, directory)
    create(writer)
    assert reader.head() == 2
