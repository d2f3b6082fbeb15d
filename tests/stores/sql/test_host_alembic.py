"""Alembic of a host leaves the tables of the ledger alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from test_host_engine import sqlite_engine

from taskstore import alembic_include_object
from taskstore.stores.sql import SQLStore
from taskstore.stores.sql.tables import TABLES, VERSION_TABLE, metadata
from taskstore.testing import create


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def engine(request, sqlite_path):
    if request.param == "sqlite":
        engine = sqlite_engine(sqlite_path)
    else:
        server = request.getfixturevalue(
            {"postgresql": "postgres_server"}.get(request.param, "mariadb_server")
        )
        engine = sa.create_engine(server.new_database())
    yield engine
    engine.dispose()


def host_metadata() -> sa.MetaData:
    host = sa.MetaData()
    sa.Table(
        "users",
        host,
        sa.Column("id", sa.Integer, sa.Identity(), primary_key=True),
        sa.Column("name", sa.String(50), index=True, unique=True),
    )
    return host


def differences(engine, host, include_object=alembic_include_object, **options):
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"include_object": include_object, **options}
        )
        return compare_metadata(context, host)


def test_the_ledger_is_left_alone(engine):
    host = host_metadata()
    host.create_all(engine)
    with SQLStore(engine) as store:
        create(store)
    plain = differences(engine, host, lambda *_: True)
    dropped = {item[1].name for item in plain if item[0] == "remove_table"}
    assert dropped == {*TABLES, VERSION_TABLE}
    assert differences(engine, host) == []
    if engine.dialect.name == "postgresql":  # on MariaDB, the schemas are all databases
        assert differences(engine, host, include_schemas=True, compare_type=True) == []


def test_the_hosts_own_differences_are_found(engine):
    host = host_metadata()
    host.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE old_table (id INTEGER)")
    with SQLStore(engine) as store:
        create(store)
    sa.Table("new_table", host, sa.Column("id", sa.Integer, primary_key=True))
    host.tables["users"].append_column(sa.Column("email", sa.String(50)))
    kinds = {item[0] for item in differences(engine, host)}
    assert kinds == {"add_table", "remove_table", "add_column"}


def test_a_ledger_in_a_schema_beside_a_hosts_tables_of_the_same_names(postgres_server):
    engine = sa.create_engine(postgres_server.new_database())
    host = host_metadata()
    for name in ("tasks", "task_journal", "taskstore_head"):
        sa.Table(
            name, host, sa.Column("id", sa.Integer, primary_key=True), sa.Column("title", sa.Text)
        )
    host.create_all(engine)
    with SQLStore(engine, schema="ledger") as store:
        create(store)
    for options in ({}, {"include_schemas": True}):
        assert differences(engine, host, **options) == []
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE tasks DROP COLUMN title")
    [[kind, _, table, column]] = differences(engine, host, include_schemas=True)
    assert (kind, table, column.name) == ("add_column", "tasks", "title")
    without = sa.MetaData()
    removed = [item[1].name for item in differences(engine, without, include_schemas=True)
               if item[0] == "remove_table"]  # fmt: skip
    assert sorted(removed) == ["task_journal", "tasks", "taskstore_head", "users"]
    engine.dispose()


def test_declared_tables_of_the_ledger_are_not_created(engine):
    # Some programs put the metadata of every library into target_metadata.
    host = host_metadata()
    assert {item[1].name for item in differences(engine, [host, metadata])} == {
        "users",
        "ix_users_name",
    }


def test_every_kind_of_object():
    def include(item, kind):
        name = getattr(item, "name", None)
        return alembic_include_object(item, name, kind, reflected=True, compare_to=None)

    for table in metadata.tables.values():
        assert not include(table, "table")
        assert not any(include(column, "column") for column in table.columns)
        assert not any(include(index, "index") for index in table.indexes)
        assert not any(include(one, "unique_constraint") for one in table.constraints)
    copied = metadata.tables["tasks"].to_metadata(sa.MetaData(), schema="ledger")
    assert not include(copied, "table")
    own = sa.Table("tasks", sa.MetaData(), sa.Column("task_id", sa.Integer), schema="app")
    assert include(own, "table")
    assert include(own.c.task_id, "column")
    assert include(sa.Index("ix_tasks_created", own.c.task_id), "index")
    assert include(sa.Sequence("tasks_id_seq"), "sequence")
    assert include(object(), "view")
    newer = sa.Table("taskstore_tags", sa.MetaData(), comment="taskstore: one row per tag")
    assert not include(newer, "table")


def test_the_filter_is_found_without_loading_sqlalchemy():
    code = (
        "import sys, taskstore; assert 'alembic_include_object' in dir(taskstore); "
        "from taskstore import alembic_include_object; "
        "assert not {'sqlalchemy', 'alembic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
