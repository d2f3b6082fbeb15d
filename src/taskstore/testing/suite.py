"""The contract suite for any installed backend.

    pytest --pyargs taskstore.testing.suite --taskstore-url URL

Every clause gets a new, empty ledger in its own namespace; the suite never
changes data at the URL.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from taskstore.testing import OpenStore, StoreContract
from taskstore.testing.scratch import scratch


class TestStore(StoreContract):
    """Runs all clauses on the backend of ``--taskstore-url``."""

    @pytest.fixture
    def make_store(self, request: pytest.FixtureRequest) -> Iterator[OpenStore]:
        """Yield a callable that opens a store on the new, empty ledger of the current clause."""
        url = request.config.getoption("taskstore_url")
        if url is None:
            pytest.exit("no backend is given: add --taskstore-url URL", returncode=4)
        with scratch(url) as open_store:
            yield open_store
