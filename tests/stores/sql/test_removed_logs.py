"""Logs that are removed while the file is open: by hand, or by a process that sees no locks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlkit import LOGS, in_process, output_of, remove_logs

from taskstore.errors import StoreReplacedError
from taskstore.stores.sql.sqlite_guard import FileGuard


def test_no_connection_is_opened_without_the_logs(live, sqlite_path):
    """A new connection would create an empty log, and read beyond its end."""
    pool = live[0].store._transactions.pool
    acquired = [pool.acquire() for _ in range(4)]  # more than were ever open
    remove_logs(sqlite_path)
    with pytest.raises(StoreReplacedError, match="removed while it was open"):
        pool.acquire()
    assert not Path(f"{sqlite_path}-wal").exists()
    for session in acquired:
        pool.release(session)
    with pytest.raises(StoreReplacedError):
        live[0].refresh()


def test_the_connection_that_makes_a_log_of_its_own_is_not_used(live, sqlite_path, monkeypatch):
    """The logs are removed just after the check found them."""
    registry, _ = live
    pool, removed = registry.store._transactions.pool, []

    def remove_after_the_check(guard):
        look(guard)
        if not removed:
            removed.append(True)
            remove_logs(sqlite_path)

    look = FileGuard.check_fully
    acquired = [pool.acquire() for _ in range(4)]
    monkeypatch.setattr(FileGuard, "check_fully", remove_after_the_check)
    with pytest.raises(StoreReplacedError, match="removed while it was open"):
        pool.acquire()
    for session in acquired:
        pool.release(session)


@pytest.mark.parametrize("gone", [("-wal",), ("-shm",), LOGS], ids=" ".join)
def test_nothing_is_acknowledged_into_a_removed_log(live, sqlite_path, open_registry, gone):
    registry, _ = live
    remove_logs(sqlite_path, gone)
    for use in (lambda: registry.record_progress("kept", "lost 3"), registry.refresh):
        with pytest.raises(StoreReplacedError, match="removed while it was open") as caught:
            use()
        assert "close the ledger" in caught.value.hint
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
    """Another SQLite library that closes the files in this process drops its locks.  Another
    process then finds no lock, and removes the log as the last user of the file."""
    registry, _ = live
    for name in (sqlite_path, f"{sqlite_path}-shm"):
        Path(name).open("rb").close()
    output_of(in_process(OPEN_AND_CLOSE, sqlite_path))
    assert not Path(f"{sqlite_path}-wal").exists()
    with pytest.raises(StoreReplacedError, match="removed while it was open"):
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
    """SQLite would share the memory of the first store, which other processes do not see."""
    open_registry()
    remove_logs(sqlite_path, gone)
    with pytest.raises(StoreReplacedError, match="removed while it was open"):
        open_registry(read_only=read_only)


def test_logs_recreated_by_another_process_are_refused(live, sqlite_path):
    registry, _ = live
    remove_logs(sqlite_path)
    for suffix in LOGS:
        Path(f"{sqlite_path}{suffix}").write_bytes(b"")
    with pytest.raises(StoreReplacedError, match="removed while it was open"):
        registry.record_progress("kept", "would be lost")
