"""Processes clauses: several processes on one storage."""

from __future__ import annotations

import multiprocessing
import os
import time
from functools import partial
from typing import ClassVar

import pytest

from taskstore.model.journal import Put
from taskstore.model.records import TaskRecord
from taskstore.registry.registry import TaskRegistry
from taskstore.store.interface import SupportsJournal
from taskstore.testing.contract.base import ContractBase, Ledger
from taskstore.testing.contract.shared import check_journal, increment
from taskstore.testing.crash.processes import RandomPauses, Report, Work, run_processes
from taskstore.testing.factories import create, make_record
from taskstore.testing.threads import TIMEOUT_S, retry_while_busy

PROCESSES = 4
COMMITS = 10
RUNS = 8


class ProcessesContract(ContractBase):
    """Clauses for several processes on one storage; each process has its own instance."""

    level: ClassVar[str] = "shared"
    abilities: ClassVar[tuple[type, ...]] = (SupportsJournal,)
    guarantee: ClassVar[str | None] = "processes"

    @pytest.fixture(autouse=True)
    def _require_fork(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform cannot fork")

    def test_processes_open_new_storage_all_do(self, ledger: Ledger) -> None:
        """[2] If processes open new storage at once, all opens succeed and no seq repeats."""

        def work(report: Report) -> None:
            with ledger.open_store() as store:
                for _ in range(COMMITS):
                    record = make_record()
                    retry_while_busy(partial(store.apply, [Put(record)]))
                    report(record.task_id)

        reported = _run_in_all(ledger, work)
        for store in ledger.before_and_after_reopen():
            assert len(reported) == PROCESSES * COMMITS
            assert set(store.load_snapshot().records) == set(reported)
            check_journal(store)

    def test_processes_lose_no_update(self, ledger: Ledger) -> None:
        """[3] Concurrent updates of one task by several processes lose no update."""
        shared = [create(ledger.store, label=str(number)) for number in range(2)]

        def work(report: Report) -> None:
            with ledger.open_store() as store, RandomPauses():
                for record in shared:
                    increment(store, record.task_id, COMMITS)  # type: ignore[arg-type]
            report("done")

        assert _run_in_all(ledger, work) == ["done"] * PROCESSES
        for store in ledger.before_and_after_reopen():
            records = store.load_snapshot().records
            for record in shared:
                assert records[record.task_id].revision == 1 + PROCESSES * COMMITS
            assert len(records) == len(shared) * (1 + PROCESSES * COMMITS)
            check_journal(store)

    def test_processes_book_a_run_once(self, ledger: Ledger) -> None:
        """[3] If several processes create the same run, all processes get the same task."""
        ledger.close()
        # Every process opens before the first creation, so that no process loads the new tasks.
        all_open = multiprocessing.get_context("fork").Barrier(PROCESSES)

        def work(report: Report) -> None:
            with ledger.open_store() as store, RandomPauses():
                registry = TaskRegistry(store)
                all_open.wait(TIMEOUT_S)
                for number in range(RUNS):
                    task = _create_run(registry, f"run {number}")
                    report(f"{number} {task.task_id}")

        reported = set(_run_in_all(ledger, work))
        assert len(reported) == RUNS
        for store in ledger.before_and_after_reopen():
            assert len(store.load_snapshot().records) == RUNS
            check_journal(store)

    def test_a_reading_process_sees_no_gap(self, ledger: Ledger) -> None:
        """[2] While others write, a process that has read seq n can read every earlier seq."""
        ledger.close()

        def write(report: Report) -> None:
            with ledger.open_store() as store:
                for _ in range(3 * COMMITS):
                    retry_while_busy(lambda: store.apply([Put(make_record()), Put(make_record())]))
            report("wrote")

        def read(report: Report) -> None:
            last_seq, final_seq = 0, 3 * COMMITS * 2 * 2
            with ledger.open_store(read_only=True) as store:
                assert isinstance(store, SupportsJournal)
                while last_seq < final_seq:
                    for entry in store.read_journal(last_seq, 7):
                        assert entry.seq == last_seq + 1, f"seq {entry.seq} follows seq {last_seq}"
                        last_seq = entry.seq
                    store.wait_for(last_seq, 0.05)
            report("read")

        with ledger.open_store():
            pass  # creates the storage that the reader opens
        assert run_processes([write, write, read]) == [["wrote"], ["wrote"], ["read"]]

    def test_another_process_ends_the_wait(self, ledger: Ledger) -> None:
        """[2] A commit by another process wakes a waiting process."""
        ledger.close()

        def write(report: Report) -> None:
            with ledger.open_store() as store:
                for number in range(3 * COMMITS):
                    time.sleep(number % 5 * 0.003)
                    retry_while_busy(lambda: store.apply([Put(make_record())]))
            report("wrote")

        def wait(report: Report) -> None:
            last_seq = 0
            with ledger.open_store(read_only=True) as store:
                assert isinstance(store, SupportsJournal)
                while last_seq < 3 * COMMITS:
                    start = time.monotonic()
                    assert store.wait_for(last_seq, TIMEOUT_S), f"no wake after seq {last_seq}"
                    assert time.monotonic() - start < TIMEOUT_S / 2, (
                        f"late wake after seq {last_seq}"
                    )
                    head = store.head()
                    assert head > last_seq
                    last_seq = head
            report("woken")

        with ledger.open_store():
            pass  # creates the storage that the waiting process opens
        assert run_processes([write, wait]) == [["wrote"], ["woken"]]


def _run_in_all(ledger: Ledger, work: Work) -> list[str]:
    """Run the same job in several processes at once; return the lines of all processes."""
    ledger.close()
    return [line for reported in run_processes([work] * PROCESSES) for line in reported]


def _create_run(registry: TaskRegistry, run_id: str) -> TaskRecord:
    """Create the task of a run, or return the task that another process created."""
    tasks: list[TaskRecord] = []

    def create_task() -> None:
        tasks.append(registry.create(runtime="cli", task="the same", run_id=run_id))

    retry_while_busy(create_task)
    return tasks[0]
