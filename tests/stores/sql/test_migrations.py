"""New databases, upgrades, and databases that must not be changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlkit import in_process, output_of

from taskstore.errors import SchemaMismatchError, StoreUnavailableError, ValidationError
from taskstore.stores.sql import SQLStore, migrate
from taskstore.stores.sql.dialects import open_database
from taskstore.stores.sql.tables import SCHEMA_EPOCH, SCHEMA_REVISIONS, TABLES, metadata
from taskstore.testing.factories import create, make_record

ROOT = Path(__file__).parents[3]


@pytest.fixture
def engine(empty_url):
    engine = migrate.database_for_url(empty_url).engine
    yield engine
    engine.dispose()


def tables_of(engine: sa.Engine) -> set[str]:
    return set(sa.inspect(engine).get_table_names())


def alembic(url: str, *arguments: str, env_url: bool = False) -> str:
    place = {} if env_url else {"x": ["-x", f"url={url}"]}
    process = subprocess.run(
        [sys.executable, "-m", "alembic", *place.get("x", []), *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"} | ({"TASKSTORE_URL": url} if env_url else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


# -- metadata and scripts ---------------------------------------------------


def test_the_scripts_lead_to_what_is_declared(engine):
    migrate.upgrade(engine)
    assert migrate.check(engine) == []
    assert migrate.current(engine) == SCHEMA_REVISIONS[-1]
    assert [name for name, _ in migrate.history()] == list(reversed(SCHEMA_REVISIONS))


def test_a_column_without_a_migration_is_found(engine, monkeypatch):
    migrate.upgrade(engine)
    extended = sa.MetaData()
    for table in metadata.tables.values():
        table.to_metadata(extended)
    extended.tables["tasks"].append_column(sa.Column("colour", sa.String(32)))
    monkeypatch.setattr(migrate, "metadata", extended)
    assert migrate.check(engine) == ["add column: tasks colour"]


def test_a_dropped_index_is_found(engine):
    migrate.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP INDEX ix_tasks_owner"))
    assert migrate.check(engine) == ["add index: ix_tasks_owner"]


def test_the_fresh_head_row(engine):
    migrate.upgrade(engine)
    with engine.connect() as connection:
        [row] = connection.execute(sa.select(metadata.tables["taskstore_head"])).all()
    assert len(row.ledger_id) == 32
    assert (row.head_seq, row.floor, row.last_at, row.timeline) == (0, 1, 0, 1)
    assert row.schema_epoch == SCHEMA_EPOCH
    assert (row.lease_owner, row.lease_until) == (None, None)


def test_base_drops_everything_only_if_allowed(empty_url, open_):
    store = open_(empty_url)
    create(store)
    store.close()
    engine = migrate.database_for_url(empty_url).engine
    with pytest.raises(ValidationError, match="would drop every record"):
        migrate.downgrade(engine, "base")
    assert tables_of(engine) > TABLES
    migrate.downgrade(engine, "base", allow_data_loss=True)
    assert tables_of(engine) == {migrate.VERSION_TABLE}
    assert migrate.current(engine) is None
    engine.dispose()
    # Nothing of the ledger is left: the next store creates a new one.
    assert open_(empty_url).head() == 0


def test_an_empty_ledger_may_be_dropped(engine):
    migrate.upgrade(engine)
    migrate.downgrade(engine, "base")
    assert not tables_of(engine) & TABLES


# -- by hand, in a checkout -------------------------------------------------


def test_alembic_in_the_checkout(empty_url, open_):
    alembic(empty_url, "upgrade", "head")
    assert "0001 (head)" in alembic(empty_url, "current")
    assert "No new upgrade operations" in alembic(empty_url, "check")
    create(open_(empty_url, migrate="never"))


def test_alembic_takes_the_url_of_the_environment(tmp_path):
    url = f"sqlite:///{tmp_path}/100% of%20it@home.db"
    alembic(url, "upgrade", "head", env_url=True)
    assert (tmp_path / "100% of%20it@home.db").stat().st_mode & 0o777 == 0o600


def test_alembic_writes_sql_without_a_database():
    printed = alembic("postgresql+psycopg://nowhere/db", "upgrade", "head", "--sql")
    assert 'task_id VARCHAR(255) COLLATE "C" NOT NULL' in printed


# -- opening ----------------------------------------------------------------


def test_never_means_never(empty_url, open_):
    with pytest.raises(SchemaMismatchError, match="contains no ledger") as caught:
        open_(empty_url, migrate="never")
    assert caught.value.found is None
    assert caught.value.needed == SCHEMA_REVISIONS[-1]
    assert caught.value.hint is not None
    assert "taskstore db upgrade --url" in caught.value.hint


def test_reading_makes_no_ledger(empty_url, open_):
    with pytest.raises((SchemaMismatchError, StoreUnavailableError)):
        open_(empty_url, read_only=True)


def test_a_database_behind_is_left_for_the_operator(url, open_, monkeypatch):
    open_(url).close()
    for module in ("migrate.SCHEMA_REVISIONS",):
        monkeypatch.setattr(f"taskstore.stores.sql.{module}", ("0001", "0002"))
    with pytest.raises(
        SchemaMismatchError, match="0001, but this version of taskstore needs 0002"
    ) as caught:
        open_(url)
    assert (caught.value.found, caught.value.needed) == ("0001", "0002")
    assert "taskstore db upgrade" in str(caught.value)


def set_revision(url: str, revision: str, epoch: int) -> None:
    database = open_database(url)
    with database.engine.begin() as connection:
        connection.execute(
            sa.text(f"UPDATE {migrate.VERSION_TABLE} SET version_num = :to"), {"to": revision}
        )
        connection.execute(sa.text("UPDATE taskstore_head SET schema_epoch = :to"), {"to": epoch})
    database.close()


def test_a_database_ahead_by_expanding_migrations_is_used(empty_url, open_):
    open_(empty_url).close()
    set_revision(empty_url, "0007", SCHEMA_EPOCH)
    store = open_(empty_url)
    create(store)
    assert any("0007" in notice for notice in store.report().notices)


def test_a_database_of_a_higher_epoch_is_refused_untouched(tmp_path, open_):
    url = f"sqlite:///{tmp_path}/tasks.db"
    open_(url).close()
    set_revision(url, "0007", SCHEMA_EPOCH + 1)
    before = (tmp_path / "tasks.db").read_bytes()
    for options in ({}, {"migrate": "never"}, {"read_only": True}):
        with pytest.raises(SchemaMismatchError, match="too new"):
            open_(url, **options)
    assert (tmp_path / "tasks.db").read_bytes() == before


def test_an_epoch_raised_under_a_writer_stops_its_next_write(empty_url, open_):
    store = open_(empty_url)
    record = create(store)
    set_revision(empty_url, "0007", SCHEMA_EPOCH + 1)
    with pytest.raises(SchemaMismatchError, match="epoch 2") as caught:
        create(store)
    assert caught.value.hint == "upgrade taskstore"
    assert list(store.load_snapshot().records) == [record.task_id]


def test_foreign_tables_with_the_names_of_a_ledger(empty_url, open_):
    engine = migrate.database_for_url(empty_url).engine
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE tasks (id INTEGER)"))
    with pytest.raises(SchemaMismatchError, match=r"did not create \(tasks\)"):
        open_(empty_url)
    assert tables_of(engine) == {"tasks"}
    engine.dispose()


# -- in a host's database ---------------------------------------------------


def test_beside_a_hosts_own_alembic(engine):
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(sa.text("INSERT INTO alembic_version VALUES ('host42')"))
        connection.execute(sa.text("CREATE TABLE invoices (id INTEGER, note TEXT)"))
    store = SQLStore(engine)
    create(store)
    store.close()
    assert migrate.check(engine) == []
    migrate.downgrade(engine, "base", allow_data_loss=True)
    assert tables_of(engine) == {"alembic_version", "invoices", migrate.VERSION_TABLE}
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT * FROM alembic_version")).all() == [("host42",)]


# -- several at once --------------------------------------------------------

OPEN_AND_CREATE = """
import sys
from taskstore import open_store
from taskstore.testing.factories import create
with open_store(sys.argv[1]) as store:
    print(create(store).task_id)
"""


def test_four_processes_make_one_ledger(empty_url, open_):
    processes = [in_process(OPEN_AND_CREATE, empty_url) for _ in range(4)]
    created = {output_of(process).strip() for process in processes}
    store = open_(empty_url, migrate="never")
    assert set(store.load_snapshot().records) == created
    assert len(created) == store.head() == 4
    assert store.verify().ok


def test_a_failed_upgrade_leaves_nothing(engine, monkeypatch):
    from alembic import op

    real = op.create_index

    def failing(name, *arguments, **options):
        if name == "ix_tasks_parent":
            raise RuntimeError("power cut")
        return real(name, *arguments, **options)

    monkeypatch.setattr(op, "create_index", failing)
    with pytest.raises(RuntimeError):
        migrate.upgrade(engine)
    assert not tables_of(engine) & TABLES
    monkeypatch.undo()
    migrate.upgrade(engine)
    assert migrate.check(engine) == []


def test_the_encoded_record_fits_the_columns(empty_url, open_):
    longest = "é" * 127 + "x"
    record = make_record(
        task_id=longest,
        owner_key=longest,
        run_id=longest,
        child_session_key=longest,
        requester_session_key=longest,
        parent_task_id=longest,
        parent_flow_id=longest,
        runtime="r" * 255,
        task="\x01" * 1024 * 1024,  # six bytes of JSON each
    )
    store = open_(empty_url)
    from taskstore.model.journal import Put

    store.apply([Put(record)])
    assert store.load_snapshot().records[longest] == record
    assert store.verify().ok
