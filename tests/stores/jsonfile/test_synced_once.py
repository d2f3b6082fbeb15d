"""[4] What another writer has synced is not synced again; what nobody has synced is, first."""

from __future__ import annotations

import errno
import os

import pytest
from jsonfiles import FOLD, segments

from taskstore import ConflictError
from taskstore.store.disk import Disk
from taskstore.testing.factories import create, make_put, next_of, update

IN_TURN = ["line", "sync", "note"]
NOTE = len("1234567890 12345678901234567890 ")
"""Where in the lock file it stands, after the pid and the generation."""
AFTER_ONE_WHO_DID_NOT = ["sync", *IN_TURN]


class Steps(Disk):
    """What is done to the journal and to the lock file, one word each."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.full = False
        self._notes: set[int] = set()

    def open(self, path, flags, mode=0o600):
        descriptor = super().open(path, flags, mode)
        (self._notes.add if path.name == "lock" else self._notes.discard)(descriptor)
        return descriptor

    def pwrite(self, descriptor, data, offset):
        if self.full and descriptor in self._notes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.taken.append("note" if descriptor in self._notes else "line")
        return super().pwrite(descriptor, data, offset)

    def sync_data(self, descriptor):
        self.taken.append("sync")
        super().sync_data(descriptor)


@pytest.fixture
def disk():
    return Steps()


@pytest.fixture
def both(open_, disk):
    """Two writers in turn, as they are after a while; the steps of the first one are told."""
    store, other = open_(disk=disk), open_()
    for _ in range(2):
        create(other)
        create(store)
    disk.taken.clear()
    return store, other


def test_who_writes_in_turn_syncs_once_for_each_commit(both, disk):
    store, other = both
    for _ in range(3):
        create(other)
        create(store)
    create(store)
    assert disk.taken == 4 * IN_TURN


def test_who_is_alone_leaves_no_note(open_, disk):
    store = open_(disk=disk)
    create(store)
    disk.taken.clear()
    create(store)
    create(store)
    assert disk.taken == ["line", "sync"] * 2


def test_who_wrote_nothing_has_nothing_to_tell(both, disk):
    store, other = both
    record = create(other)
    with pytest.raises(ConflictError):
        store.apply([next_of(record, revision=7)])
    assert disk.taken == []
    update(store, record)
    assert disk.taken == IN_TURN


def test_what_another_has_not_synced_is_synced_first(both, open_, disk):
    store, _ = both
    careless = open_(durability="process")
    for _ in range(2):
        create(careless)
        create(store)
    assert disk.taken == 2 * AFTER_ONE_WHO_DID_NOT


class Killed(BaseException):
    pass


class Deadly(Disk):
    """Kills whoever wants to sync, if it is ``armed``."""

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


def test_what_a_killed_one_has_not_synced_is_synced_first(both, open_, disk):
    store, other = both
    deadly = Deadly()
    victim = open_(disk=deadly)
    create(other)
    create(victim)  # in company from now on
    create(other)
    create(store)
    disk.taken.clear()
    deadly.armed = True
    with pytest.raises(Killed):
        create(victim)
    assert len(store.load_snapshot().records) == 9
    create(store)
    assert disk.taken == AFTER_ONE_WHO_DID_NOT


def emptied(lock):
    with lock.open("r+b") as file:
        file.truncate(0)


def torn(lock):
    """The first digits are those of a note that comes to mean more than was synced."""
    with lock.open("r+b") as file:
        file.seek(NOTE)
        file.write(b"1")


def nonsense(lock):
    with lock.open("r+b") as file:
        file.seek(NOTE)
        file.write(b"x" * 41)


@pytest.mark.parametrize("harm", [emptied, torn, nonsense])
def test_a_note_that_is_missing_or_torn_is_not_relied_on(both, directory, disk, harm):
    store, other = both
    create(other)
    harm(directory / "lock")
    create(store)
    # Where nothing can be told, it begins with the pid.
    steps = disk.taken if harm is torn else disk.taken[1:]
    assert steps == AFTER_ONE_WHO_DID_NOT


def test_a_new_segment_is_not_the_old_one(both, disk):
    store, other = both
    create(other)
    other.compact(FOLD)
    create(other)
    create(store)
    assert disk.taken == AFTER_ONE_WHO_DID_NOT


def test_nobody_relies_on_a_cut_that_was_not_synced(both, directory, open_, disk):
    """The file is as long as it was, but a power loss may bring back what was cut."""
    store, _ = both
    with segments(directory)[-1].open("ab") as file:
        file.write(b'{"crc":"00000000","torn')
    open_(durability="process")
    create(store)
    assert "sync" in disk.taken[: disk.taken.index("line")]


def test_a_note_that_cannot_be_written_is_no_failure(both, disk):
    store, other = both
    create(other)
    disk.full = True
    change = make_put()
    store.apply([change])
    assert store.load_snapshot().records[change.record.task_id] == change.record
    disk.full = False
    create(other)
    create(store)
    assert disk.taken == ["line", "sync", *IN_TURN]
