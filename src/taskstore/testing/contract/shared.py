"""Shared clauses: several instances on one storage, in several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache, partial
from typing import ClassVar

import pytest

from taskstore.errors import Conflict, ConflictError, CursorExpiredError
from taskstore.model.journal import Commit, Put, Snapshot, fold
from taskstore.model.query import Summary, TaskQuery
from taskstore.model.records import TaskRecord
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    SupportsSummary,
)
from taskstore.testing.contract.base import ContractBase, Ledger, journal_of, needs
from taskstore.testing.contract.compaction import TRIM, check_against_model
from taskstore.testing.contract.journal import check_commit_wakes
from taskstore.testing.factories import (
    EPOCH_MS,
    Model,
    create,
    delete,
    make_put,
    make_record,
    next_of,
    play,
    removal_of,
    update,
)
from taskstore.testing.threads import TIMEOUT_S, meanwhile, retry_while_busy, run_together
from taskstore.testing.types import FullStore

THREADS = 4
TURNS = 40
COMMITS = 12
"""The number of commits per thread: enough to cause conflicts, few enough for a slow disk."""


def increment(store: FullStore, task_id: str, times: int) -> None:
    """Update a task ``times`` times; each of these commits also creates another task."""
    done = 0
    while done < times:
        record = store.load_snapshot().records[task_id]
        try:
            retry_while_busy(partial(store.apply, [next_of(record), make_put()]))
        except ConflictError:
            continue
        done += 1


def check_journal(store: FullStore, base: Snapshot | None = None) -> None:
    """Check that the journal has no gap and that its entries give the stored records [2] [5]."""
    entries = journal_of(store)
    base = base if base is not None else Snapshot(0)
    assert [entry.seq for entry in entries] == list(range(base.seq + 1, store.head() + 1))
    revisions = {task_id: record.revision for task_id, record in base.records.items()}
    for entry in entries:
        assert entry.revision == revisions.get(entry.task_id, 0) + 1
        revisions[entry.task_id] = entry.revision
    assert dict(fold(base, entries).records) == dict(store.load_snapshot().records)


class SharedContract(ContractBase):
    """Clauses for several store instances on one storage; the store must keep a journal."""

    level = "shared"
    abilities: ClassVar[tuple[type, ...]] = (SupportsJournal,)

    def test_each_sees_what_the_other_wrote(self, ledger: Ledger) -> None:
        """[2] If two instances commit in turn, each instance sees every commit immediately."""
        one, two = ledger.store, ledger.open()
        model = Model()
        for writer, reader in ((one, two), (two, one)) * 2:
            play(writer, model)
            for store in (reader, writer):
                loaded = store.load_snapshot()
                assert (loaded.seq, dict(loaded.records)) == (model.head, dict(model.records))
                assert store.head() == model.head
                assert len(journal_of(store)) == len(model.entries)
        for store in ledger.before_and_after_reopen():
            check_against_model(store, model)

    def test_revisions_are_compared_across_instances(self, ledger: Ledger) -> None:
        """[3] If one instance changes a task, the other instance cannot update the old revision."""
        one, two = ledger.store, ledger.open()
        record = create(one)
        newer = update(two, record, label="two")
        with ledger.unchanged(), pytest.raises(ConflictError) as caught:
            update(one, record, label="one")
        assert caught.value.conflicts == (Conflict(record.task_id, 1, 2),)
        for turn in range(4):
            newer = update((ledger.store, ledger.open())[turn % 2], newer, label=f"{turn}")
        for store in ledger.before_and_after_reopen():
            assert store.load_snapshot().records[record.task_id] == newer
            check_journal(store)

    def test_deletions_hold_across_instances(self, ledger: Ledger) -> None:
        """[3] After one instance deletes a task, every change by the other instance conflicts."""
        one, two = ledger.store, ledger.open()
        record = create(one, task_id="gone")
        delete(two, record)
        for change in (make_put(task_id="gone"), next_of(record), removal_of(record)):
            with pytest.raises(ConflictError) as caught:
                one.apply([change])
            assert caught.value.conflicts == (
                Conflict("gone", change.revision - 1, 0, deleted=True),
            )
        for store in ledger.before_and_after_reopen():
            check_journal(store)

    def test_dedup_keys_hold_across_instances(self, ledger: Ledger) -> None:
        """[3] If two instances use one dedup key, the ConflictError names the existing task."""
        one, two = ledger.store, ledger.open()
        existing = create(one, run_id="run-1")
        for store in (two, one):
            with pytest.raises(ConflictError) as caught:
                create(store, run_id="run-1")
            assert caught.value.conflicts[0].existing_task_id == existing.task_id
        delete(two, existing)
        create(one, run_id="run-1")
        with pytest.raises(ConflictError):
            create(two, run_id="run-1")
        for store in ledger.before_and_after_reopen():
            check_journal(store)

    def test_times_do_not_go_back_across_instances(self, ledger: Ledger) -> None:
        """[2] Commit times do not decrease if the clock of one instance is behind."""
        one, two = ledger.store, ledger.open()
        one.clock, two.clock = lambda: EPOCH_MS, lambda: EPOCH_MS - 60_000
        assert one.apply([make_put()]).at == EPOCH_MS
        assert two.apply([make_put()]).at == EPOCH_MS
        for store in ledger.before_and_after_reopen():
            assert [entry.at for entry in journal_of(store)] == [EPOCH_MS, EPOCH_MS]

    def test_a_saved_snapshot_reaches_the_other(self, ledger: Ledger) -> None:
        """[2] After one instance saves a snapshot, the other instance reads the new content."""
        one, two = ledger.store, ledger.open()
        model = play(one)
        record = make_record()
        two.save_snapshot(Snapshot(model.head + 5, {record.task_id: record}, EPOCH_MS))
        assert dict(one.load_snapshot().records) == {record.task_id: record}
        with pytest.raises(CursorExpiredError):
            one.read_journal(model.head, 10)
        with pytest.raises(ConflictError):
            one.save_snapshot(Snapshot(model.head + 5))
        assert one.apply([next_of(record)]).first_seq == model.head + 6
        assert two.head() == model.head + 6
        for store in ledger.before_and_after_reopen():
            assert [entry.seq for entry in journal_of(store)] == [model.head + 6]

    @needs(SupportsCompaction)
    def test_a_compaction_reaches_the_other(self, ledger: Ledger) -> None:
        """[7] If one instance trims entries, the other instance can read only the kept entries."""
        one, two = ledger.store, ledger.open()
        model = play(one)
        two.read_journal(0, 10)
        model.trim(one.compact(TRIM).floor)
        check_against_model(two, model)
        play(two, model)
        check_against_model(one, model)
        model.trim(two.compact(TRIM).floor)
        check_against_model(one, model)
        for store in ledger.before_and_after_reopen():
            check_against_model(store, model)

    def test_closing_one_leaves_the_other(self, ledger: Ledger) -> None:
        """[4] If one instance is closed, the other instances on the storage still work."""
        one, two, three = ledger.store, ledger.open(), ledger.open(read_only=True)
        record = create(one)
        two.close()
        record = update(one, record)
        three.close()
        record = update(one, record)
        for store in ledger.before_and_after_reopen():
            assert store.load_snapshot().records[record.task_id] == record

    def test_a_reader_follows_the_writer(self, ledger: Ledger) -> None:
        """[13] A read-only instance sees commits that are made after the instance was opened."""
        record = create(ledger.store)
        reader = ledger.open(read_only=True)
        for seq in range(2, 5):
            record = update(ledger.store, record)
            assert reader.head() == seq
            assert dict(reader.load_snapshot().records) == {record.task_id: record}
            assert [entry.seq for entry in reader.read_journal(seq - 1, 10)] == [seq]
        for store in ledger.before_and_after_reopen():
            assert store.head() == seq

    def test_waiting_for_the_other(self, ledger: Ledger) -> None:
        """[2] A commit by one instance wakes a thread that waits on another instance."""
        record = create(ledger.store)
        for other in (ledger.open(), ledger.open(read_only=True)):
            check_commit_wakes(other, partial(update, ledger.store, record))
            record = ledger.store.load_snapshot().records[record.task_id]
        for store in ledger.before_and_after_reopen():
            assert store.load_snapshot().records[record.task_id].revision == 3

    def test_no_commit_is_missed(self, ledger: Ledger) -> None:
        """[2] wait_for misses no commit, even if the commit happens just as wait_for starts."""
        waiting, writing = ledger.open(), ledger.open()
        record = create(ledger.store)
        start = time.monotonic()
        gate = threading.Semaphore(0)

        def write() -> None:
            newest = record
            for turn in range(TURNS):
                assert gate.acquire(timeout=TIMEOUT_S)
                time.sleep(turn % 10 * 0.0003)
                newest = update(writing, newest)

        with meanwhile(write):
            for seq in range(2, 2 + TURNS):
                gate.release()
                assert waiting.wait_for(seq - 1, TIMEOUT_S) is True, f"wait_for missed seq {seq}"
        assert time.monotonic() - start < TIMEOUT_S / 2
        for store in ledger.before_and_after_reopen():
            assert store.head() == 1 + TURNS

    # -- threads ----------------------------------------------------------

    def test_no_update_is_lost(self, ledger: Ledger) -> None:
        """[3] Concurrent updates of one task by several instances lose no update."""
        create(ledger.store, task_id="counter")
        stores = [ledger.open() for _ in range(THREADS)]
        run_together(*(partial(increment, store, "counter", COMMITS) for store in stores))
        for store in ledger.before_and_after_reopen():
            assert store.load_snapshot().records["counter"].revision == 1 + THREADS * COMMITS
            check_journal(store)

    def test_no_seq_is_given_twice(self, ledger: Ledger) -> None:
        """[2] Concurrent commits get separate, contiguous ranges of seqs."""
        commits: list[Commit] = []

        def write(store: FullStore) -> None:
            for size in range(COMMITS):
                changes = [make_put() for _ in range(1 + size % 3)]
                retry_while_busy(lambda changes=changes: commits.append(store.apply(changes)))  # type: ignore[misc]

        run_together(*(partial(write, ledger.open()) for _ in range(THREADS)))
        seqs = [seq for c in commits for seq in range(c.first_seq, c.last_seq + 1)]
        assert sorted(seqs) == list(range(1, len(seqs) + 1))
        for store in ledger.before_and_after_reopen():
            check_journal(store)
            assert store.head() == len(seqs)
            entries = {entry.seq: entry for entry in journal_of(store)}
            for commit in commits:
                assert entries[commit.last_seq].commit_id == commit.commit_id
                assert entries[commit.first_seq].at == commit.at

    def test_one_of_many_gets_the_dedup_key(self, ledger: Ledger) -> None:
        """[3] If several threads create the same run, only one task is created, and each
        ConflictError names this task."""
        for attempt in range(3):
            created: list[str] = []
            reported: list[str | None] = []

            def create_run(
                store: FullStore,
                change: Put,
                created: list[str] = created,
                reported: list[str | None] = reported,
            ) -> None:
                try:
                    retry_while_busy(lambda: store.apply([change]))
                except ConflictError as conflict:
                    reported.append(conflict.conflicts[0].existing_task_id)
                else:
                    created.append(change.task_id)

            run_together(
                *(
                    partial(create_run, ledger.open(), make_put(run_id=f"run-{attempt}"))
                    for _ in range(THREADS)
                )
            )
            assert len(created) == 1
            assert reported == created * (THREADS - 1)
        for store in ledger.before_and_after_reopen():
            check_journal(store)

    def test_readers_see_no_gap(self, ledger: Ledger) -> None:
        """[2] A reader that sees head n can read every entry up to n while other threads write."""
        self._read_while_writing(ledger, _read_journal)

    def test_loading_is_one_moment(self, ledger: Ledger) -> None:
        """[5] A loaded snapshot has the records as of its seq, even while other threads write."""
        loaded: list[Snapshot] = []
        self._read_while_writing(ledger, lambda store: loaded.append(store.load_snapshot()))
        for store in ledger.before_and_after_reopen():
            records_at = _records_at(store)
            for snapshot in loaded:
                assert dict(snapshot.records) == records_at(snapshot.seq), f"at seq {snapshot.seq}"

    @needs(SupportsQuery)
    def test_a_page_is_one_moment(self, ledger: Ledger) -> None:
        """[5] A query page has the records as of its seq, even while other threads write."""
        pages: list[tuple[int, dict[str, TaskRecord]]] = []

        def read(store: FullStore) -> None:
            page = store.query(TaskQuery())
            pages.append((page.seq, {record.task_id: record for record in page}))

        self._read_while_writing(ledger, read)
        for store in ledger.before_and_after_reopen():
            records_at = _records_at(store)
            for seq, records in pages:
                assert records == records_at(seq), f"at seq {seq}"

    @needs(SupportsSummary)
    def test_a_summary_is_one_moment(self, ledger: Ledger) -> None:
        """[5] A summary counts the records as of its seq, even while other threads write."""
        counted: list[Summary] = []
        self._read_while_writing(ledger, lambda store: counted.append(store.summary()))
        for store in ledger.before_and_after_reopen():
            records_at = _records_at(store)
            for summary in counted:
                expected = Summary.from_records(records_at(summary.seq).values(), summary.seq)
                assert summary == expected, f"at seq {summary.seq}"

    @needs(SupportsCompaction, SupportsIntegrity)
    def test_compacting_while_writing(self, ledger: Ledger) -> None:
        """[7] A compaction during writes and reads does not change the result of any read."""
        create(ledger.store, task_id="counter")
        writers = [ledger.open() for _ in range(2)]
        compactor, reader = ledger.open(), ledger.open()
        done = threading.Event()

        def compact() -> None:
            while not done.is_set():
                retry_while_busy(lambda: compactor.compact(TRIM))

        def read() -> None:
            while not done.is_set():
                loaded = reader.load_snapshot()
                assert loaded.records["counter"].revision == len(loaded.records)
                assert loaded.seq == 2 * len(loaded.records) - 1

        def write() -> None:
            try:
                run_together(*(partial(increment, store, "counter", COMMITS) for store in writers))
            finally:
                done.set()

        run_together(write, compact, read)
        for store in ledger.before_and_after_reopen():
            assert store.head() == 1 + 2 * 2 * COMMITS
            assert store.load_snapshot().records["counter"].revision == 1 + 2 * COMMITS
            assert store.verify().problems == ()
            base = store.read_snapshot(store.floor() - 1)
            check_journal(store, base)

    def _read_while_writing(self, ledger: Ledger, read: Callable[[FullStore], object]) -> None:
        """Commit on one store instance while threads read on the same and on a second instance.

        The commits go on until every thread has read a few times, also on a busy machine.
        """
        writer, other = ledger.store, ledger.open()
        done = threading.Event()
        reads = [0, 0, 0]

        def write() -> None:
            try:
                records: list[TaskRecord] = []
                for n in range(40 * COMMITS):
                    if n >= 40 and min(reads) >= 10:
                        break
                    new = make_record(task_id=f"task-{n % 7}-{n}")
                    writer.apply(
                        [make_put(), *map(next_of, records), make_put(task_id=new.task_id)]
                    )
                    records = [new]
            finally:
                done.set()

        def read_repeatedly(reader: int, store: FullStore) -> None:
            while not done.is_set():
                read(store)
                reads[reader] += 1
            read(store)

        readers = enumerate((other, other, writer))
        run_together(write, *(partial(read_repeatedly, *reader) for reader in readers))


def _records_at(store: FullStore) -> Callable[[int], dict[str, TaskRecord]]:
    """Return a function that gives the records as of a seq, by folding the journal."""
    entries = journal_of(store)

    @cache
    def records_at(seq: int) -> dict[str, TaskRecord]:
        return dict(fold(Snapshot(0), entries[:seq]).records)

    return records_at


def _read_journal(store: FullStore) -> None:
    head = store.head()
    entries = store.read_journal(0, head + 1000)
    seqs = [entry.seq for entry in entries]
    assert len(seqs) >= head
    assert seqs == list(range(1, len(seqs) + 1))
