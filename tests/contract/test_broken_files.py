"""Defects that the contract finds only with several processes or kills."""

from __future__ import annotations

import broken_files as files
import pytest

from taskstore.testing import Ledger, OpenStore, StoreContract

CAUGHT = [
    (files.AppendsAfterTheTornLine, "killed_at_every_step", False),
    (files.AppendsAfterTheTornLine, "killed_at_every_step", True),
    (files.KeepsPartOfATornBatch, "killed_at_every_step", False),
    (files.KeepsPartOfATornBatch, "killed_at_every_step", True),
    (files.AcknowledgesBeforeWriting, "killed_at_every_step", False),
    (files.AcknowledgesBeforeWriting, "killed_right_after_an_answer"),
    (files.SavesInPlace, "killed_at_every_step", False),
    (files.SkipsTheLock, "processes_lose_no_update"),
    (files.ComparesBeforeLocking, "processes_lose_no_update"),
    (files.ChecksDedupKeysInMemoryOnly, "processes_book_a_run_once"),
    (files.WakesOnOwnCommitsOnly, "another_process_ends_the_wait"),
]


class TestLogStore(StoreContract):
    """The correct store; the defective ones are subclasses of it."""

    @pytest.fixture
    def make_store(self, tmp_path) -> OpenStore:
        return lambda *, read_only=False: files.LogStore(tmp_path / "log", read_only=read_only)


@pytest.mark.parametrize("case", CAUGHT, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_the_clause_catches_the_fault(case, tmp_path, monkeypatch):
    monkeypatch.setattr("taskstore.testing.contract.processes.TIMEOUT_S", 1.0)
    store_class, name, *arguments = case
    clause = getattr(StoreContract(), f"test_{name}")
    ledger = Ledger(lambda *, read_only=False: store_class(tmp_path / "log", read_only=read_only))
    try:
        with pytest.raises((Exception, pytest.fail.Exception)) as caught:
            clause(ledger, *arguments)
        assert not isinstance(caught.value, TypeError | NameError), "an unrelated error"
    finally:
        ledger.close()
