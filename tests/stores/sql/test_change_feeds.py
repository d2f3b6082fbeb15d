"""Watchers of SQL stores: commits of other processes, and the resources of a waiter."""

from __future__ import annotations

import signal
import threading
import time

import psycopg
import pytest
import sqlalchemy as sa
from sqlkit import Spy

from taskstore import StoreClosedError
from taskstore.stores.common import change_feed as feed
from taskstore.stores.sql import SQLStore, watchers
from taskstore.stores.sql.dialects.postgresql import PostgreSQLDatabase
from taskstore.stores.sql.statements import Statements
from taskstore.testing import make_put
from taskstore.testing.threads import meanwhile, until

TIMEOUT_S = 20


@pytest.fixture
def only_notified(monkeypatch):
    """Only a notification wakes a waiter: no safety poll finds a missed one."""
    monkeypatch.setattr(watchers, "SAFETY_POLL_S", 1000.0)


@pytest.fixture
def pair(postgres_url, open_):
    return open_(postgres_url), open_(postgres_url)


def listeners(url):
    """The number of sessions of the database that have the listener lock."""
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as raw:
        [count] = raw.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchone()
    return count


def waits(store, after, answers):
    return meanwhile(lambda: answers.append(store.wait_for(after, TIMEOUT_S)))


def test_no_commit_is_missed(pair, only_notified):
    one, two = pair
    answers = []
    for seq in range(60):
        with waits(two, seq, answers):
            time.sleep(seq % 6 * 0.0004)
            one.apply([make_put()])
    assert answers == [True] * 60


def test_a_notification_in_the_middle_of_a_statement(pair, only_notified, monkeypatch):
    """The notification arrives with the result of a statement that read the head before."""
    one, two = pair
    poll = watchers.ListeningWatcher._poll_head
    polls = []

    def slowly(watcher):
        head = poll(watcher)
        polls.append(head)
        if len(polls) == 1:
            one.apply([make_put()])
            watcher._session.row("SELECT pg_sleep(0.1)")
        return head

    monkeypatch.setattr(watchers.ListeningWatcher, "_poll_head", slowly)
    assert two.wait_for(0, TIMEOUT_S)
    assert polls == [0, 1]


def test_the_first_poll_during_a_commit(pair, only_notified, postgres_url):
    """A transaction that began before the listener sends no notification, and is not missed."""
    one, two = pair
    begun, go_on = threading.Event(), threading.Event()
    claim = one._database.claim_seqs

    def slow_claim(*arguments):
        claimed = claim(*arguments)
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        return claimed

    one._database.claim_seqs = slow_claim
    answers = []
    with meanwhile(lambda: one.apply([make_put()])):
        assert begun.wait(TIMEOUT_S)
        with waits(two, 0, answers):
            time.sleep(0.1)
            assert listeners(postgres_url) == 0
            go_on.set()
    assert answers == [True]


def test_without_a_listener_nothing_is_notified(pair, postgres_url):
    one, two = pair
    channel = one._database.sql.channel_of(one._head().ledger_id)
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as raw:
        raw.execute(f'LISTEN "{channel}"')
        one.apply([make_put()])
        assert list(raw.notifies(timeout=0.1)) == []
        answers = []
        with waits(two, 1, answers):
            until(lambda: listeners(postgres_url) == 1)
            one.apply([make_put()])
        assert [note.payload for note in raw.notifies(timeout=5, stop_after=1)] == [""]


def test_own_commits_cause_no_poll(pair, only_notified, postgres_url):
    one, _ = pair
    polls = []
    with pytest.raises(StoreClosedError), waits(one, 10**6, []):
        until(lambda: listeners(postgres_url) == 1)
        watcher = one._feed._watcher
        poll = watcher._poll_head
        watcher._poll_head = lambda: polls.append(0) or poll()
        for _ in range(20):
            one.apply([make_put()])
        time.sleep(0.05)
        one.close()
    assert len(polls) <= 1


def test_a_listening_connection_that_is_cut(pair, only_notified, postgres_url):
    one, two = pair
    answers = []
    with waits(two, 0, answers):
        until(lambda: listeners(postgres_url) == 1)
        with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as raw:
            raw.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
        time.sleep(0.1)
        assert answers == []
        one.apply([make_put()])
    assert answers == [True]


def test_a_failover_replaces_the_watcher(pair, only_notified, postgres_url):
    """The watcher of the old primary, which may still run, is replaced."""
    one, two = pair
    answers = []
    with waits(two, 0, answers):
        until(lambda: listeners(postgres_url) == 1)
        old = two._feed._watcher
        two._database.invalidate_connections()
        old.wake()
        until(lambda: two._feed._watcher not in (None, old))
        one.apply([make_put()])
    assert answers == [True]
    assert listeners(postgres_url) == 0


def test_a_server_that_rejects_listen(pair, monkeypatch):
    """As on a standby: the head is polled, also between attempts to listen."""
    one, two = pair
    monkeypatch.setattr(feed, "RETRY_S", 0.1)
    monkeypatch.setattr(
        watchers.ListeningWatcher, "_listen", lambda watcher: watcher._session.execute("LISTEN")
    )
    answers = []
    for seq in range(3):
        with waits(two, seq, answers):
            time.sleep(0.15)
            one.apply([make_put()])
    assert answers == [True] * 3


def test_a_writer_without_notifications(pair, monkeypatch):
    """Some poolers drop notifications: after the first safety poll the head is polled."""
    one, two = pair
    silent = Statements(PostgreSQLDatabase.sa_dialect).claim
    monkeypatch.setattr(PostgreSQLDatabase.sql, "claim", silent)
    answers = []
    for seq in range(3):
        with waits(two, seq, answers):
            until(
                lambda seq=seq: (
                    two._feed and two._feed._watcher and two._feed._watcher._last_head == seq
                )
            )
            one.apply([make_put()])
        assert two._feed._watcher._has_silent_writer
        # From now on a safety poll would come too late.
        monkeypatch.setattr(watchers, "SAFETY_POLL_S", 1000.0)
    assert answers == [True] * 3


def test_one_connection_for_all_waiters_and_none_afterwards(pair, postgres_url, monkeypatch):
    one, two = pair
    two.wait_for(0, 0)
    two._feed._idle_timeout_s = 0.2
    answers = []
    pool = two._database.engine.pool
    with waits(two, 0, answers), waits(two, 0, answers), waits(two, 0, answers):
        until(lambda: listeners(postgres_url) == 1)
        until(lambda: two._feed and len(two._feed.waiters) == 3)
        time.sleep(0.05)
        assert pool.checkedout() == 1
        one.apply([make_put()])
    assert answers == [True] * 3
    first = two._feed._watcher
    assert not two.wait_for(1, 0.05)
    assert two._feed._watcher is first, "a caller that waits in slices reuses the watcher"
    until(lambda: pool.checkedout() == 0)
    assert listeners(postgres_url) == 0
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as raw:
        count = raw.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND state = 'idle'"
        ).fetchone()
    assert count == (0,)


def test_a_pool_of_the_host(postgres_url):
    """Waiters use one connection of the pool, and only while they wait."""
    engine = sa.create_engine(postgres_url, pool_size=2, max_overflow=0, pool_timeout=2)
    with SQLStore(engine) as store:
        answers = []
        with waits(store, 0, answers), waits(store, 0, answers), waits(store, 0, answers):
            until(lambda: listeners(postgres_url) == 1)
            store.apply([make_put()])
        assert answers == [True] * 3
        until(lambda: engine.pool.checkedout() == 0)
        assert listeners(postgres_url) == 0
    engine.dispose()


def test_an_idle_wait_reads_the_data_version_only(sqlite_path, open_):
    store = open_(f"sqlite:///{sqlite_path}")
    spy = Spy(store)
    assert not store.wait_for(0, 0.5)
    asked = spy.matching("taskstore_head")
    assert len(asked) <= 2, asked
    assert 0 < len(spy.matching("data_version")) < 60


def test_close_with_a_waiter_releases_all_connections(url, open_):
    store = open_(url)
    pool = store._database.engine.pool
    with pytest.raises(StoreClosedError), waits(store, 0, []):
        until(lambda: store._feed and store._feed._watcher)
        store.close()
    until(lambda: pool.checkedout() == 0)


def test_an_interrupt_leaves_nothing_behind(url, open_):
    one, two = open_(url), open_(url)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(3):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                two.wait_for(0, TIMEOUT_S)
            assert not two._feed.waiters
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    until(lambda: two._feed._thread is None)
    assert two._feed._watcher is None
    assert two._database.engine.pool.checkedout() == 0
    answers = []
    with waits(two, 0, answers):
        one.apply([make_put()])
    assert answers == [True]
