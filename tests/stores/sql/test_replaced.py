"""Files that are moved, removed or replaced while they are open: every further use is refused."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from sqlkit import LOGS, in_process, output_of, put_in_place, write

from taskstore import StoreReplacedError, TaskRegistry
from taskstore.stores.sql import sqlite_guard
from taskstore.testing.factories import create, update
from taskstore.testing.threads import until

GONE = "moved, removed or replaced"
GONE_OR_ITS_LOG = "while it was open"
"""The error of a check while both files are replaced, one after the other."""


@pytest.mark.parametrize("how", ["removed", "replaced", "moved"])
def test_a_file_that_was_replaced_is_not_written(sqlite_path, open_, how):
    url = f"sqlite:///{sqlite_path}"
    store = open_(url)
    record = create(store)
    copy = sqlite_path.with_name("copy.db")
    store._transactions.scrub_deleted()  # so that the file is whole without its log
    shutil.copy(sqlite_path, copy)
    if how == "removed":
        sqlite_path.unlink()
    elif how == "replaced":
        for suffix in LOGS:
            Path(f"{sqlite_path}{suffix}").unlink()
        copy.replace(sqlite_path)
    else:
        sqlite_path.rename(sqlite_path.with_name("elsewhere.db"))
    for change in (lambda: create(store), lambda: update(store, record, label="x")):
        with pytest.raises(StoreReplacedError, match=GONE) as caught:
            change()
        assert str(sqlite_path) in str(caught.value)
        assert "open the ledger again" in caught.value.hint
        assert not caught.value.retryable
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
    store._transactions.scrub_deleted()
    copy = sqlite_path.with_name("copy.db")
    shutil.copy(sqlite_path, copy)
    if read_only:
        store.close()
        store = open_(url, read_only=True)
    assert store.head() == 1
    copy.replace(sqlite_path)
    for read in (store.head, store.load_snapshot, lambda: store.wait_for(1, 5)):
        with pytest.raises(StoreReplacedError, match=GONE):
            read()


def test_a_directory_that_was_moved(tmp_path, open_):
    place, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    store = open_(f"sqlite:///{place}/tasks.db")
    record = create(store)
    place.rename(elsewhere)
    for attempt in range(2):
        with pytest.raises(StoreReplacedError, match=GONE):
            update(store, record, label=str(attempt))
        place.mkdir(exist_ok=True)  # another one
    store.close()
    assert open_(f"sqlite:///{elsewhere}/tasks.db").head() == 1


def test_a_detected_replacement_stays_refused(sqlite_path, open_):
    url = f"sqlite:///{sqlite_path}"
    store = open_(url)
    create(store)
    away = sqlite_path.with_name("away.db")
    sqlite_path.rename(away)
    with pytest.raises(StoreReplacedError):
        create(store)
    away.rename(sqlite_path)
    for use in (store.head, store.load_snapshot, lambda: create(store)):
        with pytest.raises(StoreReplacedError):
            use()
    store.close()
    again = open_(url)
    create(again)
    assert (again.head(), again.verify().ok) == (2, True)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_registry_is_refused_and_another_one_opens_the_new_file(
    live, backup, sqlite_path, open_registry, read_only
):
    registry, heard = live
    if read_only:
        registry.close()
        registry = open_registry(hooks=[heard.append], read_only=True)
        heard.clear()
    put_in_place(backup, sqlite_path)
    for _ in range(2):
        with pytest.raises(StoreReplacedError, match=GONE):
            registry.refresh()
    if not read_only:
        with pytest.raises(StoreReplacedError, match=GONE):
            registry.record_progress("kept", "to the wrong file")
    assert not heard
    registry.close()
    again = open_registry(read_only=read_only)
    assert (again.seq, again.get("kept").progress_summary) == (2, "saved")
    assert again.store.verify().ok
    assert open_descriptors(sqlite_path) == []


def open_descriptors(path):
    """The removed files of a database that are still open in this process."""
    links = []
    if Path("/proc/self/fd").is_dir():
        found = Path("/proc/self/fd").iterdir()
        links = [str(link.readlink()) for link in found if link.is_symlink()]
    return [link for link in links if link.startswith(str(path)) and link.endswith("(deleted)")]


def test_replaced_in_the_middle_of_a_transaction(backup, sqlite_path, open_):
    url = f"sqlite:///{sqlite_path}"
    store = open_(url)
    create(store)
    works = []

    def work(session):
        works.append(session.row("SELECT head_seq FROM taskstore_head")[0])
        session.execute("UPDATE taskstore_head SET last_at = last_at + 1")
        put_in_place(backup, sqlite_path)

    with pytest.raises(StoreReplacedError, match=GONE):
        write(store, work)
    assert works == [3]
    store.close()
    again = open_(url)
    assert (again.head(), again.verify().ok) == (2, True)


def test_a_follower_reports_it(live, backup, sqlite_path, caplog):
    registry, heard = live
    with caplog.at_level(logging.WARNING, "taskstore"), registry.follow():
        put_in_place(backup, sqlite_path)
        until(lambda: GONE_OR_ITS_LOG in caplog.text)
    assert not heard


@pytest.mark.parametrize("read_only", [False, True])
def test_a_waiter_gets_the_error(live, backup, sqlite_path, open_registry, read_only):
    follower = open_registry(read_only=True) if read_only else live[0]
    following = follower.changes(wait=30)
    assert [next(following).seq for _ in range(4)] == [1, 2, 3, 4]
    timer = threading.Timer(0.1, put_in_place, (backup, sqlite_path))
    timer.start()
    with pytest.raises(StoreReplacedError, match=GONE_OR_ITS_LOG):
        next(following)
    timer.join()


@pytest.mark.parametrize("left", [("-wal",), ("-shm",), LOGS], ids=" ".join)
def test_a_log_of_the_old_file_is_not_replayed_over_the_new_one(
    live, backup, sqlite_path, open_registry, left
):
    registry, heard = live
    put_in_place(backup, sqlite_path, remove=set(LOGS) - set(left))
    for use in (registry.refresh, lambda: registry.record_progress("kept", "lost 3")):
        with pytest.raises(StoreReplacedError, match="still belong") as caught:
            use()
        for suffix in LOGS:
            assert f"{sqlite_path}{suffix}" in caught.value.hint
    assert not heard
    registry.close()
    # A copy would open the file, which only SQLite may open in this process.
    assert output_of(in_process(DIGEST, sqlite_path)) == output_of(in_process(DIGEST, backup))
    for suffix in left:
        Path(f"{sqlite_path}{suffix}").unlink()
    again = open_registry()
    assert again.record_progress("kept", "on").revision == 3
    assert again.store.verify().ok


DIGEST = """
import sys, hashlib
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())
"""


def test_no_connection_is_opened_to_a_file_beside_which_the_old_log_lies(
    live, backup, sqlite_path, open_
):
    store = open_(f"sqlite:///{sqlite_path}")
    put_in_place(backup, sqlite_path, remove=())
    pool, acquired = store._transactions.pool, []
    with pytest.raises(StoreReplacedError, match="still belong"):
        while len(acquired) < 8:
            acquired.append(pool.acquire())
    for session in acquired:
        pool.release(session)
    store.close()
    live[0].close()
    assert output_of(in_process(DIGEST, sqlite_path)) == output_of(in_process(DIGEST, backup))


def test_the_log_of_a_faster_process_is_left_alone(live, backup, sqlite_path, open_registry):
    registry, _ = live
    put_in_place(backup, sqlite_path)
    other = open_registry()
    theirs = other.record_progress("kept", "theirs")
    log = Path(f"{sqlite_path}-wal").stat()
    with pytest.raises(StoreReplacedError):
        registry.refresh()
    registry.close()
    assert Path(f"{sqlite_path}-wal").stat().st_ino == log.st_ino
    assert other.get("kept") == theirs
    assert other.store.verify().ok


def test_threads_that_read_meanwhile_see_the_old_file_or_are_refused(live, backup, sqlite_path):
    registry, _ = live
    store, seen, errors = registry.store, [], []

    def read():
        heads = set()
        try:
            while True:
                snapshot = store.load_snapshot()
                heads.add((snapshot.seq, snapshot.records["kept"].progress_summary))
        except Exception as error:  # noqa: BLE001 - asserted on below
            errors.append(error)
        seen.append(heads)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    put_in_place(backup, sqlite_path)
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == [StoreReplacedError] * 6
    assert set().union(*seen) <= {(4, "lost 2")}


def test_replaced_by_a_foreign_file(live, sqlite_path):
    registry, _ = live
    strange = sqlite_path.with_name("strange.db")
    for content in (b"", b"?" * 5000):
        strange.write_bytes(content)
        put_in_place(strange, sqlite_path)
        for use in (registry.refresh, lambda: registry.record_progress("kept", "x")):
            with pytest.raises(StoreReplacedError):
                use()
        assert sqlite_path.stat().st_size == len(content)


# -- what it costs, and when the directory is believed -----------------------------------


def test_a_lone_commit_checks_once(live, monkeypatch):
    registry, _ = live
    looks = []

    def counting(path, *arguments, **options):
        looks.append(path)
        return real(path, *arguments, **options)

    real = os.stat
    until(lambda: time.time() - Path(registry.store.location).parent.stat().st_mtime > 0.1)
    registry.record_progress("kept", "the directory is settled now")
    monkeypatch.setattr(sqlite_guard.os, "stat", counting)
    registry.record_progress("kept", "once")
    monkeypatch.undo()
    assert looks == [str(Path(registry.store.location).parent)]


def test_a_change_in_the_same_tick_of_the_clock_is_seen(live, backup, sqlite_path, monkeypatch):
    """A directory that was changed just now may be changed again without another time."""
    registry, _ = live
    monkeypatch.setattr(sqlite_guard, "_MTIME_GRANULARITY_NS", 10**15)
    sqlite_path.with_name("beside").touch()
    registry.record_progress("kept", "the directory is young")
    before = sqlite_path.parent.stat()
    put_in_place(backup, sqlite_path)
    os.utime(sqlite_path.parent, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(StoreReplacedError):
        registry.record_progress("kept", "to the wrong file")


def test_other_files_in_the_directory_mean_nothing(live, sqlite_path):
    registry, _ = live
    for number in range(3):
        sqlite_path.with_name(f"beside-{number}").write_bytes(b"")
        registry.record_progress("kept", str(number))
    with TaskRegistry.open(f"sqlite:///{sqlite_path.with_name('another.db')}") as other:
        other.create(runtime="cli", task="x")
    assert registry.record_progress("kept", "on").progress_summary == "on"
