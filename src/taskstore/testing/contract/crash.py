"""Crash-safe: a writer killed at any instruction loses nothing that it was told is stored."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest
from msgspec import Struct

from taskstore.model.journal import Change, Put, Remove, Snapshot
from taskstore.model.policies import CompactionPolicy
from taskstore.model.records import TaskRecord, TaskStatus
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsIntegrity,
    SupportsJournal,
    TaskRegistryStore,
)
from taskstore.testing.contract.base import ContractBase, Ledger
from taskstore.testing.contract.shared import check_history
from taskstore.testing.crash.processes import Child, KillAt, Report
from taskstore.testing.factories import make_record, next_of

KILLS = 8
"""How often a writer is killed at a random moment."""

POINTS = 30
"""At how many of a writer's steps it is killed, before and after each."""

LONGEST_LIFE_S = 0.15

FOLD = CompactionPolicy(history_s=0, history_entries=3, keep_snapshots=1).forced()
ERASE = CompactionPolicy(erase_deleted=True)


class Deed(Struct):
    """One thing that a writer does: a batch, a compaction, or a save.

    ``records`` are what the ledger holds afterwards.
    """

    does: Callable[[TaskRegistryStore], object]
    records: dict[str, TaskRecord]


class CrashContract(ContractBase):
    """The writer is killed with SIGKILL; what was acknowledged is there, and nothing is half."""

    level: ClassVar[str] = "crash-safe"
    promise: ClassVar[str | None] = "crash-safe"

    @pytest.fixture(autouse=True)
    def _forks(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this platform cannot fork")

    def test_killed_at_random(self, ledger: Ledger) -> None:
        """[4] [7] At any moment of a life full of commits and compactions."""
        chance = random.Random(4)  # noqa: S311 - moments, not secrets
        for _ in range(KILLS):
            deeds = deeds_of(ledger.store, repeat=80)
            before = dict(ledger.store.load_snapshot().records)
            ledger.close()
            child = Child(lambda report, deeds=deeds: _live(ledger, deeds, report))  # type: ignore[misc]
            child.line()
            time.sleep(chance.uniform(0, LONGEST_LIFE_S))
            child.kill()
            check_survival(ledger, before, deeds, child.finish())

    def test_killed_right_after_an_answer(self, ledger: Ledger) -> None:
        """[4] What was acknowledged is stored at that very moment, not a little later."""
        for reached in range(1, len(deeds_of(ledger.store)) + 1):
            deeds = deeds_of(ledger.store)[:reached]
            before = dict(ledger.store.load_snapshot().records)
            ledger.close()

            def work(report: Report, deeds: Sequence[Deed] = deeds) -> None:
                with ledger.open_store() as store:
                    for deed in deeds:
                        deed.does(store)
                    report("acknowledged")
                    os.kill(os.getpid(), signal.SIGKILL)

            assert Child(work).finish() == ["acknowledged"]
            check_survival(ledger, before, deeds, [str(reached - 1)])

    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    def test_killed_at_every_step(self, ledger: Ledger, after: bool) -> None:  # noqa: FBT001 - a parameter
        """[4] [7] Before and after each call in which something may become durable."""
        ledger.store.apply([Put(make_record(label="there from the beginning"))])
        steps = self._count_steps(ledger)
        stride = max(1, steps // POINTS)
        for number in range(1, steps + 1, stride):
            deeds = deeds_of(ledger.store)
            before = dict(ledger.store.load_snapshot().records)
            ledger.close()

            def work(report: Report, number: int = number, deeds: Sequence[Deed] = deeds) -> None:
                with KillAt(number, after=after):
                    _live(ledger, deeds, report)

            child = Child(work)
            check_survival(ledger, before, deeds, child.finish()[1:])

    def _count_steps(self, ledger: Ledger) -> int:
        """How many such calls a whole life makes."""
        deeds = deeds_of(ledger.store)
        before = dict(ledger.store.load_snapshot().records)
        ledger.close()

        def work(report: Report) -> None:
            with KillAt() as counter:
                _live(ledger, deeds, lambda _: None)
            report(str(len(counter.names)))

        [steps] = Child(work).finish()
        check_survival(ledger, before, deeds, [str(n) for n in range(len(deeds))])
        return int(steps)


def deeds_of(store: TaskRegistryStore, repeat: int = 1) -> list[Deed]:
    """What a writer is going to do, starting from what the store holds now."""
    loaded = store.load_snapshot()
    records, deeds = dict(loaded.records), list[Deed]()

    def commit(*changes: Change) -> None:
        for change in changes:
            if isinstance(change, Put):
                records[change.task_id] = change.record
            else:
                del records[change.task_id]
        deeds.append(Deed(lambda store: store.apply(changes), dict(records)))

    def compact(policy: CompactionPolicy) -> None:
        if isinstance(store, SupportsCompaction):
            deeds.append(Deed(lambda store: store.compact(policy), dict(records)))  # type: ignore[attr-defined]

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
        deeds.append(Deed(lambda store: _save(store, saved), saved))
        commit(Put(make_record(label="after the save")))
    return deeds


def _save(store: TaskRegistryStore, records: dict[str, TaskRecord]) -> None:
    head = store.load_snapshot().seq
    store.save_snapshot(Snapshot(head + 10, records))


def _live(ledger: Ledger, deeds: Sequence[Deed], report: Report) -> None:
    """In the child: do everything in order, telling of each deed when it was acknowledged."""
    with ledger.open_store() as store:
        report("open")
        for number, deed in enumerate(deeds):
            deed.does(store)
            report(str(number))


def check_survival(
    ledger: Ledger, before: dict[str, TaskRecord], deeds: Sequence[Deed], told: Sequence[str]
) -> None:
    """Check that the ledger is where the writer was, or one whole deed further."""
    states = [before, *(deed.records for deed in deeds)]
    reached = int(told[-1]) + 1 if told else 0
    for store in ledger.twice():
        found = dict(store.load_snapshot().records)
        assert found in states[reached : reached + 2], (
            f"{reached} deeds were acknowledged, but the ledger is not as after them"
        )
        if isinstance(store, SupportsIntegrity):
            assert store.verify().problems == ()
        if isinstance(store, SupportsJournal):
            check_history(store, store.read_snapshot(store.floor() - 1))
    # Life goes on.
    ledger.store.apply([Put(make_record(label="a survivor"))])
