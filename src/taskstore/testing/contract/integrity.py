"""Integrity clauses: verify finds damage, and no problem in an undamaged ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest

from taskstore.errors import CorruptStoreError
from taskstore.model.journal import Snapshot
from taskstore.store.interface import SupportsCompaction, SupportsIntegrity
from taskstore.testing.contract.base import ContractBase, Ledger, needs
from taskstore.testing.contract.compaction import ERASE, FOLD, TRIM
from taskstore.testing.factories import EPOCH_MS, Model, delete, make_record, play


class IntegrityContract(ContractBase):
    """The guarantees of ``SupportsIntegrity``."""

    level = "integrity"
    abilities: ClassVar[tuple[type, ...]] = (SupportsIntegrity,)

    @pytest.fixture
    def damage(self) -> Callable[[str], object] | None:
        """Return a callable that changes the stored record of a task without the store.

        A clause calls the callable with a task id, while no store instance is open.  After the
        call, a lookup or a query of this task must return another result.  If a subclass does not
        override this fixture, pytest skips the clause about damage.
        """
        return None

    @needs(SupportsCompaction)
    def test_a_damaged_record_is_found(
        self, ledger: Ledger, damage: Callable[[str], object] | None
    ) -> None:
        """[5] If a record is changed without the store, opening or verify finds the damage."""
        if damage is None:
            pytest.skip("the store has no fixture damage")
        model = play(ledger.store)
        model.trim(ledger.store.compact(FOLD).floor)
        play(ledger.store, model)
        task_id = min(model.records)
        ledger.close()
        damage(task_id)
        try:
            report = ledger.store.verify()
        except CorruptStoreError:
            return
        assert report.problems, "verify finds no problem in a damaged ledger"
        assert not report.ok

    def test_an_empty_ledger_is_whole(self, ledger: Ledger) -> None:
        """[5] verify finds no problem in an empty ledger."""
        for store in ledger.before_and_after_reopen():
            report = store.verify()
            assert (report.ok, report.problems) == (True, ())
            assert (report.seq, report.records, report.entries) == (0, 0, 0)

    def test_a_good_ledger_is_whole(self, ledger: Ledger) -> None:
        """[5] verify finds no problem in an undamaged ledger and counts the records and entries."""
        model = play(ledger.store)
        for store in ledger.before_and_after_reopen():
            report = store.verify()
            assert report.problems == ()
            assert (report.seq, report.records) == (model.head, len(model.records))
            assert report.entries == len(model.entries)

    def test_verifying_changes_nothing(self, ledger: Ledger) -> None:
        """[13] verify writes nothing and works on a store that was opened read-only."""
        play(ledger.store)
        with ledger.unchanged():
            ledger.store.verify()
            with ledger.open(read_only=True) as reader:
                assert reader.verify().ok

    @needs(SupportsCompaction)
    def test_a_compacted_ledger_is_whole(self, ledger: Ledger) -> None:
        """[7] verify finds no problem after compactions that fold and trim, and after commits."""
        model = Model()
        for policy in (FOLD, TRIM, FOLD, ERASE):
            play(ledger.store, model)
            model.trim(ledger.store.compact(policy).floor)
            for store in ledger.before_and_after_reopen():
                report = store.verify()
                assert report.problems == ()
                assert (report.seq, report.entries) == (model.head, len(model.entries))

    def test_a_saved_ledger_is_whole(self, ledger: Ledger) -> None:
        """[5] verify finds no problem if the journal starts from a saved snapshot."""
        record = make_record(revision=9)
        play(ledger.store)
        ledger.store.save_snapshot(Snapshot(1000, {record.task_id: record}, EPOCH_MS))
        assert ledger.store.verify().problems == ()
        delete(ledger.store, record)
        for store in ledger.before_and_after_reopen():
            assert store.verify().problems == ()
