"""A ledger behind a transaction pooler: no promise depends on the state of a server session."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from pooler import Pooler

from taskstore import CompactionPolicy, StoreBusyError, TaskRegistry, compact
from taskstore.stores.sql import SQLStore, open_sql
from taskstore.stores.sql.migrate import upgrade
from taskstore.testing import create, make_put

OPTIONS = ("", "?prepare_threshold=0", "?prepare_threshold=none")
WRITES = 7
"""More than the 5 executions after which psycopg prepares a statement on the server."""
KINDS = {
    "as in use": {},
    "one server connection": {"backends": 1},
    "the server's process id": {"replays_greeting": True},
    "one server connection, the server's process id": {"backends": 1, "replays_greeting": True},
}


@pytest.fixture
def start_pooler(postgres_url: str) -> Iterator[Callable[..., Pooler]]:
    started = []

    def start(**options: object) -> Pooler:
        started.append(Pooler(postgres_url, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def pooler(start_pooler) -> Pooler:
    return start_pooler()


def write(registry: TaskRegistry, name: str, count: int = WRITES) -> None:
    for number in range(count):
        task = registry.create(runtime="cli", task=f"{name} {number}", run_id=f"{name}-{number}")
        registry.mark_running(task.task_id)
        registry.finish(task.task_id, "succeeded")


@pytest.mark.parametrize(
    ("kind", "options"),
    [*itertools.product(KINDS, OPTIONS), ("as in use", "?prepare_threshold=None")],
)
def test_two_writers_behind_a_pooler(postgres_url, start_pooler, kind, options):
    url = start_pooler(**KINDS[kind]).url(options)
    failed = []

    def run(registry: TaskRegistry, name: str) -> None:
        try:
            write(registry, name)
        except Exception as error:  # noqa: BLE001 - the test checks the error
            failed.append(error)

    with TaskRegistry.open(url) as one, TaskRegistry.open(url) as two:
        threads = [
            threading.Thread(target=run, args=(registry, name), daemon=True)
            for registry, name in ((one, "one"), (two, "two"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    with open_sql(postgres_url, read_only=True) as store:  # without the pooler
        assert store.head() == 2 * WRITES * 3
        assert store.verify().ok
        records = store.load_snapshot().records.values()
        assert {record.status for record in records} == {"succeeded"}
        assert {record.run_id for record in records} == {
            f"{name}-{number}" for name in ("one", "two") for number in range(WRITES)
        }


SESSION_STATE = """
SELECT concat_ws(' ', current_setting('lock_timeout'), current_setting('client_min_messages'),
    current_setting('idle_in_transaction_session_timeout'),
    current_setting('default_transaction_read_only'), current_setting('search_path'),
    (SELECT count(*) FROM pg_listening_channels()), (SELECT count(*) FROM pg_prepared_statements),
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'))"""


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_the_shared_sessions_stay_as_they_were(pooler, options):
    [before] = pooler.ask(SESSION_STATE)
    with open_sql(pooler.url(options)) as store:
        for _ in range(12):
            create(store)
        with store.exclusive():
            store.apply([make_put()])
        assert store.compact(CompactionPolicy(force=True, history_s=0)).compacted
        assert store.wait_for(store.head() - 1, 1)
        assert not store.wait_for(store.head(), 0.05)
        with open_sql(pooler.url(options), read_only=True) as reader:
            for _ in range(12):
                reader.load_snapshot()
                reader.head()
            assert not reader.wait_for(reader.head(), 0.05)
        assert pooler.ask(SESSION_STATE) == {before}
    assert pooler.ask(SESSION_STATE) == {before}
    assert not [text for text in pooler.statements if "LISTEN" in text]


def test_a_reader_does_not_make_a_writer_read_only(start_pooler):
    url = start_pooler(backends=1, replays_greeting=True).url()
    with open_sql(url, read_only=True) as reader, open_sql(url) as store:
        assert reader.head() == 0
        create(store)
        assert reader.head() == 1


def test_a_follower_is_woken_by_polling(pooler, postgres_url):
    with TaskRegistry.open(postgres_url) as writer, open_sql(pooler.url()) as store:
        found = []
        thread = threading.Thread(target=lambda: found.append(store.wait_for(0, 60)))
        thread.start()
        writer.create(runtime="cli", task="x")
        thread.join()
        assert found == [True]


def test_a_pooler_that_is_noticed_late_ends_the_listening(start_pooler):
    pooler = start_pooler(backends=1, replays_greeting=True)
    with open_sql(pooler.url()) as one, open_sql(pooler.url()) as two:
        one.wait_for(0, 0.05)
        for _ in range(12):
            create(one)
            create(two)
        assert one._database.pooled
        assert two._database.pooled
        assert one.wait_for(0, 60)
        thread = threading.Thread(target=create, args=(two,))
        thread.start()
        assert one.wait_for(24, 60)
        thread.join()


def test_the_lock_timeout_holds_behind_a_pooler(pooler, postgres_url, monkeypatch):
    from taskstore.stores.common import retry
    from taskstore.stores.sql.dialects import postgresql

    monkeypatch.setattr(retry, "BUSY_TIMEOUT_S", 0.8)
    monkeypatch.setattr(postgresql, "WRITE_LOCK_TIMEOUT_S", 0.4)
    with open_sql(postgres_url) as holder, open_sql(pooler.url()) as store:
        with holder.exclusive(), pytest.raises(StoreBusyError):
            create(store)
        create(store)


@pytest.mark.parametrize("arguments", [{}, {"prepare_threshold": None}, {"prepare_threshold": 1}])
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_of_a_host_behind_a_pooler(start_pooler, arguments, kind):
    url = start_pooler(**KINDS[kind]).url()
    engines = [sa.create_engine(url, connect_args=arguments) for _ in range(2)]
    stores = [SQLStore(engine) for engine in engines]
    for _ in range(12):
        for store in stores:
            create(store)
    assert stores[0].head() == 24
    for store, engine in zip(stores, engines, strict=True):
        store.close()
        engine.dispose()


def test_a_pooler_that_supports_prepared_statements(start_pooler):
    pooler = start_pooler(backends=1)
    with open_sql(pooler.url("?prepare_threshold=1")) as store:
        for _ in range(12):
            create(store)
        prepared = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE '\\_pg3%'"
        assert pooler.ask(prepared) != {"0"}


def test_statements_are_prepared_without_a_pooler(postgres_url):
    with open_sql(postgres_url) as store:
        for _ in range(12):
            create(store)
        session = store._transactions.pool.write_session
        [count] = session.row("SELECT count(*) FROM pg_prepared_statements")
        assert count >= 3


def test_the_schema_is_made_behind_a_pooler(postgres_server):
    pooler = Pooler(postgres_server.new_database())
    try:
        engine = sa.create_engine(pooler.url())
        upgrade(engine)
        engine.dispose()
        with TaskRegistry.open(pooler.url()) as registry:
            write(registry, "x", 1)
            compact(registry.store)
            assert registry.store.verify().ok
    finally:
        pooler.close()
