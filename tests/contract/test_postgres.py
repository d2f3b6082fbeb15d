"""The contract suite on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from side_door import change_owner

from taskstore.store.opening import open_store
from taskstore.testing import OpenStore, StoreContract


class TestPostgreSQLStore(StoreContract):
    @pytest.fixture
    def damage(self, postgres_url: str) -> Callable[[str], object]:
        """Change a column that queries use."""
        return partial(change_owner, postgres_url)

    @pytest.fixture
    def make_store(self, postgres_url: str) -> OpenStore:
        return lambda *, read_only=False: open_store(postgres_url, read_only=read_only)
