"""[4] Commits of other writers are synced before the next append, unless already synced."""

from __future__ import annotations

import errno
import os

import pytest
from jsonfiles import FOLD, segments

from taskstore import ConflictError
from taskstore.store.disk import Disk
from taskstore.testing.factories import create, make_put, next_of, update

SYNCED_BEFORE = ["line", "sync", "record"]
SYNCED_OFFSET = len("1234567890 12345678901234567890 ")
"""The offset of the synced offset in the lock file, after the pid and the generation."""
NOT_SYNCED_BEFORE = ["sync", *SYNCED_BEFORE]


class Steps(Disk):
    """Records the steps on the journal and the lock file, one word each."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.full = False
        self._lock_files: set[int] = set()

    def open(self, path, flags, mode=0o600):
        descriptor = super().open(path, flags, mode)
        is_lock = path.name in {"lock", "lock.tmp"}
        (self._lock_files.add if is_lock else self._lock_files.discard)(descriptor)
        return descriptor

    def pwrite(self, descriptor, data, offset):
        if self.full and descriptor in self._lock_files:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.steps.append("record" if descriptor in self._lock_files else "line")
        return super().pwrite(descriptor, data, offset)

    def sync_data(self, descriptor):
        self.steps.append("sync")
        super().sync_data(descriptor)


@pytest.fixture
def disk():
    return Steps()


@pytest.fixture
def both(open_, disk):
    """Two writers that have committed in turn; ``disk`` records the steps of the first one."""
    store, other = open_(disk=disk), open_()
    for _ in range(2):
        create(other)
        create(store)
    disk.steps.clear()
    return store, other


def test_alternating_writers_sync_once_for_each_commit(both, disk):
    store, other = both
    for _ in range(3):
        create(other)
        create(store)
    create(store)
    assert disk.steps == 4 * SYNCED_BEFORE


def test_a_single_writer_does_not_record_its_syncs(open_, disk):
    store = open_(disk=disk)
    create(store)
    disk.steps.clear()
    create(store)
    create(store)
    assert disk.steps == ["line", "sync"] * 2


def test_a_conflict_records_no_sync(both, disk):
    store, other = both
    record = create(other)
    with pytest.raises(ConflictError):
        store.apply([next_of(record, revision=7)])
    assert disk.steps == []
    update(store, record)
    assert disk.steps == SYNCED_BEFORE


def test_an_unsynced_commit_of_another_writer_is_synced_first(both, open_, disk):
    store, _ = both
    unsynced = open_(durability="process")
    for _ in range(2):
        create(unsynced)
        create(store)
    assert disk.steps == 2 * NOT_SYNCED_BEFORE


class Killed(BaseException):
    pass


class Deadly(Disk):
    """If ``armed``, kills the writer at its next sync."""

    def __init__(self) -> None:
        self.armed = self._dead = False

    def sync_data(self, descriptor):
        self._dead |= self.armed
        self._live()
        super().sync_data(descriptor)

    def truncate(self, descriptor, size):
        self._live()
        super().truncate(descriptor, size)

    def pwrite(self, descriptor, data, offset):
        self._live()
        return super().pwrite(descriptor, data, offset)

    def _live(self):
        if self._dead:
            raise Killed


def test_an_unsynced_commit_of_a_killed_writer_is_synced_first(both, open_, disk):
    store, other = both
    deadly = Deadly()
    victim = open_(disk=deadly)
    create(other)
    create(victim)  # it knows of other writers from now on
    create(other)
    create(store)
    disk.steps.clear()
    deadly.armed = True
    with pytest.raises(Killed):
        create(victim)
    assert len(store.load_snapshot().records) == 9
    create(store)
    assert disk.steps == NOT_SYNCED_BEFORE


def emptied(lock):
    with lock.open("r+b") as file:
        file.truncate(0)


def torn(lock):
    """The first digit is that of an offset beyond the synced bytes."""
    with lock.open("r+b") as file:
        file.seek(SYNCED_OFFSET)
        file.write(b"1")


def nonsense(lock):
    with lock.open("r+b") as file:
        file.seek(SYNCED_OFFSET)
        file.write(b"x" * 41)


@pytest.mark.parametrize("harm", [emptied, torn, nonsense])
def test_a_missing_or_torn_synced_offset_is_not_used(both, directory, disk, harm):
    store, other = both
    create(other)
    harm(directory / "lock")
    create(store)
    # An unreadable state is written before the commit, with the pid.
    rewritten = [] if harm is torn else ["record"]
    assert disk.steps == ["sync", *rewritten, *SYNCED_BEFORE]


def test_a_synced_offset_does_not_apply_to_a_new_segment(both, disk):
    store, other = both
    create(other)
    other.compact(FOLD)
    create(other)
    create(store)
    assert disk.steps == NOT_SYNCED_BEFORE


def test_an_unsynced_cut_is_synced_first(both, directory, open_, disk):
    """The file has its old length, but a power loss may restore the cut bytes."""
    store, _ = both
    with segments(directory)[-1].open("ab") as file:
        file.write(b'{"crc":"00000000","torn')
    open_(durability="process")
    create(store)
    assert "sync" in disk.steps[: disk.steps.index("line")]


def test_a_synced_offset_that_cannot_be_written_is_no_failure(both, disk):
    store, other = both
    create(other)
    disk.full = True
    change = make_put()
    store.apply([change])
    assert store.load_snapshot().records[change.record.task_id] == change.record
    disk.full = False
    create(other)
    create(store)
    assert disk.steps == ["line", "sync", *SYNCED_BEFORE]
