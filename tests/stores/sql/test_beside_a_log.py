"""[4, 13] A log that holds data is never removed because its file is empty, foreign or missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pysqlite3.dbapi2
import pytest
import sqlalchemy as sa
from sqlkit import in_process, output_of

from taskstore import TaskRegistry
from taskstore.cli.app import main
from taskstore.errors import CorruptStoreError, SchemaMismatchError, TaskStoreError
from taskstore.stores.sql import SQLStore
from taskstore.stores.sql.migrate import locked_url

KILLED = """
import os, sys
from taskstore import TaskRegistry
registry = TaskRegistry.open(sys.argv[1])
for _ in range(20):
    registry.create(runtime="cli", task="acknowledged")
os._exit(0)
"""

ROLLING_BACK = """
import os, sys
import pysqlite3.dbapi2 as sqlite3
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = DELETE").fetchall()
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("CREATE TABLE filler (x)")
for _ in range(50):
    connection.execute("INSERT INTO filler VALUES (zeroblob(3000))")
os._exit(0)
"""


def cut(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def write_text(path):
    path.write_text("hello\n")


def cut_to_a_part_of_the_header(path):
    path.write_bytes(path.read_bytes()[:20])


DAMAGES = [cut, zero, write_text, cut_to_a_part_of_the_header, Path.unlink]


@pytest.fixture
def crashed(sqlite_path):
    """A ledger of 20 tasks whose writer was killed: its log holds all of them."""
    output_of(in_process(KILLED, f"sqlite:///{sqlite_path}"))
    assert Path(f"{sqlite_path}-wal").stat().st_size > 0
    return sqlite_path


def files_of(path):
    """The bytes of every file in the directory.  No process has them open."""
    return {item.name: item.read_bytes() for item in path.parent.iterdir()}


def open_store(url):
    TaskRegistry.open(url).close()


def open_read_only(url):
    TaskRegistry.open(url, read_only=True).close()


def open_with_alembic(url):
    with locked_url(url):
        pass


def open_with_engine(url, *, listens=False, read_only=False):
    engine = sa.create_engine(url, module=pysqlite3.dbapi2)

    def set_mode(raw, _record):
        raw.execute("PRAGMA journal_mode = WAL").fetchall()

    if listens:
        sa.event.listen(engine, "connect", set_mode)
    try:
        SQLStore(engine, read_only=read_only).close()
    finally:
        engine.dispose()


def open_with_creator(url):
    path = url.removeprefix("sqlite:///")
    engine = sa.create_engine(
        "sqlite://", module=pysqlite3.dbapi2, creator=lambda: pysqlite3.dbapi2.connect(path)
    )
    try:
        SQLStore(engine).close()
    finally:
        engine.dispose()


WAYS = [
    open_store,
    open_read_only,
    open_with_alembic,
    open_with_engine,
    lambda url: open_with_engine(url, listens=True),
    lambda url: open_with_engine(url, read_only=True),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_refused_and_nothing_is_changed(crashed, damage):
    damage(crashed)
    before = files_of(crashed)
    for number, way in enumerate(WAYS):
        with pytest.raises(CorruptStoreError, match="contains changes") as caught:
            way(f"sqlite:///{crashed}")
        assert f"{crashed}-wal" in str(caught.value), number
        assert files_of(crashed) == before, number


@pytest.mark.parametrize("damage", [cut, zero])
def test_a_host_that_makes_its_own_connections(crashed, damage):
    damage(crashed)
    before = files_of(crashed)
    with pytest.raises(CorruptStoreError, match="contains changes"):
        open_with_creator(f"sqlite:///{crashed}")
    assert files_of(crashed) == before


COMMANDS = (
    "list",
    "show x",
    "summary",
    "log x",
    "changes",
    "verify",
    "compact",
    "delete x",
    "run -- echo",
    "db current",
    "db check",
    "db history",
    "db upgrade",
    "db downgrade",
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_command_changes_anything(crashed, damage, capsys):
    damage(crashed)
    before = files_of(crashed)
    for words in COMMANDS:
        status = main(
            [*words.split(" --")[0].split(), "--url", f"sqlite:///{crashed}"]
            + (["--", "echo"] if "--" in words else [])
        )
        assert status == 3, words
        assert "contains changes" in capsys.readouterr().err, words
        assert files_of(crashed) == before, words


def test_the_file_that_is_put_back_has_all_tasks(crashed):
    kept = shutil.copy(crashed, crashed.parent / "kept")
    cut(crashed)
    for way in WAYS:
        with pytest.raises(CorruptStoreError):
            way(f"sqlite:///{crashed}")
    Path(kept).replace(crashed)
    with TaskRegistry.open(f"sqlite:///{crashed}") as registry:
        assert len(registry.list()) == 20
        assert registry.store.verify().ok
        assert registry.store.report().notices == ()


def test_an_unfinished_transaction_in_a_rollback_journal(sqlite_path, open_):
    url = f"sqlite:///{sqlite_path}"
    open_(url).close()
    output_of(in_process(ROLLING_BACK, sqlite_path))
    assert Path(f"{sqlite_path}-journal").stat().st_size > 0
    kept = shutil.copy(sqlite_path, sqlite_path.parent / "kept")
    for damage in DAMAGES:
        damage(sqlite_path)
        before = files_of(sqlite_path)
        for way in WAYS:
            with pytest.raises(CorruptStoreError, match="-journal contains changes"):
                way(url)
            assert files_of(sqlite_path) == before
    Path(kept).replace(sqlite_path)
    with open_(url) as store:  # the file is whole: SQLite rolls the transaction back
        assert store.verify().ok


def test_a_creation_that_was_killed_begins_again(sqlite_path):
    output_of(in_process(ROLLING_BACK, sqlite_path))
    cut(sqlite_path)
    assert Path(f"{sqlite_path}-journal").stat().st_size > 0
    before = files_of(sqlite_path)
    with pytest.raises(SchemaMismatchError, match="contains no ledger"):
        open_read_only(f"sqlite:///{sqlite_path}")
    assert files_of(sqlite_path) == before
    open_store(f"sqlite:///{sqlite_path}")


@pytest.mark.parametrize("words", ["list", "verify", "db check", "db current"])
def test_reading_an_empty_file_changes_nothing(sqlite_path, words, capsys):
    cut(sqlite_path)
    Path(f"{sqlite_path}-wal").touch()
    main(["--url", f"sqlite:///{sqlite_path}", *words.split()])
    capsys.readouterr()
    assert files_of(sqlite_path) == {"tasks.db": b"", "tasks.db-wal": b""}


def test_an_empty_file_is_a_new_ledger_with_a_notice(sqlite_path):
    with TaskRegistry.open(f"sqlite:///{sqlite_path}") as registry:
        assert registry.store.report().notices == ()
    cut(sqlite_path)
    for expected in (1, 0):
        with TaskRegistry.open(f"sqlite:///{sqlite_path}") as registry:
            notices = registry.store.report().notices
            assert len(notices) == expected
            assert all(f"{sqlite_path} existed and was empty" in text for text in notices)


def test_a_foreign_file_without_a_log_is_refused_as_before(sqlite_path):
    write_text(sqlite_path)
    before = files_of(sqlite_path)
    for way in WAYS:
        with pytest.raises(TaskStoreError):
            way(f"sqlite:///{sqlite_path}")
        assert files_of(sqlite_path) == before


def test_looking_at_the_header_keeps_the_locks_of_this_process(live, sqlite_path):
    registry, _ = live
    for read_only in (True, False):
        TaskRegistry.open(f"sqlite:///{sqlite_path}", read_only=read_only).close()
        # Another process removes the log on exit, if it finds no lock on the file.
        output_of(
            in_process(
                KILLED.replace("os._exit(0)", "registry.close()"), f"sqlite:///{sqlite_path}"
            )
        )
        assert Path(f"{sqlite_path}-wal").exists()
        registry.record_progress("kept", "still here")
