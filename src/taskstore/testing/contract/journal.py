"""Journal clauses: contiguous seqs, paging, cursors, history, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from queue import Queue
from typing import ClassVar

import pytest

from taskstore.errors import ConflictError, CursorExpiredError, StoreClosedError
from taskstore.model.journal import (
    ChangeSet,
    EntryKind,
    JournalEntry,
    Position,
    Put,
    Remove,
    Snapshot,
)
from taskstore.store.interface import SupportsHistory, SupportsJournal
from taskstore.testing.contract.base import ContractBase, Ledger, as_of, journal_of, needs
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
from taskstore.testing.threads import TIMEOUT_S, meanwhile
from taskstore.testing.types import FullStore

IDLE_S = 0.5
MAX_CPU_SHARE = 0.1
"""The highest allowed CPU time of a waiting store, as a share of the waiting time."""


def entry_fields(entry: JournalEntry) -> tuple[object, ...]:
    """Return the fields of an entry in the form that ``Model.entries`` uses."""
    return (entry.seq, entry.kind, entry.task_id, entry.revision, entry.record)


def check_commit_wakes(waiting: FullStore, commit: Callable[[], object]) -> None:
    """Check that a commit wakes a thread that waits for the next seq."""
    head = waiting.head()
    start = time.monotonic()
    answers: list[bool] = []
    with meanwhile(lambda: answers.append(waiting.wait_for(head, TIMEOUT_S))):
        time.sleep(0.05)
        commit()
    assert answers == [True]
    assert time.monotonic() - start < TIMEOUT_S / 2


class JournalContract(ContractBase):
    """The guarantees of ``SupportsJournal``."""

    level = "journal"
    abilities: ClassVar[tuple[type, ...]] = (SupportsJournal,)

    def test_a_new_journal(self, ledger: Ledger) -> None:
        """[2] A new ledger has head 0, floor 1 and no entries."""
        for store in ledger.before_and_after_reopen():
            assert (store.head(), store.floor()) == (0, 1)
            assert list(store.read_journal(0, 10)) == []
            assert store.read_snapshot(0) in (None, Snapshot(0))

    def test_entries_are_what_was_committed(self, ledger: Ledger) -> None:
        """[2] Each entry has the seq, kind, revision and exact record of its change."""
        model = play(ledger.store)
        for store in ledger.before_and_after_reopen():
            assert (store.head(), store.floor()) == (model.head, 1)
            assert [entry_fields(entry) for entry in journal_of(store)] == model.entries

    def test_entries_carry_their_commit(self, ledger: Ledger) -> None:
        """[2] Entries have the time and id of their commit, and commit ids are unique."""
        commits = [ledger.store.apply([make_put() for _ in range(size)]) for size in (1, 3, 2)]
        for store in ledger.before_and_after_reopen():
            entries = {entry.seq: entry for entry in journal_of(store)}
            for commit in commits:
                for seq in range(commit.first_seq, commit.last_seq + 1):
                    assert entries[seq].at == commit.at
                    assert entries[seq].commit_id == commit.commit_id
        named = [commit.commit_id for commit in commits if commit.commit_id]
        assert len(set(named)) == len(named)
        assert len(named) in (0, len(commits)), "some commits have a commit id, others have none"

    def test_changes_over_another_history(self, ledger: Ledger) -> None:
        """[3] A batch raises ConflictError if the journal does not contain its base position.

        After a restore from a backup, a revision of a task can be a different record than before
        the restore.
        """
        first = ledger.store.apply([make_put(), make_put()])
        last = ledger.store.apply([make_put()])
        if not last.commit_id:
            pytest.skip("the store keeps no commit ids")
        for store in ledger.before_and_after_reopen():
            head = store.head()
            for base in (
                Position(last.last_seq, first.commit_id),
                Position(last.last_seq, "of another history"),
                Position(first.first_seq, last.commit_id),
                Position(head + 1, last.commit_id),
                Position(head + 1000, "of another history"),
            ):
                with pytest.raises(ConflictError):
                    store.apply(ChangeSet([make_put()], base))
            assert store.head() == head
            for base in (
                Position(0),
                Position(first.first_seq, first.commit_id),
                Position(first.last_seq, first.commit_id),
                Position(last.last_seq, last.commit_id),
                Position(last.last_seq),
            ):
                store.apply(ChangeSet([make_put()], base))
            assert store.head() == head + 5

    def test_changes_over_what_was_trimmed(self, ledger: Ledger) -> None:
        """[3] A batch conflicts if its base position is below floor - 1.  At floor - 1, the
        batch does not conflict."""
        seq = 0
        for store in ledger.before_and_after_reopen():
            store.apply([make_put(), make_put()])
            seq += 5
            store.save_snapshot(Snapshot(seq, store.load_snapshot().records))
            with pytest.raises(ConflictError):
                store.apply(ChangeSet([make_put()], Position(seq - 1, "whose entry is gone")))
            commit = store.apply(ChangeSet([make_put()], Position(seq, "whose entry is gone")))
            assert commit.first_seq == seq + 1

    def test_times_never_go_back(self, ledger: Ledger) -> None:
        """[2] The times of journal entries do not decrease, even if the clock steps back."""
        for store in ledger.before_and_after_reopen():
            for step in (10, -7, 3, -(10**9), 0):
                store.clock = lambda step=step: EPOCH_MS + step  # type: ignore[misc]
                store.apply([make_put()])
        for store in ledger.before_and_after_reopen():
            times = [entry.at for entry in journal_of(store)]
            assert times == sorted(times)
            assert len(times) == 10

    def test_a_clock_far_ahead_is_reported(self, ledger: Ledger) -> None:
        """[2] If the last commit is over an hour later than the clock, report() has a notice."""

        def tells(store: FullStore, ahead_ms: int) -> bool:
            store.clock = lambda: EPOCH_MS - ahead_ms
            return any("later than the clock" in notice for notice in store.report().notices)

        ledger.store.clock = lambda: EPOCH_MS
        create(ledger.store)
        for store in ledger.before_and_after_reopen():
            store.load_snapshot()
            for hours, told in ((0.0, False), (1.0, False), (1.01, True), (90_000.0, True)):
                assert tells(store, int(hours * 3_600_000)) is told
            create(store)  # gets the time of the commit before
            assert tells(store, 7_200_000)
            assert not tells(store, -1000)
        reader = ledger.open(read_only=True)
        reader.load_snapshot()
        assert tells(reader, 7_200_000)

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
    def test_paging_reads_everything_once(self, ledger: Ledger, limit: int) -> None:
        """[2] A reader of successive journal pages gets each entry once, in order."""
        model = play(ledger.store)
        for store in ledger.before_and_after_reopen():
            after, entries = 0, []
            while page := store.read_journal(after, limit):
                assert len(page) <= limit
                assert len(page) == min(limit, model.head - after)
                entries += [entry_fields(entry) for entry in page]
                after = page[-1].seq
            assert entries == model.entries

    def test_reading_from_every_point(self, ledger: Ledger) -> None:
        """[2] read_journal returns the entries after any seq, even after a seq inside a batch."""
        model = play(ledger.store)
        for store in ledger.before_and_after_reopen():
            for after in range(model.head + 1):
                seqs = [entry.seq for entry in store.read_journal(after, 5)]
                assert seqs == list(range(after + 1, min(after + 5, model.head) + 1))

    def test_reading_beyond_the_head(self, ledger: Ledger) -> None:
        """[2] If the given seq is not below the head, read_journal returns no entries."""
        head = play(ledger.store).head
        for store in ledger.before_and_after_reopen():
            for after in (head, head + 1, head + 1000, 2**53 - 1):
                assert list(store.read_journal(after, 10)) == []

    def test_fold_gives_the_records_at_every_seq(self, ledger: Ledger) -> None:
        """[5] Snapshots and journal give the records as of every seq from floor - 1 to the head."""
        model = play(ledger.store)
        for store in ledger.before_and_after_reopen():
            for seq, records in model.states.items():
                assert dict(as_of(store, seq).records) == records, f"as of seq {seq}"
                assert as_of(store, seq).seq == seq
            assert dict(as_of(store, store.head()).records) == dict(store.load_snapshot().records)

    def test_save_empties_the_journal(self, ledger: Ledger) -> None:
        """[2] After save the head is the snapshot's seq and the journal is empty."""
        head = play(ledger.store).head
        record = make_record()
        ledger.store.save_snapshot(Snapshot(head + 10, {record.task_id: record}, EPOCH_MS))
        for store in ledger.before_and_after_reopen():
            assert (store.head(), store.floor()) == (head + 10, head + 11)
            assert journal_of(store) == []
            for after in (0, head, head + 9):
                with pytest.raises(CursorExpiredError) as caught:
                    store.read_journal(after, 10)
                assert (caught.value.after, caught.value.floor) == (after, head + 11)

    def test_what_was_saved_is_retained(self, ledger: Ledger) -> None:
        """[5] After a save, the saved snapshot is the oldest snapshot that can be read."""
        play(ledger.store)
        record = make_record()
        ledger.store.save_snapshot(Snapshot(100, {record.task_id: record}, EPOCH_MS))
        model = play(ledger.store, Model(ledger.store.load_snapshot()))
        for store in ledger.before_and_after_reopen():
            kept = store.read_snapshot(100)
            assert kept is not None
            assert (kept.seq, dict(kept.records)) == (100, {record.task_id: record})
            assert store.read_snapshot(99) is None
            for seq, records in model.states.items():
                assert dict(as_of(store, seq).records) == records

    def test_the_ones_before_the_floor_are_expired(self, ledger: Ledger) -> None:
        """[2] read_journal raises CursorExpiredError if and only if the seq is below floor - 1."""
        ledger.store.save_snapshot(Snapshot(5))
        model = play(ledger.store, Model(Snapshot(5)))
        for store in ledger.before_and_after_reopen():
            assert len(store.read_journal(5, 1000)) == len(model.entries)
            for after in (4, 1, 0, -1):
                with pytest.raises(CursorExpiredError):
                    store.read_journal(after, 1000)

    def test_refused_batches_leave_no_entry(self, ledger: Ledger) -> None:
        """[3] A batch that raises ConflictError leaves no entry in the journal."""
        model = play(ledger.store)
        with ledger.unchanged(), pytest.raises(ConflictError):
            ledger.store.apply([make_put(), Remove("absent", 2)])
        for store in ledger.before_and_after_reopen():
            assert [entry_fields(entry) for entry in journal_of(store)] == model.entries

    def test_a_task_that_came_and_went(self, ledger: Ledger) -> None:
        """[2] If one batch creates and deletes a task, the journal contains both entries."""
        record = make_record()
        ledger.store.apply([Put(record), removal_of(record)])
        for store in ledger.before_and_after_reopen():
            assert [(e.seq, e.kind, e.record) for e in journal_of(store)] == [
                (1, EntryKind.UPSERTED, record),
                (2, EntryKind.DELETED, None),
            ]

    def test_entries_read_before_stay_as_they_were(self, ledger: Ledger) -> None:
        """[10] A commit does not change a journal page that was read before the commit."""
        play(ledger.store)
        for store in ledger.before_and_after_reopen():
            page = store.read_journal(0, 1000)
            before = list(page)
            create(store)
            assert list(page) == before

    # -- history ----------------------------------------------------------

    @needs(SupportsHistory)
    def test_history_of_one_task(self, ledger: Ledger) -> None:
        """[7] read_history returns a task's entries, oldest first, even if the task is deleted."""
        record = create(ledger.store, task_id="task")
        create(ledger.store, task_id="Task")
        record = update(ledger.store, record, label="a")
        ledger.store.apply([next_of(record, label="b"), make_put(task_id="task ")])
        ledger.store.apply([Remove("task", 4)])
        for store in ledger.before_and_after_reopen():
            history = store.read_history("task")
            assert [entry.revision for entry in history] == [1, 2, 3, 4]
            assert list(history) == [e for e in journal_of(store) if e.task_id == "task"]
            assert [entry.seq for entry in store.read_history("Task")] == [2]
            assert list(store.read_history("absent")) == []

    # -- waiting ----------------------------------------------------------

    def test_wait_for_what_is_there(self, ledger: Ledger) -> None:
        """[2] If the head is already above the given seq, wait_for returns True at once."""
        head = play(ledger.store).head
        for store in ledger.before_and_after_reopen():
            start = time.monotonic()
            assert store.wait_for(head - 1, TIMEOUT_S) is True
            assert store.wait_for(0, 0) is True
            assert time.monotonic() - start < TIMEOUT_S / 2

    def test_wait_for_what_does_not_come(self, ledger: Ledger) -> None:
        """[2] If no commit happens, wait_for returns False at the timeout and not earlier."""
        head = play(ledger.store).head
        for store in ledger.before_and_after_reopen():
            assert store.wait_for(head, 0) is False
            start = time.monotonic()
            assert store.wait_for(head, 0.2) is False
            assert time.monotonic() - start >= 0.19

    def test_waiting_does_not_spin(self, ledger: Ledger) -> None:
        """[2] While wait_for waits, all threads together use almost no CPU time."""
        create(ledger.store)
        ledger.store.wait_for(1, 0.01)

        def cpu_time() -> float:
            used = time.process_time()
            assert ledger.store.wait_for(1, IDLE_S) is False
            return time.process_time() - used

        # Other work of the process also uses CPU time, so only one of three attempts must pass.
        allowed = IDLE_S * MAX_CPU_SHARE
        assert any(cpu_time() <= allowed for _ in range(3)), (
            f"each wait used over {allowed} s of CPU time"
        )

    @pytest.mark.parametrize("timeout", [10.0**9, 1e-3])
    def test_any_timeout(self, ledger: Ledger, timeout: float) -> None:
        """[2] wait_for accepts any timeout, from a millisecond to thirty years."""
        record = create(ledger.store)
        assert ledger.store.wait_for(1, 1e-3) is False
        with meanwhile(lambda: ledger.store.wait_for(1, timeout)):
            update(ledger.store, record)
        assert ledger.store.wait_for(1, timeout) is True

    def test_everybody_who_waits_is_woken(self, ledger: Ledger) -> None:
        """[2] A commit wakes every thread that waits for the commit's seq, and no other thread."""
        store = ledger.store
        record = create(store)
        answers: Queue[int] = Queue()

        def wait(after: int) -> None:
            assert store.wait_for(after, TIMEOUT_S) is True
            answers.put(after)

        with ExitStack() as threads:
            for after in (1, 2, 1, 2, 1):
                threads.enter_context(meanwhile(partial(wait, after)))
            time.sleep(0.02)
            start = time.monotonic()
            record = update(store, record)
            assert sorted(answers.get(timeout=TIMEOUT_S) for _ in range(3)) == [1, 1, 1]
            assert answers.empty()
            update(store, record)
        assert time.monotonic() - start < TIMEOUT_S / 2
        assert sorted(answers.get_nowait() for _ in range(2)) == [2, 2]

    def test_closing_ends_the_wait(self, ledger: Ledger) -> None:
        """[2] If a store is closed during wait_for, wait_for raises StoreClosedError at once."""
        create(ledger.store)
        for store in ledger.before_and_after_reopen():
            start = time.monotonic()
            errors: list[StoreClosedError] = []

            def wait(store: FullStore = store, errors: list[StoreClosedError] = errors) -> None:
                with pytest.raises(StoreClosedError) as caught:
                    store.wait_for(1, TIMEOUT_S)
                errors.append(caught.value)

            with meanwhile(wait), meanwhile(wait):
                time.sleep(0.05)
                store.close()
            assert len(errors) == 2
            assert time.monotonic() - start < TIMEOUT_S / 2

    def test_a_commit_ends_the_wait(self, ledger: Ledger) -> None:
        """[2] A commit by one thread wakes another thread that waits in wait_for."""
        record = create(ledger.store)
        for store in ledger.before_and_after_reopen():
            check_commit_wakes(store, partial(update, store, record))
            record = store.load_snapshot().records[record.task_id]
        delete(ledger.store, record)
