"""Waiting on a directory: the change feed follows every change of its files."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest

from taskstore import Snapshot, StoreClosedError, StoreUnavailableError
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing import make_put
from taskstore.testing.contract.compaction import TRIM
from taskstore.testing.threads import meanwhile, until

TIMEOUT_S = 20


@pytest.fixture
def pair(tmp_path):
    with JSONStore(tmp_path / "ledger") as one, JSONStore(tmp_path / "ledger") as two:
        one.apply([make_put(), make_put()])
        yield one, two


def woken(store, after, change):
    """Return whether a change ends a wait."""
    answers = []
    with meanwhile(lambda: answers.append(store.wait_for(after, TIMEOUT_S))):
        time.sleep(0.06)
        change()
    return answers == [True]


def test_a_commit_after_the_journal_was_rolled_and_compacted(pair):
    one, two = pair

    def change():
        one.compact(TRIM)
        time.sleep(0.06)
        one.apply([make_put()])

    assert woken(two, 2, change)
    assert woken(two, 3, lambda: one.apply([make_put()]))


def test_content_that_was_replaced(pair):
    one, two = pair
    assert woken(two, 2, lambda: one.save_snapshot(Snapshot(10)))
    assert woken(two, 10, lambda: one.apply([make_put()]))


def test_a_directory_that_was_replaced(pair, tmp_path):
    _one, two = pair
    with JSONStore(tmp_path / "other") as other:
        other.apply([make_put() for _ in range(5)])

    # A half-copied directory would be reported as corrupt.
    shutil.copytree(tmp_path / "other", tmp_path / "copy")

    def change():
        (tmp_path / "ledger").rename(tmp_path / "away")
        (tmp_path / "copy").rename(tmp_path / "ledger")

    # In between the directory may not exist, which raises.
    try:
        assert woken(two, 2, change)
    except StoreUnavailableError:
        assert two.wait_for(2, 0)


def test_an_idle_wait_reads_no_journal(pair, monkeypatch):
    _, two = pair
    reads = []
    end = two._reader.end
    monkeypatch.setattr(two._reader, "end", lambda layout: reads.append(0) or end(layout))
    assert not two.wait_for(2, 0.4)
    assert len(reads) <= 2


def test_a_torn_end_is_not_read_again_and_again(pair, tmp_path, monkeypatch):
    _, two = pair
    [segment] = (tmp_path / "ledger").glob("journal-*")
    with segment.open("ab") as file:
        file.write(b"half a line")
    test_an_idle_wait_reads_no_journal(pair, monkeypatch)
    assert two.head() == 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_refused(pair):
    """The child must not wait for a thread of its parent; the parent still waits."""
    one, two = pair
    answers = []
    with meanwhile(lambda: answers.append(two.wait_for(2, TIMEOUT_S))):
        until(lambda: two._feed._watcher is not None)
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            refused = 0
            for seconds in (0, TIMEOUT_S):
                try:
                    two.wait_for(2, seconds)
                except StoreClosedError as error:
                    refused += "forked" in str(error)
            os._exit(0 if refused == 2 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        one.apply([make_put()])
    assert answers == [True]
