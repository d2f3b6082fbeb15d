"""The file format, as documented for other programs."""

from __future__ import annotations

import json
import os
import stat
import zlib

import pytest
from jsonfiles import FOLD, FOLD_AND_TRIM, names, segments, snapshots

from taskstore import StoreUnavailableError, ValidationError, open_store
from taskstore.model.codec import decode_record
from taskstore.model.journal import Put, Snapshot
from taskstore.stores.jsonfile import JSONStore, open_json
from taskstore.testing.factories import create, delete, make_record, next_of, update

JOURNAL_1 = "journal-00000000000000000001.jsonl"


def test_a_fresh_directory_holds_one_empty_segment_and_a_lock(directory, open_):
    open_()
    assert names(directory) == {JOURNAL_1, "lock"}
    (header,) = (directory / JOURNAL_1).read_bytes().splitlines()
    members = json.loads(header)
    assert list(members) == ["crc", "format", "ledger", "timeline", "seq", "at", "base"]
    assert members["format"] == "taskstore-journal/1"
    assert (members["timeline"], members["seq"], members["at"]) == (1, 1, 0)
    assert len(members["ledger"]) == 32
    int(members["ledger"], 16)


def test_new_directories_are_private_and_so_are_files(tmp_path):
    with JSONStore(tmp_path / "a" / "b" / "ledger") as store:
        create(store)
        store.compact(FOLD)
    for made in ("a", "a/b", "a/b/ledger"):
        assert stat.S_IMODE((tmp_path / made).stat().st_mode) == 0o700
    for path in (tmp_path / "a/b/ledger").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_an_existing_directory_keeps_its_mode(directory, open_):
    directory.mkdir()
    directory.chmod(0o755)
    create(open_())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755


def test_a_commit_is_one_line_under_one_checksum(directory, open_):
    store = open_()
    first, second = make_record(task="línea\n\x7f"), make_record()
    commit = store.apply([Put(first), next_of(first, label="x"), Put(second)])
    delete(store, second)
    _, line, removal = segments(directory)[0].read_bytes().splitlines()
    assert line.startswith(b'{"crc":"%08x",' % zlib.crc32(line[18:]))
    members = json.loads(line)
    assert list(members) == ["crc", "commit", "seq", "at", "entries"]
    assert members["commit"] == commit.commit_id
    assert (members["seq"], members["at"]) == (1, commit.at)
    assert [entry["revision"] for entry in members["entries"]] == [1, 2, 1]
    payload = json.dumps(members["entries"][0]["record"]).encode()
    assert decode_record(payload) == first
    assert json.loads(removal)["entries"] == [
        {"kind": "deleted", "task_id": second.task_id, "revision": 2}
    ]


def test_a_snapshot_is_a_json_document_with_one_record_a_line(directory, open_):
    store = open_()
    records = [create(store) for _ in range(3)]
    gone = create(store)
    delete(store, gone)
    store.compact(FOLD)
    assert names(directory) == {
        JOURNAL_1,
        "journal-00000000000000000006.jsonl",
        "snapshot-00000000000000000005.json",
        "lock",
        "compact.lock",
    }
    data = snapshots(directory)[0].read_bytes()
    document = json.loads(data)
    assert document["format"] == "taskstore-snapshot/1"
    assert (document["seq"], document["floor"]) == (5, 1)
    assert document["ledger"] == store.identity.ledger
    assert document["deleted"] == {gone.task_id: 5}
    assert [record["task_id"] for record in document["records"]] == sorted(
        record.task_id for record in records
    )
    assert len(data.splitlines()) == 3 + 4
    before, _, _ = data.rpartition(b'"checksum"')
    assert document["checksum"] == f"{zlib.crc32(before):08x}"


def test_the_files_of_a_ledger_hold_its_id(directory, open_):
    store = open_()
    create(store)
    store.compact(FOLD)
    create(store)
    found = {
        json.loads(path.read_bytes().splitlines()[0])["ledger"] for path in segments(directory)
    }
    found.add(json.loads(snapshots(directory)[0].read_bytes())["ledger"])
    assert found == {store.identity.ledger}


def test_replacing_the_content_begins_the_next_timeline(directory, open_):
    store = open_()
    create(store)
    snapshot = store.load_snapshot()
    store.save_snapshot(type(snapshot)(10, snapshot.records))
    assert store.identity.timeline == 2
    assert names(directory) == {
        "journal-00000000000000000011.jsonl",
        "snapshot-00000000000000000010.json",
        "lock",
        "compact.lock",
    }
    assert open_().identity == store.identity


def test_the_lock_file_names_the_last_writer_and_an_even_generation(directory, open_):
    store = open_()
    generations = []
    for change in (
        lambda: create(store),
        lambda: create(store),
        lambda: store.compact(FOLD),
        lambda: store.save_snapshot(Snapshot(9)),
    ):
        change()
        pid, generation, *_ = (directory / "lock").read_text().split()
        assert int(pid) == os.getpid()
        generations.append(int(generation))
    assert all(generation % 2 == 0 for generation in generations)
    assert generations[0] == generations[1] < generations[2] < generations[3]


def test_trimming_leaves_only_live_files(directory, open_):
    store = open_()
    task = create(store)
    for n in range(3):
        task = update(store, task, label=str(n))
        store.compact(FOLD_AND_TRIM)
    assert store.floor() == 5
    assert [path.name for path in segments(directory)] == ["journal-00000000000000000005.jsonl"]
    assert [path.name for path in snapshots(directory)] == ["snapshot-00000000000000000004.json"]


def test_erased_text_is_in_no_file(directory, open_):
    store = open_()
    kept, gone = create(store, task="stays"), create(store, task="the secret")
    store.compact(FOLD)
    delete(store, gone)
    (directory / f"{JOURNAL_1}.9.torn").write_bytes(b"the secret")
    store.compact(FOLD.__class__(erase_deleted=True))
    for path in directory.iterdir():
        assert b"the secret" not in path.read_bytes()
    assert store.load_snapshot().records == {kept.task_id: kept}


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("json:///tasks", "tasks"),
        ("json:///sub/my tasks", "sub/my tasks"),
        ("JSON:///100%25 tasks%", "100%25 tasks%"),
    ],
)
def test_three_slashes_are_relative_and_the_path_is_not_decoded(url, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_json(url) as store:
        assert (tmp_path / path / JOURNAL_1).exists()
        assert store.location == path


def test_four_slashes_are_absolute(tmp_path):
    with open_store(f"json:///{tmp_path}/ledger") as store:
        create(store)
    assert (tmp_path / "ledger" / JOURNAL_1).exists()


@pytest.mark.parametrize(
    "url",
    ["json:", "json://", "json:///", "json:tasks", "json://host/tasks", "json:///a?b=c",
     "json:///a\0b", "file:///a"],
)  # fmt: skip
def test_other_urls_are_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValidationError) as caught:
        open_json(url)
    assert caught.value.field == "url"
    assert names(tmp_path) == set()


def test_a_durability_that_does_not_exist_is_refused(directory):
    with pytest.raises(ValidationError):
        JSONStore(directory, durability="none")
    assert not directory.exists()


@pytest.mark.parametrize("durability", ["full", "process"])
def test_the_store_reports_its_durability(durability, open_):
    assert open_(durability=durability).durability == durability


def test_a_path_that_is_a_file_is_unavailable(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "ledger"):
        with pytest.raises(StoreUnavailableError, match=str(path)) as caught:
            JSONStore(path)
        assert isinstance(caught.value.__cause__, OSError)


def test_a_relative_path_stays_where_it_was_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_json("json:///ledger") as store:
        create(store)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        create(store)
        store.compact(FOLD)
        assert store.head() == 2
    assert snapshots(tmp_path / "ledger")
    assert names(tmp_path / "elsewhere") == set()
