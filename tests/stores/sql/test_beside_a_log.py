"""[4, 13] A log that holds data is never removed for an empty, cut, foreign or missing file."""

from __future__ import annotations

import os
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
from taskstore.stores.sql.dialects.sqlite import file_problem
from taskstore.stores.sql.migrate import connect_with_schema_lock
from taskstore.stores.sql.sqlite_guard import lacks_pages

KILLED = """
import os, sys
from taskstore import TaskRegistry
registry = TaskRegistry.open(sys.argv[1])
for _ in range(20):
    registry.create(runtime="cli", task="acknowledged")
os._exit(0)
"""

CLOSED = KILLED.replace("os._exit(0)", "registry.close()")

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


def cut_to_a_byte(path):
    path.write_bytes(path.read_bytes()[:1])  # SQLite takes such a file for an empty one


def cut_within_the_header(path):
    path.write_bytes(path.read_bytes()[:99])


def cut_to_a_part_of_the_header(path):
    path.write_bytes(path.read_bytes()[:20])


def cut_to_the_header(path):
    os.truncate(path, 100)


def cut_to_a_page(path):
    os.truncate(path, 4096)


def cut_to_half(path):
    os.truncate(path, path.stat().st_size // 2)


CUTS = [cut_to_the_header, cut_to_a_page, cut_to_half]

DAMAGES = [
    *CUTS,
    cut,
    zero,
    write_text,
    cut_to_a_byte,
    cut_to_a_part_of_the_header,
    cut_within_the_header,
    Path.unlink,
]


@pytest.fixture(scope="module")
def crashed_files(tmp_path_factory):
    """The files of a ledger whose writer was killed: the database file holds 20 tasks, and the log
    holds 20 other tasks."""
    path = tmp_path_factory.mktemp("crashed") / "tasks.db"
    output_of(in_process(CLOSED, f"sqlite:///{path}"))
    output_of(in_process(KILLED, f"sqlite:///{path}"))
    files = files_of(path)
    assert len(files["tasks.db"]) > 10 * 4096
    assert files["tasks.db-wal"]
    return files


@pytest.fixture
def crashed(crashed_files, sqlite_path):
    put_back(crashed_files, sqlite_path)
    return sqlite_path


def files_of(path):
    """The bytes of every file in the directory.  No process has them open."""
    return {item.name: item.read_bytes() for item in path.parent.iterdir()}


def put_back(files, path):
    for item in path.parent.iterdir():
        item.unlink()
    for name, content in files.items():
        path.with_name(name).write_bytes(content)


def open_store(url):
    TaskRegistry.open(url).close()


def open_read_only(url):
    TaskRegistry.open(url, read_only=True).close()


def open_with_alembic(url):
    with connect_with_schema_lock(url):
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


BEGINNING_A_CHECKPOINT = """
import struct, sys
path = sys.argv[1]
with open(path + "-wal", "rb") as log:
    salts, page = log.read(32)[16:24], None
    while len(frame := log.read(24 + 4096)) == 24 + 4096 and frame[8:16] == salts:
        number, pages_after = struct.unpack(">II", frame[:8])
        if number == 1:
            page = frame[24:]
assert pages_after, "the log does not end with a commit"
with open(path, "r+b") as file:
    file.write(page)
"""
"""Writes the first page of the log into the file, as a checkpoint does that is then killed."""


def begin_checkpoint(path):
    output_of(in_process(BEGINNING_A_CHECKPOINT, path))


def is_malformed_without_its_log(path):
    connection = pysqlite3.dbapi2.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        connection.execute("PRAGMA schema_version").fetchall()
    except pysqlite3.dbapi2.DatabaseError as error:
        return "malformed" in str(error)
    finally:
        connection.close()
    return False


VACUUMING = """
import os, sys
import pysqlite3.dbapi2 as sqlite3
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("CREATE TABLE filler (x)")
for _ in range(50):
    connection.execute("INSERT INTO filler VALUES (zeroblob(3000))")
connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
connection.execute("DROP TABLE filler")
connection.execute("VACUUM")
print(connection.execute("PRAGMA page_count").fetchone()[0])
sys.stdout.flush()
os._exit(0)
"""


CHANGING_THE_FIRST_PAGE = """
import os, sys
import pysqlite3.dbapi2 as sqlite3
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA user_version = 1")
os._exit(0)
"""


def killed_in_a_checkpoint(path):
    """The file has the pages of an earlier checkpoint, and the log has the new pages."""
    for script in (CLOSED, KILLED, KILLED):
        output_of(in_process(script, f"sqlite:///{path}"))
    begin_checkpoint(path)
    return 60


def shortened_before_the_first_page(path):
    """After a power loss, the file has the new size, and the old first page."""
    output_of(in_process(CLOSED, f"sqlite:///{path}"))
    pages = int(output_of(in_process(VACUUMING, path)))
    os.truncate(path, pages * 4096)
    return 20


def rebuilt_in_the_log(path):
    """The log has all pages of a vacuum, and the file has only the first of these pages."""
    output_of(in_process(CLOSED, f"sqlite:///{path}"))
    output_of(in_process(VACUUMING, path))
    begin_checkpoint(path)
    os.truncate(path, 4096)
    return 20


@pytest.mark.parametrize(
    "state", [killed_in_a_checkpoint, shortened_before_the_first_page, rebuilt_in_the_log]
)
def test_a_file_that_its_log_completes_is_opened(sqlite_path, state):
    tasks = state(sqlite_path)
    files = files_of(sqlite_path)
    assert is_malformed_without_its_log(sqlite_path)
    for way in WAYS:
        put_back(files, sqlite_path)
        way(f"sqlite:///{sqlite_path}")
        with TaskRegistry.open(f"sqlite:///{sqlite_path}") as registry:
            assert len(registry.list()) == tasks
            assert registry.store.verify().ok


def test_a_file_that_its_log_does_not_complete_is_refused(sqlite_path):
    killed_in_a_checkpoint(sqlite_path)
    cut_to_half(sqlite_path)
    before = files_of(sqlite_path)
    for way in WAYS:
        with pytest.raises(CorruptStoreError, match="was cut: its last pages are missing, but"):
            way(f"sqlite:///{sqlite_path}")
        assert files_of(sqlite_path) == before


@pytest.fixture
def small_log(sqlite_path):
    """A ledger whose log has only the first page."""
    output_of(in_process(CLOSED, f"sqlite:///{sqlite_path}"))
    output_of(in_process(CHANGING_THE_FIRST_PAGE, sqlite_path))
    assert Path(f"{sqlite_path}-wal").stat().st_size == 32 + 24 + 4096
    return sqlite_path


def test_only_the_pages_of_commits_complete_a_file(small_log):
    pages, log = small_log.stat().st_size // 4096, Path(f"{small_log}-wal")
    os.truncate(small_log, (pages - 1) * 4096)
    frames = log.read_bytes()
    for page, pages_after, salts, complete in (
        (pages, 0, frames[16:24], False),  # no commit follows
        (pages, pages, b"earlier.", False),
        (pages - 1, pages, frames[16:24], False),
        (pages, pages, frames[16:24], True),
        (1, pages - 1, frames[16:24], True),  # the commit makes the database smaller
    ):
        frame = page.to_bytes(4) + pages_after.to_bytes(4) + salts + bytes(8 + 4096)
        log.write_bytes(frames + frame)
        assert lacks_pages(small_log) is not complete
        log.write_bytes(frames + frame[:-1])  # the last frame is not complete
        assert lacks_pages(small_log)


def test_a_page_that_is_cut_in_its_middle_is_missing(small_log):
    os.truncate(small_log, small_log.stat().st_size - 1)
    before = files_of(small_log)
    with pytest.raises(CorruptStoreError, match="was cut"):
        open_store(f"sqlite:///{small_log}")
    assert files_of(small_log) == before


def test_a_damaged_number_of_pages_takes_no_time(crashed):
    with crashed.open("r+b") as file:
        file.seek(28)
        file.write(b"\xff\xff\xff\xfe")
    Path(f"{crashed}-wal").unlink()
    with pytest.raises(CorruptStoreError, match="was cut"):
        open_store(f"sqlite:///{crashed}")


@pytest.mark.parametrize("log", [None, b""])
@pytest.mark.parametrize("damage", [cut_within_the_header, *CUTS])
def test_a_cut_file_without_a_log(sqlite_path, damage, log, capsys):
    output_of(in_process(CLOSED, f"sqlite:///{sqlite_path}"))
    damage(sqlite_path)
    if log is not None:
        Path(f"{sqlite_path}-wal").write_bytes(log)
    before = sqlite_path.read_bytes()
    for number, way in enumerate([*WAYS, open_with_creator]):
        with pytest.raises(CorruptStoreError, match="the file was cut: its last") as caught:
            way(f"sqlite:///{sqlite_path}")
        assert "backup" in str(caught.value.hint), number
        assert sqlite_path.read_bytes() == before, number
    for words in ("list", "verify", "compact --vacuum", "db current", "db upgrade"):
        assert main([*words.split(), "--url", f"sqlite:///{sqlite_path}"]) == 3
        assert "the file was cut" in capsys.readouterr().err, words
        assert sqlite_path.read_bytes() == before, words


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_refused_and_nothing_is_changed(crashed, damage):
    damage(crashed)
    before = files_of(crashed)
    for number, way in enumerate(WAYS):
        with pytest.raises(CorruptStoreError, match="contains changes") as caught:
            way(f"sqlite:///{crashed}")
        assert f"{crashed}-wal" in str(caught.value), number
        assert files_of(crashed) == before, number


@pytest.mark.parametrize("damage", [cut, cut_to_a_byte, cut_within_the_header, zero, *CUTS])
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
        assert len(registry.list()) == 40
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


LOCKING = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)
    except OSError:
        print("locked by another process")
"""
"""Locks the bytes that every connection of SQLite locks for reading."""


def test_looking_at_the_header_keeps_the_locks_of_this_process(live, sqlite_path):
    registry, _ = live
    for read_only in (True, False):
        TaskRegistry.open(f"sqlite:///{sqlite_path}", read_only=read_only).close()
        # Another process removes the log on exit, if it finds no lock on the file.
        output_of(in_process(CLOSED, f"sqlite:///{sqlite_path}"))
        assert Path(f"{sqlite_path}-wal").exists()
        assert output_of(in_process(LOCKING, sqlite_path)) == "locked by another process\n"
        registry.record_progress("kept", "still here")


def test_looking_at_a_short_file_keeps_the_locks_of_this_process(live, sqlite_path):
    registry, _ = live
    for _ in range(40):
        registry.create(runtime="cli", task="acknowledged")
    begin_checkpoint(sqlite_path)
    assert is_malformed_without_its_log(sqlite_path)
    assert file_problem(pysqlite3.dbapi2, sqlite_path) is None
    assert output_of(in_process(LOCKING, sqlite_path)) == "locked by another process\n"
    registry.record_progress("kept", "still here")
