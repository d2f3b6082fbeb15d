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
from taskstore.stores.sql import SQLStore
from taskstore.stores.sql.dialects import MariaDBDatabase, open_database
from taskstore.stores.sql.dialects.base import DriverSession
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


@pytest.mark.parametrize("name", [*index_names("postgresql"), "pk_tasks", "pk_task_journal"])
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
    select = DriverSession.select

    def explain(session: DriverSession, query: Any) -> Any:
        statement, values = session._compiled(query)
        if "crc32" in statement or "hashtextextended" in statement:
            plans.append(str(session.rows(f"EXPLAIN {statement}", values)))
        return select(session, query)

    with open_(url) as store:
        for _ in range(3):
            update(store, create(store, owner_key="me"), label="x")
        monkeypatch.setattr(DriverSession, "select", explain)
        assert store.verify().problems == ()
    names = index_names(dialect)
    if dialect == "postgresql":
        names += [f"pk_{name}" for name in metadata.tables]
        # One pass over the index, and one pass over the table; no pass keeps the rows.
        assert [plan for plan in plans if "Sort" in plan] == []
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


# -- declarations -----------------------------------------------------------

BOOKING = "the index uq_tasks_booking of the table tasks"
OWNER = "the index ix_tasks_owner of the table tasks"
VALID = "UPDATE pg_index SET indisvalid = {} WHERE indexrelid = 'uq_tasks_booking'::regclass"
PG_BOOKING = (
    "CREATE UNIQUE INDEX uq_tasks_booking ON tasks (run_id, booking) WHERE run_id IS NOT NULL"
)
PG_OWNER = "CREATE INDEX ix_tasks_owner ON tasks (owner_key, created_at, task_id)"


@pytest.mark.parametrize(
    ("changes", "restore", "problem"),
    [
        (["DROP INDEX ix_tasks_owner"], [PG_OWNER], f"{OWNER} is missing"),
        (
            [
                "DROP INDEX ix_tasks_owner",
                "CREATE INDEX ix_tasks_owner ON tasks (owner_key, created_at DESC, task_id)",
            ],
            ["DROP INDEX ix_tasks_owner", PG_OWNER],
            f"{OWNER} is (owner_key, created_at DESC, task_id), but must be (owner_key, created_at",
        ),
        (
            [
                "DROP INDEX ix_tasks_owner",
                'CREATE INDEX ix_tasks_owner ON tasks (owner_key COLLATE "default", created_at)',
            ],
            ["DROP INDEX ix_tasks_owner", PG_OWNER],
            f"{OWNER} is (owner_key COLLATE default, created_at)",
        ),
        (
            ["DROP INDEX uq_tasks_booking", PG_BOOKING.replace("UNIQUE ", "")],
            ["DROP INDEX uq_tasks_booking", PG_BOOKING],
            f"{BOOKING} is (run_id, booking) WHERE run_id IS NOT NULL, but must be UNIQUE (run_id",
        ),
        (
            ["DROP INDEX uq_tasks_booking", f"{PG_BOOKING} AND run_id <> 'x'"],
            ["DROP INDEX uq_tasks_booking", PG_BOOKING],
            f"{BOOKING} is UNIQUE (run_id, booking) WHERE ..., but",
        ),
        (
            ["DROP INDEX uq_tasks_booking", PG_BOOKING.partition(" WHERE")[0]],
            ["DROP INDEX uq_tasks_booking", PG_BOOKING],
            f"{BOOKING} is UNIQUE (run_id, booking), but",
        ),
        (
            [VALID.format("false")],
            [VALID.format("true")],
            f"{BOOKING} is UNIQUE (run_id, booking, invalid)",
        ),
        (
            ["ALTER TABLE tasks DROP CONSTRAINT pk_tasks"],
            ["ALTER TABLE tasks ADD CONSTRAINT pk_tasks PRIMARY KEY (task_id)"],
            "the primary key of the table tasks is missing: it must be UNIQUE (task_id)",
        ),
        (
            ["ALTER TABLE tasks ALTER task_id TYPE varchar(255)"],
            ['ALTER TABLE tasks ALTER task_id TYPE varchar(255) COLLATE "C"'],
            "the column task_id of the table tasks is VARCHAR(255) COLLATE default NOT NULL, but",
        ),
        (
            ["ALTER TABLE tasks ALTER revision TYPE integer"],
            ["ALTER TABLE tasks ALTER revision TYPE bigint"],
            "the column revision of the table tasks is INTEGER NOT NULL, but must be BIGINT NOT",
        ),
        (
            ["ALTER TABLE tasks ALTER status DROP NOT NULL"],
            ["ALTER TABLE tasks ALTER status SET NOT NULL"],
            "the column status of the table tasks is VARCHAR(32) COLLATE C, but",
        ),
    ],
)
def test_a_changed_declaration_on_postgresql(changes, restore, problem, postgres_url, open_):
    check_changed_declaration(postgres_url, changes, restore, problem, open_)


def column(name: str, type_: str) -> str:
    charset = "CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin"
    return f"ALTER TABLE tasks MODIFY {name} {type_} {charset}"


def index(columns: str, kind: str = "INDEX", name: str = "ix_tasks_owner") -> str:
    return f"ALTER TABLE tasks DROP INDEX {name}, ADD {kind} {name} ({columns})"


MARIADB_OWNER = index("owner_key, created_at, task_id")
MARIADB_BOOKING = index("run_id, booking", "UNIQUE INDEX", "uq_tasks_booking")
TASK_ID = column("task_id", "VARCHAR(255)") + " NOT NULL"


@pytest.mark.parametrize(
    ("change", "restore", "problem"),
    [
        (
            "DROP INDEX ix_tasks_owner ON tasks",
            "CREATE INDEX ix_tasks_owner ON tasks (owner_key, created_at, task_id)",
            f"{OWNER} is missing",
        ),
        (
            index("run_id, booking", name="uq_tasks_booking"),
            MARIADB_BOOKING,
            f"{BOOKING} is (run_id, booking), but must be UNIQUE (run_id, booking)",
        ),
        (
            index("run_id(10), booking", "UNIQUE INDEX", "uq_tasks_booking"),
            MARIADB_BOOKING,
            f"{BOOKING} is UNIQUE (run_id(10), booking), but",
        ),
        (index("owner_key, task_id"), MARIADB_OWNER, f"{OWNER} is (owner_key, task_id), but"),
        (
            "ALTER TABLE tasks ALTER INDEX ix_tasks_owner IGNORED",
            "ALTER TABLE tasks ALTER INDEX ix_tasks_owner NOT IGNORED",
            f"{OWNER} is (owner_key, created_at, task_id, ignored)",
        ),
        (
            "ALTER TABLE tasks DROP PRIMARY KEY",
            "ALTER TABLE tasks ADD PRIMARY KEY (task_id)",
            "the primary key of the table tasks is missing",
        ),
        # Equal to the default of the table, and without the collation in SHOW CREATE TABLE.
        (
            TASK_ID.replace("nopad_bin", "general_ci"),
            TASK_ID,
            "VARCHAR(255) COLLATE utf8mb4_general_ci NOT NULL, but must be VARCHAR(255)",
        ),
        (TASK_ID.replace("nopad_bin", "bin"), TASK_ID, "VARCHAR(255) COLLATE utf8mb4_bin NOT NULL"),
        (
            column("run_id", "VARCHAR(255)").replace("nopad_bin", "general_nopad_ci"),
            column("run_id", "VARCHAR(255)"),
            "the column run_id of the table tasks is VARCHAR(255) COLLATE utf8mb4_",
        ),
        (column("owner_key", "VARCHAR(100)"), column("owner_key", "VARCHAR(255)"), "VARCHAR(100)"),
        (
            "ALTER TABLE tasks MODIFY revision INT UNSIGNED NOT NULL",
            "ALTER TABLE tasks MODIFY revision BIGINT NOT NULL",
            "the column revision of the table tasks is INTEGER UNSIGNED NOT NULL, but",
        ),
        (
            "ALTER TABLE tasks MODIFY payload BLOB NOT NULL",
            "ALTER TABLE tasks MODIFY payload MEDIUMBLOB NOT NULL",
            "the column payload of the table tasks is BLOB NOT NULL, but must be MEDIUMBLOB NOT",
        ),
    ],
)
def test_a_changed_declaration_on_mariadb(change, restore, problem, mariadb_url, open_):
    check_changed_declaration(mariadb_url, [change], [restore], problem, open_)


def check_changed_declaration(
    url: str, changes: list[str], restore: list[str], problem: str, open_: Callable[..., Any]
) -> None:
    with open_(url) as store:
        create(store, owner_key="me", run_id="run", run_digest="digest")
        assert store.verify().problems == ()
    run(url, *changes)
    try:
        with open_(url) as store:
            assert problem in problems_of(store)
    finally:  # other tests use the same tables
        run(url, *restore)
    with open_(url) as store:
        assert store.verify().problems == ()


@pytest.mark.parametrize("schema", [None, 'a "ledger"'])
def test_a_host_keeps_tables_and_indexes_beside_the_ledger_on_postgresql(schema, postgres_server):
    engine = sa.create_engine(postgres_server.new_database())
    with engine.begin() as connection:
        connection.exec_driver_sql('CREATE TABLE "Tasks" (task_id int PRIMARY KEY, title text)')
        if schema is not None:
            connection.exec_driver_sql("CREATE TABLE tasks (task_id int, owner_key text)")
            connection.exec_driver_sql("CREATE INDEX ix_tasks_owner ON tasks (task_id)")
    with SQLStore(engine, schema=schema) as store:
        create(store, owner_key="me")
        name = "tasks" if schema is None else '"a ""ledger""".tasks'
        with engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE INDEX of_the_host ON {name} (revision)")
            connection.exec_driver_sql(f"ALTER TABLE {name} ADD of_the_host int")
        assert store.verify().problems == ()
        with store.exclusive():
            assert store.verify().problems == ()
    engine.dispose()


def test_a_host_keeps_tables_and_indexes_beside_the_ledger_on_mariadb(mariadb_server):
    engine = sa.create_engine(mariadb_server.new_database())
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE `Tasks` (task_id int PRIMARY KEY, owner_key text)")
        connection.exec_driver_sql("CREATE INDEX ix_tasks_owner ON `Tasks` (task_id)")
    with SQLStore(engine) as store:
        create(store, owner_key="me")
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE INDEX of_the_host ON tasks (revision)")
            connection.exec_driver_sql("ALTER TABLE tasks ADD of_the_host int")
        assert store.verify().problems == ()
        with store.exclusive():
            assert store.verify().problems == ()
    engine.dispose()


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
            patched.setattr(DriverSession, "rows", rows)
            with pytest.raises(CorruptStoreError) as caught:
                store.load_snapshot()
        assert caught.value.where == store.location
        assert caught.value.hint
