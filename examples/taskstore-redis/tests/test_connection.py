"""Connections that break during a request, a commit or a wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
import redis
from taskstore import (
    CompactionPolicy,
    OutcomeUnknownError,
    Put,
    Snapshot,
    StoreClosedError,
    StoreUnavailableError,
    TaskRegistry,
    open_store,
)
from taskstore.testing import OpenStore, create, make_record, next_of, play, removal_of, update

from conftest import Server
from proxy import Proxy
from taskstore_redis import link, open_redis

ERASE = CompactionPolicy(erase_deleted=True)


def url_through(proxy: Proxy, url: str) -> str:
    parts = urlsplit(url)
    return f"redis://127.0.0.1:{proxy.port}{parts.path}?{parts.query}"


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    parts = urlsplit(url)
    proxy = Proxy(parts.hostname or "", parts.port or 6379)
    yield proxy
    proxy.close()


@pytest.fixture
def short_retry_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "RETRY_TIMEOUT_S", 0.3)


@pytest.mark.parametrize("fault", ["lose_request", "lose_answer"])
def test_a_commit_whose_connection_breaks_is_made_once(proxy: Proxy, url: str, fault: str) -> None:
    with open_redis(url_through(proxy, url)) as store, open_redis(url) as witness:
        record = create(store)
        proxy.faults.append(fault)
        record = update(store, record, label="after a fault")
        assert proxy.injected == [fault]
        assert update(store, record).revision == 3
        assert witness.head() == 3
        assert [entry.revision for entry in witness.read_journal(0, 10)] == [1, 2, 3]
        assert witness.verify().problems == ()


def test_the_outcome_that_is_read_back_is_right(proxy: Proxy, url: str) -> None:
    with open_redis(url_through(proxy, url)) as store:
        proxy.faults.append("lose_answer")
        record = make_record()
        commit = store.apply([Put(record), next_of(record), next_of(next_of(record).record)])
        entries = store.read_journal(0, 10)
        assert (commit.first_seq, commit.last_seq) == (1, 3)
        assert {(entry.at, entry.commit_id) for entry in entries} == {(commit.at, commit.commit_id)}


def test_a_late_command_has_no_effect(proxy: Proxy, url: str) -> None:
    """The server receives the first command after the store voided its id and sent a second
    command."""
    with open_redis(url_through(proxy, url)) as store, open_redis(url) as witness:
        record = create(store)
        proxy.faults.append("hold")
        update(store, record)
        assert witness.head() == 2
        proxy.deliver()
        time.sleep(0.2)
        assert witness.head() == 2
        create(store)
        assert witness.head() == 3
        assert witness.verify().problems == ()


def test_a_late_creation_has_no_effect(proxy: Proxy, url: str) -> None:
    """No revision conflicts with the late command: only the void key prevents a second commit."""
    with open_redis(url_through(proxy, url)) as store, open_redis(url) as witness:
        proxy.faults.append("hold")
        record = create(store)
        witness.apply([removal_of(record)])
        witness.compact(ERASE)
        proxy.deliver()
        time.sleep(0.2)
        assert dict(witness.load_snapshot().records) == {}


def test_a_connection_that_always_breaks(proxy: Proxy, url: str) -> None:
    with open_redis(url_through(proxy, url)) as store, open_redis(url) as witness:
        proxy.faults += ["lose_request"] * 10
        with pytest.raises(StoreUnavailableError, match="broke in 4 attempts to commit"):
            create(store)
        assert witness.head() == 0


@pytest.mark.usefixtures("short_retry_timeout")
@pytest.mark.parametrize("fault", ["lose_request", "lose_answer"])
def test_the_outcome_cannot_be_read_back(
    proxy: Proxy, url: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_redis(url_through(proxy, url)) as store, open_redis(url) as witness:
        record = create(store)
        proxy.faults.append(fault)
        monkeypatch.setattr(proxy, "_target", ("127.0.0.1", 1))  # no connection succeeds again
        with pytest.raises(OutcomeUnknownError, match="cannot be read back"):
            update(store, record)
        assert witness.head() == (2 if fault == "lose_answer" else 1)
        with pytest.raises(StoreUnavailableError, match="cannot be reached"):
            store.load_snapshot()


def test_a_registry_continues(proxy: Proxy, url: str) -> None:
    with TaskRegistry.open(url_through(proxy, url)) as registry:
        for number, fault in enumerate(("lose_answer", "lose_request", "lose_answer")):
            proxy.faults.append(fault)
            task = registry.create(runtime="cli", task=fault, run_id=f"run-{number}")
            proxy.faults.append(fault)
            registry.finish(task.task_id, "succeeded")
        assert len(registry.list()) == 3
        assert registry.seq == 6


def test_a_save_whose_answer_is_lost(url: str) -> None:
    parts = urlsplit(url)
    proxy = Proxy(parts.hostname or "", parts.port or 6379, "switch")
    try:
        with open_redis(url_through(proxy, url)) as store:
            head = play(store).head
            record = make_record()
            for seq, fault in enumerate(("lose_answer", "lose_request"), head + 1):
                proxy.faults.append(fault)
                store.save_snapshot(Snapshot(seq, {record.task_id: record}))
                assert store.head() == seq
                assert store.verify().problems == ()
            assert proxy.injected == ["lose_answer", "lose_request"]
            client = redis.Redis.from_url(url.partition("?")[0])
            with client:
                prefix = store._reader.keys.prefix.decode()
                assert not list(client.scan_iter(match=f"{prefix}staging*"))
                assert len(list(client.scan_iter(match=f"{prefix}snap:*"))) == 1
    finally:
        proxy.close()


def test_a_server_that_does_not_answer(proxy: Proxy, url: str) -> None:
    with open_redis(url_through(proxy, url), timeout_s=0.3) as store, open_redis(url) as witness:
        proxy.faults.append("stall")
        started = time.monotonic()
        create(store)
        assert 0.3 <= time.monotonic() - started < 3
        assert witness.head() == 1


def test_no_server() -> None:
    with pytest.raises(StoreUnavailableError, match="cannot be reached") as caught:
        open_store("redis://someone:hunter2@127.0.0.1:1/0")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_restarted_server(start_server: Callable[..., Server]) -> None:
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    with open_redis(server.url()) as store:
        record = create(store)
        server.kill()
        server.start()
        record = update(store, record)
        server.kill()
        server.start()
        assert dict(store.load_snapshot().records) == {record.task_id: record}


def test_a_flushed_script_cache(url: str, client: redis.Redis) -> None:
    with open_redis(url) as store:
        for _ in range(3):
            client.script_flush()
            create(store)
            client.script_flush()
            store.load_snapshot()
        assert store.head() == 3


def test_closing_ends_a_wait(make_store: OpenStore) -> None:
    store = make_store()
    raised: list[type[BaseException]] = []

    def wait() -> None:
        try:
            store.wait_for(0, 60)
        except BaseException as error:  # noqa: BLE001 (the test checks it)
            raised.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    store.close()
    thread.join(10)
    assert time.monotonic() - started < 5
    assert raised == [StoreClosedError]


def test_many_wait_at_once(make_store: OpenStore) -> None:
    with make_store() as store:
        answers: list[bool] = []
        threads = [
            threading.Thread(target=lambda: answers.append(store.wait_for(0, 30)))
            for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        create(store)
        for thread in threads:
            thread.join(10)
        assert answers == [True] * 20


def test_a_save_ends_a_wait(make_store: OpenStore) -> None:
    with make_store() as store, make_store() as other:
        play(store)
        head = store.head()
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.append(store.wait_for(head, 30)))
        thread.start()
        time.sleep(0.1)
        other.save_snapshot(Snapshot(head + 5))
        thread.join(10)
        assert answers == [True]


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan"), "1"])
def test_a_timeout_is_seconds(url: str, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        open_store(url, timeout_s=timeout_s)
