"""The space that a compaction frees goes back to the file system, a little at a time."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pysqlite3.dbapi2
import pytest
import sqlalchemy as sa
from sqlkit import Spy, in_process, output_of

from taskstore import CompactionPolicy, TaskRegistry, compact
from taskstore.cli.app import main
from taskstore.errors import (
    SchemaMismatchError,
    StoreBusyError,
    StoreUnavailableError,
    UnsupportedError,
)
from taskstore.stores.sql import SQLStore, migrate, vacuum
from taskstore.stores.sql.dialects import sqlite
from taskstore.testing.factories import create

TRIM = CompactionPolicy(history_s=0, history_entries=0, keep_snapshots=1, force=True)
TEXT = "x" * 20_000


def pragma(path, name):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]
    finally:
        connection.close()


def fill(store, count=60):
    for _ in range(count):
        create(store, task=TEXT)


def empty(path):
    """Delete all tasks of a ledger; their text stays in the journal."""
    with TaskRegistry.open(f"sqlite:///{path}") as registry:
        for task in registry.list(limit=1000):
            registry.finish(task.task_id, "succeeded")
            registry.delete(task.task_id)


def test_a_new_file_can_shrink(sqlite_path, open_):
    with open_(f"sqlite:///{sqlite_path}") as store:
        assert store.verify().ok
    assert pragma(sqlite_path, "auto_vacuum") == 2


@pytest.mark.parametrize("module", [pysqlite3.dbapi2, sqlite3])
def test_the_new_file_of_a_host_can_shrink_too(sqlite_path, module):
    engine = sa.create_engine(f"sqlite:///{sqlite_path}", module=module)
    migrate.upgrade(engine)
    with SQLStore(engine) as store:
        fill(store)
    engine.dispose()
    assert pragma(sqlite_path, "auto_vacuum") == 2
    before = sqlite_path.stat().st_size
    empty(sqlite_path)
    with SQLStore(engine) as store:
        compact(store, TRIM)
        assert store.verify().ok
    engine.dispose()
    assert sqlite_path.stat().st_size < before / 4
    assert pragma(sqlite_path, "freelist_count") == 0


def test_a_file_of_the_host_keeps_its_mode(sqlite_path):
    engine = sa.create_engine(f"sqlite:///{sqlite_path}", module=pysqlite3.dbapi2)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE notes (body)")
    with SQLStore(engine) as store:
        fill(store, 3)
        compact(store, TRIM)
    engine.dispose()
    assert pragma(sqlite_path, "auto_vacuum") == 0


def test_compaction_gives_space_back_while_the_ledger_is_open(sqlite_path, open_, monkeypatch):
    monkeypatch.setattr(sqlite, "_PAGES_PER_STEP", 7)
    store = open_(f"sqlite:///{sqlite_path}")
    fill(store)
    store.compact(TRIM)
    before = sqlite_path.stat().st_size
    empty(sqlite_path)
    spy = Spy(store)
    began, removed = [], []

    def watch(sql):
        if sql == "BEGIN IMMEDIATE":
            began.append(sql)
            removed.append(0)
        elif "incremental_vacuum" in sql:
            removed[-1] += 1

    spy.before = watch
    store.compact(TRIM)
    assert sqlite_path.stat().st_size < before / 4
    assert max(removed) == 7  # a write lock is held for one small step
    assert sum(removed) > 70
    spy.before = lambda _sql: None
    assert store.verify().ok
    spy.statements.clear()
    create(store)
    store.compact(TRIM)
    assert store.load_snapshot().records
    assert pragma(sqlite_path, "integrity_check") == "ok"


def test_other_writers_commit_between_two_steps(sqlite_path, open_, monkeypatch):
    monkeypatch.setattr(sqlite, "_PAGES_PER_STEP", 5)
    store = open_(f"sqlite:///{sqlite_path}")
    fill(store)
    empty(sqlite_path)
    other = open_(f"sqlite:///{sqlite_path}")
    spy = Spy(store)
    written = []

    def write(sql):
        if "incremental_vacuum" in sql:
            spy.after = write_after_the_commit

    def write_after_the_commit(sql):
        if sql == "COMMIT":
            spy.after = write
            written.append(create(other, task=TEXT).task_id)

    spy.after = write
    monkeypatch.setattr(sqlite, "_PAGES_PER_STEP", 20)
    store.compact(TRIM)
    spy.after = lambda _sql: None
    assert written
    assert set(store.load_snapshot().records) == set(written)
    assert store.verify().ok


def test_a_killed_creation_leaves_a_file_that_can_shrink(sqlite_path, open_, monkeypatch):
    def die(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("alembic.command.upgrade", die)
        with pytest.raises(KeyboardInterrupt):
            open_(f"sqlite:///{sqlite_path}")
    with open_(f"sqlite:///{sqlite_path}") as store:
        create(store)
        assert store.report().notices == ()
    assert pragma(sqlite_path, "auto_vacuum") == 2


# -- the vacuum of a file that was created without incremental vacuum -----------------


@pytest.fixture
def old(sqlite_path):
    """A closed ledger in a file that cannot shrink, with many free pages."""
    connection = pysqlite3.dbapi2.connect(sqlite_path)
    connection.execute("CREATE TABLE taken (x)")  # the first table, in a file of mode 0
    connection.execute("DROP TABLE taken")
    connection.close()
    sqlite_path.chmod(0o640)
    with TaskRegistry.open(f"sqlite:///{sqlite_path}") as registry:
        fill(registry.store)
    empty(sqlite_path)
    with TaskRegistry.open(f"sqlite:///{sqlite_path}") as registry:
        registry.create(runtime="cli", task="kept", task_id="kept")
        compact(registry.store, TRIM)
    assert pragma(sqlite_path, "auto_vacuum") == 0
    assert pragma(sqlite_path, "freelist_count") > 100
    return sqlite_path


def files_of(path):
    return {item.name: item.read_bytes() for item in path.parent.iterdir()}


def check_rebuilt(path, before):
    status = path.stat()
    assert status.st_size < before / 4
    assert status.st_mode & 0o777 == 0o640
    assert sorted(item.name for item in path.parent.iterdir()) == ["tasks.db"]
    assert pragma(path, "auto_vacuum") == 2
    assert pragma(path, "journal_mode") == "wal"
    assert pragma(path, "integrity_check") == "ok"
    with TaskRegistry.open(f"sqlite:///{path}") as registry:
        assert [task.task_id for task in registry.list()] == ["kept"]
        assert registry.store.verify().ok


@pytest.mark.parametrize("module", [pysqlite3.dbapi2, sqlite3])
def test_a_vacuum_rebuilds_the_file(old, module, monkeypatch):
    monkeypatch.setattr(sqlite, "sqlite_module", lambda: module)
    (old.parent / "tasks.db-vacuum").write_bytes(b"left by a killed process")
    before = old.stat().st_size
    report = vacuum(f"sqlite:///{old}")
    check_rebuilt(old, before)
    assert report.before_bytes == before
    assert report.after_bytes == old.stat().st_size
    assert report.after_bytes < report.needed_bytes < 4 * report.after_bytes
    again = vacuum(f"sqlite:///{old}")
    assert again.after_bytes == report.after_bytes


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_the_command_rebuilds_then_compacts(old, mode, capsys):
    connection = pysqlite3.dbapi2.connect(old)
    connection.execute(f"PRAGMA journal_mode = {mode}")
    connection.close()
    before = old.stat().st_size
    assert main(["--url", f"sqlite:///{old}", "compact", "--vacuum"]) == 0
    out = capsys.readouterr().out
    assert f"{before:,} bytes before" in out
    assert "free bytes beside the file" in out
    assert "nothing to do" in out or "compacted at seq" in out
    check_rebuilt(old, before)
    assert main(["--url", f"sqlite:///{old}", "compact", "--vacuum", "--json"]) == 0
    members = json.loads(capsys.readouterr().out)
    assert members["vacuum"]["before_bytes"] == old.stat().st_size
    assert "compacted" in members


OPEN = """
import sys
from taskstore import TaskRegistry
registry = TaskRegistry.open(sys.argv[1], read_only=sys.argv[2] == "reader")
print("open", flush=True)
sys.stdin.readline()
registry.close()
"""


@pytest.mark.parametrize("kind", ["reader", "writer"])
def test_a_ledger_that_another_process_has_open_is_not_rebuilt(old, kind, capsys):
    url = f"sqlite:///{old}"
    process = in_process(OPEN, url, kind)
    assert process.stdout.readline() == "open\n"
    with pytest.raises(StoreBusyError, match="is open elsewhere") as caught:
        vacuum(url)
    assert "nothing was changed" in str(caught.value)
    if Path("/proc/locks").exists():
        [owner] = caught.value.owners  # this process waited for the lock, and did not own it
        assert owner.startswith(f"pid {process.pid}")
    assert main(["--url", url, "compact", "--vacuum"]) == 3
    assert "is open elsewhere" in capsys.readouterr().err
    process.communicate("close\n")
    assert pragma(old, "auto_vacuum") == 0
    vacuum(url)
    assert pragma(old, "auto_vacuum") == 2


def test_a_store_of_this_process_counts_too(old, open_):
    store = open_(f"sqlite:///{old}")
    with pytest.raises(StoreBusyError, match="is open elsewhere") as caught:
        vacuum(f"sqlite:///{old}")
    if Path("/proc/locks").exists():
        assert caught.value.owners == (f"pid {os.getpid()}, this process",)
    store.close()
    engine = sa.create_engine(f"sqlite:///{old}", module=sqlite3)
    with SQLStore(engine), pytest.raises(StoreBusyError, match="is open elsewhere"):
        vacuum(f"sqlite:///{old}")
    engine.dispose()


def test_too_little_room_changes_nothing(old, monkeypatch, capsys):
    usage = shutil.disk_usage(old.parent)._replace(free=1000)
    monkeypatch.setattr(sqlite.shutil, "disk_usage", lambda _path: usage)
    before = files_of(old)
    with pytest.raises(StoreUnavailableError, match=r"needs [0-9,]+ free bytes in .* 1,000 bytes"):
        vacuum(f"sqlite:///{old}")
    assert main(["--url", f"sqlite:///{old}", "compact", "--vacuum"]) == 3
    assert "nothing was changed" in capsys.readouterr().err
    assert files_of(old) == before


@pytest.mark.parametrize("failing", ["copy", "write back"])
def test_a_disk_that_is_full_in_the_middle_changes_nothing(old, failing, monkeypatch):
    class Full(pysqlite3.dbapi2.Connection):
        def execute(self, sql, *parameters):
            if failing == "copy" and sql.startswith("VACUUM"):
                raise full()
            return super().execute(sql, *parameters)

        def backup(self, target):
            super().backup(target, pages=5, progress=lambda *_: raise_full())

    def full():
        error = pysqlite3.dbapi2.OperationalError("database or disk is full")
        error.sqlite_errorcode = 13
        return error

    def raise_full():
        raise full()

    connect = pysqlite3.dbapi2.connect
    monkeypatch.setattr(
        pysqlite3.dbapi2,
        "connect",
        lambda *args, **options: connect(*args, factory=Full, **options),
    )
    before = files_of(old)
    with pytest.raises(StoreUnavailableError, match="disk is full"):
        vacuum(f"sqlite:///{old}")
    assert files_of(old)["tasks.db"] == before["tasks.db"]
    assert not (old.parent / "tasks.db-vacuum").exists()
    monkeypatch.undo()
    vacuum(f"sqlite:///{old}")
    with TaskRegistry.open(f"sqlite:///{old}") as registry:
        assert len(registry.list()) == 1


KILLED = """
import os, sys
import pysqlite3.dbapi2 as sqlite3
from taskstore.stores.sql import vacuum
class Killed(sqlite3.Connection):
    def execute(self, sql, *parameters):
        if sql.startswith(sys.argv[2]):
            os._exit(0)
        return super().execute(sql, *parameters)
    def backup(self, target):
        steps = iter(range(int(sys.argv[3])))
        def count(*_):
            if next(steps, None) is None:
                os._exit(0)
        super().backup(target, pages=5, progress=count)
connect = sqlite3.connect
sqlite3.connect = lambda *args, **options: connect(*args, factory=Killed, **options)
vacuum(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("statement", "steps"), [("VACUUM", 0), ("none", 1), ("none", 5), ("PRAGMA wal_checkpoint", 99)]
)
def test_a_vacuum_may_be_killed(old, statement, steps):
    url = f"sqlite:///{old}"
    before = old.stat().st_size
    output_of(in_process(KILLED, url, statement, steps))
    with TaskRegistry.open(url, read_only=True) as registry:
        assert [task.task_id for task in registry.list()] == ["kept"]
        assert registry.store.verify().ok
    vacuum(url)
    check_rebuilt(old, before)


def test_other_backends_answer_clearly(tmp_path, backend_url, capsys):
    url, said = backend_url
    TaskRegistry.open(url).close()
    with pytest.raises(UnsupportedError, match="only an SQLite file") as caught:
        vacuum(url)
    assert said in str(caught.value)
    assert main(["--url", url, "compact", "--vacuum"]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(params=["json", "postgresql", "mariadb"])
def backend_url(request, tmp_path):
    if request.param == "json":
        return f"json:///{tmp_path}/ledger", "a JSON ledger gives space back at each compaction"
    if request.param == "mariadb":
        return request.getfixturevalue("mariadb_url"), "OPTIMIZE TABLE"
    return request.getfixturevalue("postgres_url"), "VACUUM FULL"


def test_only_a_ledger_is_rebuilt(sqlite_path, capsys):
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        vacuum(f"sqlite:///{sqlite_path}")
    connection = sqlite3.connect(sqlite_path)
    connection.execute("CREATE TABLE notes (body)")
    connection.close()
    before = files_of(sqlite_path)
    with pytest.raises(SchemaMismatchError, match="contains no ledger"):
        vacuum(f"sqlite:///{sqlite_path}")
    assert files_of(sqlite_path) == before
