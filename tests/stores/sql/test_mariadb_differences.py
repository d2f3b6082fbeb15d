"""MariaDB only: collations, modes, locks, packets and settings."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import closing

import pymysql
import pytest
import sqlalchemy as sa
from pymysql.constants import CLIENT
from sqlkit import Spy, write
from test_host_engine import work_with

from taskstore import open_store
from taskstore.errors import StoreBusyError, StoreUnavailableError, TaskStoreError, ValidationError
from taskstore.model.journal import Put
from taskstore.stores.common import retry
from taskstore.stores.sql import SQLStore, migrate
from taskstore.stores.sql.dialects import mariadb
from taskstore.testing.factories import create, make_put, make_record, next_of, update
from taskstore.testing.servers import MariaDBServer

ODD_KEYS = [
    "",
    "A",
    "a",
    "a\0",
    "a\t",
    "a ",
    "a  ",
    "z",
    "ß",
    "ss",
    "é",
    "e\u0301",
    "\uffff",
    "\U0001d538",
]


def raw_connection(url: str, **options: object) -> pymysql.Connection:
    place = sa.make_url(url)
    return pymysql.connect(
        host=place.host, port=place.port, user="root", database=place.database, **options
    )


@pytest.fixture
def raw(mariadb_url: str) -> Iterator[pymysql.cursors.Cursor]:
    """A transaction of another client in the same database."""
    with closing(raw_connection(mariadb_url)) as connection, connection.cursor() as cursor:
        yield cursor


@pytest.fixture
def store(mariadb_url: str) -> Iterator[SQLStore]:
    with open_store(mariadb_url) as store:
        yield store


# -- texts and bytes ------------------------------------------------------------


def test_the_server_orders_and_compares_keys_as_python_does(raw):
    for key in ODD_KEYS:
        raw.execute(
            "INSERT INTO tasks SET task_id = %s, revision = 1, created_at = 0, status = '', "
            "runtime = '', payload = '', checksum = 0",
            (key,),
        )
    raw.execute("SELECT task_id FROM tasks ORDER BY task_id")
    assert [key for (key,) in raw.fetchall()] == sorted(ODD_KEYS)
    for key in ODD_KEYS:
        raw.execute("SELECT count(*) FROM tasks WHERE task_id = %s", (key,))
        assert raw.fetchone() == (1,)


def test_similar_dedup_keys_are_distinct(store):
    create(store, run_id="run", run_digest="b")
    for run_id, digest in (("run ", "b"), ("RUN", "b"), ("run", "b "), ("run", "B")):
        create(store, run_id=run_id, run_digest=digest)
    with pytest.raises(TaskStoreError, match="has the same dedup key"):
        create(store, run_id="run", run_digest="b")


def test_nothing_is_cut_off_in_silence(store):
    long = "INSERT INTO task_set_aside VALUES (1, REPEAT('x', 17000000), 0)"
    status = f"UPDATE taskstore_head SET ledger_id = '{'x' * 33}'"
    for statement in (long, status):
        with pytest.raises(StoreUnavailableError):
            write(store, lambda session, sql=statement: session.execute(sql))


# -- locks ------------------------------------------------------------------------


def test_a_deadlock_is_run_again(store, raw, mariadb_server):
    deadlocks = "SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'"
    [[_, before]] = mariadb_server.execute(deadlocks)
    record = create(store)
    raw.execute("UPDATE tasks SET created_at = created_at WHERE task_id = %s", (record.task_id,))
    raw.execute("SELECT revision FROM tasks WHERE task_id = %s FOR UPDATE", (record.task_id,))
    done = []
    writer = threading.Thread(target=lambda: done.append(update(store, record, label="new")))
    writer.start()
    try:
        for number in range(2000):
            # Weighed by rows that were changed, the store's transaction is the lighter one.
            raw.execute("INSERT INTO task_set_aside VALUES (%s, 'x', 0)", (number,))
        raw.execute("SELECT head_seq FROM taskstore_head FOR UPDATE")
        raw.connection.rollback()
    except pymysql.OperationalError as error:
        assert error.args[0] == 1213  # noqa: PT017 - then the store went on undisturbed
    writer.join(30)
    assert [one.label for one in done] == ["new"]
    [[_, after]] = mariadb_server.execute(deadlocks)
    assert int(after) > int(before)
    assert store.head() == 2
    assert store.verify().ok


@pytest.mark.parametrize("number", [1020, 1205, 1213, 1412])
def test_what_the_server_gives_up_is_tried_again(store, number):
    spy = Spy(store)
    failures = [pymysql.OperationalError(number, "try again")] * 3

    def fail(sql):
        if "task_journal" in sql and failures:
            raise failures.pop()

    spy.before = fail
    create(store)
    assert not failures
    assert store.head() == 1
    assert store.verify().ok


def test_a_lock_that_is_never_released_is_reported(mariadb_url, raw, monkeypatch):
    monkeypatch.setattr(mariadb, "WRITE_LOCK_TIMEOUT_S", 1)
    monkeypatch.setattr(retry, "BUSY_TIMEOUT_S", 0.5)
    raw.execute("SELECT * FROM taskstore_head FOR UPDATE")
    with open_store(mariadb_url) as store:
        assert store.load_snapshot().seq == 0, "reading waits for nobody"
        with pytest.raises(StoreBusyError):
            create(store)
        raw.connection.rollback()
        create(store)
        assert store.head() == 1


def test_an_idle_transaction_is_lost(mariadb_url, monkeypatch):
    monkeypatch.setattr(mariadb, "LOCK_TIMEOUT_S", 1)
    with open_store(mariadb_url) as one, open_store(mariadb_url) as two:
        stopped, go_on = threading.Event(), threading.Event()
        spy = Spy(one)

        def stop(sql):
            if "INTO task_journal" in sql:
                stopped.set()
                assert go_on.wait(30)

        spy.before = stop
        slow = threading.Thread(target=lambda: create(one))
        slow.start()
        assert stopped.wait(30)
        create(two)
        go_on.set()
        slow.join(30)
        assert two.head() == 2
        assert two.verify().ok


# -- broken connections ---------------------------------------------------------------


def kill_writer(store: SQLStore, server: MariaDBServer) -> None:
    held = store._transactions.pool.write_session
    assert held is not None
    server.execute(f"KILL CONNECTION {held.raw.thread_id()}")


@pytest.mark.parametrize("moment", ["START", "INTO task_journal", "COMMIT"])
@pytest.mark.parametrize("after", [False, True])
def test_a_connection_that_is_killed(store, mariadb_server, moment, after):
    create(store)
    spy = Spy(store)
    killed = []

    def kill(sql):
        if moment in sql and not killed:
            killed.append(sql)
            kill_writer(store, mariadb_server)
            if after:
                raise pymysql.OperationalError(2013, "Lost connection to server during query")

    setattr(spy, "after" if after else "before", kill)
    create(store)
    assert killed
    assert store.head() == 2
    assert len(store.load_snapshot().records) == 2
    assert store.verify().ok


def test_idle_connections_that_the_server_closed(store, mariadb_server):
    record = create(store)
    store.load_snapshot()
    database = store._database.engine.url.database
    for (number,) in mariadb_server.execute(
        f"SELECT id FROM information_schema.processlist WHERE db = '{database}'"
    ):
        mariadb_server.execute(f"KILL CONNECTION {number}")
    assert store.head() == 1
    update(store, record, label="new")
    assert store.head() == 2


# -- packets --------------------------------------------------------------------------


def test_the_largest_batches_are_cut(store):
    # Six bytes of JSON for each character, seven of SQL: 7 MiB a record, 28 in all.
    records = [make_record(task="\x01" * 1024 * 1024) for _ in range(4)]
    store.apply([Put(record) for record in records])
    store.apply([next_of(record, label="new") for record in records])
    assert {one.label for one in store.load_snapshot().records.values()} == {"new"}
    assert store.head() == 8


def test_a_record_larger_than_a_packet_is_refused(store):
    store._database._max_packet = 100_000
    store.apply([make_put(task="x" * 30_000) for _ in range(9)])
    with pytest.raises(StoreUnavailableError, match="max_allowed_packet=100000") as caught:
        create(store, task="x" * 100_000)
    assert "set max_allowed_packet" in str(caught.value)
    assert store.head() == 9
    create(store)
    assert store.verify().ok


# -- a host's engine --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, ""),
        ({"isolation_level": "SERIALIZABLE"}, ""),
        ({"isolation_level": "AUTOCOMMIT"}, ""),
        ({"poolclass": sa.NullPool}, "SET SESSION sql_mode = ''"),
        ({"pool_size": 1, "max_overflow": 0}, "SET SESSION sql_mode = 'ANSI,NO_BACKSLASH_ESCAPES'"),
        ({}, "SET collation_connection = utf8mb4_bin"),
        ({}, "SET SESSION innodb_lock_wait_timeout = 1"),
    ],
)
@pytest.mark.parametrize("scheme", ["mysql", "mariadb"])
def test_any_engine_will_do(mariadb_server, scheme, options, settings):
    url = mariadb_server.new_database().replace("mariadb+", f"{scheme}+")
    engine = sa.create_engine(url, **options)

    @sa.event.listens_for(engine, "connect")
    def set_up(raw, _record):
        if settings:
            raw.cursor().execute(settings)

    with SQLStore(engine) as store:
        work_with(store)
    engine.dispose()


def test_the_host_gets_its_connection_back_as_it_was(mariadb_url):
    engine = sa.create_engine(mariadb_url, pool_size=1, max_overflow=0)
    wanted = "SELECT @@sql_mode, @@autocommit, @@tx_isolation, @@tx_read_only"
    with engine.begin() as connection:
        connection.exec_driver_sql("SET SESSION sql_mode = 'NO_ZERO_DATE'")
        before = connection.exec_driver_sql(wanted).one()
    with SQLStore(engine) as store:
        create(store)
        store.load_snapshot()
        with engine.begin() as connection:
            assert connection.exec_driver_sql(wanted).one() == before
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM tasks").scalar() == 1
    engine.dispose()


@pytest.mark.parametrize(
    ("query", "options", "settings", "reason"),
    [
        ("?charset=latin1", {}, "", "uses the charset latin1"),
        ("?charset=utf8", {}, "", "uses the charset utf8mb3"),
        ("", {"creator": True}, "", "FOUND_ROWS"),
        ("", {}, "SET SESSION sql_mode = 'EMPTY_STRING_IS_NULL'", "EMPTY_STRING_IS_NULL"),
    ],
)
def test_engines_that_would_do_harm(mariadb_url, query, options, settings, reason):
    if "creator" in options:
        options = {"creator": lambda: raw_connection(mariadb_url, client_flag=CLIENT.MULTI_RESULTS)}
    engine = sa.create_engine(f"{mariadb_url}{query}", **options)

    @sa.event.listens_for(engine, "connect")
    def set_up(raw, _record):
        if settings:
            raw.cursor().execute(settings)

    with pytest.raises(ValidationError, match=reason):
        SQLStore(engine)
    engine.dispose()


# -- URLs and versions ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("root@127.0.0.1/", "names no database"),
        ("root@127.0.0.1", "names no database"),
        ("root:secret@127.0.0.1/db?charset=latin1", "charset"),
        ("root:secret@127.0.0.1/db?nonsense=1", "nonsense"),
        ("root:secret@127.0.0.1/db?connect_timeout=secret", "option"),
    ],
)
def test_urls_that_are_refused(rest, reason):
    with pytest.raises(ValidationError, match=reason) as caught:
        open_store(f"mariadb+pymysql://{rest}")
    assert "secret" not in str(caught.value)


def test_no_password_is_ever_said(caplog):
    for rest in ("me:s3cr3t@127.0.0.1:1/db", "me@127.0.0.1:1/db?password=s3cr3t"):
        with pytest.raises(StoreUnavailableError) as caught:
            open_store(f"mysql+pymysql://{rest}")
        assert "s3cr3t" not in "".join(traceback.format_exception(caught.value)) + caplog.text


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("10.11.19-MariaDB-0+deb12u1", None),
        ("5.5.5-10.6.0-MariaDB", None),
        ("11.8.2-MariaDB-log", None),
        ("10.5.29-MariaDB", "too old"),
        ("8.0.40", "not MariaDB"),
        ("8.4.0-26 Percona", "not MariaDB"),
    ],
)
def test_which_servers_serve(version, problem):
    if problem is None:
        mariadb.check_version(version, "here")
        return
    with pytest.raises(StoreUnavailableError, match=problem) as caught:
        mariadb.check_version(version, "here")
    assert caught.value.hint == "use MariaDB 10.6 or later"


def test_reading_makes_no_transaction_that_writes(mariadb_url):
    open_store(mariadb_url).close()
    engine = migrate.database_for_url(mariadb_url, read_only=True).engine
    with engine.connect() as connection, pytest.raises(sa.exc.OperationalError, match="READ ONLY"):
        connection.exec_driver_sql("UPDATE taskstore_head SET floor = 1")
    engine.dispose()
