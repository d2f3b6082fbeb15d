"""Exclusive: who keeps the others out can look first, and conflicts with nobody."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import pytest

from taskstore.model.journal import Put
from taskstore.store.interface import SupportsExclusive, SupportsJournal
from taskstore.testing.contract.base import ContractBase, Ledger
from taskstore.testing.contract.shared import COMMITS, THREADS, check_history
from taskstore.testing.factories import create, make_put, next_of
from taskstore.testing.threads import meanwhile, run_together
from taskstore.testing.types import FullStore

A_WHILE_S = 0.1
"""How long another writer is watched waiting, in seconds."""


class ExclusiveContract(ContractBase):
    """What ``SupportsExclusive`` promises."""

    level = "shared"
    abilities: ClassVar[tuple[type, ...]] = (SupportsJournal, SupportsExclusive)

    def test_others_wait_for_who_keeps_them_out(self, ledger: Ledger) -> None:
        """[3] Nobody comes in between what is read in the body and what is applied there."""
        one, two = ledger.store, ledger.open()
        record = create(one)
        entered, done = threading.Event(), threading.Event()

        def write() -> None:
            entered.wait()
            two.apply([make_put()])
            done.set()

        with meanwhile(write), one.exclusive():
            entered.set()
            assert not done.wait(A_WHILE_S), "another writer came in between"
            assert one.read_journal(0, 10)[-1].record == record
            assert one.apply([next_of(record)]).first_seq == 2
        for store in ledger.twice():
            check_history(store)
            assert store.head() == 3

    def test_entering_alone_writes_nothing(self, ledger: Ledger) -> None:
        """[1] Neither leaving nor raising leaves anything, or keeps anybody out."""
        create(ledger.store)
        with ledger.unchanged():
            with ledger.store.exclusive():
                assert ledger.store.head() == 1
            with pytest.raises(LookupError), ledger.store.exclusive():
                raise LookupError
            other = ledger.open()
            with other.exclusive():
                assert len(other.read_journal(0, 10)) == 1
        ledger.store.apply([make_put()])
        assert ledger.open().apply([make_put()]).first_seq == 3

    def test_who_looks_first_conflicts_with_nobody(self, ledger: Ledger) -> None:
        """[3] With the others kept out, what was read last is what is changed."""
        shared = create(ledger.store)
        stores = [ledger.store, *(ledger.open() for _ in range(THREADS - 1))]

        def count(store: FullStore) -> None:
            record, seen = shared, 1
            for _ in range(COMMITS):
                with store.exclusive():
                    for entry in store.read_journal(seen, 1000):
                        assert entry.record is not None
                        record, seen = entry.record, entry.seq
                    time.sleep(0.001)  # time enough for others, if they could
                    change = next_of(record)
                    assert isinstance(change, Put)
                    commit = store.apply([change])
                    assert commit.first_seq == seen + 1
                    record, seen = change.record, commit.last_seq

        run_together(*(lambda store=store: count(store) for store in stores))
        for store in ledger.twice():
            assert store.load_snapshot().records[shared.task_id].revision == 1 + THREADS * COMMITS
            check_history(store)
