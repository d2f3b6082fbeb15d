"""The contract suite on the memory store, without crash safety."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing import OpenStore, StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def storage(self) -> MemoryStorage:
        return MemoryStorage()

    @pytest.fixture
    def damage(self, storage: MemoryStorage) -> Callable[[str], object]:
        def change(task_id: str) -> None:
            storage.current[task_id] = replace(storage.current[task_id], task="damaged")

        return change

    @pytest.fixture
    def make_store(self, storage: MemoryStorage) -> OpenStore:
        return lambda *, read_only=False: MemoryStore(storage, read_only=read_only)
