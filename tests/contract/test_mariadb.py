"""The contract suite on MariaDB."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from side_door import change_owner

from taskstore.store.opening import open_store
from taskstore.testing import OpenStore, StoreContract


class TestMariaDBStore(StoreContract):
    @pytest.fixture
    def damage(self, mariadb_url: str) -> Callable[[str], object]:
        """Change a column that queries use."""
        return partial(change_owner, mariadb_url)

    @pytest.fixture
    def make_store(self, mariadb_url: str) -> OpenStore:
        # Without this option PyMySQL spends most of the time on loading certificates.
        url = f"{mariadb_url}?ssl_disabled=true"
        return lambda *, read_only=False: open_store(url, read_only=read_only)
