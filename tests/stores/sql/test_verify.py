"""[5] verify: the engine's check, the indexes, and every column that copies another value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.schema import CreateIndex

from taskstore.errors import CorruptStoreError, TaskStoreError
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.journal import ChangeSet, Position
from taskstore.model.query import TaskQuery
from taskstore.model.records import TaskRecord
from taskstore.stores.sql.dialects import MariaDBDatabase, open_database
from taskstore.stores.sql.dialects.base import Session
from taskstore.stores.sql.tables import ONLY_ON, metadata, tasks
from taskstore.testing.factories import create, make_put, update

KEEP = CompactionPolicy(force=True, history_s=10**9)
ERASE = CompactionPolicy(erase_deleted=True)


def run(url: str, *statements: str) -> None:
    database = open_database(url)
    with database.engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    database.close()


def problems_of(store: Any) -> str:
    return "\n".join(store.verify().problems)


@pytest.fixture
def filled(store):
    """Three tasks, a snapshot, and three more tasks."""
    for number in range(6):
        record = create(
            store,
            owner_key="me",
            run_id=f"run-{number}",
            run_digest="digest",
            child_session_key="child",
            requester_session_key="requester",
            parent_task_id="parent",
        )
        if number == 2:
            store.compact(KEEP)
    update(store, record, label="x")
    assert store.verify().problems == ()
    return store


# -- indexes ----------------------------------------------------------------

HIDE = "UPDATE pg_index SET indisready = {} WHERE indexrelid = '{}'::regclass"
SQLITE_ROW = "SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master WHERE name = '{}'"


def index_names(dialect: str) -> list[str]:
    return sorted(
        str(index.name)
        for table in metadata.sorted_tables
        for index in table.indexes
        if dialect in ONLY_ON.get(str(index.name), {dialect})
    )


@pytest.mark.parametrize("name", index_names("postgresql"))
def test_a_row_that_an_index_does_not_give_on_postgresql(name, postgres_url, open_):
    with open_(postgres_url) as store:
        create(store, owner_key="me")
    run(postgres_url, HIDE.format("false", name))
    with open_(postgres_url) as store:
        keys = ("child_session_key", "requester_session_key", "parent_task_id", "run_digest")
        create(store, owner_key="me", run_id="run", **dict.fromkeys(keys, "key"))
    run(postgres_url, HIDE.format("true", name))
    with open_(postgres_url) as store:
        assert f"the index {name} gives " in problems_of(store)
        run(postgres_url, f"REINDEX INDEX {name}")
        assert store.verify().ok


@pytest.mark.parametrize("name", index_names("sqlite"))
def test_a_row_that_an_index_does_not_give_on_sqlite(name, sqlite_path, open_):
    def edit(change: Callable[[sa.Connection], object]) -> None:
        database = open_database(url)
        with database.engine.begin() as connection:
            connection.exec_driver_sql("PRAGMA writable_schema = ON")
            change(connection)
            version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
            connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
        database.close()

    def hide(connection: sa.Connection) -> None:
        hidden.append(tuple(connection.exec_driver_sql(SQLITE_ROW.format(name)).one()))
        connection.exec_driver_sql(f"DELETE FROM sqlite_master WHERE name = '{name}'")

    url, hidden = f"sqlite:///{sqlite_path}", []
    with open_(url) as store:
        create(store, owner_key="me")
    edit(hide)
    with open_(url) as store:
        assert f"the index {name} is missing" in problems_of(store)
        keys = ("child_session_key", "requester_session_key", "parent_task_id", "run_digest")
        create(store, owner_key="me", run_id="run", **dict.fromkeys(keys, "key"))
    insert = "INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)"
    edit(lambda connection: connection.exec_driver_sql(insert, hidden[0]))
    with open_(url) as store:
        assert f"missing from index {name}" in problems_of(store)


@pytest.mark.parametrize("dialect", ["postgresql", "mariadb"])
def test_every_index_of_a_server_is_read(dialect, request, open_, monkeypatch):
    """The plan of each comparison names the index that it reads."""
    url = request.getfixturevalue({"postgresql": "postgres_url"}.get(dialect, "mariadb_url"))
    plans: list[str] = []
    select = Session.select

    def explain(session: Session, query: Any) -> Any:
        statement, values = session._compiled(query)
        if "crc32" in statement or "hashtextextended" in statement:
            plans.append(str(session.rows(f"EXPLAIN {statement}", values)))
        return select(session, query)

    with open_(url) as store:
        for _ in range(3):
            update(store, create(store, owner_key="me"), label="x")
        monkeypatch.setattr(Session, "select", explain)
        assert store.verify().problems == ()
    names = index_names(dialect)
    assert len(plans) == 2 * len(names)
    assert [name for name in names if not any(name in plan for plan in plans[::2])] == []
    assert not any(name in plan for name in names for plan in plans[1::2])


def test_a_missing_index_is_a_problem_on_mariadb(mariadb_url, open_):
    with open_(mariadb_url) as store:
        create(store)
        [index] = (index for index in tasks.indexes if index.name == "ix_tasks_owner")
        run(mariadb_url, "DROP INDEX ix_tasks_owner ON tasks")
        try:
            assert "ix_tasks_owner" in problems_of(store)
        finally:  # other tests use the same tables
            run(mariadb_url, str(CreateIndex(index).compile(dialect=MariaDBDatabase.sa_dialect)))
        assert problems_of(store) == ""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("VARCHAR(255) NOT NULL, \n\trevision", "VARBHAR(255) NOT NULL, \n\trevision", "task_id"),
        ("owner_key VARCHAR", "owner_key VARCHBR", "column owner_key of tasks"),
        ("(owner_key, created_at, task_id)", "(owner_key, created_at DESC, task_id)", "ix_tasks_o"),
        ("'queued', 'running'", "'queued', 'runninh'", "index ix_tasks_active is damaged"),
        ("CREATE UNIQUE INDEX", "CREATE INDEX", "index uq_tasks_booking is damaged"),
    ],
)
def test_a_damaged_declaration_on_sqlite(old, new, problem, sqlite_path, open_):
    url = f"sqlite:///{sqlite_path}"
    with open_(url) as store:
        create(store, owner_key="me")
    database = open_database(url)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA writable_schema = ON")
        changed = connection.exec_driver_sql(
            "UPDATE sqlite_master SET sql = replace(sql, ?, ?)", (old, new)
        )
        assert changed.rowcount
        connection.exec_driver_sql("PRAGMA schema_version = 1000")
    database.close()
    with open_(url) as store:
        assert problem in problems_of(store)


# -- columns ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE task_journal SET at = at + 1 WHERE seq = 5", "seq 5: the commit id"),
        ("UPDATE task_journal SET at = at - 1 WHERE seq = 5", "seq 5: the commit id"),
        (
            "UPDATE task_journal SET commit_id = replace(replace(commit_id, '1', '2'), 'a', 'b')",
            "the commit id",
        ),
        ("UPDATE task_journal SET revision = 7 WHERE seq = 5", "seq 5"),
        ("UPDATE task_journal SET kind = 'deleted' WHERE seq = 5", "tasks has tasks not in the"),
        ("UPDATE taskstore_head SET last_at = last_at + 1", "the table tasks has the time"),
        ("UPDATE taskstore_head SET head_seq = 8", "the journal ends at seq 7"),
        ("UPDATE task_snapshots SET at = at - 1", "snapshot at seq 3 has the time"),
        ("UPDATE task_snapshots SET records = records + 1", "the records of the chunks is 3"),
        ("UPDATE task_snapshots SET set_aside = 1", "the quarantined of the chunks is 0"),
        ("UPDATE task_snapshots SET size = size + 1", "the size of the chunks is"),
        ("UPDATE task_snapshots SET checksum = checksum + 1", "the checksum of the chunks is"),
        ("UPDATE tasks SET created_at = created_at + 1", "the column created_at of task"),
        ("UPDATE tasks SET run_id = 'other' WHERE run_id = 'run-1'", "the column run_id of task"),
        ("UPDATE tasks SET revision = 9 WHERE run_id = 'run-1'", "the column revision of task"),
    ],
)
def test_a_wrong_column_is_a_problem(statement, problem, filled, url):
    run(url, statement)
    assert problem in problems_of(filled)


def test_a_snapshot_below_the_floor_is_a_problem(filled, url):
    filled.compact(KEEP)
    run(url, "UPDATE taskstore_head SET floor = 8")
    assert "the snapshot at seq 3 is below the floor 8" in problems_of(filled)


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE task_journal SET at = at - 1 WHERE seq = 7", "seq 7: the commit id"),
        ("UPDATE task_journal SET commit_id = replace(commit_id, 'a', 'b')", "seq 7: the commit"),
        ("UPDATE task_journal SET revision = 1 WHERE seq = 7", "row of the trimmed entry"),
        ("UPDATE task_journal SET task_id = 'x' WHERE seq = 7", "row of the trimmed entry"),
        ("UPDATE task_journal SET kind = 'deletee' WHERE seq = 7", "unknown kind"),
        ("UPDATE task_snapshots SET at = at + 1", "the snapshot at seq 7 has the time"),
    ],
)
def test_the_row_before_the_floor_is_checked(statement, problem, filled, url):
    # The replacement must change the commit id.
    create(filled)
    while "a" not in filled.read_journal(filled.head() - 1, 1)[0].commit_id:
        create(filled)
    seq = filled.head()
    filled.compact(ERASE)
    assert filled.verify().problems == ()
    run(url, statement.replace("7", str(seq)))
    assert problem.replace("7", str(seq)) in problems_of(filled)


def test_at_most_100_problems_are_listed(store, url):
    store.apply(ChangeSet([make_put() for _ in range(150)], Position(0)))
    run(url, "UPDATE tasks SET owner_key = 'other'")
    problems = store.verify().problems
    assert len(problems) == 101
    assert problems[-1] == "and 50 more problems"


# -- values of another type ---------------------------------------------------

SQLITE = SQLiteDialect()
COLUMNS = [
    (table.name, column.name)
    for table in metadata.sorted_tables
    for column in table.columns
    # An INTEGER PRIMARY KEY of SQLite is always an integer.
    if not (column.primary_key and isinstance(column.type.dialect_impl(SQLITE), sa.Integer))
]


@pytest.mark.parametrize("value", ["'text'", "1.5", "x'ff00'", "CAST(x'ff' AS TEXT)", "-1"])
@pytest.mark.parametrize("table", sorted(metadata.tables))
def test_no_value_raises_an_error_of_the_driver(table, value, sqlite_path, open_):
    """A damaged header of a row can change the type of any value."""
    url = f"sqlite:///{sqlite_path}"
    for column in [name for other, name in COLUMNS if other == table]:
        sqlite_path.unlink(missing_ok=True)
        with open_(url) as store:
            first, second = create(store, owner_key="me"), create(store)
            store.compact(KEEP)
            last = f"rowid = (SELECT max(rowid) FROM {table})"
            run(url, f"UPDATE {table} SET {column} = {value} WHERE {last}")
            call_everything(store, first, second)


def call_everything(store: Any, first: TaskRecord, second: TaskRecord) -> None:
    """Call each method of a damaged store; only errors of taskstore are allowed."""
    for call in (
        store.verify,
        store.load_snapshot,
        store.head,
        store.floor,
        lambda: store.read_journal(0, 10),
        lambda: store.read_history(first.task_id),
        lambda: store.read_snapshot(10),
        lambda: store.query(TaskQuery(owner_key="me")),
        lambda: store.query(TaskQuery(limit=1)),
        lambda: update(store, second, label="x"),
        lambda: create(store),
        lambda: store.compact(KEEP),
    ):
        with suppress(TaskStoreError):
            call()


def test_a_value_that_is_too_long_is_damage(store, monkeypatch):
    """A damaged length can be larger than the memory; drivers raise MemoryError."""
    create(store)
    undecodable = UnicodeDecodeError("utf-8", b"", 0, 1, "")
    for error in (MemoryError(), OverflowError("too large"), undecodable):

        def rows(*_: object, error: Exception = error) -> Any:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(Session, "rows", rows)
            with pytest.raises(CorruptStoreError) as caught:
                store.load_snapshot()
        assert caught.value.where == store.location
        assert caught.value.hint
