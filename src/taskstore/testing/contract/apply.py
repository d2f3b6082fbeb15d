"""Core clauses for ``apply``, the atomic commit of a batch of changes."""

from __future__ import annotations

from typing import Any

import pytest

from taskstore.errors import Conflict, ConflictError, ValidationError
from taskstore.model.ids import system_clock
from taskstore.model.journal import Change, Put, Remove, Snapshot
from taskstore.model.records import TaskRecord, TaskStatus
from taskstore.store.interface import SupportsJournal, TaskRegistryStore
from taskstore.testing.contract.base import ContractBase, Ledger, needs
from taskstore.testing.factories import (
    EPOCH_MS,
    create,
    delete,
    make_put,
    make_record,
    next_of,
    play,
    removal_of,
    update,
)


def conflicts_of(store: TaskRegistryStore, *changes: Change) -> set[Conflict]:
    """Check that the changes raise ConflictError, and return the conflicts of this error."""
    with pytest.raises(ConflictError) as caught:
        store.apply(changes)
    assert len(set(caught.value.conflicts)) == len(caught.value.conflicts)
    return set(caught.value.conflicts)


def records_of(store: TaskRegistryStore) -> dict[str, TaskRecord]:
    """Return the current records of the store."""
    return dict(store.load_snapshot().records)


class ApplyContract(ContractBase):
    """``apply`` assigns contiguous seqs, compares revisions, and commits a batch atomically."""

    # -- seqs and times ---------------------------------------------------

    def test_seqs_are_contiguous(self, ledger: Ledger) -> None:
        """[2] Seqs start at 1 and have no gap, even after a batch or a restart."""
        head = 0
        for size in (1, 3, 2):
            commit = ledger.reopened().apply([make_put() for _ in range(size)])
            assert (commit.first_seq, commit.last_seq) == (head + 1, head + size)
            head += size
            for store in ledger.before_and_after_reopen():
                assert store.load_snapshot().seq == head

    def test_a_refused_batch_takes_no_seq(self, ledger: Ledger) -> None:
        """[2] A batch that raises ConflictError takes no seq."""
        record = create(ledger.store)
        with ledger.unchanged():
            conflicts_of(ledger.store, make_put(), Put(record))
        assert ledger.store.apply([make_put()]).first_seq == 2

    def test_the_time_is_the_clocks(self, ledger: Ledger) -> None:
        """[2] A commit gets its time from the clock of the store."""
        before = system_clock()
        commit = ledger.store.apply([make_put()])
        assert before <= commit.at <= system_clock()
        ledger.store.clock = lambda: before + 10**9
        commit = ledger.store.apply([make_put()])
        assert commit.at == before + 10**9
        for store in ledger.before_and_after_reopen():
            assert store.load_snapshot().at == commit.at

    def test_the_time_never_goes_back(self, ledger: Ledger) -> None:
        """[2] Commit times do not decrease when the clock steps back."""
        ledger.store.clock = lambda: EPOCH_MS
        assert ledger.store.apply([make_put()]).at == EPOCH_MS
        for store in ledger.before_and_after_reopen():
            store.clock = lambda: EPOCH_MS - 5000
            assert store.apply([make_put()]).at == EPOCH_MS

    def test_the_time_never_goes_back_over_a_save(self, ledger: Ledger) -> None:
        """[2] If a saved snapshot has an earlier time than the last commit, the times of later
        commits still do not decrease."""
        ledger.store.clock = lambda: EPOCH_MS
        ledger.store.apply([make_put()])
        ledger.store.save_snapshot(Snapshot(9, {}, EPOCH_MS - 5000))
        for store in ledger.before_and_after_reopen():
            store.clock = lambda: EPOCH_MS - 5000
            assert store.apply([make_put()]).at == EPOCH_MS

    # -- compare and set --------------------------------------------------

    def test_create_over_existing(self, ledger: Ledger) -> None:
        """[3] If a task exists, a Put of a record at revision 1 conflicts."""
        record = update(ledger.store, create(ledger.store))
        with ledger.unchanged():
            conflicts = conflicts_of(ledger.store, make_put(task_id=record.task_id))
            assert conflicts == {Conflict(record.task_id, 0, 2)}

    def test_update_of_absent(self, ledger: Ledger) -> None:
        """[3] If a task does not exist, a Put of a record at a revision above 1 conflicts."""
        create(ledger.store)
        with ledger.unchanged():
            conflicts = conflicts_of(ledger.store, make_put(task_id="absent", revision=5))
            assert conflicts == {Conflict("absent", 4, 0)}

    @pytest.mark.parametrize("revision", [1, 2, 3, 5, 6, 99])
    def test_stale_and_skipped_revisions(self, ledger: Ledger, revision: int) -> None:
        """[3] If revision r is stored, a Put of any revision except r + 1 conflicts."""
        record = create(ledger.store, task_id="task")
        for _ in range(2):
            record = update(ledger.store, record)
        with ledger.unchanged():
            conflicts = conflicts_of(ledger.store, next_of(record, revision=revision))
            assert conflicts == {Conflict("task", revision - 1, 3)}
        update(ledger.store, record)

    @pytest.mark.parametrize("revision", [2, 3, 5, 99])
    def test_delete_of_another_revision(self, ledger: Ledger, revision: int) -> None:
        """[3] A deletion conflicts if its revision is not the stored revision plus 1."""
        record = update(ledger.store, update(ledger.store, create(ledger.store, task_id="task")))
        with ledger.unchanged():
            conflicts = conflicts_of(ledger.store, Remove("task", revision))
            assert conflicts == {Conflict("task", revision - 1, 3)}
        delete(ledger.store, record)

    def test_delete_of_absent(self, ledger: Ledger) -> None:
        """[3] The deletion of a task that does not exist raises ConflictError."""
        create(ledger.store)
        with ledger.unchanged():
            conflicts = conflicts_of(ledger.store, Remove("absent", 2))
            assert conflicts == {Conflict("absent", 1, 0)}

    def test_the_same_change_again(self, ledger: Ledger) -> None:
        """[3] If a committed change is applied again, apply raises ConflictError."""
        change = next_of(create(ledger.store), label="once")
        ledger.store.apply([change])
        with ledger.unchanged():
            conflicts = conflicts_of(ledger.store, change)
            assert conflicts == {Conflict(change.task_id, 1, 2)}

    @needs(SupportsJournal)
    def test_a_deleted_task_stays_deleted(self, ledger: Ledger) -> None:
        """[3] While the journal contains a task's deletion, every change to this task conflicts."""
        record = create(ledger.store, task_id="gone")
        delete(ledger.store, record)
        changes = (make_put(task_id="gone"), next_of(record), Remove("gone", 2), Remove("gone", 3))
        for _ in ledger.before_and_after_reopen():
            for change in changes:
                with ledger.unchanged():
                    conflicts = conflicts_of(ledger.store, change)
                    assert conflicts == {Conflict("gone", change.revision - 1, 0, deleted=True)}

    @needs(SupportsJournal)
    def test_what_came_and_went_in_one_batch_stays_deleted(self, ledger: Ledger) -> None:
        """[3] If a batch creates and deletes a task, a later creation of this task conflicts."""
        ledger.store.apply([make_put(task_id="gone"), Remove("gone", 2)])
        for _ in ledger.before_and_after_reopen():
            with ledger.unchanged():
                conflicts = conflicts_of(ledger.store, make_put(task_id="gone"))
                assert conflicts == {Conflict("gone", 0, 0, deleted=True)}

    # -- batches ----------------------------------------------------------

    def test_a_batch_is_all_or_nothing(self, ledger: Ledger) -> None:
        """[3] If any change of a batch conflicts, the store rejects the whole batch."""
        one, two = create(ledger.store), create(ledger.store)
        valid: list[Change] = [
            make_put(),
            next_of(one, label="changed"),
            removal_of(two),
            make_put(run_id="r"),
        ]
        for index in range(len(valid) + 1):
            with ledger.unchanged():
                conflicting = make_put(task_id="absent", revision=3)
                conflicts = conflicts_of(ledger.store, *valid[:index], conflicting, *valid[index:])
                assert conflicts == {Conflict("absent", 2, 0)}
        ledger.store.apply(valid)
        for store in ledger.before_and_after_reopen():
            assert len(records_of(store)) == 3

    def test_every_task_in_the_way_is_named(self, ledger: Ledger) -> None:
        """[3] ConflictError lists each conflicting task of the batch exactly once."""
        record = update(ledger.store, create(ledger.store))
        existing = create(ledger.store, run_id="run-1")
        duplicate = make_put(run_id="run-1")
        with ledger.unchanged():
            conflicts = conflicts_of(
                ledger.store,
                make_put(),
                next_of(record, revision=2),
                next_of(record, revision=3),
                Remove("absent", 8),
                duplicate,
            )
            assert conflicts == {
                Conflict(record.task_id, 1, 2),
                Conflict("absent", 7, 0),
                Conflict(duplicate.task_id, 0, 0, existing_task_id=existing.task_id),
            }

    def test_several_changes_of_one_task(self, ledger: Ledger) -> None:
        """[3] If a batch changes a task several times, the record of the final change is stored."""
        first = create(ledger.store)
        new = make_record()
        second, newer = next_of(first, label="a"), next_of(new, label="n")
        third = next_of(second.record, label="b", status=TaskStatus.RUNNING)
        commit = ledger.store.apply([second, Put(new), third, newer])
        assert commit.last_seq - commit.first_seq == 3
        for store in ledger.before_and_after_reopen():
            assert records_of(store) == {
                first.task_id: third.record,
                new.task_id: newer.record,
            }

    def test_change_and_deletion_in_one_batch(self, ledger: Ledger) -> None:
        """[3] A batch can update and then delete the same task; each of the two takes a seq."""
        old, new = create(ledger.store), make_record()
        changed = next_of(old, label="last words")
        commit = ledger.store.apply(
            [changed, Put(new), removal_of(changed.record), removal_of(new)]
        )
        assert (commit.first_seq, commit.last_seq) == (2, 5)
        for store in ledger.before_and_after_reopen():
            assert records_of(store) == {}
            assert store.load_snapshot().seq == 5

    def test_a_batch_that_contradicts_itself(self, ledger: Ledger) -> None:
        """[3] If a batch changes a task twice, the two revisions must be consecutive."""
        record = create(ledger.store)
        contradictions: list[list[Change]] = [
            [next_of(record), next_of(record)],
            [next_of(record), next_of(record, revision=4)],
            [removal_of(record), next_of(record)],
            [removal_of(record), make_put(task_id=record.task_id)],
            [removal_of(record), removal_of(record)],
            [make_put(task_id="new"), make_put(task_id="new")],
            [make_put(run_id="run-1"), make_put(run_id="run-1")],
        ]
        for changes in contradictions:
            with ledger.unchanged():
                assert conflicts_of(ledger.store, make_put(), *changes)

    def test_an_empty_batch(self, ledger: Ledger) -> None:
        """[3] An empty batch raises ValidationError and takes no seq."""
        play(ledger.store)
        with ledger.unchanged(), pytest.raises(ValidationError) as caught:
            ledger.store.apply([])
        assert caught.value.field == "changes"

    def test_what_is_not_a_change(self, ledger: Ledger) -> None:
        """[11] A batch with a value that is not a Change raises ValidationError."""
        for value in (make_record(), None, "put", {"record": make_record()}):
            changes: Any = [make_put(), value]
            with ledger.unchanged(), pytest.raises(ValidationError) as caught:
                ledger.store.apply(changes)
            assert caught.value.field == "changes"

    def test_a_large_batch(self, ledger: Ledger) -> None:
        """[3] A batch of a thousand changes is one commit."""
        puts = [make_put(task_id=f"task-{n:04}", label="x" * (n % 50)) for n in range(1000)]
        commit = ledger.store.apply(puts)
        assert (commit.first_seq, commit.last_seq) == (1, 1000)
        for store in ledger.before_and_after_reopen():
            assert records_of(store) == {put.task_id: put.record for put in puts}
        changes = [next_of(put.record, label="changed") for put in puts]
        with ledger.unchanged():
            assert conflicts_of(ledger.store, *changes, Remove("absent", 2))
        ledger.store.apply([*changes[:500], *(removal_of(put.record) for put in puts[500:])])
        for store in ledger.before_and_after_reopen():
            assert records_of(store) == {put.task_id: put.record for put in changes[:500]}

    # -- dedup keys -------------------------------------------------------

    def test_a_dedup_key_creates_one_task(self, ledger: Ledger) -> None:
        """[3] If a creation repeats a dedup key, the ConflictError names the existing task."""
        existing = create(ledger.store, run_id="run-1", label="same")
        for store in ledger.before_and_after_reopen():
            with ledger.unchanged():
                second = make_put(run_id="run-1", label="same")
                conflicts = conflicts_of(ledger.store, second)
                assert conflicts == {
                    Conflict(second.task_id, 0, 0, existing_task_id=existing.task_id)
                }
            assert records_of(ledger.store) == {existing.task_id: existing}
            del store

    def test_another_scope_of_the_same_run(self, ledger: Ledger) -> None:
        """[3] Two tasks can have the same run_id or the same run_digest, but not both."""
        one = create(ledger.store, run_id="run-1", run_digest="a" * 32)
        two = create(ledger.store, run_id="run-1", run_digest="b" * 32)
        three = create(ledger.store, run_id="run-2", run_digest="a" * 32)
        four, five = create(ledger.store), create(ledger.store)
        for store in ledger.before_and_after_reopen():
            assert set(records_of(store)) == {r.task_id for r in (one, two, three, four, five)}

    def test_runs_that_differ_only_in_case_or_space(self, ledger: Ledger) -> None:
        """[11] Dedup keys are compared byte by byte."""
        runs = ["run", "Run", "run ", " run", "rün", "ru\u0308n", "run\n"]
        for run_id in runs:
            create(ledger.store, run_id=run_id, run_digest="b" * 32)
        for store in ledger.before_and_after_reopen():
            assert {record.run_id for record in records_of(store).values()} == set(runs)
            with pytest.raises(ConflictError):
                create(store, run_id="Run", run_digest="b" * 32)

    def test_an_update_keeps_the_dedup_key(self, ledger: Ledger) -> None:
        """[3] A task keeps its dedup key after an update and after the end of the task."""
        existing = create(ledger.store, run_id="run-1")
        existing = update(ledger.store, existing, status=TaskStatus.SUCCEEDED)
        for store in ledger.before_and_after_reopen():
            with pytest.raises(ConflictError) as caught:
                create(store, run_id="run-1")
            assert caught.value.conflicts[0].existing_task_id == existing.task_id

    def test_deletion_frees_the_dedup_key(self, ledger: Ledger) -> None:
        """[3] If a task is deleted, another task can use its dedup key, even in the same batch."""
        existing = create(ledger.store, run_id="run-1")
        delete(ledger.store, existing)
        second = create(ledger.store, run_id="run-1")
        third = make_put(run_id="run-1")
        ledger.store.apply([removal_of(second), third])
        fourth = make_put(run_id="run-1")
        ledger.store.apply([fourth, removal_of(third.record)])
        for store in ledger.before_and_after_reopen():
            assert records_of(store) == {fourth.task_id: fourth.record}
            with pytest.raises(ConflictError):
                create(store, run_id="run-1")
