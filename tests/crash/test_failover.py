"""[1] [2] [4] PostgreSQL under load: kill, restart, failover to a standby.

``TASKSTORE_FAILOVERS`` sets the rounds of each test (default 1); ``make soak`` sets many.
"""

from __future__ import annotations

import os
import random
import time

import pytest
from load import Load

from taskstore import TaskNotFound, TaskQuery, TaskRegistry
from taskstore.testing.crash.replication import url_of
from taskstore.testing.threads import meanwhile, until

ROUNDS = int(os.environ.get("TASKSTORE_FAILOVERS", "1"))
THREADS = 6
COROUTINES = 40


def shared_task(url: str) -> str:
    with TaskRegistry.open(url) as registry:
        return registry.create(runtime="cli", task="shared", label="shared").task_id


# -- a server that restarts ------------------------------------------------------------


@pytest.mark.parametrize("death", ["killed", "stopped at once"])
def test_a_server_that_restarts(server, server_url, death, report):
    load, shared = Load(), shared_task(server_url)
    with TaskRegistry.open(server_url) as registry:
        with (
            load.threads(registry, THREADS, shared),
            load.coroutines(server_url, COROUTINES, shared),
        ):
            for _ in range(3 * ROUNDS):
                load.until_acknowledged(100)
                server.kill() if death == "killed" else server.stop("immediate")
                time.sleep(random.uniform(0, 0.3))
                server.start()
            load.until_acknowledged(100)
        load.check(server_url, registry)
    report(f"a server {death} {3 * ROUNDS} times", load)
    # The outages were shorter than the retry timeout, so no call failed.
    assert (load.refused, load.unknown) == ([], [])


def test_a_server_that_is_down_longer_than_the_timeout(server, server_url, report):
    load, shared = Load(), shared_task(server_url)
    with TaskRegistry.open(server_url, reconnect_s=0.5) as registry:
        with (
            load.threads(registry, THREADS, shared),
            load.coroutines(server_url, COROUTINES, shared, reconnect_s=0.5),
        ):
            load.until_acknowledged(100)
            server.kill()
            # All callers fail within about the same time, also those in a queue.
            until(lambda: len(load.refused) + len(load.unknown) > 2 * (THREADS + COROUTINES), 5)
            server.start()
            load.until_acknowledged(100)
        load.check(server_url, registry)
    report("a server down for longer than 0.5 s", load)


# -- a standby that takes over ---------------------------------------------------------


@pytest.mark.parametrize("_round", range(ROUNDS))
def test_a_synchronous_standby_takes_over(primary, standby, _round, report):
    url, load = url_of(primary, standby), Load()
    shared = shared_task(url)
    with TaskRegistry.open(url) as registry, TaskRegistry.open(url) as reader:
        with (
            load.threads(registry, THREADS, shared),
            load.coroutines(url, COROUTINES, shared),
        ):
            load.until_acknowledged(random.randrange(100, 200))
            before = len(load.acknowledged)
            after, woken = reader.store.head() + before, []
            with meanwhile(lambda: woken.append(reader.store.wait_for(after, 60))):
                time.sleep(0.1)
                primary.kill()
                time.sleep(random.uniform(0, 0.5))
                standby.promote()
                load.until_acknowledged(before + 100)
            assert woken == [True]  # the reader waited through the failover
        # Reads work again too: from the record cache, the store and the change feed.
        assert reader.refresh() == registry.refresh()
        assert reader.store.query(TaskQuery()).seq == registry.seq
        assert reader.store.wait_for(registry.seq - 1, 5)
        load.check(url, registry)
        assert list(reader.list()) == list(registry.list())
    report(f"failover after {before}", load)
    assert (load.refused, load.unknown) == ([], [])


def backends_waiting_for_standby(primary):
    return primary.execute("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")


def test_a_commit_without_its_standby_is_not_acknowledged(primary, standby):
    """A primary that is killed while it waits for its standby shows the commit after a restart."""
    url, answers = url_of(primary, standby), []
    with TaskRegistry.open(url) as registry:
        registry.create(runtime="cli", task="before")
        standby.stop_replication()

        def create():
            answers.append(registry.create(runtime="cli", task="waits for its standby"))

        with meanwhile(create):
            until(lambda: backends_waiting_for_standby(primary))
            primary.kill()
            primary.start()
            until(lambda: backends_waiting_for_standby(primary) or answers)
            assert primary.execute("SELECT head_seq FROM taskstore_head") == [(2,)]
            assert not answers
            primary.kill()
            standby.promote()
        assert registry.get(answers[0].task_id) == answers[0]
        assert standby.execute("SELECT head_seq FROM taskstore_head") == [(2,)]


def test_a_wait_for_the_standby_that_is_cancelled(primary, standby):
    """PostgreSQL acknowledges a commit with a cancelled wait, with a warning only."""
    url, answers = url_of(primary), []
    with TaskRegistry.open(url) as registry:
        registry.create(runtime="cli", task="before")
        [[conninfo]] = standby.execute("SHOW primary_conninfo")
        standby.stop_replication()

        def create():
            answers.append(registry.create(runtime="cli", task="waits for its standby"))

        with meanwhile(create):
            for _ in range(3):
                until(lambda: backends_waiting_for_standby(primary) or answers)
                assert not answers
                [[pid]] = backends_waiting_for_standby(primary)
                primary.execute(f"SELECT pg_cancel_backend({pid})")
                until(lambda pid=pid: (pid,) not in backends_waiting_for_standby(primary))
            standby.replicate_from(conninfo)
        assert len(answers) == 1
        for node in (primary, standby):
            assert node.execute("SELECT head_seq FROM taskstore_head") == [(2,)]


# -- a standby that takes over without the last commits --------------------------------


@pytest.mark.parametrize("later_commits", [0, 2, 3] if ROUNDS > 1 else [2])
@pytest.mark.parametrize("first", ["refresh", "write"])
def test_a_standby_without_the_last_commits(primary, first, later_commits):
    """A record cache has two lost commits; the promoted standby has ``later_commits`` others."""
    standby = primary.standby(synchronous=False)
    url, events = url_of(primary, standby), []
    with TaskRegistry.open(url, hooks=[events.append]) as registry:
        kept = registry.create(runtime="cli", task="kept")
        until(lambda: standby.execute("SELECT to_regclass('taskstore_head')") != [(None,)])
        until(lambda: standby.execute("SELECT head_seq FROM taskstore_head") == [(1,)])
        standby.stop_replication()
        lost = registry.create(runtime="cli", task="lost")
        registry.record_progress(kept.task_id, "lost")
        primary.kill()
        standby.promote()
        with TaskRegistry.open(url) as other:
            for number in range(later_commits):
                other.create(runtime="cli", task=f"made instead {number}")
        del events[:]
        if first == "refresh":
            registry.refresh()
        else:
            own = registry.create(runtime="cli", task="own")
            assert registry.get(own.task_id) == own
        # No event is from the lost history or based on it.
        restored, *later = events
        assert (restored.kind, restored.count) == ("restored", 1 + later_commits)
        assert [(event.seq, event.kind, event.local) for event in later] == [
            (2 + later_commits, "upserted", True)
        ] * (first == "write")
        with TaskRegistry.open(url) as fresh:
            assert list(registry.list()) == list(fresh.list())
            assert registry.seq == fresh.seq
        with pytest.raises(TaskNotFound):
            registry.record_progress(lost.task_id, "still there?")
        assert registry.record_progress(kept.task_id, "after").revision == 2
