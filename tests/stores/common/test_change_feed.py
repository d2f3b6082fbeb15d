"""The change feed, with a scripted watcher."""

from __future__ import annotations

import threading
import time

import pytest

from taskstore.errors import StoreClosedError, StoreUnavailableError
from taskstore.stores.common import change_feed
from taskstore.stores.common.change_feed import ChangeFeed, PollingWatcher, WatcherBrokenError
from taskstore.testing.threads import meanwhile, run_together, until

TIMEOUT_S = 20


class Ledger:
    """A head that the test moves, and its watchers."""

    def __init__(self, **options):
        self.head = 0
        self.moved = threading.Event()
        self.watchers = []
        self.broken = False
        self.feed = ChangeFeed(self.read, self.watch, "there", **options)

    def read(self):
        return self.head

    def watch(self):
        if self.broken:
            raise WatcherBrokenError
        self.watchers.append(Watcher(self))
        return self.watchers[-1]

    def commit(self):
        self.head += 1
        self.moved.set()


class Watcher:
    def __init__(self, ledger):
        self.ledger = ledger
        self.closed = False
        self.polls = 0
        self.user = None

    def poll(self):
        assert not self.closed
        self.polls += 1
        if self.ledger.broken:
            raise WatcherBrokenError
        assert self.user in (None, threading.get_ident()), "one thread at a time"
        self.ledger.moved.clear()
        return self.ledger.head

    def pause(self, seconds):
        self.user = threading.get_ident()
        self.ledger.moved.wait(seconds)
        self.user = None

    def wake(self):
        self.ledger.moved.set()

    def close(self, *, broken):
        assert not self.closed
        self.closed = True


@pytest.fixture
def ledger():
    ledger = Ledger()
    yield ledger
    ledger.feed.close()
    assert all(watcher.closed for watcher in ledger.watchers)


def test_a_wait_with_no_timeout_starts_no_watcher(ledger):
    assert not ledger.feed.wait_for(0, 0)
    assert not ledger.feed.wait_for(0, -1)
    ledger.commit()
    assert ledger.feed.wait_for(0, 0)
    assert ledger.watchers == []


def test_one_watcher_serves_all_waiters_and_the_first_one_may_leave(ledger):
    """The first waiter times out; the watcher keeps serving the others."""
    left = []

    def wait(seconds):
        assert not ledger.feed.wait_for(0, seconds)
        left.append(seconds)

    stay = []
    with meanwhile(lambda: run_together(*(lambda s=s: wait(s) for s in (0.05, 0.1, 0.15)))):
        with meanwhile(lambda: stay.append(ledger.feed.wait_for(0, TIMEOUT_S))):
            until(lambda: len(left) == 3)
            ledger.commit()
        assert stay == [True]
    assert len(ledger.watchers) == 1


def test_own_commits_wake_all_waiters(ledger):
    answers = []
    with meanwhile(
        lambda: run_together(*[lambda: answers.append(ledger.feed.wait_for(0, TIMEOUT_S))] * 5)
    ):
        until(lambda: len(ledger.feed.waiters) == 5 and ledger.watchers)
        ledger.head = 1  # the watcher is not notified
        ledger.feed.announce(1)
    assert answers == [True] * 5


def test_an_earlier_announcement_does_not_end_a_wait(ledger):
    """The head may go back, as after a restore."""
    ledger.feed.announce(10)
    assert not ledger.feed.wait_for(5, 0.05)


def test_a_broken_watcher_is_replaced_and_no_commit_is_missed(ledger, monkeypatch):
    monkeypatch.setattr(change_feed, "RETRY_S", 0.2)
    answers = []
    with meanwhile(lambda: answers.append(ledger.feed.wait_for(0, TIMEOUT_S))):
        until(lambda: ledger.watchers)
        ledger.broken = True
        ledger.watchers[0].wake()
        until(lambda: isinstance(ledger.feed._watcher, PollingWatcher))
        ledger.head += 1
    assert answers == [True]
    with meanwhile(lambda: answers.append(ledger.feed.wait_for(1, TIMEOUT_S))):
        ledger.broken = False
        until(lambda: ledger.feed._watcher is ledger.watchers[-1])
        ledger.commit()
    assert answers == [True, True]
    assert len(ledger.watchers) == 2


def test_an_error_is_raised_by_all_waiters_and_the_next_one_starts_a_new_watcher(ledger):
    errors = []

    def wait():
        try:
            ledger.feed.wait_for(0, TIMEOUT_S)
        except StoreUnavailableError as error:
            errors.append(error)

    def fail():
        raise StoreUnavailableError("unavailable for a moment")

    with meanwhile(lambda: run_together(wait, wait, wait)):
        until(lambda: len(ledger.feed.waiters) == 3 and ledger.watchers)
        ledger.watchers[0].poll = fail
        ledger.watchers[0].wake()
    assert len(errors) == 3
    answers = []
    with meanwhile(lambda: answers.append(ledger.feed.wait_for(0, TIMEOUT_S))):
        until(lambda: len(ledger.watchers) == 2)
        ledger.commit()
    assert answers == [True]
    assert ledger.watchers[0].closed


def wait_for_a_commit(ledger, count):
    """Wait for a commit, with watcher number ``count``."""
    answers = []
    with meanwhile(lambda: answers.append(ledger.feed.wait_for(ledger.head, TIMEOUT_S))):
        until(lambda: len(ledger.watchers) == count and ledger.feed._watcher is ledger.watchers[-1])
        ledger.commit()
    assert answers == [True]


def test_one_thread_serves_all_waiters():
    ledger = Ledger(idle_timeout_s=TIMEOUT_S)
    threads = set()

    def wait():
        assert ledger.feed.wait_for(0, TIMEOUT_S)
        threads.add(ledger.feed._thread)

    with meanwhile(lambda: run_together(*[wait] * 5)):
        until(lambda: len(ledger.feed.waiters) == 5 and ledger.watchers)
        ledger.commit()
    [thread] = threads
    assert (thread.name, thread.daemon) == ("taskstore-watcher", True)
    for _ in range(3):
        assert not ledger.feed.wait_for(1, 0.01)
    assert len(ledger.watchers) == 1, "a wait in slices must not start a new watcher"
    ledger.feed.close()
    assert ledger.watchers[0].closed
    assert not thread.is_alive()


@pytest.mark.parametrize("idle_timeout_s", [0.0, 0.01])
def test_the_thread_ends_some_time_after_the_last_waiter(idle_timeout_s):
    ledger = Ledger(idle_timeout_s=idle_timeout_s)
    for number in range(1, 4):
        wait_for_a_commit(ledger, number)
        until(lambda: all(w.closed for w in ledger.watchers) and not ledger.feed._thread)
    ledger.feed.close()


def test_no_thread_can_be_started(ledger, monkeypatch):
    def start(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(StoreUnavailableError, match="can't start new thread") as caught:
            ledger.feed.wait_for(0, 1)
        assert "threads" in caught.value.hint
        assert not ledger.feed.wait_for(0, 0)
    assert not ledger.feed.waiters
    assert not ledger.feed.wait_for(0, 0.01)


@pytest.mark.parametrize("started", [False, True])
def test_an_interrupt_while_the_thread_is_started(ledger, monkeypatch, started):
    """One thread serves the next waiter, whether the interrupted call started it or not."""
    start = threading.Thread.start

    def interrupted(thread):
        if started:
            start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.feed.wait_for(0, TIMEOUT_S)
    answers = []
    with meanwhile(lambda: answers.append(ledger.feed.wait_for(0, TIMEOUT_S))):
        until(lambda: ledger.watchers)
        threads = [thread for thread in threading.enumerate() if thread is ledger.feed._thread]
        assert len(threads) == 1
        ledger.commit()
    assert answers == [True]


@pytest.mark.parametrize("waiters", [0, 1, 3])
def test_close_ends_every_wait(ledger, waiters):
    closed = []

    def wait():
        with pytest.raises(StoreClosedError):
            ledger.feed.wait_for(0, TIMEOUT_S)
        closed.append(1)

    jobs = [wait] * waiters
    with meanwhile(lambda: run_together(*jobs) if jobs else None):
        until(lambda: len(ledger.feed.waiters) == waiters)
        ledger.feed.close()
        ledger.feed.close()
    assert len(closed) == waiters
    with pytest.raises(StoreClosedError):
        ledger.feed.wait_for(0, 1)


def test_polling_reads_the_head_only_when_the_version_changes():
    heads, version = [], [0]
    watcher = PollingWatcher(lambda: heads.append(0) or 7, lambda: version[0])
    assert watcher.poll() == 7
    assert [watcher.poll() for _ in range(5)] == [None] * 5
    version[0] = 1
    assert watcher.poll() == 7
    assert len(heads) == 2
    watcher.pause(0.01)
    watcher.wake()
    started = time.monotonic()
    watcher.pause(TIMEOUT_S)
    assert time.monotonic() - started < TIMEOUT_S / 2
