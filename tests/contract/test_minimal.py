"""The core clauses on a minimal backend that loads and saves one file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from taskstore.errors import ConflictError
from taskstore.model.codec import decode_snapshot, encode_snapshot
from taskstore.model.journal import Snapshot
from taskstore.store.interface import StoreReport, TaskRegistryStore
from taskstore.testing import OpenStore
from taskstore.testing.contract.apply import ApplyContract
from taskstore.testing.contract.core import CoreContract
from taskstore.testing.contract.machine import ModelContract


class FileStore(TaskRegistryStore):
    durability = "process"

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.path, self.location = path, str(path)
        self.last_report = StoreReport()

    def load_snapshot(self) -> Snapshot:
        self._check_open()
        if not self.path.exists():
            return Snapshot(0)
        loaded = decode_snapshot(self.path.read_bytes(), self.location)
        self.last_report = StoreReport(loaded.quarantined)
        return loaded

    def save_snapshot(self, snapshot: Snapshot) -> None:
        self._check_writable()
        before = self.load_snapshot()
        if before.seq and snapshot.seq <= before.seq:
            raise ConflictError([], f"the head is at {before.seq}")
        if snapshot.at < before.at:
            snapshot = Snapshot(snapshot.seq, snapshot.records, before.at, snapshot.quarantined)
        new = self.path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(encode_snapshot(snapshot))
            os.fsync(file.fileno())
        new.replace(self.path)

    def report(self) -> StoreReport:
        return self.last_report


class TestMinimalStore(CoreContract, ApplyContract, ModelContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> OpenStore:
        return lambda *, read_only=False: FileStore(tmp_path / "ledger.json", read_only=read_only)

    # These clauses need SupportsJournal; a store without a journal keeps no deletions.
    test_a_deleted_task_stays_deleted = None
    test_what_came_and_went_in_one_batch_stays_deleted = None
