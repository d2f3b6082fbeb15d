"""Read-only stores change no file [13], and raise for what they cannot do."""

from __future__ import annotations

import contextlib
import os
import time

import pytest
from jsonfiles import FOLD, names, segments, state_of

from taskstore import (
    CompactionPolicy,
    ReadOnlyError,
    StoreClosedError,
    StoreUnavailableError,
    TaskQuery,
)
from taskstore.model.journal import Remove, Snapshot
from taskstore.stores.jsonfile import JSONStore, open_json
from taskstore.testing.factories import create, delete, make_put, update

NOBODY = 65534


@pytest.fixture
def ledger(directory, open_):
    store = open_()
    task, gone = create(store), create(store)
    store.compact(FOLD)
    delete(store, gone)
    update(store, task)
    store.close()
    return directory


def read_everything(store: JSONStore) -> None:
    assert len(store.load_snapshot().records) == 1
    assert (store.head(), store.floor()) == (4, 1)
    assert len(store.read_journal(0, 10)) == 4
    assert len(store.read_history(store.read_journal(0, 1)[0].task_id)) == 2
    assert store.read_snapshot(3).seq == 2
    assert store.read_snapshot(1) is None
    assert not store.wait_for(4, 0.01)
    assert len(store.query(TaskQuery())) == 1
    assert store.verify().ok
    assert store.identity.timeline == 1
    assert store.report().notices == ()


def test_reading_changes_nothing(ledger, open_):
    before = state_of(ledger)
    with open_(read_only=True) as store:
        read_everything(store)
    assert state_of(ledger) == before


def test_readers_and_writers_do_not_wait_for_each_other(ledger, open_):
    writer, reader = open_(), open_(read_only=True)
    with writer._writer.lock():
        started = time.monotonic()
        read_everything(open_(read_only=True))
        read_everything(reader)
        assert time.monotonic() - started < 5
    with open_(lock_timeout_s=0) as other:
        create(other)


def test_a_copy_without_its_lock_files_can_be_read(ledger, open_):
    for name in ("lock", "compact.lock"):
        (ledger / name).unlink()
    before = state_of(ledger)
    read_everything(open_(read_only=True))
    assert state_of(ledger) == before


def test_writing_is_refused(ledger, open_):
    before = state_of(ledger)
    store = open_(read_only=True)
    for work in (
        lambda: store.apply([make_put()]),
        lambda: store.apply([]),
        lambda: store.save_snapshot(Snapshot(10)),
        lambda: store.compact(CompactionPolicy()),
    ):
        with pytest.raises(ReadOnlyError, match=str(ledger)):
            work()
    assert state_of(ledger) == before


@pytest.mark.parametrize("read_only", [False, True])
def test_a_closed_store_raises(read_only, ledger, open_):
    store = open_(read_only=read_only)
    store.close()
    store.close()
    for work in (
        store.load_snapshot,
        store.head,
        store.floor,
        store.verify,
        lambda: store.apply([Remove("x", 2)]),
        lambda: store.save_snapshot(Snapshot(10)),
        lambda: store.compact(FOLD),
        lambda: store.read_journal(0, 1),
        lambda: store.read_history("x"),
        lambda: store.read_snapshot(1),
        lambda: store.wait_for(0, 1),
        lambda: store.query(TaskQuery()),
    ):
        with pytest.raises(StoreClosedError):
            work()
    store.report()


@pytest.mark.parametrize("there", [False, True])
def test_a_missing_ledger_is_unavailable_and_is_not_created(there, directory):
    if there:
        directory.mkdir()
    with pytest.raises(StoreUnavailableError, match=str(directory)):
        open_json(f"json:///{directory}", read_only=True)
    assert directory.exists() == there
    assert not there or names(directory) == set()


def open_descriptors() -> set[int]:
    found = set()
    for descriptor in range(256):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            found.add(descriptor)
    return found


def test_descriptors_are_closed(ledger):
    before = open_descriptors()
    for read_only in (True, False):
        for _ in range(3):
            with JSONStore(ledger, read_only=read_only) as store:
                read_everything(store)
                if not read_only:
                    store.compact(CompactionPolicy(force=True))
    for _ in range(3):
        with pytest.raises(StoreUnavailableError):
            JSONStore(segments(ledger)[0])
    assert open_descriptors() == before


def as_nobody(work) -> str:
    """Run ``work`` as another user in a child; return the name and text of its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
        except BaseException as error:  # noqa: BLE001 - reported to the parent
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as result:
        text = result.read()
    os.waitpid(pid, 0)
    return text


@pytest.fixture
def readable(ledger, tmp_path_factory):
    """A ledger that other users may read but not change."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    parent = ledger
    while parent != parent.parent and parent.stat().st_uid == os.geteuid():
        if parent.stat().st_mode & 0o777 == 0o700:
            parent.chmod(0o755)
        parent = parent.parent
    for path in ledger.iterdir():
        path.chmod(0o644)
    return ledger


def test_a_user_without_write_permission_can_open_it_read_only(readable):
    before = state_of(readable)
    assert not as_nobody(lambda: read_everything(JSONStore(readable, read_only=True)))
    assert state_of(readable) == before


def test_a_user_without_write_permission_cannot_open_it_for_writing(readable):
    before = state_of(readable)
    message = as_nobody(lambda: JSONStore(readable))
    assert message.startswith("StoreUnavailableError")
    assert str(readable) in message
    assert "modes" in message
    assert state_of(readable) == before


def test_a_directory_that_cannot_take_new_files_is_refused_at_once(readable):
    for path in readable.iterdir():
        path.chmod(0o666)
    before = state_of(readable)
    message = as_nobody(lambda: JSONStore(readable))
    assert message.startswith("StoreUnavailableError")
    assert state_of(readable) == before


def test_a_new_directory_without_write_permission_is_unavailable(readable):
    message = as_nobody(lambda: JSONStore(readable / "new"))
    assert message.startswith("StoreUnavailableError")
    assert str(readable / "new") in message


def test_a_user_without_read_permission_gets_an_error(readable):
    segments(readable)[-1].chmod(0o600)
    message = as_nobody(lambda: JSONStore(readable, read_only=True))
    assert message.startswith("StoreUnavailableError")
    assert segments(readable)[-1].name in message
