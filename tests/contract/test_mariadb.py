"""The SQL store keeps the contract on MariaDB."""

from __future__ import annotations

import pytest

from taskstore.store.opening import open_store
from taskstore.testing import OpenStore, StoreContract


class TestMariaDBStore(StoreContract):
    @pytest.fixture
    def make_store(self, mariadb_url: str) -> OpenStore:
        # Loading the certificates of the machine takes PyMySQL longer than the rest.
        url = f"{mariadb_url}?ssl_disabled=true"
        return lambda *, read_only=False: open_store(url, read_only=read_only)
