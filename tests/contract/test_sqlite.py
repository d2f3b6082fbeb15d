"""The SQL store keeps the contract on SQLite."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskstore.backends import open_store
from taskstore.testing import OpenStore, StoreContract


class TestSQLiteStore(StoreContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> OpenStore:
        url = f"sqlite:///{tmp_path / 'tasks.db'}"
        return lambda *, read_only=False: open_store(url, read_only=read_only)
