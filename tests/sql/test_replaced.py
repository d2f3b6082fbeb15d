"""Files that are moved, removed or replaced while they are open."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from sqlkit import in_process, output_of

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


LOGS = ("-wal", "-shm")


def put_in_place(backup, path, *, remove=LOGS):
    """Another file, the same bytes, under the path: what ``cp`` and ``mv`` do."""
    incoming = path.with_name("incoming")
    shutil.copy(backup, incoming)
    for suffix in remove:
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    incoming.replace(path)


@pytest.fixture
def open_registry(sqlite_path):
    opened = []

    def once(**options):
        opened.append(TaskRegistry.open(f"sqlite:///{sqlite_path}", **options))
        return opened[-1]

    yield once
    for registry in opened:
        registry.close()


@pytest.fixture
def backup(sqlite_path):
    """Of a ledger at seq 2: one task, at revision 2."""
    with TaskRegistry.open(f"sqlite:///{sqlite_path}") as registry:
        task = registry.create(runtime="cli", task="x", status="running", task_id="kept")
        registry.record_progress(task.task_id, "saved")
    return Path(shutil.copy(sqlite_path, sqlite_path.with_name("backup.db")))


@pytest.fixture
def live(backup, open_registry):
    """A registry that has gone on to seq 4, and what its hooks hear from then on."""
    heard = []
    registry = open_registry(hooks=[heard.append])
    for step in ("lost 1", "lost 2"):
        registry.record_progress("kept", step)
    heard.clear()
    return registry, heard


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


def remove_logs(path, suffixes=LOGS):
    for suffix in suffixes:
        Path(f"{path}{suffix}").unlink()


def test_a_connection_that_is_opened_between_the_logs_and_the_file(live, backup, sqlite_path):
    connections = live[0].store._connections
    lent = [connections.borrow() for _ in range(4)]  # more than have ever been opened
    remove_logs(sqlite_path)
    timer = threading.Timer(0.1, put_in_place, (backup, sqlite_path), {"remove": ()})
    timer.start()
    fresh = connections.borrow()
    timer.join()
    assert fresh.row("SELECT head_seq FROM taskstore_head")[0] == 2
    for session in (*lent, fresh):
        connections.give_back(session)
    assert live[0].refresh() == 2


def test_the_connection_that_makes_a_log_of_its_own_is_not_used(
    live, backup, sqlite_path, monkeypatch
):
    """The logs go just after it has seen them there."""
    registry, _ = live
    connections = registry.store._connections
    file = connections.database.file
    check, removed = file.check_there, []

    def remove_after_the_check():
        check()
        if not removed:
            removed.append(True)
            remove_logs(sqlite_path)
            timer.start()

    timer = threading.Timer(0.1, put_in_place, (backup, sqlite_path), {"remove": ()})
    lent = [connections.borrow() for _ in range(4)]
    monkeypatch.setattr(file, "check_there", remove_after_the_check)
    fresh = connections.borrow()
    timer.join()
    assert fresh.file is not file
    for session in (*lent, fresh):
        connections.give_back(session)
    assert registry.refresh() == 2
    assert registry.record_progress("kept", "on").revision == 3


@pytest.mark.parametrize("gone", [("-wal",), ("-shm",), LOGS], ids=" ".join)
def test_nothing_is_acknowledged_into_a_log_that_is_gone(live, sqlite_path, open_registry, gone):
    registry, _ = live
    remove_logs(sqlite_path, gone)
    for use in (lambda: registry.record_progress("kept", "lost 3"), registry.refresh):
        with pytest.raises(StoreUnavailableError, match="removed while it was open") as caught:
            use()
        assert "close it" in caught.value.hint
    registry.close()
    after = open_registry()
    assert after.get("kept").progress_summary == "lost 2"
    assert after.record_progress("kept", "on").revision == 5
    assert after.store.verify().ok


OPEN_AND_CLOSE = """
import sys
try:
    from pysqlite3.dbapi2 import connect
except ImportError:
    from sqlite3 import connect
connection = connect(sys.argv[1])
connection.execute("SELECT count(*) FROM tasks").fetchall()
connection.close()
"""


@pytest.mark.skipif(os.name != "posix", reason="locks that belong to the process")
def test_locks_that_were_dropped_are_noticed_before_the_next_commit(
    live, sqlite_path, open_registry
):
    """Whoever closes the files in our process, as another SQLite library does, drops the
    locks; then another process takes itself for the last one, and removes the log."""
    registry, _ = live
    for name in (sqlite_path, f"{sqlite_path}-shm"):
        Path(name).open("rb").close()
    output_of(in_process(OPEN_AND_CLOSE, sqlite_path))
    assert not Path(f"{sqlite_path}-wal").exists()
    with pytest.raises(StoreUnavailableError, match="removed while it was open"):
        registry.record_progress("kept", "would be lost")
    registry.close()
    after = open_registry()
    assert after.get("kept").progress_summary == "lost 2"
    assert after.store.verify().ok


@pytest.mark.parametrize("gone", [("-shm",), LOGS], ids=" ".join)
@pytest.mark.parametrize("read_only", [False, True])
def test_another_store_of_the_process_is_not_opened_without_the_logs(
    backup, sqlite_path, open_registry, gone, read_only
):
    """SQLite would share what the first one has in memory, and other processes would not."""
    open_registry()
    remove_logs(sqlite_path, gone)
    with pytest.raises(StoreUnavailableError, match="removed while it was open"):
        open_registry(read_only=read_only)


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
