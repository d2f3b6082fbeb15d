"""Failed writes: disk and memory stay unchanged, or the store refuses further writes."""

from __future__ import annotations

import errno
import os
import resource
import signal

import pytest
from jsonfiles import FOLD, names, output_of, segments, state_of

from taskstore import ConflictError, OutcomeUnknownError, Put, StoreUnavailableError
from taskstore.model.journal import Snapshot
from taskstore.store.disk import Disk
from taskstore.testing.factories import create, make_put, make_record, update


class Failing(Disk):
    """A disk with failing steps: ``fails`` maps their names to errors.

    A step in ``once`` fails only the first time.
    """

    def __init__(self) -> None:
        self.fails: dict[str, BaseException] = {}
        self.once: set[str] = set()

    def check(self, step: str) -> None:
        if step in self.fails:
            raise self.fails.pop(step) if step in self.once else self.fails[step]

    def sync_data(self, descriptor: int) -> None:
        self.check("sync_data")
        super().sync_data(descriptor)

    def truncate(self, descriptor: int, size: int) -> None:
        self.check("truncate")
        super().truncate(descriptor, size)

    def publish(self, temporary, path) -> None:
        super().publish(temporary, path)
        self.check(f"published {path.name.partition('-')[0]}")


class InterruptedAtTheEnd(Disk):
    """If ``armed``, interrupts the removal of the temporary file of a published snapshot."""

    armed = False

    def remove_all(self, paths) -> None:
        paths = list(paths)
        super().remove_all(paths)
        if self.armed and any(
            path.suffix == ".tmp" and path.with_suffix("").exists() for path in paths
        ):
            raise KeyboardInterrupt


EIO = OSError(errno.EIO, os.strerror(errno.EIO))


def without(state, *ignored: str):
    return {name: value[-1] for name, value in state.items() if name not in ("lock", *ignored)}


@pytest.fixture
def limit():
    """Limit the size of files: a write beyond it is partial, the next one fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def set_limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield set_limit
    set_limit(None)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_partial_append_is_undone_and_the_next_one_works(directory, open_, limit):
    store, other = open_(), open_()
    task = create(store)
    before = state_of(directory)
    limit(segments(directory)[0].stat().st_size + 100)
    for _ in range(3):
        with pytest.raises(StoreUnavailableError, match=str(directory)) as caught:
            update(store, task, task="x" * 4096)
        assert caught.value.__cause__.errno == errno.EFBIG
        assert without(state_of(directory)) == without(before)
        assert store.head() == other.head() == 1
    limit(None)
    # Memory is not ahead of the disk: the same change applies, and only once.
    task = update(store, task, task="x" * 4096)
    update(other, task)
    assert store.verify().ok
    assert store.report().notices == ()


def test_a_full_disk_in_another_process(directory):
    printed = output_of(
        """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = JSONStore(sys.argv[1])
create(store)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
done = 1
while True:
    try:
        create(store, task="y" * 300)
    except StoreUnavailableError as error:
        print(done == store.head() == len(store.load_snapshot().records), sys.argv[1] in str(error))
        break
    done += 1
""",
        directory,
    )
    assert printed == "True True\n"
    assert segments(directory)[0].read_bytes().endswith(b"}\n")


def test_a_compaction_on_a_full_disk_leaves_no_file_and_the_writer_continues(
    directory, open_, limit
):
    store = open_()
    tasks = [create(store, task="x" * 1000) for _ in range(10)]
    limit(5000)
    with pytest.raises(StoreUnavailableError):
        store.compact(FOLD)
    assert not list(directory.glob("snapshot-*"))
    update(store, tasks[0])
    limit(None)
    assert store.compact(FOLD).compacted
    assert store.verify().ok


def test_a_replacement_on_a_full_disk_leaves_the_old_content(directory, open_, limit):
    store = open_()
    task = create(store)
    limit(5000)
    records = [make_record(task="x" * 1000) for _ in range(10)]
    with pytest.raises(StoreUnavailableError):
        store.save_snapshot(Snapshot(50, {record.task_id: record for record in records}))
    assert names(directory) == {segments(directory)[0].name, "lock", "compact.lock"}
    update(store, task)
    limit(None)
    store.save_snapshot(Snapshot(50, {record.task_id: record for record in records}))
    assert len(open_().load_snapshot().records) == 10


def test_after_a_failed_sync_an_instance_refuses_writes_until_it_is_reopened(directory, open_):
    disk = Failing()
    store = open_(disk=disk)
    task = create(store)
    before = state_of(directory)
    disk.fails, disk.once = {"sync_data": EIO}, {"sync_data"}
    with pytest.raises(StoreUnavailableError, match="reopened") as caught:
        update(store, task)
    assert caught.value.__cause__.errno == errno.EIO
    assert without(state_of(directory)) == without(before)
    for work in (
        lambda: store.apply([make_put()]),
        lambda: store.compact(FOLD),
        lambda: store.save_snapshot(Snapshot(9)),
    ):
        with pytest.raises(StoreUnavailableError, match="refuses writes until it is reopened"):
            work()
    assert store.load_snapshot().records == {task.task_id: task}
    store.close()
    update(open_(), task)


def test_if_the_undo_of_a_line_cannot_be_synced_the_outcome_is_unknown(directory, open_):
    disk = Failing()
    store = open_(disk=disk)
    task = create(store)
    before = state_of(directory)
    disk.fails = {"sync_data": EIO}
    with pytest.raises(OutcomeUnknownError):
        update(store, task)
    disk.fails = {}
    # The line is undone, but a power loss may restore it.
    assert without(state_of(directory)) == without(before)
    with pytest.raises(StoreUnavailableError, match="reopened"):
        update(store, task)
    update(open_(), task)


def test_if_the_commits_of_others_cannot_be_synced_an_instance_refuses_writes(open_):
    disk = Failing()
    store, other = open_(disk=disk), open_()
    task = create(store)
    task = update(other, task)
    disk.fails, disk.once = {"sync_data": EIO}, {"sync_data"}
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            update(store, task)
    update(other, task)


def test_if_a_line_cannot_be_undone_the_outcome_is_unknown(open_):
    disk = Failing()
    store = open_(disk=disk)
    task = create(store)
    disk.fails = {"sync_data": EIO, "truncate": EIO}
    with pytest.raises(OutcomeUnknownError):
        update(store, task)
    disk.fails = {}
    with pytest.raises(StoreUnavailableError, match="reopened"):
        update(store, task)
    assert open_().head() == 2


def test_an_interrupted_commit_is_undone(directory, open_):
    disk = Failing()
    store = open_(disk=disk)
    task = create(store)
    before = state_of(directory)
    disk.fails, disk.once = {"sync_data": KeyboardInterrupt()}, {"sync_data"}
    with pytest.raises(KeyboardInterrupt):
        update(store, task)
    disk.fails = {}
    assert without(state_of(directory)) == without(before)
    update(store, task)
    assert store.verify().ok


def test_an_interrupt_after_the_content_was_replaced(open_):
    """The index of the old content is invalid."""
    disk = InterruptedAtTheEnd()
    store = open_(disk=disk)
    gone = create(store)
    there = make_record()
    disk.armed = True
    with pytest.raises(KeyboardInterrupt):
        store.save_snapshot(Snapshot(50, {there.task_id: there}))
    disk.armed = False
    with pytest.raises(ConflictError):
        store.apply([Put(there)])
    store.apply([Put(make_record(task_id=gone.task_id))])
    assert store.verify().ok


def test_if_a_replacement_fails_half_way_the_outcome_is_unknown_until_reopened(open_):
    disk = Failing()
    store = open_(disk=disk)
    task = create(store)
    disk.fails = {"published snapshot": EIO}
    with pytest.raises(OutcomeUnknownError):
        store.save_snapshot(Snapshot(50))
    disk.fails = {}
    with pytest.raises(StoreUnavailableError, match="reopened"):
        update(store, task)
    assert open_().load_snapshot() == store.load_snapshot()
    assert open_().head() == 50
