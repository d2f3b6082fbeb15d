"""The contract suite on PostgreSQL."""

from __future__ import annotations

import pytest

from taskstore.store.opening import open_store
from taskstore.testing import OpenStore, StoreContract


class TestPostgreSQLStore(StoreContract):
    @pytest.fixture
    def make_store(self, postgres_url: str) -> OpenStore:
        return lambda *, read_only=False: open_store(postgres_url, read_only=read_only)
