"""Exclusive clauses: a writer inside ``exclusive()`` gets no conflict."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import pytest

from taskstore.model.journal import Put
from taskstore.store.interface import SupportsExclusive, SupportsJournal
from taskstore.testing.contract.base import ContractBase, Ledger
from taskstore.testing.contract.shared import COMMITS, THREADS, check_journal
from taskstore.testing.factories import create, make_put, next_of
from taskstore.testing.threads import meanwhile, run_together
from taskstore.testing.types import FullStore

BLOCKED_S = 0.1
"""The time, in seconds, for which a clause checks that another writer is blocked."""


class ExclusiveContract(ContractBase):
    """The guarantees of ``SupportsExclusive``."""

    level = "shared"
    abilities: ClassVar[tuple[type, ...]] = (SupportsJournal, SupportsExclusive)

    def test_others_wait_for_who_keeps_them_out(self, ledger: Ledger) -> None:
        """[3] No other writer commits between the reads and the commit in an exclusive() block."""
        one, two = ledger.store, ledger.open()
        record = create(one)
        entered, committed = threading.Event(), threading.Event()

        def write() -> None:
            entered.wait()
            two.apply([make_put()])
            committed.set()

        with meanwhile(write), one.exclusive():
            entered.set()
            assert not committed.wait(BLOCKED_S), "another writer committed in between"
            assert one.read_journal(0, 10)[-1].record == record
            assert one.apply([next_of(record)]).first_seq == 2
        for store in ledger.before_and_after_reopen():
            check_journal(store)
            assert store.head() == 3

    def test_entering_alone_writes_nothing(self, ledger: Ledger) -> None:
        """[1] An exclusive() block without a commit writes nothing and blocks no later writer."""
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
        """[3] A writer that reads and commits in an exclusive() block never gets a conflict."""
        shared = create(ledger.store)
        stores = [ledger.store, *(ledger.open() for _ in range(THREADS - 1))]

        def increment(store: FullStore) -> None:
            record, last_seq = shared, 1
            for _ in range(COMMITS):
                with store.exclusive():
                    for entry in store.read_journal(last_seq, 1000):
                        assert entry.record is not None
                        record, last_seq = entry.record, entry.seq
                    time.sleep(0.001)  # if the other writer were not blocked, it would commit now
                    change = next_of(record)
                    assert isinstance(change, Put)
                    commit = store.apply([change])
                    assert commit.first_seq == last_seq + 1
                    record, last_seq = change.record, commit.last_seq

        run_together(*(lambda store=store: increment(store) for store in stores))
        for store in ledger.before_and_after_reopen():
            assert store.load_snapshot().records[shared.task_id].revision == 1 + THREADS * COMMITS
            check_journal(store)
