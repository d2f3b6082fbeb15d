"""A host passes its own engine, with any settings."""

from __future__ import annotations

import sqlite3
from types import SimpleNamespace

import pymysql
import pysqlite3.dbapi2
import pytest
import sqlalchemy as sa
from sqlalchemy import event

from taskstore.errors import StoreBusyError, ValidationError
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.query import TaskQuery
from taskstore.stores.sql import SQLStore
from taskstore.testing.factories import create, delete, make_record, update

ALL = CompactionPolicy(force=True, history_s=0, history_entries=0, keep_snapshots=1)


def work_with(store: SQLStore) -> None:
    """Every operation of a store, once."""
    kept = update(store, create(store, run_id="run-1", owner_key="me"), label="new")
    gone = create(store)
    delete(store, gone)
    with pytest.raises(Exception, match="has the same dedup key"):
        create(store, run_id="run-1", owner_key="me", task_id="other")
    assert dict(store.load_snapshot().records) == {kept.task_id: kept}
    assert list(store.query(TaskQuery(owner_key="me", limit=5))) == [kept]
    assert list(store.query(TaskQuery(label="new"))) == [kept]
    assert [entry.revision for entry in store.read_history(gone.task_id)] == [1, 2]
    assert store.compact(ALL).compacted
    assert store.verify().ok
    assert store.floor() == store.head() + 1 == 5
    assert store.compact(CompactionPolicy(erase_deleted=True)).compacted


def sqlite_engine(path, **options) -> sa.Engine:
    return sa.create_engine(f"sqlite:///{path}", module=pysqlite3.dbapi2, **options)


@pytest.mark.parametrize(
    "pool",
    [
        {},
        {"poolclass": sa.NullPool},
        {"poolclass": sa.QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 1},
        {"poolclass": sa.SingletonThreadPool},
        {"poolclass": sa.StaticPool},
    ],
    ids=["default", "null", "one connection", "one per thread", "static"],
)
def test_any_pool_will_do(sqlite_path, pool):
    engine = sqlite_engine(sqlite_path, **pool)
    with SQLStore(engine) as store:
        work_with(store)
    engine.dispose()


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE", "REPEATABLE READ"])
def test_any_isolation_level_will_do(postgres_server, level):
    engine = sa.create_engine(postgres_server.new_database(), isolation_level=level)
    with SQLStore(engine) as store:
        work_with(store)
    engine.dispose()


def test_listeners_that_begin_transactions(sqlite_path):
    # SQLAlchemy's manual recommends this for savepoints on SQLite.
    engine = sqlite_engine(sqlite_path)

    @event.listens_for(engine, "connect")
    def no_begin_of_the_driver(raw, _record):
        raw.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection):
        connection.exec_driver_sql("BEGIN")

    with SQLStore(engine) as store:
        work_with(store)
    engine.dispose()


def test_the_host_gets_its_connection_back_as_it_was(sqlite_path):
    engine = sqlite_engine(sqlite_path, poolclass=sa.QueuePool, pool_size=1, max_overflow=0)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE invoices (id INTEGER)")
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA synchronous = 0")
    store = SQLStore(engine)
    create(store)
    with engine.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 0
        assert connection.exec_driver_sql("PRAGMA secure_delete").scalar() == 0
        assert connection.get_isolation_level() == "SERIALIZABLE"
        connection.exec_driver_sql("INSERT INTO invoices VALUES (1)")
        connection.rollback()
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM invoices").scalar() == 0
    store.close()
    # Closing the store does not close the host's engine.
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM tasks").scalar() == 1
    engine.dispose()


def test_a_commit_is_durable_whatever_the_host_prefers(sqlite_path):
    engine = sqlite_engine(sqlite_path)
    seen = []

    @event.listens_for(engine, "connect")
    def careless(raw, _record):
        raw.execute("PRAGMA synchronous = OFF")
        raw.set_trace_callback(seen.append)

    with SQLStore(engine, durability="full") as store:
        create(store)
    begun = seen.index("BEGIN IMMEDIATE", seen.index("PRAGMA synchronous = FULL"))
    assert "PRAGMA synchronous = 0" in seen[begun:]
    engine.dispose()


def test_the_journal_mode_is_the_hosts_to_choose(sqlite_path):
    engine = sqlite_engine(sqlite_path)
    store = SQLStore(engine)
    assert any("journal mode delete instead of wal" in notice for notice in store.report().notices)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
    store.close()
    engine.dispose()


def test_a_pool_that_is_used_up_is_named(sqlite_path):
    engine = sqlite_engine(
        sqlite_path, poolclass=sa.QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.1
    )
    store = SQLStore(engine)
    with engine.connect(), pytest.raises(StoreBusyError, match="larger pool"):
        create(store)
    create(store)
    store.close()
    engine.dispose()


def test_a_host_in_a_transaction_of_its_own_is_waited_for(sqlite_path):
    engine = sqlite_engine(sqlite_path, connect_args={"timeout": 0.05})
    store = SQLStore(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        from threading import Timer

        raw = connection.connection.driver_connection
        timer = Timer(0.4, lambda: raw.execute("COMMIT"))
        timer.start()
        create(store)
        timer.join()
    store.close()
    engine.dispose()


def test_what_is_refused(tmp_path):
    for engine, reason in (
        (sa.create_engine("sqlite://", module=pysqlite3.dbapi2), "in-memory"),
        ("sqlite:///tasks.db", "must be an Engine, not str"),
        (
            sa.create_engine("mysql+mysqldb://u:secret@h/d", module=pymysql),
            r"mysql\+mysqldb; supported engines",
        ),
    ):
        with pytest.raises(ValidationError, match=reason):
            SQLStore(engine)
    with pytest.raises(ValidationError, match="durability"):
        SQLStore(sqlite_engine(tmp_path / "x.db"), durability="most")


def test_the_engine_of_an_asynchronous_driver_is_refused():
    # SQLAlchemy's AsyncEngine has such an engine as its sync_engine.
    engine = sa.create_engine("postgresql+psycopg_async://h/d")
    with pytest.raises(ValidationError, match="sync_engine has the same driver"):
        SQLStore(engine)
    engine.dispose()


@pytest.mark.parametrize(
    ("name", "driver", "told"),
    [
        ("sqlite", "aiosqlite", "create_engine('sqlite://...')"),
        ("postgresql", "asyncpg", "create_engine('postgresql+psycopg://...')"),
        ("mysql", "aiomysql", "create_engine('mysql+pymysql://...')"),
    ],
)
def test_every_asynchronous_driver_is_told_what_to_pass(name, driver, told):
    dialect = SimpleNamespace(name=name, driver=driver, is_async=True)
    with pytest.raises(ValidationError, match=driver) as caught:
        SQLStore(SimpleNamespace(dialect=dialect))
    assert caught.value.field == "engine"
    assert told in str(caught.value)


def test_two_libraries_on_one_file_are_warned_about(sqlite_path, open_, caplog):
    ours = open_(f"sqlite:///{sqlite_path}")
    assert ours.report().notices == ()
    link = sqlite_path.with_name("link.db")
    link.symlink_to(sqlite_path)
    engine = sa.create_engine(f"sqlite:///{link}", module=sqlite3)
    host = SQLStore(engine)
    [notice] = [text for text in host.report().notices if "two SQLite libraries" in text]
    assert str(sqlite_path) in notice
    assert notice in caplog.messages
    # Nothing is closed here while the other library has the file open: that would drop its locks.
    ours.close()
    host.close()
    engine.dispose()
    again = open_(f"sqlite:///{sqlite_path}")
    assert not any("two SQLite" in text for text in again.report().notices)


def test_an_affected_library_is_named(sqlite_path, caplog):
    from taskstore.stores.sql.sqlite_library import has_wal_reset_bug

    engine = sa.create_engine(f"sqlite:///{sqlite_path}", module=sqlite3)
    store = SQLStore(engine)
    named = [text for text in store.report().notices if "WAL-reset bug" in text]
    assert bool(named) == has_wal_reset_bug(sqlite3.sqlite_version_info)
    assert [text for text in caplog.messages if "WAL-reset bug" in text] == named
    store.close()
    engine.dispose()


def test_the_host_writes_in_the_same_database(url, open_):
    open_(url).close()
    options = {"module": pysqlite3.dbapi2} if url.startswith("sqlite") else {}
    engine = sa.create_engine(url, **options)
    store = SQLStore(engine)
    record = make_record()
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE notes (body VARCHAR(20))"))
    create(store, task_id=record.task_id)
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO notes VALUES ('hello')"))
        connection.execute(sa.text("DROP TABLE notes"))
    assert store.verify().ok
    store.close()
    engine.dispose()
