"""Crash-safe clauses: a killed writer loses no acknowledged commit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import pytest
from msgspec import Struct

from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.journal import Change, Put, Remove, Snapshot
from taskstore.model.records import TaskRecord, TaskStatus
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsIntegrity,
    SupportsJournal,
    TaskRegistryStore,
)
from taskstore.testing.contract.base import ContractBase, Ledger
from taskstore.testing.contract.shared import check_journal
from taskstore.testing.crash.processes import Child, KillAt, Report
from taskstore.testing.factories import make_record, next_of

RANDOM_KILLS = 8
"""The number of times that a writer is killed at a random time."""

KILL_POINTS = 30
"""The approximate number of calls at which a writer is killed.  Each call can make data durable."""

MAX_RUN_S = 0.15

FOLD = CompactionPolicy(history_s=0, history_entries=3, keep_snapshots=1).forced()
ERASE = CompactionPolicy(erase_deleted=True)


class Operation(Struct):
    """One operation of a writer: a batch, a compaction, or a save.

    ``records`` are the expected records after the operation.
    """

    execute: Callable[[TaskRegistryStore], object]
    records: dict[str, TaskRecord]


class CrashContract(ContractBase):
    """SIGKILL loses no acknowledged commit and leaves no commit half-applied."""

    level: ClassVar[str] = "crash-safe"
    guarantee: ClassVar[str | None] = "crash-safe"

    @pytest.fixture(autouse=True)
    def _require_fork(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform cannot fork")

    def test_killed_at_random(self, ledger: Ledger) -> None:
        """[4] [7] A random kill, even during a compaction, loses no acknowledged commit."""
        rng = random.Random(4)  # noqa: S311 - times, not secrets
        for _ in range(RANDOM_KILLS):
            operations = plan_operations(ledger.store, repeat=80)
            before = dict(ledger.store.load_snapshot().records)
            ledger.close()
            child = Child(partial(_run_operations, ledger, operations))
            child.line()
            time.sleep(rng.uniform(0, MAX_RUN_S))
            child.kill()
            check_after_kill(ledger, before, operations, child.finish())

    def test_killed_right_after_an_answer(self, ledger: Ledger) -> None:
        """[4] If a writer is killed right after a call returned, the call's changes are stored."""
        for acknowledged in range(1, len(plan_operations(ledger.store)) + 1):
            operations = plan_operations(ledger.store)[:acknowledged]
            before = dict(ledger.store.load_snapshot().records)
            ledger.close()

            def work(report: Report, operations: Sequence[Operation] = operations) -> None:
                with ledger.open_store() as store:
                    for operation in operations:
                        operation.execute(store)
                    report("acknowledged")
                    os.kill(os.getpid(), signal.SIGKILL)

            assert Child(work).finish() == ["acknowledged"]
            check_after_kill(ledger, before, operations, [str(acknowledged - 1)])

    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    def test_killed_at_every_step(self, ledger: Ledger, after: bool) -> None:  # noqa: FBT001 - a parameter
        """[4] [7] If a writer is killed before or after a call that can make data durable (such as
        ``fsync`` or ``rename``), no acknowledged commit is lost."""
        ledger.store.apply([Put(make_record(label="there from the beginning"))])
        steps = self._count_steps(ledger)
        stride = max(1, steps // KILL_POINTS)
        for number in range(1, steps + 1, stride):
            operations = plan_operations(ledger.store)
            before = dict(ledger.store.load_snapshot().records)
            ledger.close()

            def work(
                report: Report, number: int = number, operations: Sequence[Operation] = operations
            ) -> None:
                with KillAt(number, after=after):
                    _run_operations(ledger, operations, report)

            child = Child(work)
            check_after_kill(ledger, before, operations, child.finish()[1:])

    def _count_steps(self, ledger: Ledger) -> int:
        """Run the planned operations in a child; return how many calls can make data durable."""
        operations = plan_operations(ledger.store)
        before = dict(ledger.store.load_snapshot().records)
        ledger.close()

        def work(report: Report) -> None:
            with KillAt() as counter:
                _run_operations(ledger, operations, lambda _: None)
            report(str(len(counter.calls)))

        [steps] = Child(work).finish()
        check_after_kill(ledger, before, operations, [str(n) for n in range(len(operations))])
        return int(steps)


def plan_operations(store: TaskRegistryStore, repeat: int = 1) -> list[Operation]:
    """Return operations for a writer that starts from the current records of the store."""
    loaded = store.load_snapshot()
    records, operations = dict(loaded.records), list[Operation]()

    def commit(*changes: Change) -> None:
        for change in changes:
            if isinstance(change, Put):
                records[change.task_id] = change.record
            else:
                del records[change.task_id]
        operations.append(Operation(lambda store: store.apply(changes), dict(records)))

    def compact(policy: CompactionPolicy) -> None:
        if isinstance(store, SupportsCompaction):
            operations.append(
                Operation(lambda store: store.compact(policy), dict(records))  # type: ignore[attr-defined]
            )

    for _ in range(repeat):
        one, two, three = (make_record(label=label) for label in ("one", "two", "three"))
        commit(Put(one))
        commit(Put(two), Put(three), next_of(one, status=TaskStatus.RUNNING))
        commit(Remove(two.task_id, 2))
        compact(FOLD)
        commit(next_of(three, error="x" * 5000))
        compact(ERASE)
    if repeat == 1:
        saved = dict(records)
        operations.append(Operation(lambda store: _save(store, saved), saved))
        commit(Put(make_record(label="after the save")))
    return operations


def _save(store: TaskRegistryStore, records: dict[str, TaskRecord]) -> None:
    head = store.load_snapshot().seq
    store.save_snapshot(Snapshot(head + 10, records))


def _run_operations(ledger: Ledger, operations: Sequence[Operation], report: Report) -> None:
    """In the child, run all operations in order; report each operation when it has returned."""
    with ledger.open_store() as store:
        report("open")
        for number, operation in enumerate(operations):
            operation.execute(store)
            report(str(number))


def check_after_kill(
    ledger: Ledger,
    before: dict[str, TaskRecord],
    operations: Sequence[Operation],
    reported: Sequence[str],
) -> None:
    """Check that the ledger has every acknowledged operation and at most one more operation."""
    states = [before, *(operation.records for operation in operations)]
    acknowledged = int(reported[-1]) + 1 if reported else 0
    for store in ledger.before_and_after_reopen():
        records = dict(store.load_snapshot().records)
        assert records in states[acknowledged : acknowledged + 2], (
            f"{acknowledged} operations were acknowledged, "
            "but the ledger contains different records"
        )
        if isinstance(store, SupportsIntegrity):
            assert store.verify().problems == ()
        if isinstance(store, SupportsJournal):
            check_journal(store, store.read_snapshot(store.floor() - 1))
    # After the kill, the ledger must accept a new commit.
    ledger.store.apply([Put(make_record(label="a survivor"))])
