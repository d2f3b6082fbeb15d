"""Processes: writers that share nothing but the storage never disagree."""

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
from taskstore.testing.contract.shared import check_history, count_up
from taskstore.testing.crash.processes import Dawdle, Report, Work, together
from taskstore.testing.factories import create, make_record
from taskstore.testing.threads import PATIENCE_S, patiently

PROCESSES = 4
TURNS = 10
RUNS = 8


class ProcessesContract(ContractBase):
    """Several processes on one storage, each with an instance of its own."""

    level: ClassVar[str] = "shared"
    abilities: ClassVar[tuple[type, ...]] = (SupportsJournal,)
    promise: ClassVar[str | None] = "processes"

    @pytest.fixture(autouse=True)
    def _forks(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform cannot fork")

    def test_processes_open_new_storage_all_do(self, ledger: Ledger) -> None:
        """[2] Whoever comes first sets it up; everybody gets in, and no seq is given twice."""

        def work(report: Report) -> None:
            with ledger.open_store() as store:
                for _ in range(TURNS):
                    record = make_record()
                    patiently(partial(store.apply, [Put(record)]))
                    report(record.task_id)

        told = _all_do(ledger, work)
        for store in ledger.twice():
            assert len(told) == PROCESSES * TURNS
            assert set(store.load_snapshot().records) == set(told)
            check_history(store)

    def test_processes_lose_no_update(self, ledger: Ledger) -> None:
        """[3] Who changes what another has changed meanwhile is told, whatever the process."""
        shared = [create(ledger.store, label=str(number)) for number in range(2)]

        def work(report: Report) -> None:
            with ledger.open_store() as store, Dawdle():
                for record in shared:
                    count_up(store, record.task_id, TURNS)  # type: ignore[arg-type]
            report("done")

        assert _all_do(ledger, work) == ["done"] * PROCESSES
        for store in ledger.twice():
            records = store.load_snapshot().records
            for record in shared:
                assert records[record.task_id].revision == 1 + PROCESSES * TURNS
            assert len(records) == len(shared) * (1 + PROCESSES * TURNS)
            check_history(store)

    def test_processes_book_a_run_once(self, ledger: Ledger) -> None:
        """[3] The same run created by several processes is one task, and all get that."""
        ledger.close()
        # Who began later would know from the start what the others have booked.
        opened = multiprocessing.get_context("fork").Barrier(PROCESSES)

        def work(report: Report) -> None:
            with ledger.open_store() as store, Dawdle():
                registry = TaskRegistry(store)
                opened.wait(PATIENCE_S)
                for number in range(RUNS):
                    task = _booked(registry, f"run {number}")
                    report(f"{number} {task.task_id}")

        told = set(_all_do(ledger, work))
        assert len(told) == RUNS
        for store in ledger.twice():
            assert len(store.load_snapshot().records) == RUNS
            check_history(store)

    def test_a_reading_process_sees_no_gap(self, ledger: Ledger) -> None:
        """[2] Who sees seq n has seen everything before it, while others write."""
        ledger.close()

        def write(report: Report) -> None:
            with ledger.open_store() as store:
                for _ in range(3 * TURNS):
                    patiently(lambda: store.apply([Put(make_record()), Put(make_record())]))
            report("wrote")

        def read(report: Report) -> None:
            seen, wanted = 0, 3 * TURNS * 2 * 2
            with ledger.open_store(read_only=True) as store:
                assert isinstance(store, SupportsJournal)
                while seen < wanted:
                    for entry in store.read_journal(seen, 7):
                        assert entry.seq == seen + 1, f"seq {entry.seq} came after {seen}"
                        seen = entry.seq
                    store.wait_for(seen, 0.05)
            report("read")

        with ledger.open_store():
            pass  # so that the reader finds something to open
        assert together([write, write, read]) == [["wrote"], ["wrote"], ["read"]]

    def test_another_process_ends_the_wait(self, ledger: Ledger) -> None:
        """[2] What another process commits wakes who waits for it, whenever that is."""
        ledger.close()

        def write(report: Report) -> None:
            with ledger.open_store() as store:
                for turn in range(3 * TURNS):
                    time.sleep(turn % 5 * 0.003)
                    patiently(lambda: store.apply([Put(make_record())]))
            report("wrote")

        def wait(report: Report) -> None:
            seen = 0
            with ledger.open_store(read_only=True) as store:
                assert isinstance(store, SupportsJournal)
                while seen < 3 * TURNS:
                    started = time.monotonic()
                    assert store.wait_for(seen, PATIENCE_S), f"after seq {seen}"
                    assert time.monotonic() - started < PATIENCE_S / 2, f"late after seq {seen}"
                    head = store.head()
                    assert head > seen
                    seen = head
            report("heard")

        with ledger.open_store():
            pass  # so that the one who waits finds something to open
        assert together([write, wait]) == [["wrote"], ["heard"]]


def _all_do(ledger: Ledger, work: Work) -> list[str]:
    """Do the same in several processes at once; everything that they told."""
    ledger.close()
    return [line for told in together([work] * PROCESSES) for line in told]


def _booked(registry: TaskRegistry, run_id: str) -> TaskRecord:
    """Create the task of a run, or get the one that another made first."""
    made: list[TaskRecord] = []

    def book() -> None:
        made.append(registry.create(runtime="cli", task="the same", run_id=run_id))

    patiently(book)
    return made[0]
