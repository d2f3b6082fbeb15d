"""The SQL store keeps the contract on MariaDB."""

from __future__ import annotations

import pytest

from taskstore.backends import open_store
from taskstore.testing import OpenStore, StoreContract


class TestMariaDBStore(StoreContract):
    @pytest.fixture
    def make_store(self, mariadb_url: str) -> OpenStore:
        return lambda *, read_only=False: open_store(mariadb_url, read_only=read_only)
