"""Who waits for the lock of a directory waits as long as others make progress."""

from __future__ import annotations

import os
import sys
import time

import pytest

from taskstore import StoreBusyError
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing import make_put
from taskstore.testing.crash.processes import Child


def test_who_holds_the_lock_is_told(tmp_path):
    go, gone = os.pipe()

    def hold(report):
        os.close(gone)  # so that it ends with us
        with JSONStore(tmp_path) as store, store._writer.entered():
            report("held")
            os.read(go, 1)

    child = Child(hold)
    assert child.line() == "held"
    store = JSONStore.__new__(JSONStore)
    with pytest.raises(StoreBusyError) as caught:
        JSONStore.__init__(store, tmp_path, lock_timeout_s=0.2)
    os.write(gone, b".")
    child.finish()
    os.close(go)
    os.close(gone)
    [told] = caught.value.owners
    assert f"pid {child.pid}" in told
    if sys.platform == "linux":
        assert "perhaps" not in told
        assert "python" in told


def test_while_others_make_progress_nobody_hears_of_it(tmp_path, monkeypatch):
    with JSONStore(tmp_path) as other, JSONStore(tmp_path, lock_timeout_s=0.2) as store:
        waiting_room = store._writer._lock.waiting_room
        wait = waiting_room.wait
        with monkeypatch.context() as patch:
            patch.setattr(waiting_room, "wait", lambda attempt, timeout_s: False)
            with pytest.raises(StoreBusyError):
                store.apply([make_put()])
        until = time.monotonic() + 1

        def late(attempt, timeout_s):
            if time.monotonic() > until:
                return wait(attempt, timeout_s)
            other.apply([make_put()])
            time.sleep(timeout_s)
            return False

        monkeypatch.setattr(waiting_room, "wait", late)
        store.apply([make_put()])
        assert store.head() == other.head() > 2
