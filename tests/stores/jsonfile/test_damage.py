"""Damaged files: the error names file and offset, and no file changes."""

from __future__ import annotations

import json

import pytest
from jsonfiles import FOLD, FOLD_AND_TRIM, damaged, segments, snapshots, state_of

from taskstore import CompactionPolicy, CorruptStoreError, CursorExpiredError
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing.factories import create, make_put, update


@pytest.fixture
def ledger(directory, open_):
    """Three commits, a snapshot, three commits, a snapshot, three commits."""
    store = open_()
    task = create(store, label="0")
    for n in range(1, 9):
        task = update(store, task, label=str(n))
        if n in (2, 5):
            store.compact(FOLD)
    store.close()
    assert [path.name[8:28].lstrip("0") for path in segments(directory)] == ["1", "4", "7"]
    return directory


def found_by(work, directory) -> CorruptStoreError:
    """Return the error of ``work`` in a read-only and a writable store; no file may change."""
    before = state_of(directory)
    for read_only in (True, False):
        with (
            pytest.raises(CorruptStoreError) as caught,
            JSONStore(directory, read_only=read_only) as store,
        ):
            work(store)
        assert state_of(directory) == before
    return caught.value


def test_a_wrong_byte_in_the_middle_of_the_last_segment(ledger):
    segment = segments(ledger)[-1]
    lines = segment.read_bytes().splitlines(keepends=True)
    offset = len(lines[0]) + len(lines[1])
    damaged(segment, offset + 50)
    error = found_by(JSONStore.load_snapshot, ledger)
    assert (error.where, error.offset) == (str(segment), offset)
    assert "checksum" in str(error)
    assert error.hint


def test_a_wrong_byte_where_the_lines_end(ledger):
    segment = segments(ledger)[-1]
    lines = segment.read_bytes().splitlines(keepends=True)
    damaged(segment, len(lines[0]) + len(lines[1]) - 1)
    error = found_by(JSONStore.load_snapshot, ledger)
    assert (error.where, error.offset) == (str(segment), len(lines[0]))


def test_history_before_the_newest_snapshot_does_not_stop_the_start(ledger):
    segment = segments(ledger)[0]
    damaged(segment, segment.stat().st_size - 10)
    error = found_by(lambda store: store.read_journal(0, 10), ledger)
    assert error.where == str(segment)
    with JSONStore(ledger) as store:
        assert len(store.load_snapshot().records) == 1
        assert len(store.read_journal(3, 10)) == 6
        assert any(str(segment) in problem for problem in store.verify().problems)


@pytest.mark.parametrize("position", [0, 1])
def test_a_damaged_header_of_a_segment(position, ledger):
    segment = segments(ledger)[position]
    damaged(segment, 30)
    error = found_by(JSONStore.load_snapshot, ledger)
    assert (error.where, error.offset) == (str(segment), 0)


def test_a_damaged_header_of_the_last_segment_with_commits_after_it(ledger):
    segment = segments(ledger)[-1]
    damaged(segment, 30)
    error = found_by(JSONStore.load_snapshot, ledger)
    assert (error.where, error.offset) == (str(segment), 0)


@pytest.mark.parametrize("header", [b"", b'{"crc":"', b'{"crc":"00000000","format":1}\n'])
@pytest.mark.parametrize("position", [0, -1], ids=["only", "last"])
def test_a_torn_header_with_nothing_after_it(position, header, directory, open_):
    """No crash leaves one: the header is synced before the segment gets its name."""
    store = open_()
    if position:
        create(store)
        store.compact(FOLD)
    store.close()
    last = segments(directory)[-1]
    last.write_bytes(header)
    error = found_by(JSONStore.head, directory)
    assert (error.where, error.offset) == (str(last), 0)


def test_a_segment_is_missing_in_the_middle(ledger):
    segments(ledger)[1].unlink()
    error = found_by(lambda store: store.read_journal(0, 10), ledger)
    assert error.where == str(segments(ledger)[1])
    assert "seq 7" in str(error)
    assert "seq 3" in str(error)
    with JSONStore(ledger) as store:
        (problem,) = store.verify().problems
        assert str(segments(ledger)[1]) in problem
        assert "seq 4 to 6 are missing" in problem


def test_the_last_segment_is_missing(ledger):
    missing = segments(ledger)[-1]
    missing.unlink()
    error = found_by(JSONStore.head, ledger)
    assert error.where == str(missing)
    assert "missing" in str(error)


def test_a_line_is_missing(ledger):
    segment = segments(ledger)[-1]
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join([lines[0], *lines[2:]]))
    error = found_by(JSONStore.load_snapshot, ledger)
    assert (error.where, error.offset) == (str(segment), len(lines[0]))
    assert "seq 8 follows seq 6" in str(error)


def test_a_segment_that_ends_too_early(ledger):
    segment = segments(ledger)[0]
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(lines[:-1]))
    error = found_by(lambda store: store.read_journal(0, 10), ledger)
    assert error.where == str(segments(ledger)[1])


@pytest.mark.parametrize("offset", [3, 60, -150, -3])
def test_the_newest_snapshot_is_damaged_and_an_older_one_exists(offset, ledger):
    newest = snapshots(ledger)[-1]
    damaged(newest, offset % newest.stat().st_size)
    error = found_by(JSONStore.load_snapshot, ledger)
    assert error.where == str(newest)
    assert newest.name in error.hint
    assert snapshots(ledger)[0].name in error.hint
    with pytest.raises(CorruptStoreError), JSONStore(ledger) as store:
        store.apply([make_put()])


def test_a_damaged_floor_removes_no_file(ledger):
    newest = snapshots(ledger)[-1]
    newest.write_bytes(newest.read_bytes().replace(b'"floor":1', b'"floor":7'))
    error = found_by(JSONStore.load_snapshot, ledger)
    assert error.where == str(newest)


def test_following_the_hint_restores_all_records(ledger):
    newest = snapshots(ledger)[-1]
    damaged(newest, newest.stat().st_size - 150)
    newest.rename(newest.with_suffix(".damaged"))
    with JSONStore(ledger) as store:
        (record,) = store.load_snapshot().records.values()
        assert (record.label, record.revision) == ("8", 9)
        assert store.verify().ok
        create(store)


def test_a_truncated_snapshot(ledger):
    newest = snapshots(ledger)[-1]
    newest.write_bytes(newest.read_bytes()[:-40])
    error = found_by(JSONStore.load_snapshot, ledger)
    assert error.where == str(newest)


def test_a_damaged_older_snapshot_is_found_when_it_is_read(ledger):
    older = snapshots(ledger)[0]
    damaged(older, older.stat().st_size - 150)
    error = found_by(lambda store: store.read_snapshot(4), ledger)
    assert error.where == str(older)
    with JSONStore(ledger) as store:
        assert store.read_snapshot(6).seq == 6
        assert len(store.load_snapshot().records) == 1
        assert any(str(older) in problem for problem in store.verify().problems)


def test_files_of_another_ledger_are_refused(ledger, tmp_path):
    with JSONStore(tmp_path / "other") as other:
        for _ in range(3):
            create(other)
    segments(ledger)[0].write_bytes(segments(tmp_path / "other")[0].read_bytes())
    error = found_by(JSONStore.load_snapshot, ledger)
    assert error.where == str(segments(ledger)[0])
    assert "ledger" in str(error)


def test_a_snapshot_of_another_ledger_is_refused(ledger, tmp_path):
    with JSONStore(tmp_path / "other") as other:
        for _ in range(6):
            create(other)
        other.compact(FOLD)
    snapshots(ledger)[-1].write_bytes(snapshots(tmp_path / "other")[0].read_bytes())
    error = found_by(JSONStore.load_snapshot, ledger)
    assert "ledger" in str(error)


def test_a_segment_under_another_name_is_refused(ledger):
    segment = segments(ledger)[-1]
    renamed = segment.rename(segment.with_name(segment.name.replace("7.", "8.")))
    renamed.with_name(segment.name).write_bytes(renamed.read_bytes())
    error = found_by(JSONStore.head, ledger)
    assert (error.where, error.offset) == (str(renamed), 0)


def test_a_newer_format_is_refused_with_a_hint(ledger):
    segment = segments(ledger)[-1]
    data = segment.read_bytes()
    header, _, rest = data.partition(b"\n")
    members = json.loads(header)
    del members["crc"]
    members["format"] = "taskstore-journal/2"
    from jsonfiles import framed

    segment.write_bytes(framed(json.dumps(members).encode()[1:]) + rest)
    error = found_by(JSONStore.head, ledger)
    assert "taskstore-journal/2" in str(error)
    assert "newer" in error.hint


def test_a_journal_without_its_beginning_and_without_a_snapshot_is_refused(directory, open_):
    store = open_()
    create(store)
    store.compact(FOLD_AND_TRIM)
    store.close()
    snapshots(directory)[0].unlink()
    found_by(JSONStore.head, directory)


def test_removed_history_is_reported_and_the_records_stay(ledger):
    segments(ledger)[0].unlink()
    with JSONStore(ledger) as store:
        assert len(store.load_snapshot().records) == 1
        assert store.floor() == 4
        with pytest.raises(CursorExpiredError):
            store.read_journal(0, 10)
        assert store.report().notices == ("the journal from seq 1 to 3 is missing",)
        assert store.verify().problems == ("the journal from seq 1 to 3 is missing",)


def test_history_that_was_moved_away_for_a_while_is_not_lost(directory, open_):
    store = open_()
    task = create(store)
    for _ in range(3):
        task = update(store, task)
        store.compact(CompactionPolicy(force=True, keep_snapshots=1))
    store.close()
    moved = segments(directory)[0].rename(directory / "elsewhere")
    store = open_()
    task = update(store, task)
    assert store.floor() == 5
    store.close()
    moved.rename(directory / "journal-00000000000000000001.jsonl")
    assert len(open_().read_journal(0, 10)) == 5
    assert open_().verify().ok


def test_damage_stops_a_compaction_before_it_removes_anything(ledger):
    damaged(snapshots(ledger)[-1], 230)
    before = state_of(ledger)
    with JSONStore(ledger) as store, pytest.raises(CorruptStoreError):
        store.compact(FOLD_AND_TRIM)
    after = state_of(ledger)
    assert {name: after[name] for name in before if name not in (".", "lock")} == {
        name: before[name] for name in before if name not in (".", "lock")
    }


def test_verify_finds_a_snapshot_that_differs_from_the_journal(ledger):
    from zlib import crc32

    newest = snapshots(ledger)[-1]
    body, _, _ = newest.read_bytes().replace(b'"label":"5"', b'"label":"6"').rpartition(b'"checks')
    newest.write_bytes(body + b'"checksum":"%08x"}\n' % crc32(body))
    with JSONStore(ledger) as store:
        (problem,) = store.verify().problems
        assert str(newest) in problem
        assert "disagrees" in problem


def test_verify_finds_a_missing_segment_before_an_empty_one(directory, open_):
    store = open_()
    create(store)
    for _ in range(2):
        store.compact(FOLD)
        create(store)
    store.compact(FOLD)
    store.close()
    segments(directory)[2].unlink()
    with JSONStore(directory) as reopened:
        (problem,) = reopened.verify().problems
    assert str(segments(directory)[-1]) in problem
    assert "seq 3 to 3 are missing" in problem


def test_damage_in_one_segment_does_not_hide_damage_in_a_later_one(ledger):
    damaged(segments(ledger)[0], segments(ledger)[0].stat().st_size - 10)
    damaged(segments(ledger)[1], segments(ledger)[1].stat().st_size - 10)
    from jsonfiles import forged

    forged(segments(ledger)[-1], b'"revision":8', b'"revision":18')
    with JSONStore(ledger) as store:
        first, second, *others = store.verify().problems
    assert str(segments(ledger)[0]) in first
    assert str(segments(ledger)[1]) in second
    assert any("revision 18 follows revision 7" in problem for problem in others)


def test_verify_finds_revisions_that_jump(ledger):
    from jsonfiles import forged

    forged(segments(ledger)[-1], b'"revision":8', b'"revision":18')
    with JSONStore(ledger) as store:
        assert any("revision 18 follows revision 7" in p for p in store.verify().problems)


def test_a_journal_that_shrank_under_a_writer_is_read_again(directory, open_):
    store = open_()
    task = create(store)
    size = segments(directory)[0].stat().st_size
    update(store, task)
    # An operator restores a backup while the writer runs.
    with segments(directory)[0].open("r+b") as file:
        file.truncate(size)
    assert store.head() == 1
    assert store.apply([make_put()]).first_seq == 2
    assert store.verify().ok


def test_verify_finds_a_wrong_index(open_):
    store = open_()
    task = create(store)
    assert store.verify().ok
    store._writer.index.revisions[task.task_id] = 7
    (problem,) = store.verify().problems
    assert task.task_id in problem
