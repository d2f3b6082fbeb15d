"""Which logs belong to an open SQLite file, and which connections are accepted."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlkit import in_process, output_of

from taskstore.errors import StoreReplacedError
from taskstore.stores.sql.dialects.sqlite import connection_factory
from taskstore.stores.sql.migrate import database_for_url, upgrade
from taskstore.stores.sql.sqlite_guard import FileGuard
from taskstore.stores.sql.sqlite_library import sqlite_module

MODULE = sqlite_module()

PRELUDE = """
import sys
try:
    from pysqlite3.dbapi2 import connect
except ImportError:
    from sqlite3 import connect
connection = connect(sys.argv[1], isolation_level=None)
"""

PLAIN = (
    PRELUDE
    + """
connection.execute("CREATE TABLE t (x)")
"""
)

OWNER = (
    PRELUDE
    + """
connection.execute("PRAGMA journal_mode = WAL").fetchall()
connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
print("up", flush=True)
sys.stdin.read()
connection.close()
"""
)


@pytest.fixture
def plain(sqlite_path):
    """A database that has no log yet."""
    assert in_process(PLAIN, sqlite_path).wait(60) == 0
    return sqlite_path


@contextmanager
def owner(path):
    """Another process that has the file and its logs open, and removes the logs when it exits."""
    process = in_process(OWNER, path)
    assert process.stdout.readline() == "up\n"
    yield
    process.communicate(timeout=60)
    assert not Path(f"{path}-wal").exists()


def guarded(path, *, set_up=lambda _raw: None, open_one=None):
    open_one = open_one or connection_factory(
        MODULE, path, busy_timeout_s=1.0, read_only=False, immutable=False
    )
    return FileGuard(path, open_one, set_up)


def test_the_logs_are_those_that_the_anchor_has_open(plain):
    with owner(plain):
        guard = guarded(plain)
        guard.start()
        assert sorted(guard._logs) == [f"{plain}-shm", f"{plain}-wal"]
        guard.close()
    with pytest.raises(StoreReplacedError):
        guard.check_fully()  # without the anchor, the last connection removed them
    guard = guarded(plain)
    guard.start()
    assert output_of(in_process(PLAIN.replace("t (x)", "other (x)"), plain)) == ""
    guard.check()  # another process that closes the file leaves the logs
    guard.close()
    assert not Path(f"{plain}-wal").exists()


def test_a_file_without_a_log_is_guarded_as_a_file(plain):
    guard = guarded(plain)
    guard.start()
    assert guard._logs == {}
    guard.check()
    plain.rename(plain.with_name("gone"))
    with pytest.raises(StoreReplacedError, match="moved, removed or replaced"):
        guard.check()
    guard.close()


def test_logs_that_came_after_the_anchor_has_read_are_not_its_own(plain):
    came = []

    class Late(MODULE.Connection):
        def execute(self, sql, *parameters):
            cursor = super().execute(sql, *parameters)
            if "journal_mode" in sql and not came:
                came.append(owner(plain))
                came[0].__enter__()
            return cursor

    guard = guarded(
        plain,
        open_one=lambda: MODULE.connect(
            plain, isolation_level=None, check_same_thread=False, factory=Late
        ),
    )
    guard.start()
    assert guard._logs == {}
    came[0].__exit__(None, None, None)
    guard.check()
    guard.close()


def test_every_connection_is_set_up_also_the_anchor(plain):
    """It may be the last to be closed, and then empties the log."""
    made = []
    guard = guarded(plain, set_up=made.append)
    guard.start()
    lent = guard.connect()
    assert len(made) == 2
    assert made[1] is lent
    guard.close()
    with pytest.raises(MODULE.ProgrammingError):
        made[0].execute("SELECT 1")
    lent.close()


@pytest.mark.parametrize(
    ("error", "told"), [(MODULE.OperationalError, StoreReplacedError), (KeyboardInterrupt, None)]
)
def test_errors_of_a_removed_file_report_the_removal_and_interrupts_pass(plain, error, told):
    failing = []

    def set_up(raw):
        if failing:
            plain.rename(plain.with_name("gone"))
            raise error

    guard = guarded(plain, set_up=set_up)
    guard.start()
    failing.append(True)
    with pytest.raises(told or error):
        guard.connect()
    guard.close()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="has to see open files")
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_an_engine_that_is_disposed_of_leaves_nothing_open_and_can_be_used_again(sqlite_path, mode):
    def open_files():
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return [link for link in links if str(link.readlink()).startswith(str(sqlite_path))]

    engine = database_for_url(f"sqlite:///{sqlite_path}").engine
    for _ in range(2):
        upgrade(engine)
        with engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA journal_mode = {mode}")
        with engine.connect(), engine.connect():  # the second one is new, and notes the logs
            pass
        assert open_files()
        engine.dispose()
        assert not open_files()
