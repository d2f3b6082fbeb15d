"""Migrations on a database where each schema change commits by itself."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from alembic import op
from sqlkit import in_process, output_of

from taskstore import open_store
from taskstore.errors import SchemaMismatchError, StoreBusyError
from taskstore.stores.sql import migrate
from taskstore.stores.sql.dialects import mariadb
from taskstore.stores.sql.tables import SCHEMA_EPOCH, TABLES
from taskstore.testing.factories import create

STEPS = ("create_table", "create_index", "bulk_insert")


class PowerCutError(Exception):
    pass


@pytest.fixture
def url(mariadb_server) -> str:
    """The URL of an empty database without a ledger."""
    return mariadb_server.new_database()


@pytest.fixture
def engine(url) -> Iterator[sa.Engine]:
    engine = migrate.database_for_url(url).engine
    yield engine
    engine.dispose()


def tables_of(engine: sa.Engine) -> set[str]:
    return set(sa.inspect(engine).get_table_names())


def execute(engine: sa.Engine, statement: str) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)


def cut_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Make a migration fail after this many of its steps."""
    left = [count]
    for name in STEPS:
        real = getattr(op, name)

        def step(*arguments, real=real, **options):
            if not left[0]:
                raise PowerCutError
            left[0] -= 1
            return real(*arguments, **options)

        monkeypatch.setattr(op, name, step)


@pytest.mark.parametrize("steps", range(15))
def test_a_migration_that_is_cut_short_is_completed(url, engine, monkeypatch, steps):
    cut_after(monkeypatch, steps)
    with pytest.raises(PowerCutError):
        open_store(url)
    monkeypatch.undo()
    for options in ({"migrate": "never"}, {"read_only": True}):
        reason = "an incomplete ledger" if steps else "contains no ledger"
        with pytest.raises(SchemaMismatchError, match=reason):
            open_store(url, **options)
    with open_store(url) as store:
        create(store)
        assert store.verify().ok
    assert migrate.check(engine) == []
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM taskstore_head").scalar() == 1


def test_that_was_all_but_the_version(url, engine, monkeypatch):
    """One step more than a migration has: nothing is interrupted."""
    cut_after(monkeypatch, 16)
    open_store(url).close()
    monkeypatch.undo()
    execute(engine, f"DELETE FROM {migrate.VERSION_TABLE}")
    with open_store(url) as store:
        ledger = store._head().ledger_id
    execute(engine, f"DELETE FROM {migrate.VERSION_TABLE}")
    with open_store(url) as store:
        assert store._head().ledger_id == ledger


def test_records_are_never_taken_for_what_was_left(url, engine):
    with open_store(url) as store:
        create(store)
    execute(engine, f"DELETE FROM {migrate.VERSION_TABLE}")
    for action in (lambda: open_store(url), lambda: migrate.upgrade(engine)):
        with pytest.raises(SchemaMismatchError, match="did not create"):
            action()
    execute(engine, f"INSERT INTO {migrate.VERSION_TABLE} VALUES ('0001')")
    with open_store(url) as store:
        assert store.head() == 1


def test_an_empty_table_of_another_program_stays(url, engine):
    execute(engine, "CREATE TABLE tasks (task_id VARCHAR(255) PRIMARY KEY)")
    for action in (lambda: open_store(url), lambda: migrate.upgrade(engine)):
        with pytest.raises(SchemaMismatchError, match=r"did not create \(tasks\)"):
            action()
    assert not tables_of(engine) & (TABLES - {"tasks"})


def test_a_downgrade_that_is_cut_short_is_done_again(url, engine, monkeypatch):
    open_store(url).close()
    real, left = op.drop_table, [2]

    def drop(*arguments, **options):
        if not left[0]:
            raise PowerCutError
        left[0] -= 1
        real(*arguments, **options)

    monkeypatch.setattr(op, "drop_table", drop)
    with pytest.raises(PowerCutError):
        migrate.downgrade(engine, "base")
    monkeypatch.undo()
    with pytest.raises(SchemaMismatchError, match="missing: task_set_aside, taskstore_head"):
        open_store(url)
    migrate.downgrade(engine, "base")
    assert tables_of(engine) == {migrate.VERSION_TABLE}
    with open_store(url) as store:
        create(store)


KILLED = """
import os, signal, sys
from alembic import op
from taskstore import open_store
real = op.create_index
def create_index(name, *arguments, **options):
    real(name, *arguments, **options)
    if name == "uq_tasks_booking":
        os.kill(os.getpid(), signal.SIGKILL)
op.create_index = create_index
open_store(sys.argv[1])
"""

OPEN = """
import sys
from taskstore import open_store
from taskstore.testing.factories import create
with open_store(sys.argv[1]) as store:
    print(create(store).task_id)
"""


def test_one_is_killed_while_others_wait(url, engine):
    victim = in_process(KILLED, url)
    others = [in_process(OPEN, url) for _ in range(3)]
    # If another process was first, there was no step to be killed at.
    assert victim.wait(60) in (-signal.SIGKILL, 0)
    victim.communicate()
    made = {output_of(process).strip() for process in others}
    with open_store(url) as store:
        assert set(store.load_snapshot().records) == made
        assert store.verify().ok
    assert migrate.check(engine) == []


def test_another_process_finishes_during_the_check(url, monkeypatch):
    look, made = migrate._is_unfinished, []
    half_made = migrate.SchemaState(None, None, TABLES)

    def unfinished(connection, state):
        monkeypatch.undo()
        with open_store(url) as other:
            made.append(create(other).task_id)
        # The content of the tables is read after their revision.
        return look(connection, state)

    monkeypatch.setattr(migrate, "_is_unfinished", unfinished)
    monkeypatch.setattr(migrate, "_state", lambda _: half_made)
    with open_store(url) as store:
        assert list(store.load_snapshot().records) == made


def test_an_upgrade_waits_for_the_lock_owner(url, engine, monkeypatch):
    monkeypatch.setattr(mariadb, "LOCK_TIMEOUT_S", 1)
    lock = "CONCAT('taskstore.', MD5(DATABASE()))"
    with engine.connect() as connection:
        assert connection.exec_driver_sql(f"SELECT GET_LOCK({lock}, 0)").scalar() == 1
        with pytest.raises(StoreBusyError, match="changing the schema"):
            open_store(url)
        monkeypatch.undo()
        opened = threading.Thread(target=lambda: open_store(url).close())
        opened.start()
        assert not tables_of(engine) & TABLES
        connection.exec_driver_sql(f"DO RELEASE_LOCK({lock})")
        opened.join(30)
    assert migrate.check(engine) == []


CONTRACTING = '''
"""Fewer columns."""
from alembic import op
revision = "0002"
down_revision = "0001"
def upgrade():
    op.execute("UPDATE taskstore_head SET schema_epoch = 2")
    op.execute("ALTER TABLE tasks DROP COLUMN IF EXISTS parent_flow_id")
    import os
    if os.environ.get("TASKSTORE_CUT"):
        raise RuntimeError("power cut")
'''


def test_old_writers_are_refused_before_anything_is_dropped(url, engine, tmp_path, monkeypatch):
    """[DESIGN 8] The epoch is raised in a transaction of its own, before the schema changes."""
    old = open_store(url)
    record = create(old)
    scripts = tmp_path / "migrations"
    shutil.copytree(migrate.migrations_path(), scripts)
    (scripts / "versions" / "0002_contracting.py").write_text(CONTRACTING)
    monkeypatch.setattr(migrate, "migrations_path", lambda: scripts)
    monkeypatch.setenv("TASKSTORE_CUT", "1")
    with pytest.raises(RuntimeError, match="power cut"):
        migrate.upgrade(engine)
    with pytest.raises(SchemaMismatchError, match=f"epoch {SCHEMA_EPOCH + 1}"):
        create(old)
    assert list(old.load_snapshot().records) == [record.task_id]
    old.close()
    assert migrate.current(engine) == "0001"
    with pytest.raises(SchemaMismatchError, match="too new"):
        open_store(url)
    # An idempotent migration is completed by a second run.
    monkeypatch.delenv("TASKSTORE_CUT")
    migrate.upgrade(engine)
    assert migrate.current(engine) == "0002"
