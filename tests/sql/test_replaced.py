"""Files that are moved, removed or replaced while they are open."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from sqlkit import LOGS, in_process, output_of, put_in_place

from taskstore import Restored, TaskRegistry, Upserted
from taskstore.errors import (
    CorruptStoreError,
    CursorExpiredError,
    SchemaMismatchError,
    StoreUnavailableError,
)
from taskstore.stores.sql.watches import DataVersionWatch
from taskstore.testing.factories import create, update
from taskstore.testing.threads import until


@pytest.mark.parametrize("how", ["removed", "replaced", "moved"])
def test_a_file_that_was_replaced_is_not_written(sqlite_path, open_, how):
    url = f"sqlite:///{sqlite_path}"
    store = open_(url)
    record = create(store)
    copy = sqlite_path.with_name("copy.db")
    store._connections.erase()  # so that the file is whole without its log
    shutil.copy(sqlite_path, copy)
    if how == "removed":
        sqlite_path.unlink()
    elif how == "replaced":
        copy.replace(sqlite_path)
    else:
        sqlite_path.rename(sqlite_path.with_name("elsewhere.db"))
    for change in (lambda: create(store), lambda: update(store, record, label="x")):
        with pytest.raises(StoreUnavailableError, match="moved, removed or replaced") as caught:
            change()
        assert str(sqlite_path) in str(caught.value)
        assert "open it again" in caught.value.hint
    store.close()
    if how == "replaced":
        again = open_(url)
        create(again)
        assert (again.head(), again.verify().ok) == (2, True)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_was_replaced_is_not_read_on(sqlite_path, open_, read_only):
    url = f"sqlite:///{sqlite_path}"
    store = open_(url)
    create(store)
    store._connections.erase()
    copy = sqlite_path.with_name("copy.db")
    shutil.copy(sqlite_path, copy)
    if read_only:
        store.close()
        store = open_(url, read_only=True)
    assert store.head() == 1
    copy.replace(sqlite_path)
    for read in (store.head, store.load_snapshot, lambda: store.wait_for(1, 5)):
        with pytest.raises(StoreUnavailableError, match="moved, removed or replaced"):
            read()


def open_descriptors(path):
    """Which files of a database that are gone are still open in this process."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.startswith(str(path)) and link.endswith("(deleted)")]


@pytest.mark.parametrize("read_only", [False, True])
def test_a_registry_goes_on_with_the_file_that_is_there(
    live, backup, sqlite_path, open_registry, read_only
):
    registry, heard = live
    if read_only:
        registry.close()
        registry = open_registry(hooks=[heard.append], read_only=True)
        heard.clear()
    put_in_place(backup, sqlite_path)
    assert registry.refresh() == 2
    assert [type(event) for event in heard] == [Restored]
    assert registry.get("kept").progress_summary == "saved"
    assert registry.store.verify().ok
    if Path("/proc/self/fd").is_dir():
        assert open_descriptors(sqlite_path) == []


def test_the_first_write_is_made_over_what_is_stored_now(live, backup, sqlite_path, open_registry):
    registry, heard = live
    put_in_place(backup, sqlite_path)
    with TaskRegistry.open(f"sqlite:///{sqlite_path}") as other:
        theirs = [other.record_progress("kept", f"theirs {n}") for n in range(2)][-1]
        # As far as seqs and revisions tell, nothing has happened.
        assert (other.seq, theirs.revision) == (registry.seq, registry.get("kept").revision)
    done = registry.update_metadata("kept", {"a": 1})
    assert (done.progress_summary, done.revision) == ("theirs 1", 5)
    assert [type(event) for event in heard] == [Restored, Upserted]
    assert open_registry().get("kept") == done
    assert registry.store.verify().ok


def test_replaced_in_the_middle_of_a_transaction(backup, sqlite_path, open_):
    store = open_(f"sqlite:///{sqlite_path}")
    create(store)
    works = []

    def work(session):
        works.append(session.row("SELECT head_seq FROM taskstore_head")[0])
        session.execute("UPDATE taskstore_head SET last_at = last_at + 1")
        if len(works) == 1:
            put_in_place(backup, sqlite_path)
        return works[-1]

    assert store._connections.write(work) == 2
    assert works == [3, 2]
    assert store.verify().ok


def test_who_follows_notices_by_itself(live, backup, sqlite_path):
    registry, heard = live
    with registry.follow():
        put_in_place(backup, sqlite_path)
        until(lambda: heard)
        assert isinstance(heard[0], Restored)
        with TaskRegistry.open(f"sqlite:///{sqlite_path}") as other:
            theirs = other.record_progress("kept", "theirs")
        until(lambda: registry.get("kept") == theirs)


@pytest.mark.parametrize("read_only", [False, True])
def test_who_waits_for_changes_is_told(live, backup, sqlite_path, open_registry, read_only):
    follower = open_registry(read_only=True) if read_only else live[0]
    following = follower.changes(wait=30)
    assert [next(following).seq for _ in range(4)] == [1, 2, 3, 4]
    timer = threading.Timer(0.1, put_in_place, (backup, sqlite_path))
    timer.start()
    with pytest.raises(CursorExpiredError) as caught:
        next(following)
    assert caught.value.replaced
    timer.join()


def test_waiting_hears_of_commits_to_the_new_file(live, backup, sqlite_path):
    registry, _ = live
    put_in_place(backup, sqlite_path)
    assert not registry.store.wait_for(4, 0)
    with TaskRegistry.open(f"sqlite:///{sqlite_path}") as other:
        timer = threading.Timer(
            0.1, lambda: [other.record_progress("kept", str(n)) for n in range(3)]
        )
        timer.start()
        assert registry.store.wait_for(4, 30)
        timer.join()


@pytest.mark.parametrize("left", [("-wal",), ("-shm",), LOGS], ids=" ".join)
def test_a_log_of_the_old_file_is_not_replayed_over_the_new_one(live, backup, sqlite_path, left):
    registry, heard = live
    put_in_place(backup, sqlite_path, remove=set(LOGS) - set(left))
    for use in (registry.refresh, lambda: registry.record_progress("kept", "lost 3")):
        with pytest.raises(StoreUnavailableError, match="replaced") as caught:
            use()
        for suffix in LOGS:
            assert f"{sqlite_path}{suffix}" in caught.value.hint
    assert not heard
    # Copying would open the file, which is SQLite's alone in this process.
    assert output_of(in_process(DIGEST, sqlite_path)) == output_of(in_process(DIGEST, backup))
    for suffix in left:
        Path(f"{sqlite_path}{suffix}").unlink()
    assert registry.refresh() == 2
    assert registry.record_progress("kept", "on").revision == 3
    assert registry.store.verify().ok


DIGEST = """
import sys, hashlib
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())
"""


def test_no_connection_is_opened_to_a_file_beside_which_the_old_log_lies(
    live, backup, sqlite_path, open_
):
    store = open_(f"sqlite:///{sqlite_path}")
    put_in_place(backup, sqlite_path, remove=())
    borrowed = []
    with pytest.raises(StoreUnavailableError, match="still belong"):
        while len(borrowed) < 8:
            borrowed.append(store._connections.borrow())
    for session in borrowed:
        store._connections.give_back(session)
    store.close()
    live[0].close()
    assert output_of(in_process(DIGEST, sqlite_path)) == output_of(in_process(DIGEST, backup))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="has to see open files")
def test_what_is_lent_meanwhile_is_closed_when_it_comes_back(live, backup, sqlite_path):
    registry, _ = live
    connections = registry.store._connections
    sessions = [connections.borrow() for _ in range(3)]
    put_in_place(backup, sqlite_path)
    assert registry.refresh() == 2
    for session in sessions:
        assert open_descriptors(sqlite_path)
        connections.give_back(session)
    assert open_descriptors(sqlite_path) == []


def test_a_watch_looks_again_at_another_file(backup, sqlite_path, open_):
    store = open_(f"sqlite:///{sqlite_path}")
    watch = DataVersionWatch(store._connections, store.head)
    assert (watch.look(), watch.look()) == (2, None)
    put_in_place(backup, sqlite_path)
    assert (watch.look(), watch.look()) == (2, None)
    watch.close()


def test_the_log_of_who_was_faster_is_left_to_them(live, backup, sqlite_path, open_registry):
    registry, _ = live
    put_in_place(backup, sqlite_path)
    other = open_registry()
    theirs = other.record_progress("kept", "theirs")
    log = Path(f"{sqlite_path}-wal").stat()
    assert registry.refresh() == 3
    assert registry.get("kept") == theirs
    registry.close()
    assert Path(f"{sqlite_path}-wal").stat().st_ino == log.st_ino
    assert other.store.verify().ok


def test_threads_that_read_meanwhile(live, backup, sqlite_path):
    registry, _ = live
    store, errors, seen = registry.store, [], []
    done = threading.Event()

    def read():
        heads = set()
        try:
            while not done.is_set():
                snapshot = store.load_snapshot()
                heads.add((snapshot.seq, snapshot.records["kept"].progress_summary))
        except Exception as error:  # noqa: BLE001 - asserted on below
            errors.append(error)
        seen.append(heads)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        put_in_place(backup, sqlite_path)
        assert registry.refresh() == 2
        assert registry.record_progress("kept", "again").revision == 3
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set().union(*seen) <= {(2, "saved"), (3, "again"), (4, "lost 2")}
    assert store.verify().ok


def test_replaced_by_what_is_not_ours(live, backup, sqlite_path):
    registry, _ = live
    strange = sqlite_path.with_name("strange.db")
    for content, error in ((b"", SchemaMismatchError), (b"?" * 5000, CorruptStoreError)):
        strange.write_bytes(content)
        put_in_place(strange, sqlite_path)
        for use in (registry.refresh, lambda: registry.record_progress("kept", "x")):
            with pytest.raises(error):
                use()
        assert sqlite_path.stat().st_size == len(content)
    put_in_place(backup, sqlite_path)
    assert registry.refresh() == 2
