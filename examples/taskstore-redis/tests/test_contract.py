"""The Redis store keeps the contract, against a real server."""

from __future__ import annotations

import pytest
from taskstore.testing import OpenStore, StoreContract


class TestRedisStore(StoreContract):
    @pytest.fixture
    def make_store(self, make_store: OpenStore) -> OpenStore:
        return make_store


@pytest.mark.usefixtures("small_steps")
class TestRedisStoreInSmallSteps(StoreContract):
    """Once more, with pages and chunks of two records: the seams between them."""

    test_many_records = None  # their pages are full as they are

    @pytest.fixture
    def make_store(self, make_store: OpenStore) -> OpenStore:
        return make_store
