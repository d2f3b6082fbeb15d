"""[13] Reading changes nothing, and works where nothing may be changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from sqlkit import in_process, output_of, write

from taskstore.errors import ReadOnlyError, StoreUnavailableError
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.journal import Snapshot
from taskstore.model.query import TaskQuery
from taskstore.testing.factories import create, make_put

NOBODY = 65534


def digest(path: Path) -> str:
    """Hash a file in another process: closing it in this one would drop SQLite's locks."""
    script = (
        "import sys, hashlib; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
    )
    return output_of(in_process(script, path)).strip()


def read_everything(store) -> int:
    store.query(TaskQuery(limit=3))
    store.read_journal(0, 100)
    store.read_snapshot(100)
    store.verify()
    return len(store.load_snapshot().records)


def test_nothing_is_written(url, open_):
    with open_(url) as store:
        create(store)
    reader = open_(url, read_only=True)
    assert read_everything(reader) == 1
    for action in (
        lambda: reader.apply([make_put()]),
        lambda: reader.save_snapshot(Snapshot(9)),
        lambda: reader.compact(CompactionPolicy(force=True)),
    ):
        with pytest.raises(ReadOnlyError):
            action()


def test_the_connection_itself_refuses(url, open_):
    open_(url).close()
    # PostgreSQL reports the same error as a standby, so the store waits.
    reader = open_(url, read_only=True, reconnect_s=0.1)
    with pytest.raises(StoreUnavailableError, match=r"cannot be written"):
        write(reader, lambda session: session.execute("DELETE FROM taskstore_head"))
    assert reader.head() == 0


def test_a_reader_follows_a_writer(url, open_):
    store = open_(url)
    reader = open_(url, read_only=True)
    for number in range(5):
        create(store)
        assert reader.head() == number + 1
        assert len(reader.load_snapshot().records) == number + 1


def test_a_reader_never_waits(sqlite_path, open_):
    url = f"sqlite:///{sqlite_path}"
    store = open_(url)
    create(store)
    held = store._transactions.pool.acquire_writer()
    held.execute("BEGIN EXCLUSIVE")
    assert read_everything(open_(url, read_only=True)) == 1
    held.execute("ROLLBACK")


def test_the_last_reader_does_not_checkpoint(sqlite_path):
    # The writer dies without closing: its commits are in the log only.
    script = """
import os, sys
from taskstore import open_store
from taskstore.testing.factories import create
store = open_store(sys.argv[1])
for _ in range(20):
    create(store)
os._exit(0)
"""
    url = f"sqlite:///{sqlite_path}"
    output_of(in_process(script, url))
    log = Path(f"{sqlite_path}-wal")
    before = digest(sqlite_path), digest(log)
    assert log.stat().st_size > 0
    reading = """
import sys
from taskstore import open_store
with open_store(sys.argv[1], read_only=True) as store:
    print(len(store.load_snapshot().records), store.verify().ok)
"""
    for _ in range(2):
        assert output_of(in_process(reading, url)).split() == ["20", "True"]
        assert (digest(sqlite_path), digest(log)) == before


def test_a_missing_file_is_not_made(sqlite_path, open_):
    with pytest.raises(StoreUnavailableError, match="does not exist") as caught:
        open_(f"sqlite:///{sqlite_path}", read_only=True)
    assert str(sqlite_path) in str(caught.value)
    assert list(sqlite_path.parent.iterdir()) == []


# -- as a user without root's rights, in a directory that may not be written --

AS_NOBODY = f"""
import os, sys
# Another user may have no access to the directory of Python.
import alembic.command, encodings.idna, taskstore.stores.sql.migrate, taskstore.testing.factories
from taskstore.stores.sql import open_sql as open_store
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
"""
READ = (
    AS_NOBODY
    + """
from taskstore.errors import TaskStoreError
try:
    with open_store(sys.argv[1], read_only=True) as store:
        print(len(store.load_snapshot().records), store.head())
        if len(sys.argv) > 2:
            print("loaded", flush=True)
            sys.stdin.readline()
            print(store.head())
except TaskStoreError as error:
    print(type(error).__name__, error)
"""
)
WRITE = (
    AS_NOBODY
    + """
from taskstore.errors import TaskStoreError
from taskstore.testing.factories import create
try:
    create(open_store(sys.argv[1]))
except TaskStoreError as error:
    print(type(error).__name__, error)
"""
)

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root to become somebody else")


@pytest.fixture
def shut(open_):
    """A closed ledger of one task in a directory that others may read, not write."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    path = place / "tasks.db"
    with open_(f"sqlite:///{path}") as store:
        create(store)
    path.chmod(0o644)
    yield path
    shutil.rmtree(place)


@needs_root
def test_a_closed_ledger_is_read_as_immutable(shut):
    before = digest(shut)
    assert output_of(in_process(READ, f"sqlite:///{shut}")).split() == ["1", "1"]
    assert digest(shut) == before
    assert [item.name for item in shut.parent.iterdir()] == ["tasks.db"]


@needs_root
def test_a_writer_that_appears_meanwhile_is_noticed(shut):
    process = in_process(READ, f"sqlite:///{shut}", "stay")
    assert process.stdout is not None
    assert process.stdout.readline().split() == ["1", "1"]
    assert process.stdout.readline() == "loaded\n"
    script = """
import sys
from taskstore import open_store
from taskstore.testing.factories import create
with open_store(sys.argv[1]) as store:
    create(store)
"""
    output_of(in_process(script, f"sqlite:///{shut}"))
    printed, _ = process.communicate("go\n")
    assert printed.startswith("StoreUnavailableError")
    assert "changed by a writer" in printed
    assert str(shut.parent) in printed


@needs_root
def test_a_live_ledger_is_read_beside_its_writer(shut):
    script = """
import sys
from taskstore import open_store
from taskstore.testing.factories import create
with open_store(sys.argv[1]) as store:
    create(store)
    print("ready", flush=True)
    sys.stdin.readline()
"""
    writer = in_process(script, f"sqlite:///{shut}")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    assert output_of(in_process(READ, f"sqlite:///{shut}")).split() == ["2", "2"]
    writer.communicate("done\n")


@needs_root
def test_a_log_without_its_index_names_the_directory(shut):
    script = """
import os, sys
from taskstore import open_store
from taskstore.testing.factories import create
store = open_store(sys.argv[1])
create(store)
os._exit(0)
"""
    output_of(in_process(script, f"sqlite:///{shut}"))
    Path(f"{shut}-shm").unlink()
    printed = output_of(in_process(READ, f"sqlite:///{shut}"))
    assert printed.startswith("StoreUnavailableError")
    assert f"{shut.parent} cannot be written" in printed


@needs_root
def test_writing_there_is_refused_with_the_path(shut):
    before = digest(shut)
    printed = output_of(in_process(WRITE, f"sqlite:///{shut}"))
    assert printed.startswith("StoreUnavailableError")
    assert str(shut) in printed
    printed = output_of(in_process(WRITE, f"sqlite:///{shut.parent}/new.db"))
    assert printed.startswith("StoreUnavailableError")
    assert f"{shut.parent}/new.db" in printed
    shut.chmod(0o666)
    printed = output_of(in_process(WRITE, f"sqlite:///{shut}"))
    assert printed.startswith("StoreUnavailableError")
    assert str(shut) in printed
    shut.chmod(0o600)
    for script in (READ, WRITE):
        printed = output_of(in_process(script, f"sqlite:///{shut}"))
        assert printed.startswith("StoreUnavailableError")
        assert str(shut) in printed
    assert digest(shut) == before


def test_the_digest_sees_a_change(sqlite_path):
    sqlite_path.write_bytes(b"x")
    assert digest(sqlite_path) == hashlib.sha256(b"x").hexdigest()
