"""The contract suite on the JSON store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from taskstore.testing import OpenStore, StoreContract


class TestJSONStore(StoreContract):
    @pytest.fixture
    def damage(self, tmp_path: Path) -> Callable[[str], object]:
        """Change the task id in all files."""

        def change(task_id: str) -> None:
            for path in (tmp_path / "ledger").glob("*.json*"):
                path.write_bytes(path.read_bytes().replace(task_id.encode(), b"damaged"))

        return change

    @pytest.fixture
    def make_store(self, tmp_path: Path) -> OpenStore:
        from taskstore.stores.jsonfile import JSONStore

        return lambda *, read_only=False: JSONStore(tmp_path / "ledger", read_only=read_only)
