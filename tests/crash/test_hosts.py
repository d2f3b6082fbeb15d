"""URLs with several hosts; servers that refuse writes or do not respond."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import traceback

import pytest

from taskstore import TaskRegistry, open_store
from taskstore.errors import StoreUnavailableError, TaskStoreError, ValidationError
from taskstore.stores.common.retry import RECONNECT_S
from taskstore.stores.sql import SQLStore, migrate
from taskstore.testing.crash.replication import url_of
from taskstore.testing.factories import create

CLOSED_ADDRESS = "127.0.0.1:9"


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "taskstore", *words], capture_output=True, text=True, check=False
    )


@pytest.fixture(params=["host=H1&host=H2", "host=127.0.0.1,127.0.0.1&port=P1,P2"])
def two_hosts(request, server, server_url):
    """Two hosts, of which the first refuses connections, in both syntaxes of a URL."""
    hosts = request.param.replace("H1", CLOSED_ADDRESS).replace("H2", server.address)
    hosts = hosts.replace("P1", CLOSED_ADDRESS.rpartition(":")[2]).replace("P2", str(server.port))
    return server_url.partition("?")[0].replace("postgres@", "postgres:s3cret@") + "?" + hosts


def test_a_ledger_on_one_of_two_hosts(two_hosts):
    assert "is at revision" not in cli("--url", two_hosts, "db", "upgrade").stderr
    with TaskRegistry.open(two_hosts) as registry:
        task = registry.create(runtime="cli", task="created on the second")
        assert CLOSED_ADDRESS.rpartition(":")[2] in registry.store.location
        for text in (repr(registry), registry.store.location):
            assert "s3cret" not in text
    listed = cli("--url", two_hosts, "list", "--json")
    assert [found["task_id"] for found in json.loads(listed.stdout)["tasks"]] == [task.task_id]
    engine = migrate.database_for_url(two_hosts).engine
    assert migrate.check(engine) == []
    migrate.downgrade(engine, "base", allow_data_loss=True)
    migrate.upgrade(engine)
    engine.dispose()


def test_no_host_accepts_connections(caplog):
    url = f"postgresql+psycopg://me:s3cret@/db?host={CLOSED_ADDRESS}&host=127.0.0.1:10"
    with pytest.raises(StoreUnavailableError) as caught:
        open_store(url)
    listed = cli("--url", url, "list")
    assert listed.returncode == 3
    output = "".join(traceback.format_exception(caught.value)) + caplog.text
    for text in (output, listed.stdout + listed.stderr):
        assert "127.0.0.1" in text
        assert "s3cret" not in text


def test_hosts_in_libpq_syntax_raise_with_the_correct_url():
    with pytest.raises(ValidationError, match=r"\?host=one:5432&host=two:5432") as caught:
        open_store("postgresql+psycopg://me:s3cret@one:5432,two:5432/db")
    assert "s3cret" not in str(caught.value)


def test_an_unresponsive_host_times_out(server, server_url):
    with socket.create_server(("127.0.0.1", 0)) as unresponsive:
        port = unresponsive.getsockname()[1]
        url = server_url.replace("?", f"?host=127.0.0.1:{port}&connect_timeout=2&")
        started = time.monotonic()
        with TaskRegistry.open(url) as registry:
            registry.create(runtime="cli", task="on the second")
            assert registry.store.verify().ok
        assert time.monotonic() - started < 15


def test_connections_use_keepalives(server_url):
    store = open_store(server_url)
    raw = store._transactions.pool.acquire_writer().raw
    with socket.socket(fileno=socket.dup(raw.fileno())) as client:
        for option, expected in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                assert client.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) == expected
    store.close()


def test_the_url_overrides_the_defaults(server_url):
    store = open_store(f"{server_url}&keepalives_idle=77&application_name=mine")
    raw = store._transactions.pool.acquire_writer().raw
    assert raw.info.get_parameters()["keepalives_idle"] == "77"
    assert raw.info.get_parameters()["application_name"] == "mine"
    store.close()


def test_a_standby_accepts_writes_after_its_promotion(primary):
    open_store(url_of(primary)).close()
    standby = primary.standby()
    short_retry = open_store(url_of(standby), reconnect_s=0.2)
    with pytest.raises(StoreUnavailableError, match="is a standby"):
        create(short_retry)
    short_retry.close()
    with open_store(url_of(standby)) as store:
        created = []
        writer = threading.Thread(target=lambda: created.append(create(store)))
        writer.start()
        time.sleep(0.3)
        assert (store.head(), created) == (0, [])
        standby.promote()
        writer.join(30)
        assert (store.head(), len(created)) == (1, 1)


def test_connections_to_a_former_primary_are_not_reused(server_url):
    """After a failover the pool replaces all connections, not only the broken one."""
    with open_store(server_url) as store:
        create(store)
        pids = backends(store, 3)
        assert backends(store, 3) == pids
        store._database.invalidate_connections()
        assert not backends(store, 3) & pids


def backends(store: SQLStore, number: int) -> set[int]:
    """Return the backend processes of ``number`` concurrent readers."""
    barrier = threading.Barrier(number)

    def read(session):
        barrier.wait(10)
        return session.row("SELECT pg_backend_pid()")[0]

    found = []
    readers = [
        threading.Thread(target=lambda: found.append(store._transactions.read(read)))
        for _ in range(number)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return set(found)


def test_an_invalid_retry_timeout_raises(server_url):
    for invalid in (-1, "30", float("nan")):
        with pytest.raises(ValidationError, match="reconnect_s"):
            open_store(server_url, reconnect_s=invalid)


def test_all_errors_are_task_store_errors(server, server_url):
    with TaskRegistry.open(server_url, reconnect_s=0.3) as registry:
        task = registry.create(runtime="cli", task="before")
        server.kill()
        try:
            for call in (
                registry.refresh,
                lambda: registry.record_progress(task.task_id, "while it is away"),
                lambda: list(registry.changes()),
                lambda: registry.store.wait_for(registry.seq, 5),
                registry.store.load_snapshot,
                registry.store.verify,
            ):
                started = time.monotonic()
                with pytest.raises(TaskStoreError):
                    call()
                assert time.monotonic() - started < RECONNECT_S / 2
        finally:
            server.start()
        assert registry.record_progress(task.task_id, "back").revision == 2
