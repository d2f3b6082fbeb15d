"""A private server that the tests configure, kill and restart."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from taskstore import open_store
from taskstore.errors import StoreUnavailableError
from taskstore.testing.factories import create, update
from taskstore.testing.servers import MARIADB_MISSING, MariaDBServer


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[MariaDBServer]:
    server = MariaDBServer("--log-bin=binary", "--sync-binlog=1", private=True)
    try:
        server.start()
    except RuntimeError as error:
        if str(error) != MARIADB_MISSING or os.environ.get("CI"):
            raise
        pytest.skip(MARIADB_MISSING)
    yield server
    server.stop()


@pytest.fixture
def configured(server) -> Iterator[MariaDBServer]:
    yield server
    server.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
    server.execute("SET GLOBAL sync_binlog = 1")
    server.execute("SET GLOBAL binlog_format = MIXED")
    server.execute(f"SET GLOBAL max_allowed_packet = {16 * 1024 * 1024}")


def test_what_was_acknowledged_outlives_the_server(server):
    url = server.new_database()
    with open_store(url) as store:
        assert store.report().notices == ()
        records = [create(store) for _ in range(20)]
        server.kill()
        server.restart()
        # The same instance continues on new connections.
        assert set(store.load_snapshot().records) == {record.task_id for record in records}
        update(store, records[0], label="afterwards")
        assert store.head() == 21
        assert store.verify().ok


@pytest.mark.parametrize(
    ("setting", "lost"),
    [
        ("innodb_flush_log_at_trx_commit = 2", "power loss"),
        ("innodb_flush_log_at_trx_commit = 0", "a server crash"),
        ("sync_binlog = 0", "power loss"),
    ],
)
def test_less_than_was_asked_for_is_said(configured, setting, lost):
    url = configured.new_database()
    configured.execute(f"SET GLOBAL {setting}")
    with open_store(url) as store:
        [notice] = store.report().notices
        assert "durability=full was requested" in notice
        assert notice.endswith(f"the last commits can be lost after {lost}")
        assert setting.split(" = ", maxsplit=1)[0] in notice
    with open_store(url, durability="process") as store:
        assert store.report().notices == ()
    with open_store(url, read_only=True) as store:
        assert store.report().notices == ()


def test_a_binary_log_of_statements_is_refused(configured):
    url = configured.new_database()
    configured.execute("SET GLOBAL binlog_format = STATEMENT")
    with pytest.raises(StoreUnavailableError, match="binlog_format=STATEMENT") as caught:
        open_store(url)
    assert caught.value.hint == "set binlog_format to MIXED or ROW"


def test_small_packets(configured):
    url = configured.new_database()
    configured.execute(f"SET GLOBAL max_allowed_packet = {1024 * 1024}")
    with open_store(url) as store:
        assert "max_allowed_packet is 1048576" in store.report().notices[0]
        with pytest.raises(StoreUnavailableError, match="can exceed the server's max"):
            create(store, task="x" * 1024 * 1024)
        # Also what the driver writes in more bytes than it is given.
        with pytest.raises(StoreUnavailableError, match="can exceed the server's max"):
            create(store, task='"' * 300_000)
        record = create(store, task="x" * 400_000)
        assert store.load_snapshot().records == {record.task_id: record}


def test_the_rights_that_it_takes(server):
    url = server.new_database()
    database = url.rpartition("/")[2]
    for user, rights in (
        ("owner", "SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, INDEX, DROP"),
        ("writer", "SELECT, INSERT, UPDATE, DELETE"),
        ("reader", "SELECT"),
    ):
        server.execute(f"CREATE USER {user}@'127.0.0.1' IDENTIFIED BY 'x'")
        server.execute(f"GRANT {rights} ON {database}.* TO {user}@'127.0.0.1'")
    owner, writer, reader = (
        url.replace("//root@", f"//{user}:x@") for user in ("owner", "writer", "reader")
    )
    open_store(owner).close()
    with open_store(writer) as store:
        create(store)
    with open_store(reader, read_only=True) as store:
        assert store.head() == 1
    with open_store(reader) as store, pytest.raises(StoreUnavailableError, match="denied"):
        create(store)


def test_a_machine_without_a_server_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_arguments, **_options: None)
    with pytest.raises(RuntimeError, match="apt-get install mariadb-server"):
        MariaDBServer(private=True).start()
