"""The contract suite on MariaDB."""

from __future__ import annotations

import pytest

from taskstore.store.opening import open_store
from taskstore.testing import OpenStore, StoreContract


class TestMariaDBStore(StoreContract):
    @pytest.fixture
    def make_store(self, mariadb_url: str) -> OpenStore:
        # Without this option PyMySQL spends most of the time on loading certificates.
        url = f"{mariadb_url}?ssl_disabled=true"
        return lambda *, read_only=False: open_store(url, read_only=read_only)
