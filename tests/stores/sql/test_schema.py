"""A ledger in a schema of a PostgreSQL database: tables, migrations, locks, notifications."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from urllib.parse import quote

import psycopg
import pytest
import sqlalchemy as sa
from pooler import Pooler
from test_host_engine import sqlite_engine, work_with

from taskstore import SchemaMismatchError, StoreUnavailableError, TaskRegistry, ValidationError
from taskstore.stores.sql import SQLStore, migrate, open_sql
from taskstore.stores.sql.tables import TABLES, VERSION_TABLE
from taskstore.testing import create

NAMES = ["ledger", "Mixed Case", 'with "quotes"', "with.dot", "per%cent", "sélect", "user", "a'b:c"]


@pytest.fixture
def database(postgres_server):
    return postgres_server.new_database()


def in_schema(url: str, name: str) -> str:
    return f"{url}&schema={quote(name, safe='')}"


def migrated(function, url: str):
    """Call a function of the migrations with the database of a URL."""
    database = migrate.database_for_url(url)
    try:
        return function(database)
    finally:
        database.close()


def tables_of(url: str) -> dict[str, set[str]]:
    engine = sa.create_engine(url)
    inspector = sa.inspect(engine)
    found = {
        name: set(inspector.get_table_names(name))
        for name in inspector.get_schema_names()
        if name != "information_schema"
    }
    engine.dispose()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_ledger_in_a_schema_of_its_own(database, name):
    url = in_schema(database, name)
    with open_sql(url) as store:
        assert store.location.endswith(f"schema={quote(name, safe='').replace('%20', '+')}")
        work_with(store)
    assert tables_of(database) == {name: {*TABLES, VERSION_TABLE}, "public": set()}
    engine = sa.create_engine(database)
    with SQLStore(engine, schema=name) as store:
        assert store.head() == 4
        create(store)
    engine.dispose()
    with open_sql(url, read_only=True) as store:
        assert store.verify().ok
    assert migrated(migrate.check, url) == []


def test_a_hosts_own_tables_of_the_same_names(database):
    engine = sa.create_engine(database)
    with engine.begin() as connection:
        for table in ("tasks", "task_journal", "taskstore_head", VERSION_TABLE):
            connection.exec_driver_sql(f"CREATE TABLE {table} (id int PRIMARY KEY, title text)")
            connection.exec_driver_sql(f"INSERT INTO {table} VALUES (1, 'mine')")
    with pytest.raises(SchemaMismatchError):
        SQLStore(engine)
    with SQLStore(engine, schema="ledger") as store:
        work_with(store)
    with engine.begin() as connection:
        for table in ("tasks", "task_journal", "taskstore_head", VERSION_TABLE):
            assert connection.exec_driver_sql(f"SELECT * FROM {table}").all() == [(1, "mine")]
        assert connection.exec_driver_sql("SHOW search_path").scalar() == '"$user", public'
    migrate.downgrade(engine, "base", allow_data_loss=True, schema="ledger")
    assert tables_of(database)["ledger"] <= {VERSION_TABLE}
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT * FROM tasks").all() == [(1, "mine")]
    engine.dispose()


def test_two_ledgers_in_one_database(database):
    urls = [in_schema(database, name) for name in ("one", "two")]
    with TaskRegistry.open(urls[0]) as one, TaskRegistry.open(urls[1]) as two:
        task = one.create(runtime="cli", task="x", run_id="same")
        assert two.find("same") is None
        assert two.create(runtime="cli", task="x", run_id="same").task_id != task.task_id
        # Neither the write lock of one ledger nor its schema lock nor its compaction keeps
        # the writers, migrations and compactions of the other ledger out.
        with one.store.exclusive(), migrate._locked(one.store._database):
            two.create(runtime="cli", task="y")
            migrated(migrate.upgrade, urls[1])
            TaskRegistry.open(in_schema(database, "three")).close()
        assert one.store.head() == 1
        assert two.store.head() == 2
    channels = set()
    for url in urls:
        with open_sql(url) as store:
            channels.add(store._transactions.read(lambda tx: tx.row(store._database.sql.head))[1])
    assert len(channels) == 2


def test_a_watcher_hears_its_own_ledger_only(database):
    with (
        open_sql(in_schema(database, "one")) as one,
        open_sql(in_schema(database, "one")) as other,
        open_sql(in_schema(database, "two")) as two,
    ):
        found = []
        thread = threading.Thread(target=lambda: found.append(one.wait_for(0, 60)))
        thread.start()
        create(two)
        create(other)
        thread.join()
        assert found == [True]
        assert one.head() == 1


def test_the_lock_owner_is_found_in_the_schema(database):
    with open_sql(in_schema(database, 'a "b"')) as store, open_sql(store._database.url) as other:
        with store.exclusive():
            [owner] = other._transactions._read_lock_owners()
            assert owner.startswith("server process")
        assert other._transactions._read_lock_owners() == []


def test_a_missing_schema(database):
    url = in_schema(database, "missing")
    for options in ({"migrate": "never"}, {"read_only": True}):
        with pytest.raises(SchemaMismatchError, match="contains no ledger") as caught:
            open_sql(url, **options)
        assert "taskstore db upgrade --url" in str(caught.value)
        assert "schema=missing" in str(caught.value)
    assert migrated(migrate.current, url) is None
    assert "missing" not in tables_of(database)


def test_a_user_who_may_not_create_a_schema(database):
    name = sa.make_url(database).database
    with psycopg.connect(database.replace("+psycopg", ""), autocommit=True) as raw:
        raw.execute("DROP ROLE IF EXISTS schema_user")
        raw.execute("CREATE ROLE schema_user LOGIN")
        url = in_schema(database.replace("postgres@", "schema_user@"), "mine")
        with pytest.raises(StoreUnavailableError, match="cannot be created") as caught:
            open_sql(url)
        assert 'CREATE SCHEMA "mine"' in str(caught.value)
        raw.execute("CREATE SCHEMA mine AUTHORIZATION schema_user")
        open_sql(url).close()
        raw.execute("DROP OWNED BY schema_user")
        raw.execute("DROP ROLE schema_user")
    assert name in database


@pytest.mark.parametrize("name", ["", "x" * 64, "a\0b", "pg_temp", "pg_x", 5, "a\nb", "\ud800"])
def test_names_that_are_refused(postgres_url, name):
    engine = sa.create_engine(postgres_url)
    with pytest.raises(ValidationError) as caught:
        SQLStore(engine, schema=name)
    assert caught.value.field == "schema"
    engine.dispose()


def test_databases_without_schemas(sqlite_path, mariadb_url):
    for engine in (sqlite_engine(sqlite_path), sa.create_engine(mariadb_url)):
        with pytest.raises(ValidationError, match="no schemas") as caught:
            SQLStore(engine, schema="ledger")
        assert caught.value.field == "schema"
        engine.dispose()
    for url in (f"sqlite:///{sqlite_path}", mariadb_url):
        with pytest.raises(ValidationError, match=r"schema|options"):
            open_sql(f"{url}?schema=ledger")


def test_an_engine_with_a_schema_map_of_its_own(database):
    # The map belongs to the host's statements.
    engine = sa.create_engine(database, execution_options={"schema_translate_map": {None: "host"}})
    with SQLStore(engine, schema="ledger") as store:
        work_with(store)
    assert tables_of(database)["ledger"] == {*TABLES, VERSION_TABLE}
    engine.dispose()


def test_the_command_line_in_a_schema(database):
    url = in_schema(database, "a b")

    def run(*words):
        result = subprocess.run(
            [sys.executable, "-m", "taskstore", "--url", url, *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    run("db", "upgrade")
    run("run", "--", "true")
    assert json.loads(run("db", "check", "--json"))["ok"]
    assert len(json.loads(run("list", "--json"))["tasks"]) == 1
    run("verify")
    run("db", "downgrade", "base", "--yes")
    assert tables_of(database)["a b"] <= {VERSION_TABLE}


def test_a_schema_behind_a_pooler(database):
    pooler = Pooler(database)
    try:
        before = pooler.ask("SHOW search_path")
        with open_sql(pooler.url("?schema=ledger")) as store:
            work_with(store)
        assert pooler.ask("SHOW search_path") == before
        assert tables_of(database)["public"] == set()
    finally:
        pooler.close()


def test_the_migrations_as_a_script(database, tmp_path):
    script = subprocess.run(
        [sys.executable, "-m", "alembic", "-x", f"url={in_schema(database, 'a b')}",
         "upgrade", "head", "--sql"],
        capture_output=True,
        text=True,
        check=True,
        cwd=migrate.migrations_path().parent,
    ).stdout  # fmt: skip
    assert 'SET LOCAL search_path TO "a b"' in script
    with psycopg.connect(database.replace("+psycopg", ""), autocommit=True) as raw:
        raw.execute('CREATE SCHEMA "a b"')
        raw.execute(script)
    assert tables_of(database)["a b"] == {*TABLES, VERSION_TABLE}
    assert tables_of(database)["public"] == set()
    with open_sql(in_schema(database, "a b"), migrate="never") as store:
        create(store)
