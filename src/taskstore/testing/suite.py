"""The contract suite against any installed backend.

    pytest --pyargs taskstore.testing.suite --taskstore-url URL

Every clause gets a new, empty ledger in a namespace of its own; what is at
the URL is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from taskstore.testing import OpenStore, StoreContract
from taskstore.testing.scratch import scratch


class TestStore(StoreContract):
    """Every clause, on the backend of ``--taskstore-url``."""

    @pytest.fixture
    def make_store(self, request: pytest.FixtureRequest) -> Iterator[OpenStore]:
        """Open a ledger of this clause's own."""
        url = request.config.getoption("taskstore_url")
        if url is None:
            pytest.exit("say which backend: --taskstore-url URL", returncode=4)
        with scratch(url) as open_store:
            yield open_store
