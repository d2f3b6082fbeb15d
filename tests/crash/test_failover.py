"""[1] [2] [4] PostgreSQL dies under load, comes back, or is replaced by its standby.

``TASKSTORE_FAILOVERS`` sets how often each happens (default 1); ``make soak`` sets many.
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


# -- a server that comes back ----------------------------------------------------------


@pytest.mark.parametrize("death", ["killed", "stopped at once"])
def test_a_server_that_comes_back(server, server_url, death, report):
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
    # Away for less than anybody's patience: nobody had to hear of it.
    assert (load.refused, load.unknown) == ([], [])


def test_a_server_that_stays_away_for_longer(server, server_url, report):
    load, shared = Load(), shared_task(server_url)
    with TaskRegistry.open(server_url, reconnect_s=0.5) as registry:
        with (
            load.threads(registry, THREADS, shared),
            load.coroutines(server_url, COROUTINES, shared, reconnect_s=0.5),
        ):
            load.until_acknowledged(100)
            server.kill()
            # Everybody is told within about the same time, also who queued behind others.
            until(lambda: len(load.refused) + len(load.unknown) > 2 * (THREADS + COROUTINES), 5)
            server.start()
            load.until_acknowledged(100)
        load.check(server_url, registry)
    report("a server away for longer than 0.5 s", load)


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
            after, heard = reader.store.head() + before, []
            with meanwhile(lambda: heard.append(reader.store.wait_for(after, 60))):
                time.sleep(0.1)
                primary.kill()
                time.sleep(random.uniform(0, 0.5))
                standby.promote()
                load.until_acknowledged(before + 100)
            assert heard == [True]  # who waited all the time
        # Reads come back too: of the mirror, of the store, and of who waits for news.
        assert reader.refresh() == registry.refresh()
        assert reader.store.query(TaskQuery()).seq == registry.seq
        assert reader.store.wait_for(registry.seq - 1, 5)
        load.check(url, registry)
        assert list(reader.list()) == list(registry.list())
    report(f"failover after {before}", load)
    assert (load.refused, load.unknown) == ([], [])


def waiting_for_the_standby(primary):
    return primary.execute("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")


def test_what_no_standby_has_is_not_acknowledged(primary, standby):
    """A primary that died while it waited for its standby shows the commit when it is back."""
    url, answers = url_of(primary, standby), []
    with TaskRegistry.open(url) as registry:
        registry.create(runtime="cli", task="before")
        standby.stop_receiving()

        def create():
            answers.append(registry.create(runtime="cli", task="waits for its standby"))

        with meanwhile(create):
            until(lambda: waiting_for_the_standby(primary))
            primary.kill()
            primary.start()
            until(lambda: waiting_for_the_standby(primary) or answers)
            assert primary.execute("SELECT head_seq FROM taskstore_head") == [(2,)]
            assert not answers
            primary.kill()
            standby.promote()
        assert registry.get(answers[0].task_id) == answers[0]
        assert standby.execute("SELECT head_seq FROM taskstore_head") == [(2,)]


def test_a_wait_for_the_standby_that_is_cancelled(primary, standby):
    """PostgreSQL answers such a commit like any other, with a warning."""
    url, answers = url_of(primary), []
    with TaskRegistry.open(url) as registry:
        registry.create(runtime="cli", task="before")
        [[conninfo]] = standby.execute("SHOW primary_conninfo")
        standby.stop_receiving()

        def create():
            answers.append(registry.create(runtime="cli", task="waits for its standby"))

        with meanwhile(create):
            for _ in range(3):
                until(lambda: waiting_for_the_standby(primary) or answers)
                assert not answers
                [[pid]] = waiting_for_the_standby(primary)
                primary.execute(f"SELECT pg_cancel_backend({pid})")
                until(lambda pid=pid: (pid,) not in waiting_for_the_standby(primary))
            standby.receive(conninfo)
        assert len(answers) == 1
        for node in (primary, standby):
            assert node.execute("SELECT head_seq FROM taskstore_head") == [(2,)]


# -- a standby that takes over without the last commits --------------------------------


@pytest.mark.parametrize("others", [0, 2, 3] if ROUNDS > 1 else [2])
@pytest.mark.parametrize("first", ["refresh", "write"])
def test_a_standby_without_the_last_commits(primary, first, others):
    """A mirror that saw two commits which are lost, and ``others`` made instead of them."""
    standby = primary.standby(synchronous=False)
    url, events = url_of(primary, standby), []
    with TaskRegistry.open(url, hooks=[events.append]) as registry:
        kept = registry.create(runtime="cli", task="kept")
        until(lambda: standby.execute("SELECT to_regclass('taskstore_head')") != [(None,)])
        until(lambda: standby.execute("SELECT head_seq FROM taskstore_head") == [(1,)])
        standby.stop_receiving()
        lost = registry.create(runtime="cli", task="lost")
        registry.record_progress(kept.task_id, "lost")
        primary.kill()
        standby.promote()
        with TaskRegistry.open(url) as other:
            for number in range(others):
                other.create(runtime="cli", task=f"made instead {number}")
        del events[:]
        if first == "refresh":
            registry.refresh()
        else:
            own = registry.create(runtime="cli", task="own")
            assert registry.get(own.task_id) == own
        # Nothing of the other history was told of, nor anything made on top of it.
        restored, *later = events
        assert (restored.kind, restored.count) == ("restored", 1 + others)
        assert [(event.seq, event.kind, event.local) for event in later] == [
            (2 + others, "upserted", True)
        ] * (first == "write")
        with TaskRegistry.open(url) as fresh:
            assert list(registry.list()) == list(fresh.list())
            assert registry.seq == fresh.seq
        with pytest.raises(TaskNotFound):
            registry.record_progress(lost.task_id, "still there?")
        assert registry.record_progress(kept.task_id, "after").revision == 2
