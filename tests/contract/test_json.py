"""The contract suite on the JSON store."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskstore.testing import OpenStore, StoreContract


class TestJSONStore(StoreContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> OpenStore:
        from taskstore.stores.jsonfile import JSONStore

        return lambda *, read_only=False: JSONStore(tmp_path / "ledger", read_only=read_only)
