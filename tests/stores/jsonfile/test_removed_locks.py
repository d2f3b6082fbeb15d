"""Lock files that another program removes: no commit is lost, and no writer fails."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading

import pytest
from jsonfiles import FOLD, FOLD_AND_TRIM, child, names

from taskstore import StoreBusyError
from taskstore.model.journal import Snapshot
from taskstore.store.disk import Disk
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing.factories import create, make_record, update
from taskstore.testing.threads import meanwhile

LOCK_FILES = ("lock", "lock.tmp", "compact.lock", "lock.turn", "compact.lock.turn")
WRITE = """
with JSONStore(sys.argv[1], durability="process") as store:
    print("ready", flush=True)
    sys.stdin.readline()
    done = [create(store).task_id for _ in range(int(sys.argv[2]))]
    print(*done)
"""


def remove_lock_files(directory):
    for name in LOCK_FILES:
        with contextlib.suppress(FileNotFoundError):
            (directory / name).unlink()


@pytest.mark.parametrize("known", [True, False], ids=["open before", "opened later"])
def test_a_writer_stays_alone_if_its_lock_file_is_removed(directory, open_, known):
    owner = open_()
    task = create(owner)
    if known:
        other = open_(lock_timeout_s=0.05)
        create(other)
    with owner.exclusive():
        for _ in range(2):
            remove_lock_files(directory)
            with pytest.raises(StoreBusyError) as caught:
                create(other if known else JSONStore(directory, lock_timeout_s=0.05))
            assert f"pid {os.getpid()}" in str(caught.value)
        task = update(owner, task)
    for store in (open_(), owner, open_()):
        task = update(store, task)
    assert open_().verify().ok


@pytest.mark.parametrize("compacts", [False, True], ids=["appends", "begins a segment"])
def test_writers_notice_changes_behind_a_removed_lock_file(directory, open_, compacts):
    one, two, reader = open_(), open_(), open_(read_only=True)
    task = create(one)
    for _ in range(3):
        for store in (two, one):
            task = update(store, task)
            if compacts:
                store.compact(FOLD_AND_TRIM)
            remove_lock_files(directory)
            assert reader.load_snapshot().records[task.task_id] == task
    assert one.head() == reader.head() == 7
    assert one.verify().ok


def test_processes_lose_nothing_while_a_cleaner_removes_the_lock_files(directory, open_):
    store = open_()
    writers = [child(WRITE, directory, 60, stdin=-1) for _ in range(3)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    ended = threading.Event()

    def clean():
        while not ended.is_set():
            remove_lock_files(directory)

    acknowledged = set()
    with meanwhile(clean):
        try:
            for writer in writers:
                writer.stdin.write("\n")
                writer.stdin.flush()
            while any(writer.poll() is None for writer in writers):
                acknowledged.add(create(store).task_id)
                with contextlib.suppress(StoreBusyError):
                    store.compact(FOLD_AND_TRIM)
        finally:
            ended.set()
    for writer in writers:
        printed, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0, printed
        acknowledged |= set(printed.split())
    for instance in (store, open_()):
        assert set(instance.load_snapshot().records) == acknowledged
        assert instance.verify().ok


def test_a_compactor_stays_alone_if_its_lock_file_is_removed(directory, open_, monkeypatch):
    monkeypatch.setattr("taskstore.stores.jsonfile.compaction.COMPACT_LOCK_TIMEOUT_S", 0.05)
    store, other = open_(), open_(lock_timeout_s=0.05)
    task = create(store)
    with store._writer.compact_lock().hold(0, "nobody"):
        temporary = directory / "snapshot-00000000000000000001.json.tmp"
        temporary.write_bytes(b"half")
        remove_lock_files(directory)
        with pytest.raises(StoreBusyError, match="compactor") as caught:
            other.compact(FOLD)
        assert f"pid {os.getpid()}" in str(caught.value)
        with pytest.raises(StoreBusyError):
            other.save_snapshot(Snapshot(100))
        open_()  # a writer that removes leftover files
        assert temporary.exists()
        task = update(other, task)  # writers do not wait for a compactor
    assert other.compact(FOLD).compacted
    assert other.load_snapshot().records == {task.task_id: task}


@pytest.mark.parametrize("replaces", [False, True], ids=["compaction", "replacement"])
def test_the_lock_moves_to_the_segment_after_the_new_snapshot(
    directory, open_, monkeypatch, replaces
):
    """The lock file is removed, and the snapshot is published: the owner still excludes others."""
    store, other = open_(), open_()
    create(store)
    attempts = []
    disk = store._writer.disk
    publish, remove_all = disk.publish, disk.remove_all

    def attempt():
        lock = other._writer.compact_lock()
        try:
            attempts.append(lock.try_acquire())
        finally:
            lock.close()

    class Spy:
        def __getattr__(self, name):
            return getattr(disk, name)

        def publish(self, temporary, path):
            publish(temporary, path)
            remove_lock_files(directory)
            attempt()

        def remove_all(self, paths):
            attempt()
            remove_all(paths)

    store._writer.disk = Spy()
    if replaces:
        record = make_record()
        store.save_snapshot(Snapshot(50, {record.task_id: record}))
    else:
        for _ in range(3):
            create(store)
            store.compact(FOLD_AND_TRIM)
    store._writer.disk = disk
    assert len(attempts) >= 3
    assert not any(attempts)
    lock = other._writer.compact_lock()
    assert lock.try_acquire()
    lock.close()


@pytest.mark.parametrize("returns", [False, True], ids=["another ledger", "a copy"])
def test_a_directory_that_is_moved_under_its_lock_owner(directory, open_, returns):
    """The commit goes to the moved directory, or the other writer waits for it: none is lost."""
    store = open_()
    task = create(store)
    with store.exclusive():
        moved = directory.with_name("moved")
        directory.rename(moved)
        if returns:
            shutil.copytree(moved, directory)
        newcomer = JSONStore(directory, lock_timeout_s=0.05)
        create(newcomer)
        update(store, task)
    with JSONStore(moved) as there:
        assert there.load_snapshot().records[task.task_id].revision == 2
        assert there.verify().ok
    acknowledged = create(store).task_id
    with newcomer:
        assert acknowledged in newcomer.load_snapshot().records
        assert newcomer.verify().ok


def test_an_older_version_cannot_write_at_the_same_time(directory, open_):
    """taskstore 0.1.0 takes an exclusive lock on the lock file for each commit."""
    store = open_()
    task = create(store)
    for _ in range(2):
        with (directory / "lock").open("r+b") as older, pytest.raises(BlockingIOError):
            fcntl.flock(older, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (directory / "lock").unlink()
        task = update(store, task)
    store.close()
    with (directory / "lock").open("r+b") as older:
        fcntl.flock(older, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(StoreBusyError):
            JSONStore(directory, lock_timeout_s=0.05)
    update(open_(), task)


def test_a_lone_commit_makes_few_system_calls(open_, monkeypatch):
    store = open_()
    for _ in range(2):
        create(store)
    calls = []

    def counted(module, name):
        real = getattr(module, name)

        def call(*arguments, **options):
            calls.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for name in ("access", "fdatasync", "fstat", "listdir", "lseek", "open", "pread", "pwrite",
                 "read", "stat", "write"):  # fmt: skip
        counted(os, name)
    counted(fcntl, "flock")
    create(store)
    # The directory, the lock file and the segment; the state and the end of the segment.
    assert calls.count("stat") == 3
    assert calls.count("pread") == 2
    assert calls.count("flock") == 2
    assert sorted({*calls} - {"stat", "pread", "flock"}) == ["access", "fdatasync", "pwrite"]
    assert len(calls) <= 10


class Cleaning(Disk):
    """Removes the lock files before and after every operation that names a file."""

    def __init__(self, directory):
        self.directory = directory

    def open(self, path, flags, mode=0o600):
        remove_lock_files(self.directory)
        descriptor = super().open(path, flags, mode)
        remove_lock_files(self.directory)
        return descriptor

    def rename(self, old, new):
        super().rename(old, new)
        remove_lock_files(self.directory)


def test_a_cleaner_that_is_always_faster_makes_no_writer_fail(directory, open_):
    store = open_(disk=Cleaning(directory))
    other = open_()
    task = create(store)
    for writer in (store, other) * 2:
        remove_lock_files(directory)
        task = update(writer, task)
    assert store.verify().ok
    assert open_().head() == 5


def test_queue_files_are_not_needed(directory, open_):
    store = open_()
    assert "lock.turn" not in names(directory)
    with store.exclusive(), pytest.raises(StoreBusyError):
        JSONStore(directory, lock_timeout_s=0.01)
    assert "lock.turn" in names(directory)
