"""The contract suite on SQLite."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from side_door import change_owner

from taskstore.store.opening import open_store
from taskstore.testing import OpenStore, StoreContract


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty ledger to copy; a migration for each clause would double the time."""
    path = tmp_path_factory.mktemp("migrated") / "tasks.db"
    open_store(f"sqlite:///{path}").close()
    return path


class TestSQLiteStore(StoreContract):
    @pytest.fixture
    def damage(self, tmp_path: Path, migrated: Path) -> Callable[[str], object]:
        """Change a column that queries use."""
        return partial(change_owner, f"sqlite:///{tmp_path / migrated.name}")

    @pytest.fixture
    def make_store(self, tmp_path: Path, migrated: Path) -> OpenStore:
        path = shutil.copy(migrated, tmp_path)
        return lambda *, read_only=False: open_store(f"sqlite:///{path}", read_only=read_only)


def test_a_new_database_is_empty(tmp_path: Path) -> None:
    """Check one new database without the copy."""
    with open_store(f"sqlite:///{tmp_path / 'new.db'}") as store:
        assert store.load_snapshot().seq == 0
