"""Waiting for the lock of a directory while other writers make progress."""

from __future__ import annotations

import os
import sys
import time

import pytest
from jsonfiles import FOLD

from taskstore import StoreBusyError
from taskstore.stores.common.locks import LockQueue
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing import make_put
from taskstore.testing.crash.processes import Child


def test_the_error_names_the_lock_owner(tmp_path):
    go, gone = os.pipe()

    def hold(report):
        os.close(gone)  # so that the child ends with this process
        with JSONStore(tmp_path) as store, store._writer.lock():
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
    [owner] = caught.value.owners
    assert f"pid {child.pid}" in owner
    if sys.platform == "linux":
        assert "perhaps" not in owner
        assert "python" in owner


def test_a_writer_waits_while_other_writers_make_progress(tmp_path, monkeypatch):
    with JSONStore(tmp_path) as other, JSONStore(tmp_path, lock_timeout_s=0.2) as store:
        queue = store._writer._lock.queue
        wait = queue.poll_in_turn
        with monkeypatch.context() as patch:
            patch.setattr(queue, "poll_in_turn", lambda attempt, timeout_s: False)
            with pytest.raises(StoreBusyError):
                store.apply([make_put()])
        until = time.monotonic() + 1

        def late(attempt, timeout_s):
            if time.monotonic() > until:
                return wait(attempt, timeout_s)
            other.apply([make_put()])
            time.sleep(timeout_s)
            return False

        monkeypatch.setattr(queue, "poll_in_turn", late)
        store.apply([make_put()])
        assert store.head() == other.head() > 2


def test_a_compaction_waits_as_long_as_a_write(tmp_path, monkeypatch):
    with JSONStore(tmp_path) as other, JSONStore(tmp_path, lock_timeout_s=0.05) as store:
        store.apply([make_put()])
        waits = []
        wait = LockQueue.poll_in_turn

        def counted(queue, attempt, timeout_s):
            waits.append(timeout_s)
            return wait(queue, attempt, timeout_s)

        monkeypatch.setattr(LockQueue, "poll_in_turn", counted)
        for call in (lambda: store.apply([make_put()]), lambda: store.compact(FOLD)):
            with other.exclusive():
                waits.clear()
                with pytest.raises(StoreBusyError):
                    call()
            assert sum(waits) == 0.05
        assert store.compact(FOLD).compacted
