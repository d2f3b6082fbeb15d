"""The contract suite on the memory store, without crash safety."""

from __future__ import annotations

import pytest

from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing import OpenStore, StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def make_store(self) -> OpenStore:
        storage = MemoryStorage()
        return lambda *, read_only=False: MemoryStore(storage, read_only=read_only)
