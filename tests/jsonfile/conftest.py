import pytest

from taskstore.stores.jsonfile import JSONStore


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "ledger"


@pytest.fixture
def open_(directory):
    """Open the directory once more; everything is closed at the end."""
    opened = []

    def open_once(**options):
        opened.append(JSONStore(directory, **options))
        return opened[-1]

    yield open_once
    for store in opened:
        store.close()
