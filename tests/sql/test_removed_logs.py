"""Logs that are removed while the file is open: by hand, or by a process that sees no locks."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from sqlkit import LOGS, in_process, output_of, put_in_place, remove_logs

from taskstore.errors import StoreUnavailableError


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
