"""Server settings, access rights, and the ledger after the server's death."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from taskstore import (
    CompactionPolicy,
    CursorExpiredError,
    Restored,
    Snapshot,
    StoreUnavailableError,
    TaskQuery,
    TaskRegistry,
    open_store,
)
from taskstore.testing import OpenStore, StoreContract, create, make_put, play, update

from conftest import Server
from taskstore_redis import open_redis

StartServer = Callable[..., Server]
ALWAYS = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.mark.parametrize(
    ("options", "durability", "words"),
    [
        (ALWAYS, "full", "survives power loss"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "process", "the last second or two"),
        (("--appendonly", "yes", "--appendfsync", "no"), "process", "half a minute"),
        (("--appendonly", "no", "--save", "3600 1"), "process", "since its last save"),
        (("--appendonly", "no", "--save", ""), "process", "is lost when the server stops"),
    ],
)
def test_durability_is_that_of_the_server(
    start_server: StartServer, options: tuple[str, ...], durability: str, words: str
) -> None:
    """[4] ``durability`` is the actual durability; a notice says if a stronger durability was
    requested."""
    server = start_server(*options)
    for requested in ("full", "process"):
        with open_store(server.url(), durability=requested) as store:
            assert store.durability == durability
            [notice] = store.report().notices
            assert words in notice
            assert ("was requested" in notice) == (requested == "full" and durability != "full")


def test_a_notice_of_eviction(start_server: StartServer) -> None:
    for policy, words in (
        ("allkeys-lru", "deletes parts of the ledger"),
        ("volatile-ttl", "only evict a compactor's lease"),
        ("noeviction", None),
    ):
        server = start_server(*ALWAYS, "--maxmemory-policy", policy)
        with open_store(server.url()) as store:
            notices = store.report().notices[1:]
            assert len(notices) == (words is not None)
            assert all(words is not None and words in notice for notice in notices)


def test_a_notice_of_replication_and_read_only_replicas(start_server: StartServer) -> None:
    master = start_server(*ALWAYS)
    replica = start_server("--replicaof", "127.0.0.1", str(master.port))
    with open_redis(master.url()) as store:
        record = create(store)
        with master.client() as client:
            client.wait(1, 5000)
        with open_redis(replica.url(), read_only=True) as reader:
            assert dict(reader.load_snapshot().records) == {record.task_id: record}
            assert list(reader.query(TaskQuery())) == [record]
            assert reader.verify().problems == ()
            assert "failover" in reader.report().notices[-1]
        with open_redis(replica.url()) as writer:
            with pytest.raises(StoreUnavailableError, match="is a replica"):
                create(writer)
            with pytest.raises(StoreUnavailableError, match="is a replica"):
                writer.compact(CompactionPolicy(force=True))
            with pytest.raises(StoreUnavailableError, match="is a replica"):
                writer.save_snapshot(Snapshot(10))
    with open_redis(master.url()) as store:
        assert "failover" in store.report().notices[-1]


def test_a_server_that_refuses_config(start_server: StartServer) -> None:
    server = start_server(*ALWAYS)
    with server.client() as client:
        client.execute_command(
            *("ACL", "SETUSER", "app", "on", ">secret word", "~{ns}:*", "+@all", "-@dangerous"),
            "+info",
        )
    with open_redis(server.url(userinfo="app:secret%20word@")) as store:
        assert store.durability == "process"
        assert "does not report its appendfsync" in store.report().notices[0]
        play(store)
        assert store.verify().problems == ()
    with pytest.raises(StoreUnavailableError, match="refuses this user"):
        open_redis(server.url("elsewhere", userinfo="app:secret%20word@"))


def test_passwords_stay_out_of_messages(start_server: StartServer) -> None:
    server = start_server("--requirepass", "s3cr3t")
    with open_redis(server.url(userinfo=":s3cr3t@")) as store:
        create(store)
        assert "s3cr3t" not in f"{store!r} {store.location} {store.report()} {vars(store)}"
    for userinfo in ("", ":wr0ng@", "someone:wr0ng@"):
        with pytest.raises(StoreUnavailableError, match="refuses the login") as caught:
            open_redis(server.url(userinfo=userinfo))
        assert "wr0ng" not in f"{caught.value} {caught.value.__cause__}"


def test_a_server_without_memory(start_server: StartServer) -> None:
    """A refused batch writes nothing; reads still succeed."""
    server = start_server("--save", "", "--maxmemory", "5mb", "--maxmemory-policy", "noeviction")
    with open_redis(server.url()) as store:
        head = 0
        with pytest.raises(StoreUnavailableError, match="no memory left"):
            while True:
                store.apply([make_put(task="x" * 20_000), make_put(task="y" * 20_000)])
                head += 2
        assert head > 0
        assert store.head() == head
        assert len(store.load_snapshot().records) == head
        assert store.verify().problems == ()


def test_an_old_server_is_refused(make_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskstore_redis.server._info", lambda _: {"redis_version": "6.0.16"})
    with pytest.raises(StoreUnavailableError, match=r"is Redis 6\.0\.16 .*needs 6\.2"):
        make_store()


def test_the_ledger_survives_the_servers_death(start_server: StartServer) -> None:
    """[4] With appendfsync always, no acknowledged change is lost."""
    server = start_server(*ALWAYS)
    acknowledged: dict[str, int] = {}
    for _ in range(3):
        with open_redis(server.url()) as store:
            before = store.head()
            record = create(store)
            for _ in range(50):
                record = update(store, record)
            acknowledged[record.task_id] = record.revision
            server.kill()
            server.start()
            assert store.head() == before + 51
            loaded = store.load_snapshot()
            assert {key: item.revision for key, item in loaded.records.items()} == acknowledged
            assert store.verify().problems == ()


def test_a_server_that_lost_commits(start_server: StartServer) -> None:
    """[2] The server gives lost seqs again: readers that knew them get an error; a registry
    reloads."""
    server = start_server("--save", "", "--appendonly", "no")
    restored: list[int] = []

    def note(event: object) -> None:
        if isinstance(event, Restored):
            restored.append(event.seq)

    with TaskRegistry.open(server.url(), hooks=[note]) as registry:
        first = registry.create(runtime="cli", task="kept")
        with server.client() as client:
            client.save()
        registry.create(runtime="cli", task="lost")
        with TaskRegistry.open(server.url(), read_only=True) as reader:
            server.kill()
            server.start()
            with TaskRegistry.open(server.url()) as other:
                # Another commit with the same seq.
                second = other.create(runtime="cli", task="another")
            with pytest.raises(CursorExpiredError):
                list(reader.changes(after=2))
            reader.refresh()
            registry.refresh()
            for each in (reader, registry):
                assert {task.task_id for task in each.list()} == {first.task_id, second.task_id}
            assert restored == [0, 2]
            assert any("has lost commits" in text for text in reader.store.report().notices)


def test_a_writer_on_a_server_that_lost_commits(start_server: StartServer) -> None:
    server = start_server("--save", "", "--appendonly", "no")
    with TaskRegistry.open(server.url()) as registry:
        with server.client() as client:
            client.save()
        for _ in range(5):
            registry.create(runtime="cli", task="lost")
        server.kill()
        server.start()
        task = registry.create(runtime="cli", task="after")
        assert [each.task_id for each in registry.list()] == [task.task_id]
        assert registry.seq == 1
        assert any("has lost commits" in text for text in registry.store.report().notices)


@pytest.fixture(scope="module")
def synced_server() -> Iterator[Server]:
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server to start (apt install redis-server)")
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory), *ALWAYS)
        try:
            yield server.start()
        finally:
            server.kill()


class TestWithFullDurability(StoreContract):
    """The contract suite on a server with full durability."""

    @pytest.fixture
    def make_store(self, synced_server: Server) -> OpenStore:
        url = synced_server.url(uuid.uuid4().hex)
        return lambda *, read_only=False: open_redis(url, read_only=read_only)
