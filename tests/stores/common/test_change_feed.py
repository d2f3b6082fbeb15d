"""Waiting, with a watch that does what it is told."""

from __future__ import annotations

import threading
import time

import pytest

from taskstore.errors import StoreClosedError, StoreUnavailableError
from taskstore.stores.common import change_feed as feed
from taskstore.stores.common.change_feed import ChangeFeed, PollingWatcher, WatcherBrokenError
from taskstore.testing.threads import meanwhile, run_together, until

PATIENCE_S = 20


class Ledger:
    """A head that others move, and watches on it."""

    def __init__(self, **options):
        self.head = 0
        self.moved = threading.Event()
        self.watches = []
        self.broken = False
        self.feed = ChangeFeed(self.read, self.watch, "there", **options)

    def read(self):
        return self.head

    def watch(self):
        if self.broken:
            raise WatcherBrokenError
        self.watches.append(Watcher(self))
        return self.watches[-1]

    def commit(self):
        self.head += 1
        self.moved.set()


class Watcher:
    def __init__(self, ledger):
        self.ledger = ledger
        self.closed = False
        self.looks = 0
        self.user = None

    def look(self):
        assert not self.closed
        self.looks += 1
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
    assert all(watch.closed for watch in ledger.watches)


def test_without_time_there_is_no_watch(ledger):
    assert not ledger.feed.wait_for(0, 0)
    assert not ledger.feed.wait_for(0, -1)
    ledger.commit()
    assert ledger.feed.wait_for(0, 0)
    assert ledger.watches == []


def test_one_watch_for_all_and_whoever_leads_may_leave(ledger):
    """The one who looks out gives up first; those who are left look out in turn."""
    left = []

    def wait(seconds):
        assert not ledger.feed.wait_for(0, seconds)
        left.append(seconds)

    stay = []
    with meanwhile(lambda: run_together(*(lambda s=s: wait(s) for s in (0.05, 0.1, 0.15)))):
        with meanwhile(lambda: stay.append(ledger.feed.wait_for(0, PATIENCE_S))):
            until(lambda: len(left) == 3)
            ledger.commit()
        assert stay == [True]
    assert len(ledger.watches) == 1


def test_own_commits_wake_everybody(ledger):
    answers = []
    with meanwhile(
        lambda: run_together(*[lambda: answers.append(ledger.feed.wait_for(0, PATIENCE_S))] * 5)
    ):
        until(lambda: len(ledger.feed.waiters) == 5 and ledger.watches)
        ledger.head = 1  # and the watch does not hear of it
        ledger.feed.announce(1)
    assert answers == [True] * 5


def test_what_was_said_before_is_no_answer(ledger):
    """A head that went back, as after a restore: the old news count for nobody."""
    ledger.feed.announce(10)
    assert not ledger.feed.wait_for(5, 0.05)


def test_a_watch_that_breaks_is_replaced_and_nothing_is_missed(ledger, monkeypatch):
    monkeypatch.setattr(feed, "RETRY_S", 0.2)
    answers = []
    with meanwhile(lambda: answers.append(ledger.feed.wait_for(0, PATIENCE_S))):
        until(lambda: ledger.watches)
        ledger.broken = True
        ledger.watches[0].wake()
        until(lambda: isinstance(ledger.feed._watch, PollingWatcher))
        ledger.head += 1
    assert answers == [True]
    with meanwhile(lambda: answers.append(ledger.feed.wait_for(1, PATIENCE_S))):
        ledger.broken = False
        until(lambda: ledger.feed._watch is ledger.watches[-1])
        ledger.commit()
    assert answers == [True, True]
    assert len(ledger.watches) == 2


def test_trouble_reaches_all_waiters_and_the_next_one_begins_anew(ledger):
    victims = []

    def wait():
        try:
            ledger.feed.wait_for(0, PATIENCE_S)
        except StoreUnavailableError as error:
            victims.append(error)

    def fail():
        raise StoreUnavailableError("away for a moment")

    with meanwhile(lambda: run_together(wait, wait, wait)):
        until(lambda: len(ledger.feed.waiters) == 3 and ledger.watches)
        ledger.watches[0].look = fail
        ledger.watches[0].wake()
    assert len(victims) == 3
    answers = []
    with meanwhile(lambda: answers.append(ledger.feed.wait_for(0, PATIENCE_S))):
        until(lambda: len(ledger.watches) == 2)
        ledger.commit()
    assert answers == [True]
    assert ledger.watches[0].closed


def wait_until_a_commit(ledger, watches):
    """Wait through the watch of that number, counted from one, for a commit."""
    answers = []
    with meanwhile(lambda: answers.append(ledger.feed.wait_for(ledger.head, PATIENCE_S))):
        until(lambda: len(ledger.watches) == watches and ledger.feed._watch is ledger.watches[-1])
        ledger.commit()
    assert answers == [True]


def test_one_thread_for_all_who_wait():
    ledger = Ledger(idle_s=PATIENCE_S)
    threads = set()

    def wait():
        assert ledger.feed.wait_for(0, PATIENCE_S)
        threads.add(ledger.feed._thread)

    with meanwhile(lambda: run_together(*[wait] * 5)):
        until(lambda: len(ledger.feed.waiters) == 5 and ledger.watches)
        ledger.commit()
    [thread] = threads
    assert (thread.name, thread.daemon) == ("taskstore-watcher", True)
    for _ in range(3):
        assert not ledger.feed.wait_for(1, 0.01)
    assert len(ledger.watches) == 1, "who waits in slices need not begin anew"
    ledger.feed.close()
    assert ledger.watches[0].closed
    assert not thread.is_alive()


@pytest.mark.parametrize("idle_s", [0.0, 0.01])
def test_the_thread_ends_some_time_after_the_last_waiter(idle_s):
    ledger = Ledger(idle_s=idle_s)
    for number in range(1, 4):
        wait_until_a_commit(ledger, number)
        until(lambda: all(watch.closed for watch in ledger.watches) and not ledger.feed._thread)
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
    """Whether it runs already or not, the next waiter is served by one thread."""
    start = threading.Thread.start

    def interrupted(thread):
        if started:
            start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.feed.wait_for(0, PATIENCE_S)
    answers = []
    with meanwhile(lambda: answers.append(ledger.feed.wait_for(0, PATIENCE_S))):
        until(lambda: ledger.watches)
        watchers = [thread for thread in threading.enumerate() if thread is ledger.feed._thread]
        assert len(watchers) == 1
        ledger.commit()
    assert answers == [True]


@pytest.mark.parametrize("waiters", [0, 1, 3])
def test_closing(ledger, waiters):
    told = []

    def wait():
        with pytest.raises(StoreClosedError):
            ledger.feed.wait_for(0, PATIENCE_S)
        told.append(1)

    jobs = [wait] * waiters
    with meanwhile(lambda: run_together(*jobs) if jobs else None):
        until(lambda: len(ledger.feed.waiters) == waiters)
        ledger.feed.close()
        ledger.feed.close()
    assert len(told) == waiters
    with pytest.raises(StoreClosedError):
        ledger.feed.wait_for(0, 1)


def test_polling_asks_for_the_sign_only():
    heads, sign = [], [0]
    watch = PollingWatcher(lambda: heads.append(0) or 7, lambda: sign[0])
    assert watch.look() == 7
    assert [watch.look() for _ in range(5)] == [None] * 5
    sign[0] = 1
    assert watch.look() == 7
    assert len(heads) == 2
    watch.pause(0.01)
    watch.wake()
    started = time.monotonic()
    watch.pause(PATIENCE_S)
    assert time.monotonic() - started < PATIENCE_S / 2
