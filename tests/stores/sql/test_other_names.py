"""[4] A file that has two names is not written: each name has a log of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys

import pysqlite3.dbapi2
import pytest
import sqlalchemy as sa

from taskstore import TaskRegistry, compact
from taskstore.aio import AsyncTaskRegistry
from taskstore.cli.app import main
from taskstore.errors import StoreUnavailableError, ValidationError
from taskstore.store import disk
from taskstore.stores.sql import SQLStore
from taskstore.stores.sql.dialects import sqlite


@pytest.fixture
def ledger(sqlite_path, open_registry):
    """A closed ledger with one task."""
    with open_registry() as registry:
        registry.create(runtime="cli", task="first")
    return sqlite_path


@pytest.fixture
def linked(ledger):
    """A second name of the file, in another directory."""
    other = ledger.parent / "other place" / "tasks.db"
    other.parent.mkdir()
    os.link(ledger, other)
    return other


async def open_async(url):
    async with await AsyncTaskRegistry.open(url):
        pass


def open_sync(url):
    TaskRegistry.open(url).close()


def open_with_engine(url):
    engine = sa.create_engine(url, module=pysqlite3.dbapi2)
    try:
        SQLStore(engine).close()
    finally:
        engine.dispose()


@pytest.mark.parametrize(
    "open_one", [open_sync, lambda url: asyncio.run(open_async(url)), open_with_engine]
)
def test_a_writer_is_refused_by_either_name(ledger, linked, open_one):
    for path in (ledger, linked):
        with pytest.raises(StoreUnavailableError, match="mount the directory") as caught:
            open_one(f"sqlite:///{path}")
        assert f"{path} has 2 hard links" in str(caught.value)
        assert str(path.parent) in caught.value.hint
        assert not caught.value.retryable
        assert sorted(item.name for item in linked.parent.iterdir()) == ["tasks.db"]
    linked.unlink()
    open_one(f"sqlite:///{ledger}")


@pytest.mark.parametrize(
    "words", ["compact", "db upgrade", "db downgrade base --yes", "run -- echo"]
)
def test_a_command_that_writes_is_refused(linked, words, capsys):
    assert main(["--url", f"sqlite:///{linked}", *words.split()]) == 3
    assert "mount the directory" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["list", "verify"])
def test_a_command_that_reads_prints_the_notice(linked, words, capsys):
    assert main(["--url", f"sqlite:///{linked}", *words.split()]) == 0
    assert f"note: {linked} has 2 hard links" in capsys.readouterr().err
    assert main(["--url", f"sqlite:///{linked}?links=allow", *words.split()]) == 0
    assert capsys.readouterr().err == ""


def test_a_reader_and_the_writer_of_a_later_link_get_a_notice(ledger, open_registry, caplog):
    writer = open_registry()
    reader = open_registry(read_only=True)
    stores = (writer.store, reader.store)
    assert [store.report().notices for store in stores] == [(), ()]
    link = ledger.with_name("link.db")
    os.link(ledger, link)
    for store in stores:
        [notice] = store.report().notices
        assert f"{ledger} has 2 hard links" in notice
        assert "mount the directory" in notice
        assert store.report().notices == (notice,)
        assert caplog.messages.count(notice) == 1
        caplog.clear()
    writer.create(runtime="cli", task="second")
    late = open_registry(read_only=True)
    assert len(late.store.report().notices) == 1
    assert len(caplog.messages) == 1
    link.unlink()
    assert [store.report().notices for store in stores] == [(), ()]


def test_a_commit_does_not_look_for_names(open_registry, monkeypatch):
    registry = open_registry()

    def looked(path):
        raise AssertionError(path)

    monkeypatch.setattr(sqlite, "alias_reason", looked)
    registry.create(runtime="cli", task="x")
    registry.list()
    compact(registry.store)


def test_an_owner_who_knows_may_allow_it(linked, open_registry):
    for _ in range(2):
        with TaskRegistry.open(f"sqlite:///{linked}?links=allow") as registry:
            registry.create(runtime="cli", task="x")
            assert registry.store.report().notices == ()
            assert registry.store.location == str(linked)
    engine = sa.create_engine(f"sqlite:///{linked}", module=pysqlite3.dbapi2)
    with SQLStore(engine, links="allow") as store:
        assert len(store.load_snapshot().records) == 3
        assert store.report().notices == ()
    with SQLStore(engine, read_only=True) as store:
        assert len(store.report().notices) == 1
    engine.dispose()
    assert main(["--url", f"sqlite:///{linked}?links=allow", "compact"]) == 0


@pytest.mark.parametrize(
    "options",
    ["", "links", "links=", "links=deny", "links=allow&links=deny", "link=allow", "mode=ro", "x"],
)
def test_other_options_are_refused(ledger, options):
    for read_only in (False, True):
        with pytest.raises(ValidationError, match="links=allow"):
            TaskRegistry.open(f"sqlite:///{ledger}?{options}", read_only=read_only)


def test_another_value_of_the_hosts_option(ledger):
    engine = sa.create_engine(f"sqlite:///{ledger}", module=pysqlite3.dbapi2)
    with pytest.raises(ValidationError, match="links"):
        SQLStore(engine, links="maybe")


def test_a_symbolic_link_is_no_second_name(ledger):
    link = ledger.with_name("link.db")
    link.symlink_to(ledger)
    with TaskRegistry.open(f"sqlite:///{link}") as one, TaskRegistry.open(f"sqlite:///{ledger}"):
        one.create(runtime="cli", task="x")
        assert one.store.report().notices == ()


def test_a_directory_is_told_as_one(tmp_path):
    for read_only, reason in ((False, "is a directory"), (True, "not a regular file")):
        with pytest.raises(StoreUnavailableError, match=reason):
            TaskRegistry.open(f"sqlite:///{tmp_path}", read_only=read_only)


def test_a_system_without_a_list_of_mounts(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "missing")
    with TaskRegistry.open(f"sqlite:///{ledger}") as registry:
        assert registry.store.report().notices == ()


# -- a file that is mounted by itself ------------------------------------------------

MOUNTED = """
import sys
from taskstore import TaskRegistry
from taskstore.errors import StoreUnavailableError
url = sys.argv[1]
try:
    TaskRegistry.open(url)
except StoreUnavailableError as error:
    print(error)
with TaskRegistry.open(url, read_only=True) as registry:
    print(*registry.store.report().notices)
with TaskRegistry.open(f"{url}?links=allow") as registry:
    print(len(registry.list()), registry.store.report().notices)
"""


UNSHARE = ("unshare", "-m", "sh", "-c")


def mounted(script, what, where, *arguments):
    """The output of a Python script that sees ``what`` mounted at ``where``."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        cannot_mount("root and the command unshare are required")
    mount = 'mount --bind "$1" "$2" || exit 77; shift 2; exec "$@"'
    done = subprocess.run(
        [*UNSHARE, mount, "sh", what, where, sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (1, 77) and "mount" in done.stderr.partition("\n")[0]:
        cannot_mount(done.stderr)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cannot_mount(reason):
    if os.environ.get("CI"):
        pytest.fail(f"nothing can be mounted here: {reason}")
    pytest.skip(f"no file system can be mounted here: {reason}")


@pytest.mark.parametrize("name", ["t.db", "with space.db", "back\\slash #1.db", "über\t.db"])
def test_a_file_that_is_mounted_by_itself(ledger, name):
    container = ledger.parent / "a container"
    container.mkdir()
    target = container / name
    target.touch()
    refusal, notice, count = mounted(MOUNTED, ledger, target, f"sqlite:///{target}").splitlines()
    assert refusal.startswith(f"{target} is mounted as a single file")
    assert f"mount the directory {container} instead" in refusal
    assert notice.startswith(f"{target} is mounted as a single file")
    assert "mount the directory" in notice
    assert count == "1 ()"
    open_sync(f"sqlite:///{ledger}")  # where nothing is mounted


def test_a_mounted_directory_is_as_good_as_any(ledger):
    container = ledger.parent / "a container"
    container.mkdir()
    script = """
import sys
from taskstore import TaskRegistry
with TaskRegistry.open(sys.argv[1]) as registry:
    registry.create(runtime="cli", task="second")
    print(len(registry.list()), registry.store.report().notices)
"""
    url = f"sqlite:///{container}/{ledger.name}"
    assert mounted(script, ledger.parent, container, url) == "2 ()\n"
