"""Real processes and real kills find the faults that one process cannot show."""

from __future__ import annotations

import broken_files as files
import pytest

from taskstore.testing import Ledger, OpenStore, StoreContract

CAUGHT = [
    (files.LeavesTheTornTailAndAppendsAfterIt, "killed_at_every_step", False),
    (files.LeavesTheTornTailAndAppendsAfterIt, "killed_at_every_step", True),
    (files.KeepsHalfOfABatchWhoseLineWasTorn, "killed_at_every_step", False),
    (files.KeepsHalfOfABatchWhoseLineWasTorn, "killed_at_every_step", True),
    (files.AcknowledgesBeforeItIsWritten, "killed_at_every_step", False),
    (files.AcknowledgesBeforeItIsWritten, "killed_right_after_an_answer"),
    (files.SavesInPlace, "killed_at_every_step", False),
    (files.ForgetsTheLock, "processes_lose_no_update"),
    (files.ComparesBeforeItHasTheLock, "processes_lose_no_update"),
    (files.ChecksBookingsInItsOwnMemoryOnly, "processes_book_a_run_once"),
    (files.HearsOfItsOwnCommitsOnly, "another_process_ends_the_wait"),
]


class TestLogStore(StoreContract):
    """The right one, of which the others are the shortest edits."""

    @pytest.fixture
    def make_store(self, tmp_path) -> OpenStore:
        return lambda *, read_only=False: files.LogStore(tmp_path / "log", read_only=read_only)


@pytest.mark.parametrize("case", CAUGHT, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_the_clause_catches_the_fault(case, tmp_path, monkeypatch):
    monkeypatch.setattr("taskstore.testing.contract.processes.PATIENCE_S", 1.0)
    store_class, name, *arguments = case
    clause = getattr(StoreContract(), f"test_{name}")
    ledger = Ledger(lambda *, read_only=False: store_class(tmp_path / "log", read_only=read_only))
    try:
        with pytest.raises((Exception, pytest.fail.Exception)) as caught:
            clause(ledger, *arguments)
        assert not isinstance(caught.value, TypeError | NameError), "the broken store is broken"
    finally:
        ledger.close()
