"""[4] A newest segment that is in two directories is not written: each has a lock of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from jsonfiles import CHILD_PRELUDE, FOLD, child, segments, snapshots, state_of

from taskstore import TaskRegistry
from taskstore.cli.app import main
from taskstore.errors import StoreUnavailableError
from taskstore.store import disk
from taskstore.stores.jsonfile import JSONStore
from taskstore.stores.jsonfile import layout as layout_module
from taskstore.testing.factories import create


@pytest.fixture
def ledger(directory):
    """A closed ledger with a snapshot, an older segment and one task in the newest segment."""
    with JSONStore(directory) as store:
        create(store, task_id="first")
        store.compact(FOLD)
        create(store, task_id="second")
    return directory


@pytest.fixture
def linked(ledger):
    """A copy of the ledger whose files are hard links, as ``cp -al`` makes it."""
    copy = ledger.with_name("the copy")
    shutil.copytree(ledger, copy, copy_function=os.link)
    return copy


def test_a_writer_is_refused_in_either_directory(ledger, linked):
    for directory in (ledger, linked):
        newest = segments(directory)[-1]
        with newest.open("ab") as file:
            file.write(b'{"crc":"the start of a line')  # a writer of the other directory writes
        before = state_of(directory)
        with pytest.raises(StoreUnavailableError, match="not opened for writing") as caught:
            JSONStore(directory)
        assert f"{newest} has 2 hard links" in str(caught.value)
        assert "cp -a instead of cp -al" in caught.value.hint
        assert not caught.value.retryable
        after = state_of(directory)
        assert {name: after[name] for name in before} == before
        assert {name for name in after.keys() - before.keys() if name.startswith("j")} == set()
    shutil.rmtree(linked)
    JSONStore(ledger).close()


def test_two_writers_cannot_lose_each_others_tasks(ledger, linked):
    code = "store = JSONStore(sys.argv[1]); create(store, task_id=sys.argv[2])"
    for name, directory in (("a", ledger), ("b", linked)):
        process = child(code, directory, name)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "StoreUnavailableError" in printed


def test_the_hint_shows_the_other_links(ledger, linked):
    with pytest.raises(StoreUnavailableError) as caught:
        JSONStore(ledger)
    command = caught.value.hint.partition("links: ")[2].partition(" shows")[0]
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    newest = segments(ledger)[-1]
    assert set(found.stdout.splitlines()) == {str(newest), str(linked / newest.name)}


def test_a_copy_without_links_is_the_way_out(ledger, linked):
    fresh = ledger.with_name("fresh")
    subprocess.run(["cp", "-a", ledger, fresh], check=True)
    with JSONStore(fresh) as store:
        create(store, task_id="third")
        assert store.report().notices == ()
        assert len(store.load_snapshot().records) == 3


def test_older_files_may_have_links(ledger):
    copy = ledger.with_name("the copy")
    copy.mkdir()
    older = [*segments(ledger)[:-1], *snapshots(ledger)]
    assert older
    for path in older:
        os.link(path, copy / path.name)
    with JSONStore(ledger) as store:
        create(store, task_id="third")
        assert store.report().notices == ()


def test_a_reader_and_the_writer_of_a_later_link_get_a_notice(ledger, open_):
    stores = (open_(), open_(read_only=True))
    assert [store.report().notices for store in stores] == [(), ()]
    newest = segments(ledger)[-1]
    link = ledger.with_name("link")
    os.link(newest, link)
    late = open_(read_only=True)
    for store in (*stores, late):
        [notice] = store.report().notices
        assert f"{newest} has 2 hard links" in notice
        assert "cp -a instead of cp -al" in notice
    create(stores[0], task_id="third")  # an open writer is not interrupted
    link.unlink()
    assert [store.report().notices for store in (*stores, late)] == [(), (), ()]


def test_a_compaction_beside_a_later_link_continues(ledger, open_):
    store = open_()
    link = ledger.with_name("link")
    os.link(segments(ledger)[-1], link)
    store.compact(FOLD)
    assert store.report().notices == ()  # the newest segment is a new file
    create(store, task_id="third")
    JSONStore(ledger).close()


def test_a_commit_does_not_look_for_links(open_, monkeypatch):
    def looked(path):
        raise AssertionError(path)

    store, other = open_(), open_()
    monkeypatch.setattr(layout_module, "alias_reason", looked)
    for number in range(2):
        create(store, task_id=f"a{number}")
        create(other, task_id=f"b{number}")
    store.compact(FOLD)
    create(other, task_id="c")


def test_the_command_line(ledger, linked, capsys):
    assert main(["--url", f"json:///{linked}", "compact"]) == 3
    assert "cp -a instead of cp -al" in " ".join(capsys.readouterr().err.split())
    for words in ("list", "verify"):
        assert main(["--url", f"json:///{linked}", words]) == 0
        assert "has 2 hard links" in capsys.readouterr().err


def test_a_directory_with_two_names_is_no_second_directory(ledger):
    link = ledger.with_name("link")
    link.symlink_to(ledger)
    with JSONStore(link) as store, JSONStore(ledger) as other:
        create(store, task_id="third")
        assert (store.report().notices, other.report().notices) == ((), ())


def test_a_system_without_a_list_of_mounts(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "missing")
    with TaskRegistry.open(f"json:///{ledger}") as registry:
        assert registry.store.report().notices == ()


MOUNTED = """
try:
    JSONStore(sys.argv[1])
except StoreUnavailableError as error:
    print(error)
with JSONStore(sys.argv[1], read_only=True) as store:
    print(*store.report().notices)
"""


@pytest.mark.skipif(
    not os.environ.get("CI") and (os.geteuid() != 0 or shutil.which("unshare") is None),
    reason="no file system can be mounted here: root and unshare are required",
)
def test_a_segment_that_is_mounted_by_itself(ledger):
    copy = ledger.with_name("a container")
    shutil.copytree(ledger, copy)
    newest = segments(copy)[-1]
    mount = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", mount, "sh", segments(ledger)[-1], newest]
    script = [sys.executable, "-c", CHILD_PRELUDE + MOUNTED, copy]
    done = subprocess.run([*words, *script], capture_output=True, text=True, check=False)
    if not os.environ.get("CI") and done.stderr.startswith(("mount", "unshare")):
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    refusal, notice = done.stdout.splitlines()
    assert refusal.startswith(f"{newest} is mounted as a single file, so the ledger was not opened")
    assert notice.startswith(f"{newest} is mounted as a single file")
    assert f"mount the directory {copy}" in refusal
