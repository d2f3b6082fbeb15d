"""The contract suite on a real Redis server."""

from __future__ import annotations

import pytest
from taskstore.testing import OpenStore, StoreContract


class TestRedisStore(StoreContract):
    @pytest.fixture
    def make_store(self, make_store: OpenStore) -> OpenStore:
        return make_store


@pytest.mark.usefixtures("small_steps")
class TestRedisStoreInSmallSteps(StoreContract):
    """The contract suite with pages and chunks of two records, to test their boundaries."""

    test_many_records = None  # its pages are full with the default limits

    @pytest.fixture
    def make_store(self, make_store: OpenStore) -> OpenStore:
        return make_store
