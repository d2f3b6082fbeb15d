"""Several instances, threads and processes on one directory."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from jsonfiles import FOLD, FOLD_AND_TRIM, child, names, output_of, segments, snapshots

from taskstore import CompactionPolicy, ConflictError, CursorExpiredError, StoreBusyError
from taskstore.model.journal import Put, Snapshot
from taskstore.stores.jsonfile.lines import decode_commit
from taskstore.stores.jsonfile.store import LOCK_TIMEOUT_S
from taskstore.testing.factories import create, delete, make_put, make_record, next_of, update

APPEND = """
with JSONStore(sys.argv[1], durability="process") as store:
    print("ready", flush=True)
    sys.stdin.readline()
    for n in range(int(sys.argv[2])):
        task = create(store, label=f"{os.getpid()}-{n}")
        store.apply([next_of(task), make_put()])
"""
SHARED_TASK = """
with JSONStore(sys.argv[1], durability="process") as store:
    done = 0
    while done < int(sys.argv[2]):
        task = store.load_snapshot().records["shared"]
        try:
            store.apply([next_of(task)])
        except ConflictError:
            continue
        done += 1
"""
HOLD = """
store = JSONStore(sys.argv[1])
with store._writer.lock():
    print("held", flush=True)
    sys.stdin.readline()
"""
COMPACT = """
lock = JSONStore(sys.argv[1])._writer.compact_lock()
assert lock.try_acquire()
print("held", flush=True)
sys.stdin.readline()
"""


def test_two_writers_take_turns(open_):
    one, two = open_(), open_()
    task = create(one)
    for store in (two, one, two, two, one):
        task = update(store, task)
    assert one.head() == two.head() == 6
    assert one.load_snapshot() == two.load_snapshot()
    assert [entry.seq for entry in one.read_journal(0, 10)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConflictError) as caught:
        one.apply([next_of(make_record(task_id=task.task_id))])
    assert (caught.value.conflicts[0].expected, caught.value.conflicts[0].found) == (1, 6)
    assert one.verify().ok


def test_a_dedup_key_of_another_writer_is_taken(open_):
    one, two = open_(), open_()
    holder = create(one, run_id="run-1")
    with pytest.raises(ConflictError) as caught:
        two.apply([make_put(run_id="run-1", run_digest=holder.run_digest)])
    assert caught.value.conflicts[0].existing_task_id == holder.task_id
    delete(one, holder)
    two.apply([make_put(run_id="run-1", run_digest=holder.run_digest)])


def test_a_writer_catches_up_after_another_one_compacts(directory, open_):
    one, two = open_(), open_()
    task = create(one)
    gone = create(two)
    for _ in range(3):
        delete(two, gone)
        two.compact(FOLD_AND_TRIM)
        task = update(one, task)  # in a segment that it has never read
        assert one.floor() == two.floor()
        # The deletion was trimmed, so the id is free again, for both.
        one.apply([Put(gone)])
    with pytest.raises(CursorExpiredError):
        one.read_journal(0, 1)
    assert one.load_snapshot() == two.load_snapshot()
    assert len(segments(directory)) == 1
    assert two.verify().ok


def test_an_id_is_free_when_another_writer_trimmed_its_deletion(open_):
    one, two = open_(), open_()
    task, gone = create(one), create(one)
    delete(one, gone)
    two.compact(FOLD)
    task = update(one, task)
    two.compact(CompactionPolicy(force=True, history_s=0, history_entries=1, keep_snapshots=1))
    assert one.floor() == 4
    one.apply([Put(gone)])
    with pytest.raises(ConflictError):
        two.apply([Put(gone)])
    assert two.verify().ok


def test_a_deletion_that_is_kept_blocks_its_id_everywhere(open_):
    one, two = open_(), open_()
    gone = create(one)
    delete(one, gone)
    for _ in range(3):
        one.compact(FOLD)  # the deletion is in the snapshot and still in the journal
        for store in (one, two, open_()):
            with pytest.raises(ConflictError) as caught:
                store.apply([Put(gone)])
            assert caught.value.conflicts[0].deleted
        create(one)


def test_a_writer_catches_up_after_another_one_replaces_the_content(open_):
    one, two = open_(), open_()
    task = create(one)
    two.apply([make_put()])
    fresh = make_record(revision=7)
    two.save_snapshot(Snapshot(50, {fresh.task_id: fresh}))
    with pytest.raises(ConflictError):
        update(one, task)
    assert update(one, fresh).revision == 8
    assert (one.head(), one.floor()) == (51, 51)
    assert one.verify().ok


def test_all_stores_see_an_empty_ledger_that_is_replaced_at_seq_0(open_):
    one, two = open_(), open_()
    assert one.load_snapshot().records == {}
    task = make_record()
    for label in ("a", "b"):
        two.save_snapshot(Snapshot(0, {task.task_id: next_of(task, label=label).record}))
        assert one.load_snapshot().records[task.task_id].label == label
    with pytest.raises(ConflictError):
        one.apply([Put(task)])
    update(one, next_of(task).record)
    assert two.load_snapshot().records[task.task_id].revision == 3
    assert two.verify().ok


def test_a_reader_follows_compactions_and_replacements(open_):
    writer, reader = open_(), open_(read_only=True)
    task = create(writer)
    for _ in range(3):
        task = update(writer, task)
        assert reader.head() == writer.head()
        writer.compact(FOLD_AND_TRIM)
        assert reader.floor() == writer.floor()
        assert reader.load_snapshot() == writer.load_snapshot()
    writer.save_snapshot(Snapshot(100, {task.task_id: task}))
    assert (reader.head(), reader.floor()) == (100, 101)
    assert reader.read_snapshot(100) == writer.read_snapshot(100)


def test_pages_may_end_within_a_commit(open_):
    store = open_()
    for _ in range(4):
        store.apply([make_put() for _ in range(5)])
    reader = open_(read_only=True)
    for limit in (1, 2, 3, 5, 7, 100):
        after, found = 0, []
        while page := reader.read_journal(after, limit):
            assert len(page) <= limit
            found += [entry.seq for entry in page]
            after = page[-1].seq
        assert found == list(range(1, 21))


def test_paging_reads_no_entry_twice(open_):
    store = open_(durability="process")
    for _ in range(20):
        store.apply([make_put(task="x" * 500) for _ in range(500)])
    reader = open_(read_only=True)
    layout = reader._reader.layout()

    def skipped(after: int) -> int:
        """Return how many entries are read before the requested one."""
        return after - reader._reader._nearest_position(layout, after).seq

    for after in range(0, 10_000, 500):
        assert skipped(after) == 0
        assert reader.read_journal(after, 500)[0].seq == after + 1
    for after in (0, 1, 777, 5_000, 9_999):
        assert skipped(after) < 1000
        assert [entry.seq for entry in reader.read_journal(after, 1)] == [after + 1]


def test_waiting_ends_when_another_process_commits(directory, open_):
    store = open_()
    process = child(APPEND, directory, 1, stdin=-1)
    assert process.stdout.readline() == "ready\n"
    assert not store.wait_for(0, 0.05)
    threading.Timer(0.2, lambda: (process.stdin.write("\n"), process.stdin.flush())).start()
    assert store.wait_for(0, 30)
    process.communicate(timeout=20)
    assert store.wait_for(2, 0)


def test_four_processes_append_and_the_journal_is_complete(directory, open_):
    store = open_()
    processes = [child(APPEND, directory, 30, stdin=-1) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    while any(process.poll() is None for process in processes):
        store.compact(CompactionPolicy(force=True, history_s=0, history_entries=50))
    for process in processes:
        assert process.wait() == 0, process.stdout.read()
        process.communicate()
    assert store.head() == 4 * 30 * 3
    assert len(store.load_snapshot().records) == 240
    seqs = [entry.seq for entry in store.read_journal(store.floor() - 1, 10_000)]
    assert seqs == list(range(store.floor(), 361))
    assert store.verify().problems == ()
    before = store.load_snapshot()
    store.compact(FOLD_AND_TRIM)
    assert store.load_snapshot() == before
    assert store.verify().problems == ()


def test_no_update_is_lost_between_processes(directory, open_):
    store = open_()
    create(store, task_id="shared")
    processes = [child(SHARED_TASK, directory, 25) for _ in range(3)]
    for process in processes:
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0, printed
    assert store.load_snapshot().records["shared"].revision == 76
    assert store.verify().ok


def test_threads_of_one_instance_take_turns(open_):
    store = open_(durability="process")

    def work() -> None:
        for _ in range(100):
            create(store)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.compact(FOLD_AND_TRIM)
    for thread in threads:
        thread.join()
    assert (store.head(), len(store.load_snapshot().records)) == (600, 600)
    assert store.verify().ok


def test_the_error_after_the_lock_timeout_names_the_lock_owner(directory, open_):
    store = open_(lock_timeout_s=0.1)
    holder = child(HOLD, directory, stdin=-1)
    assert holder.stdout.readline() == "held\n"
    started = time.monotonic()
    with pytest.raises(StoreBusyError) as caught:
        create(store)
    assert 0.1 <= time.monotonic() - started < LOCK_TIMEOUT_S / 2
    assert str(directory) in str(caught.value)
    assert f"pid {holder.pid}" in str(caught.value)
    # Reads do not wait for the lock.
    assert open_(read_only=True).load_snapshot().seq == store.head() == 0
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    create(store)


def test_a_second_compactor_is_refused_and_a_killed_one_does_not_block(
    directory, open_, monkeypatch
):
    monkeypatch.setattr("taskstore.stores.jsonfile.compaction.COMPACT_LOCK_TIMEOUT_S", 0.2)
    store = open_()
    create(store)
    holder = child(COMPACT, directory, stdin=-1)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreBusyError, match="compactor"):
        store.compact(FOLD)
    create(store)  # writers do not wait for a compactor
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert store.compact(FOLD).compacted


def test_a_lock_file_that_was_removed_is_not_relied_on(directory, open_):
    one, two = open_(lock_timeout_s=0.05), open_()
    task = create(one)
    (directory / "lock").unlink()
    newcomer = open_()
    with newcomer._writer.lock(), pytest.raises(StoreBusyError):
        update(one, task)
    for store in (one, two, newcomer):
        task = update(store, task)
        store.compact(FOLD_AND_TRIM)
    assert one.verify().ok
    assert one.head() == 4


def test_a_forked_child_is_refused_and_leaves_its_parents_lock_alone(directory, open_):
    printed = output_of(
        """
import warnings; warnings.simplefilter("ignore")
store = JSONStore(sys.argv[1], durability="process")
task = create(store)
with store.exclusive():
    pid = os.fork()
    if not pid:
        for use in (lambda: create(store), store.load_snapshot, store.head, store.verify):
            try:
                use()
            except StoreClosedError as error:
                assert "before the process forked" in str(error), error
            else:
                os._exit(1)
        store.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    try:
        JSONStore(sys.argv[1], lock_timeout_s=0.1)
    except StoreBusyError:
        store.apply([next_of(task)])
print(store.head(), store.verify().problems)
""",
        directory,
    )
    assert printed == "2 ()\n"


def test_dedup_keys_and_revisions_are_loaded_after_reopening(open_):
    store = open_()
    holder = create(store, run_id="run-1")
    task = create(store)
    for _ in range(2):
        for instance in (store, open_()):
            with pytest.raises(ConflictError):
                instance.apply([make_put(run_id="run-1", run_digest=holder.run_digest)])
            task = update(instance, task)
        store.compact(FOLD)


def test_leftover_files_of_killed_processes_are_removed_by_the_next_writer(directory, open_):
    store = open_()
    create(store)
    store.close()
    for name in (
        "snapshot-00000000000000000009.json.tmp",
        "journal-00000000000000000009.jsonl.tmp",
        "mine.tmp",
    ):
        (directory / name).write_bytes(b"half")
    open_(read_only=True).load_snapshot()
    assert len(names(directory)) == 5
    open_()
    assert {name for name in names(directory) if name.endswith(".tmp")} == {"mine.tmp"}


def test_a_running_compactor_keeps_its_temporary_file(directory, open_):
    store = open_()
    create(store)
    lock = store._writer.compact_lock()
    assert lock.try_acquire()
    temporary = directory / "snapshot-00000000000000000001.json.tmp"
    temporary.write_bytes(b"half")
    segment = directory / "journal-00000000000000000009.jsonl.tmp"
    segment.write_bytes(b"half")
    open_()
    assert temporary.exists()
    assert not segment.exists()  # compactors make segments only under the write lock
    lock.close()
    open_()
    assert not temporary.exists()


def test_a_compactor_waits_for_a_writer_that_removes_leftovers(open_, monkeypatch):
    monkeypatch.setattr("taskstore.stores.jsonfile.compaction.COMPACT_LOCK_TIMEOUT_S", 30)
    store = open_()
    create(store)
    lock = store._writer.compact_lock()
    assert lock.try_acquire()
    released = threading.Timer(0.1, lock.close)
    released.start()
    assert store.compact(FOLD_AND_TRIM).compacted
    released.join()


def test_retained_snapshots_and_the_floor_follow_the_policy(directory, open_):
    store = open_()
    policy = CompactionPolicy(force=True, history_s=0, history_entries=4, keep_snapshots=1)
    for _ in range(6):
        create(store)
        create(store)
        report = store.compact(policy)
        kept = tuple(int(path.stem[9:]) for path in snapshots(directory))
        assert report.snapshots == kept
        assert int(segments(directory)[0].stem[8:]) == report.floor == store.floor()
        assert report.floor == 1 or report.floor - 1 in kept
        assert store.verify().ok
    assert report.floor == 9


def lines_decoded(monkeypatch):
    """Return a list of the journal lines that are decoded from now on."""
    decoded = []

    def decode(*line):
        decoded.append(line)
        return decode_commit(*line)

    monkeypatch.setattr("taskstore.stores.jsonfile.segments.decode_commit", decode)
    return decoded


def test_catching_up_decodes_only_new_commits(open_, monkeypatch):
    ours, theirs = open_(), open_()
    for _ in range(200):
        ours.apply([make_put()])
    theirs.apply([make_put()])
    last = 200
    decoded = lines_decoded(monkeypatch)
    for _ in range(10):
        theirs.apply([make_put()])
        assert ours.read_journal(last, 10)
        last = ours.apply([make_put()]).last_seq
    assert len(decoded) < 300  # the first read decodes everything


def test_reading_the_last_entry_again_decodes_nothing_else(open_, monkeypatch):
    ours, theirs = open_(), open_()
    for _ in range(200):
        theirs.apply([make_put()])
    seq = ours.read_journal(0, 1000)[-1].seq
    decoded = lines_decoded(monkeypatch)
    for _ in range(10):
        theirs.apply([make_put(), make_put()])
        seq = ours.read_journal(seq - 1, 1000)[-1].seq
    for _ in range(10):
        # The next page begins at the last entry of the previous one.
        seq = ours.read_journal(max(seq - 3, 0), 3)[-1].seq
    assert len(decoded) < 100
