"""Shared: several instances on one storage, in several threads, never disagree."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import pytest

from taskstore.errors import Conflict, ConflictError, CursorExpiredError
from taskstore.model.journal import Commit, Put, Snapshot, fold
from taskstore.model.query import TaskQuery
from taskstore.model.records import TaskRecord
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
)
from taskstore.testing.contract.base import ContractBase, Ledger, journal_of, needs
from taskstore.testing.contract.compaction import TRIM, agrees
from taskstore.testing.contract.journal import check_woken
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
from taskstore.testing.threads import PATIENCE_S, meanwhile, patiently, run_together
from taskstore.testing.types import FullStore

THREADS = 4
TURNS = 40
COMMITS = 12
"""How many commits each thread makes: enough to collide, few enough for a slow disk."""


def count_up(store: FullStore, task_id: str, times: int) -> None:
    """Raise a task's revision, over and over, and create a task each time."""
    done = 0
    while done < times:
        record = store.load_snapshot().records[task_id]
        try:
            patiently(partial(store.apply, [next_of(record), make_put()]))
        except ConflictError:
            continue
        done += 1


def check_history(store: FullStore, base: Snapshot | None = None) -> None:
    """Check the journal from one end to the other, and what follows from it [2] [5]."""
    entries = journal_of(store)
    start = base if base is not None else Snapshot(0)
    assert [entry.seq for entry in entries] == list(range(start.seq + 1, store.head() + 1))
    revisions = {task_id: record.revision for task_id, record in start.records.items()}
    for entry in entries:
        assert entry.revision == revisions.get(entry.task_id, 0) + 1
        revisions[entry.task_id] = entry.revision
    assert dict(fold(start, entries).records) == dict(store.load_snapshot().records)


class SharedContract(ContractBase):
    """Several instances: without a journal a store is single-process and says so."""

    level = "shared"
    abilities: ClassVar[tuple[type, ...]] = (SupportsJournal,)

    def test_each_sees_what_the_other_wrote(self, ledger: Ledger) -> None:
        """[2] Two instances take turns; each sees all commits of both at once."""
        one, two = ledger.store, ledger.open()
        model = Model()
        for writer, reader in ((one, two), (two, one)) * 2:
            play(writer, model)
            for store in (reader, writer):
                loaded = store.load_snapshot()
                assert (loaded.seq, dict(loaded.records)) == (model.head, dict(model.records))
                assert store.head() == model.head
                assert len(journal_of(store)) == len(model.entries)
        for store in ledger.twice():
            agrees(store, model)

    def test_revisions_are_compared_across_instances(self, ledger: Ledger) -> None:
        """[3] What the other instance changed cannot be overwritten unseen."""
        one, two = ledger.store, ledger.open()
        record = create(one)
        newer = update(two, record, label="two")
        with ledger.unchanged(), pytest.raises(ConflictError) as caught:
            update(one, record, label="one")
        assert caught.value.conflicts == (Conflict(record.task_id, 1, 2),)
        for turn in range(4):
            newer = update((ledger.store, ledger.open())[turn % 2], newer, label=f"{turn}")
        for store in ledger.twice():
            assert store.load_snapshot().records[record.task_id] == newer
            check_history(store)

    def test_deletions_hold_across_instances(self, ledger: Ledger) -> None:
        """[3] A task that the other instance deleted stays deleted."""
        one, two = ledger.store, ledger.open()
        record = create(one, task_id="gone")
        delete(two, record)
        for change in (make_put(task_id="gone"), next_of(record), removal_of(record)):
            with pytest.raises(ConflictError) as caught:
                one.apply([change])
            assert caught.value.conflicts == (
                Conflict("gone", change.revision - 1, 0, deleted=True),
            )
        for store in ledger.twice():
            check_history(store)

    def test_bookings_hold_across_instances(self, ledger: Ledger) -> None:
        """[3] A run that the other instance booked is answered with its task."""
        one, two = ledger.store, ledger.open()
        holder = create(one, run_id="run-1")
        for store in (two, one):
            with pytest.raises(ConflictError) as caught:
                create(store, run_id="run-1")
            assert caught.value.conflicts[0].existing_task_id == holder.task_id
        delete(two, holder)
        create(one, run_id="run-1")
        with pytest.raises(ConflictError):
            create(two, run_id="run-1")
        for store in ledger.twice():
            check_history(store)

    def test_times_do_not_go_back_across_instances(self, ledger: Ledger) -> None:
        """[2] A clock that is behind the other instance's does not take the journal back."""
        one, two = ledger.store, ledger.open()
        one.clock, two.clock = lambda: EPOCH_MS, lambda: EPOCH_MS - 60_000
        assert one.apply([make_put()]).at == EPOCH_MS
        assert two.apply([make_put()]).at == EPOCH_MS
        for store in ledger.twice():
            assert [entry.at for entry in journal_of(store)] == [EPOCH_MS, EPOCH_MS]

    def test_a_saved_snapshot_reaches_the_other(self, ledger: Ledger) -> None:
        """[2] What one instance replaced, the other one does not go on from."""
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
        for store in ledger.twice():
            assert [entry.seq for entry in journal_of(store)] == [model.head + 6]

    @needs(SupportsCompaction)
    def test_a_compaction_reaches_the_other(self, ledger: Ledger) -> None:
        """[7] What one instance trimmed is expired for the other, and nothing else changes."""
        one, two = ledger.store, ledger.open()
        model = play(one)
        two.read_journal(0, 10)
        model.trim(one.compact(TRIM).floor)
        agrees(two, model)
        play(two, model)
        agrees(one, model)
        model.trim(two.compact(TRIM).floor)
        agrees(one, model)
        for store in ledger.twice():
            agrees(store, model)

    def test_closing_one_leaves_the_other(self, ledger: Ledger) -> None:
        """[4] An instance that closes takes nothing away from the others."""
        one, two, three = ledger.store, ledger.open(), ledger.open(read_only=True)
        record = create(one)
        two.close()
        record = update(one, record)
        three.close()
        record = update(one, record)
        for store in ledger.twice():
            assert store.load_snapshot().records[record.task_id] == record

    def test_a_reader_follows_the_writer(self, ledger: Ledger) -> None:
        """[13] An instance opened read-only sees each later commit."""
        record = create(ledger.store)
        reader = ledger.open(read_only=True)
        for seq in range(2, 5):
            record = update(ledger.store, record)
            assert reader.head() == seq
            assert dict(reader.load_snapshot().records) == {record.task_id: record}
            assert [entry.seq for entry in reader.read_journal(seq - 1, 10)] == [seq]
        for store in ledger.twice():
            assert store.head() == seq

    def test_waiting_for_the_other(self, ledger: Ledger) -> None:
        """[2] A commit of one instance ends the wait of another."""
        record = create(ledger.store)
        for other in (ledger.open(), ledger.open(read_only=True)):
            check_woken(other, partial(update, ledger.store, record))
            record = ledger.store.load_snapshot().records[record.task_id]
        for store in ledger.twice():
            assert store.load_snapshot().records[record.task_id].revision == 3

    def test_no_commit_is_missed(self, ledger: Ledger) -> None:
        """[2] A commit right before, in, or after the moment in which somebody begins to wait."""
        waiting, writing = ledger.open(), ledger.open()
        record = create(ledger.store)
        started = time.monotonic()
        gate = threading.Semaphore(0)

        def write() -> None:
            newest = record
            for turn in range(TURNS):
                assert gate.acquire(timeout=PATIENCE_S)
                time.sleep(turn % 10 * 0.0003)
                newest = update(writing, newest)

        with meanwhile(write):
            for seq in range(2, 2 + TURNS):
                gate.release()
                assert waiting.wait_for(seq - 1, PATIENCE_S) is True, f"seq {seq} was missed"
        assert time.monotonic() - started < PATIENCE_S / 2
        for store in ledger.twice():
            assert store.head() == 1 + TURNS

    # -- threads ----------------------------------------------------------

    def test_no_update_is_lost(self, ledger: Ledger) -> None:
        """[3] Instances that count on one task in parallel lose none of their counts."""
        create(ledger.store, task_id="counter")
        stores = [ledger.open() for _ in range(THREADS)]
        run_together(*(lambda store=store: count_up(store, "counter", COMMITS) for store in stores))
        for store in ledger.twice():
            assert store.load_snapshot().records["counter"].revision == 1 + THREADS * COMMITS
            check_history(store)

    def test_no_seq_is_given_twice(self, ledger: Ledger) -> None:
        """[2] Commits of parallel instances get ranges of their own, without a gap."""
        commits: list[Commit] = []

        def write(store: FullStore) -> None:
            for size in range(COMMITS):
                changes = [make_put() for _ in range(1 + size % 3)]
                patiently(lambda changes=changes: commits.append(store.apply(changes)))  # type: ignore[misc]

        run_together(*(partial(write, ledger.open()) for _ in range(THREADS)))
        seqs = [seq for c in commits for seq in range(c.first_seq, c.last_seq + 1)]
        assert sorted(seqs) == list(range(1, len(seqs) + 1))
        for store in ledger.twice():
            check_history(store)
            assert store.head() == len(seqs)
            entries = {entry.seq: entry for entry in journal_of(store)}
            for commit in commits:
                assert entries[commit.last_seq].commit_id == commit.commit_id
                assert entries[commit.first_seq].at == commit.at

    def test_one_of_many_gets_the_booking(self, ledger: Ledger) -> None:
        """[3] When all book the same run at once, one does, and the others learn which."""
        for attempt in range(3):
            made: list[str] = []
            told: list[str | None] = []

            def book(
                store: FullStore,
                change: Put,
                made: list[str] = made,
                told: list[str | None] = told,
            ) -> None:
                try:
                    patiently(lambda: store.apply([change]))
                except ConflictError as conflict:
                    told.append(conflict.conflicts[0].existing_task_id)
                else:
                    made.append(change.task_id)

            run_together(
                *(
                    partial(book, ledger.open(), make_put(run_id=f"run-{attempt}"))
                    for _ in range(THREADS)
                )
            )
            assert len(made) == 1
            assert told == made * (THREADS - 1)
        for store in ledger.twice():
            check_history(store)

    def test_readers_see_no_gap(self, ledger: Ledger) -> None:
        """[2] Who sees head n can read every entry up to n, while a writer goes on."""
        self._read_while_writing(ledger, _read_journal)

    def test_loading_is_one_moment(self, ledger: Ledger) -> None:
        """[5] Head and records of a load belong together, while a writer goes on."""
        loaded: list[Snapshot] = []
        self._read_while_writing(ledger, lambda store: loaded.append(store.load_snapshot()))
        for store in ledger.twice():
            entries = journal_of(store)
            for snapshot in {snapshot.seq: snapshot for snapshot in loaded}.values():
                right = fold(Snapshot(0), entries[: snapshot.seq])
                assert dict(snapshot.records) == dict(right.records), f"at seq {snapshot.seq}"

    @needs(SupportsQuery)
    def test_a_page_is_one_moment(self, ledger: Ledger) -> None:
        """[5] A page holds what was true at its seq, while a writer goes on."""
        seen: list[tuple[int, dict[str, TaskRecord]]] = []

        def read(store: FullStore) -> None:
            page = store.query(TaskQuery())
            seen.append((page.seq, {record.task_id: record for record in page}))

        self._read_while_writing(ledger, read)
        for store in ledger.twice():
            entries = journal_of(store)
            for seq, records in dict(seen).items():
                assert records == dict(fold(Snapshot(0), entries[:seq]).records), f"at seq {seq}"

    @needs(SupportsCompaction, SupportsIntegrity)
    def test_compacting_while_writing(self, ledger: Ledger) -> None:
        """[7] Compaction runs beside writers and readers, and nobody notices."""
        create(ledger.store, task_id="counter")
        writers = [ledger.open() for _ in range(2)]
        keeper, reader = ledger.open(), ledger.open()
        done = threading.Event()

        def compact() -> None:
            while not done.is_set():
                patiently(lambda: keeper.compact(TRIM))

        def read() -> None:
            while not done.is_set():
                loaded = reader.load_snapshot()
                assert loaded.records["counter"].revision == len(loaded.records)
                assert loaded.seq == 2 * len(loaded.records) - 1

        def write() -> None:
            try:
                run_together(*(partial(count_up, store, "counter", COMMITS) for store in writers))
            finally:
                done.set()

        run_together(write, compact, read)
        for store in ledger.twice():
            assert store.head() == 1 + 2 * 2 * COMMITS
            assert store.load_snapshot().records["counter"].revision == 1 + 2 * COMMITS
            assert store.verify().problems == ()
            base = store.read_snapshot(store.floor() - 1)
            check_history(store, base)

    def _read_while_writing(self, ledger: Ledger, read: Callable[[FullStore], object]) -> None:
        """Let one instance write while two more read, one of them from two threads."""
        writer, other = ledger.store, ledger.open()
        done = threading.Event()

        def write() -> None:
            try:
                records: list[TaskRecord] = []
                for n in range(40):
                    new = make_record(task_id=f"task-{n % 7}-{n}")
                    writer.apply(
                        [make_put(), *map(next_of, records), make_put(task_id=new.task_id)]
                    )
                    records = [new]
            finally:
                done.set()

        def keep_reading(store: FullStore) -> None:
            while not done.is_set():
                read(store)
            read(store)

        run_together(
            write,
            lambda: keep_reading(other),
            lambda: keep_reading(other),
            lambda: keep_reading(writer),
        )


def _read_journal(store: FullStore) -> None:
    head = store.head()
    entries = store.read_journal(0, head + 1000)
    seqs = [entry.seq for entry in entries]
    assert len(seqs) >= head
    assert seqs == list(range(1, len(seqs) + 1))
