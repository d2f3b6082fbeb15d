"""The schema of a database: its current state, required state, and migrations.

Only the migrations create tables; ``metadata.create_all`` is never used.  If a ledger has
the required schema, Alembic is not imported.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from taskstore.errors import SchemaMismatchError, TaskStoreError, ValidationError
from taskstore.stores.common.retry import CircuitBreaker, RetryPolicy
from taskstore.stores.sql.dialects import Database, database_for_engine, open_database
from taskstore.stores.sql.dialects.base import DriverSession
from taskstore.stores.sql.errors import command_for
from taskstore.stores.sql.tables import (
    COMMENT_PREFIX,
    ONLY_ON,
    SCHEMA_EPOCH,
    SCHEMA_REVISIONS,
    TABLES,
    VERSION_TABLE,
    metadata,
    task_journal,
    tasks,
    taskstore_head,
)

if TYPE_CHECKING:
    from alembic.config import Config

log = logging.getLogger("taskstore")

_version = sa.Table(VERSION_TABLE, sa.MetaData(), sa.Column("version_num", sa.String(32)))


class SchemaState(NamedTuple):
    """The state of a schema: its revision, its epoch, and the existing tables of taskstore."""

    revision: str | None
    epoch: int | None
    tables: frozenset[str]


def migrations_path() -> Path:
    """Return the directory of the migration scripts in the package or in a source checkout."""
    package = Path(str(files("taskstore")))
    for path in (package / "migrations", package.parents[1] / "migrations"):
        if (path / "env.py").is_file():
            return path
    raise TaskStoreError(
        f"the migration scripts are missing from {package}", hint="reinstall taskstore"
    )


def history() -> list[tuple[str, str]]:
    """Return every revision and the first line of its docstring, newest revision first."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(_config()).walk_revisions()
    return [(script.revision, script.doc) for script in scripts]


def database_for_url(url: str, *, read_only: bool = False) -> Database:
    """Return the database of a URL, for the functions of this module.

    The caller must close the database.
    """
    return open_database(url, read_only=read_only)


def current(engine: sa.Engine | Database, *, schema: str | None = None) -> str | None:
    """Return the revision of a database; ``None`` if the database contains no ledger.

    If ``schema`` is given, the functions of this module use the ledger in this schema.
    """
    with _database(engine, schema) as database, _reading(database) as connection:
        return _state(connection).revision


def upgrade(
    engine: sa.Engine | Database, revision: str = "head", *, schema: str | None = None
) -> None:
    """Upgrade a database to a revision, under the schema lock.  The upgrade is one
    transaction if the database has transactional DDL.  A ``schema`` that does not exist is created.

    If two processes upgrade one database at the same time, the second process waits for the schema
    lock, and then changes nothing.
    """
    with _database(engine, schema) as database:
        _upgrade(database, revision)


def _upgrade(database: Database, revision: str) -> None:
    from alembic import command

    with _locked(database) as connection:
        database.create_schema(connection)
        command.upgrade(_config(connection), revision)


def downgrade(
    engine: sa.Engine | Database,
    revision: str,
    *,
    allow_data_loss: bool = False,
    schema: str | None = None,
) -> None:
    """Downgrade a database to a revision; ``"base"`` drops all tables of the ledger.

    Raises :class:`~taskstore.ValidationError` if ``allow_data_loss`` is false and
    the downgrade would drop records or history.
    """
    from alembic import command

    with _database(engine, schema) as database, _locked(database) as connection:
        if revision == "base" and not allow_data_loss:
            _check_no_data_loss(connection)
        command.downgrade(_config(connection), revision)


def check(engine: sa.Engine | Database, *, schema: str | None = None) -> list[str]:
    """Return the differences between a database and the declared schema, one text per
    difference."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with _database(engine, schema) as database, _reading(database) as connection:
        context = MigrationContext.configure(
            connection, opts=alembic_options(connection.dialect.name)
        )
        found = _state(connection)
        problems = [_describe(item) for item in compare_metadata(context, metadata)]
    if found.revision != SCHEMA_REVISIONS[-1]:
        problems.insert(
            0,
            f"the revision is {found.revision}, but the newest revision is {SCHEMA_REVISIONS[-1]}",
        )
    return problems


def alembic_options(dialect: str) -> dict[str, Any]:
    """Return the Alembic options for :func:`check` and ``env.py``.  Alembic compares only the
    tables of a ledger, and only the indexes that the dialect has."""

    def include_name(name: str | None, kind: str, _parents: Any) -> bool:
        return kind != "table" or name in TABLES

    def include_object(_item: Any, name: str | None, *_details: Any) -> bool:
        return name not in ONLY_ON or dialect in ONLY_ON[name]

    return {
        "version_table": VERSION_TABLE,
        "include_name": include_name,
        "include_object": include_object,
        "compare_type": True,
        "target_metadata": metadata,
    }


def ensure_schema(database: Database, migrate: str) -> None:
    """Ensure that a database has the schema that this version requires.

    If ``migrate`` is ``"auto"`` and the database contains no ledger, create the schema.  Otherwise,
    do not change the database.  If the database then does not have the required schema, raises
    :class:`~taskstore.SchemaMismatchError` with the actual revision, the required revision, and the
    command to run.
    """
    location = database.location
    with _reading(database) as connection:
        state = _state(connection)
        unfinished = _is_unfinished(connection, state)
        if state.revision is None and state.tables and not unfinished:
            # Another process can have completed the migration since the first call of _state.
            state = _state(connection)
    fresh = state.revision is None and (unfinished or not state.tables)
    if fresh and migrate == "auto" and not database.read_only:
        _upgrade(database, "head")
        return
    needed = SCHEMA_REVISIONS[-1]
    hint = None
    missing = ", ".join(sorted(TABLES - state.tables))
    if fresh:
        problem = "contains an incomplete ledger" if unfinished else "contains no ledger"
    elif state.revision is None:
        with _connected(database) as connection:
            database.check_integrity(connection)
        raise _foreign_tables_error(location, state)
    elif state.epoch is not None and state.epoch > SCHEMA_EPOCH:
        problem = (
            f"has revision {state.revision} and schema epoch {state.epoch}, which are too new: "
            f"this version of taskstore needs revision {needed} and epoch {SCHEMA_EPOCH}"
        )
        hint = "upgrade taskstore"
    elif state.revision in SCHEMA_REVISIONS[:-1]:
        problem = f"has revision {state.revision}, but this version of taskstore needs {needed}"
    elif state.revision == needed and missing:
        problem = f"has revision {needed}, but these tables are missing: {missing}"
        hint = "if a downgrade was interrupted, repeat the downgrade; otherwise restore the tables"
    else:
        if state.revision != needed:
            database.add_notice(
                f"{location} has revision {state.revision}, which is newer than {needed} but "
                "compatible with this version of taskstore"
            )
        return
    if hint is None:
        hint = f"run: {command_for(database.url or location, 'db', 'upgrade')}"
    raise SchemaMismatchError(
        f"{location} {problem}", found=state.revision, needed=needed, hint=hint
    )


def _state(connection: sa.Connection) -> SchemaState:
    names = set(sa.inspect(connection).get_table_names())
    revision = epoch = None
    if VERSION_TABLE in names:
        revision = connection.execute(sa.select(_version.c.version_num)).scalars().first()
    if revision is not None and "taskstore_head" in names:
        epoch = connection.execute(sa.select(taskstore_head.c.schema_epoch)).scalars().first()
    return SchemaState(revision, epoch, frozenset(names & TABLES))


def check_table_owner(connection: sa.Connection) -> None:
    """Check that every table with the name of a ledger's table was created by taskstore.

    ``env.py`` calls this function.  Raises :class:`~taskstore.SchemaMismatchError` if another
    program created such a table.
    """
    state = _state(connection)
    if state.revision is None and state.tables and not _is_unfinished(connection, state):
        location = connection.engine.url.render_as_string(hide_password=True)
        raise _foreign_tables_error(location, state)


def _foreign_tables_error(location: str, state: SchemaState) -> SchemaMismatchError:
    names = ", ".join(sorted(state.tables))
    return SchemaMismatchError(
        f"{location} has tables of a ledger that taskstore did not create ({names}): "
        f"no revision is stored in the table {VERSION_TABLE}",
        found=None,
        needed=SCHEMA_REVISIONS[-1],
        hint="use another database or schema",
    )


def _is_unfinished(connection: sa.Connection, state: SchemaState) -> bool:
    """Return whether the first migration is still running or was killed.  In these two cases,
    taskstore created all existing tables, and the tables contain no tasks and no history."""
    kind = Database.dialects[connection.dialect.name]
    if state.revision is not None or not state.tables or not kind.ddl_autocommits:
        return False
    inspector = sa.inspect(connection)
    for name in state.tables:
        if not (inspector.get_table_comment(name)["text"] or "").startswith(COMMENT_PREFIX):
            return False
        table = metadata.tables[name]
        rows: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(table)
        if table is taskstore_head:
            rows = rows.where(table.c.head_seq != 0)
        if connection.execute(rows.limit(1)).first() is not None:
            return False
    return True


def _check_no_data_loss(connection: sa.Connection) -> None:
    existing = _state(connection).tables
    for table in (tasks, task_journal):
        if table.name in existing and connection.execute(sa.select(table).limit(1)).first():
            raise ValidationError(
                "revision",
                f"a downgrade to base would drop every record and all history, and {table.name} is "
                "not empty",
            )


@contextmanager
def _database(engine: sa.Engine | Database, schema: str | None) -> Iterator[Database]:
    """Return the database of an engine; the end of the ``with`` block does not close the engine."""
    if isinstance(engine, Database):
        yield engine
        return
    database = database_for_engine(engine, schema=schema)
    try:
        yield database
    finally:
        database.close()


@contextmanager
def _connected(database: Database) -> Iterator[sa.Connection]:
    """Open a connection in the driver's autocommit mode; driver errors in the body are translated.

    The connection comes from the engine, but the engine's event listeners do not run for this
    connection: the listeners of a host's engine can begin transactions.
    """
    with database.translator, database.engine.connect() as borrowed:
        plain = borrowed.execution_options(isolation_level="AUTOCOMMIT")
        raw = plain.connection.driver_connection
        host = None if database.owned else DriverSession(plain, database)
        bare = sa.create_engine(
            database.engine.url,
            module=database.engine.dialect.loaded_dbapi,
            creator=lambda: raw,
            poolclass=sa.StaticPool,
            isolation_level="AUTOCOMMIT",
        )
        try:
            if host is not None:
                database.configure_borrowed_connection(host)
            with bare.connect() as connection:
                database.check_server(connection)
                yield connection
        finally:
            if host is not None:
                with suppress(*database.translator.errors):
                    host.restore_settings()


@contextmanager
def _reading(database: Database) -> Iterator[sa.Connection]:
    """Open a connection in the same way as :func:`_connected`.

    If the database has a ``schema``, table names without a schema refer to this schema.
    """
    with _connected(database) as connection:
        if database.schema is None:
            yield connection
            return
        # One transaction: the search path must end with it, and a pooler gives the next
        # transaction to another session.
        connection.exec_driver_sql("BEGIN")
        try:
            database.use_schema(connection)
            yield connection
        finally:
            connection.exec_driver_sql("ROLLBACK")


@contextmanager
def _locked(database: Database) -> Iterator[sa.Connection]:
    """Open a connection that owns the schema lock; other processes wait for this lock."""
    with _connected(database) as connection:
        policy = RetryPolicy(database.translator, CircuitBreaker(database.location, 0.0))
        for attempt in policy.attempts():
            with attempt:
                database.lock_schema(connection)
                break
        try:
            yield connection
        except BaseException:
            with suppress(sa.exc.SQLAlchemyError):
                database.unlock_schema(connection, done=False)
            raise
        database.unlock_schema(connection, done=True)


def _config(connection: sa.Connection | None = None) -> Config:
    from alembic.config import Config

    config = Config()
    # ConfigParser treats % as the start of a placeholder, so % is doubled.
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _describe(item: Any) -> str:
    """Return the text for one difference that Alembic has found."""
    if isinstance(item, list):
        return "; ".join(map(_describe, item))
    kind, *details = item
    names = [str(getattr(detail, "name", detail)) for detail in details if detail is not None]
    return f"{kind.replace('_', ' ')}: {' '.join(names)}"


@contextmanager
def connect_with_schema_lock(url: str) -> Iterator[sa.Connection]:
    """Open a connection for ``env.py`` in a source checkout.  The connection owns the schema lock.
    The schema changes are committed at the end of the ``with`` block."""
    database = open_database(url)
    try:
        with _locked(database) as connection:
            yield connection
    finally:
        database.close()
