import os
import shutil
import tempfile
from pathlib import Path

import pytest

from taskstore.stores.jsonfile import JSONStore


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "ledger"


@pytest.fixture
def open_(directory):
    """Open another store on the directory; all are closed at the end."""
    opened = []

    def open_once(**options):
        opened.append(JSONStore(directory, **options))
        return opened[-1]

    yield open_once
    for store in opened:
        store.close()


@pytest.fixture
def fast_path(tmp_path):
    """A directory in memory, for tests that kill a hundred processes.

    A sync costs nothing there, and a killed process loses nothing without one.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(dir=memory))
    yield path
    shutil.rmtree(path)
