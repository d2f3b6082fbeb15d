"""The schema of a database: what is there, what is needed, and getting from one to the other.

A database is created by running the migrations, never from the metadata.
Alembic is imported only when there is something to migrate: opening a ledger
whose schema is right does not pay for it.
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
from taskstore.store.opening import redacted
from taskstore.stores.common.retry import CircuitBreaker, RetryPolicy
from taskstore.stores.sql.dialects import Database, host_database, open_database
from taskstore.stores.sql.tables import (
    MARK,
    ONLY_ON,
    REVISIONS,
    SCHEMA_EPOCH,
    TABLES,
    metadata,
    task_journal,
    tasks,
    taskstore_head,
)

if TYPE_CHECKING:
    from alembic.config import Config

log = logging.getLogger("taskstore")

VERSION_TABLE = "taskstore_alembic_version"
"""Where Alembic notes our revision: beside, not among, those of a host."""

_version = sa.Table(VERSION_TABLE, sa.MetaData(), sa.Column("version_num", sa.String(32)))


class SchemaState(NamedTuple):
    """What a database holds of us: its revision, schema epoch, and which of our tables."""

    revision: str | None
    epoch: int | None
    tables: frozenset[str]


def migrations_path() -> Path:
    """Where the migration scripts lie: inside the installed package, or in the checkout."""
    package = Path(str(files("taskstore")))
    for place in (package / "migrations", package.parents[1] / "migrations"):
        if (place / "env.py").is_file():
            return place
    raise TaskStoreError(
        f"the migration scripts are missing from {package}", hint="reinstall taskstore"
    )


def history() -> list[tuple[str, str]]:
    """Every revision with the first line of what it does, newest first."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(_config()).walk_revisions()
    return [(script.revision, script.doc) for script in scripts]


def engine_for_url(url: str, *, read_only: bool = False) -> sa.Engine:
    """An engine set up as ours are, for the functions of this module."""
    return open_database(url, read_only=read_only).engine


def current(engine: sa.Engine) -> str | None:
    """The revision that a database is at, ``None`` when it holds nothing of us."""
    with _database(engine) as database, _connected(database) as connection:
        return _state(connection).revision


def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    """Bring a database up to a revision, under a lock, in one transaction where the
    database has such for its schema.

    Other processes that do the same wait, and then find it done.
    """
    with _database(engine) as database:
        _upgrade(database, revision)


def _upgrade(database: Database, revision: str) -> None:
    from alembic import command

    with _locked(database) as connection:
        command.upgrade(_config(connection), revision)


def downgrade(engine: sa.Engine, revision: str, *, allow_data_loss: bool = False) -> None:
    """Take a database back to a revision (``"base"``: without our tables).

    Refused with :class:`~taskstore.ValidationError` when that would drop
    records or history, unless ``allow_data_loss``.
    """
    from alembic import command

    with _database(engine) as database, _locked(database) as connection:
        if revision == "base" and not allow_data_loss:
            _refuse_loss(connection)
        command.downgrade(_config(connection), revision)


def check(engine: sa.Engine) -> list[str]:
    """What differs between a database and what this version declares, one sentence each."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with _database(engine) as database, _connected(database) as connection:
        context = MigrationContext.configure(
            connection, opts=alembic_options(connection.dialect.name)
        )
        found = _state(connection)
        problems = [_difference(item) for item in compare_metadata(context, metadata)]
    if found.revision != REVISIONS[-1]:
        problems.insert(0, f"the revision is {found.revision}, not {REVISIONS[-1]}")
    return problems


def alembic_options(dialect: str) -> dict[str, Any]:
    """What Alembic is told, for a check and for ``env.py``: to compare our tables only,
    whatever else a host's database holds, without what we declare for other dialects."""

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
    """Make sure that a database has the schema that this version works with.

    With ``migrate="auto"`` one that holds nothing of us is given it; nothing
    else is ever changed.  Raises :class:`~taskstore.SchemaMismatchError`,
    naming what was found, what is needed, and the command to run.
    """
    where = database.location
    with _connected(database) as connection:
        state = _state(connection)
        unfinished = _is_unfinished(connection, state)
        if state.revision is None and state.tables and not unfinished:
            # Somebody may have finished it, and written to it, between the two looks.
            state = _state(connection)
    fresh = state.revision is None and (unfinished or not state.tables)
    if fresh and migrate == "auto" and not database.read_only:
        _upgrade(database, "head")
        return
    needed, named = REVISIONS[-1], redacted(database.url or where)
    hint = f"run: taskstore db upgrade --url {named}"
    missing = ", ".join(sorted(TABLES - state.tables))
    if fresh:
        problem = "holds a ledger that is only half made" if unfinished else "holds no ledger"
    elif state.revision is None:
        with _connected(database) as connection:
            database.check_sound(connection)
        raise _foreign(where, state)
    elif state.epoch is not None and state.epoch > SCHEMA_EPOCH:
        problem = (
            f"is at revision {state.revision}, schema epoch {state.epoch}: too new for "
            f"this version of taskstore, which works with {needed}, epoch {SCHEMA_EPOCH}"
        )
        hint = "upgrade taskstore"
    elif state.revision in REVISIONS[:-1]:
        problem = f"is at revision {state.revision}, needed is {needed}"
    elif state.revision == needed and missing:
        problem = f"is at revision {needed}, but lacks the tables {missing}"
        hint = "restore them; if a downgrade was interrupted, run it again"
    else:
        if state.revision != needed:
            database.notice(
                f"{where} is at revision {state.revision}, which is newer than {needed} and "
                "compatible with it"
            )
        return
    raise SchemaMismatchError(f"{where} {problem}", found=state.revision, needed=needed, hint=hint)


def _state(connection: sa.Connection) -> SchemaState:
    names = set(sa.inspect(connection).get_table_names())
    revision = epoch = None
    if VERSION_TABLE in names:
        revision = connection.execute(sa.select(_version.c.version_num)).scalars().first()
    if revision is not None and "taskstore_head" in names:
        epoch = connection.execute(sa.select(taskstore_head.c.schema_epoch)).scalars().first()
    return SchemaState(revision, epoch, frozenset(names & TABLES))


def check_free(connection: sa.Connection) -> None:
    """For ``env.py``: refuse a database whose tables of our names are not ours.

    Raises :class:`~taskstore.SchemaMismatchError`.
    """
    state = _state(connection)
    if state.revision is None and state.tables and not _is_unfinished(connection, state):
        raise _foreign(connection.engine.url.render_as_string(hide_password=True), state)


def _foreign(where: str, state: SchemaState) -> SchemaMismatchError:
    names = ", ".join(sorted(state.tables))
    return SchemaMismatchError(
        f"{where} has tables of our names that are not ours ({names}): {VERSION_TABLE} "
        "does not say which revision they are of",
        found=None,
        needed=REVISIONS[-1],
        hint="use another database or schema",
    )


def _is_unfinished(connection: sa.Connection, state: SchemaState) -> bool:
    """Whether all that a database holds of us was left by a first migration that was
    killed, or is being made by one that goes on: our own tables, and nothing in them."""
    kind = Database.kinds[connection.dialect.name]
    if state.revision is not None or not state.tables or not kind.schema_commits:
        return False
    inspector = sa.inspect(connection)
    for name in state.tables:
        if not (inspector.get_table_comment(name)["text"] or "").startswith(MARK):
            return False
        table = metadata.tables[name]
        rows: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(table)
        if table is taskstore_head:
            rows = rows.where(table.c.head_seq != 0)
        if connection.execute(rows.limit(1)).first() is not None:
            return False
    return True


def _refuse_loss(connection: sa.Connection) -> None:
    here = _state(connection).tables
    for table in (tasks, task_journal):
        if table.name in here and connection.execute(sa.select(table).limit(1)).first():
            raise ValidationError(
                "revision", f"base drops every record and all history, and {table.name} has some"
            )


@contextmanager
def _database(engine: sa.Engine) -> Iterator[Database]:
    """The database of any engine; the engine stays its owner's."""
    database = host_database(engine, durability="full", read_only=False)
    try:
        yield database
    finally:
        database.close()


@contextmanager
def _connected(database: Database) -> Iterator[sa.Connection]:
    """A connection in the driver's autocommit, its errors translated.

    It is the engine's, but without the listeners that a host may have put on
    it, which may begin transactions where we do.
    """
    with database.translator, database.engine.connect() as borrowed:
        plain = borrowed.execution_options(isolation_level="AUTOCOMMIT")
        raw = plain.connection.driver_connection
        bare = sa.create_engine(
            database.engine.url,
            module=database.engine.dialect.loaded_dbapi,
            creator=lambda: raw,
            poolclass=sa.StaticPool,
            isolation_level="AUTOCOMMIT",
        )
        with bare.connect() as connection:
            database.examine(connection)
            yield connection


@contextmanager
def _locked(database: Database) -> Iterator[sa.Connection]:
    """A connection that changes the schema, others waiting until it is done."""
    with _connected(database) as connection:
        waiting = RetryPolicy(database.translator, CircuitBreaker(database.location, 0.0))
        for attempt in waiting.attempts():
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
    # The value goes through ConfigParser, to which % means something.
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _difference(item: Any) -> str:
    """One operation of Alembic's comparison as a sentence."""
    if isinstance(item, list):
        return "; ".join(map(_difference, item))
    kind, *details = item
    named = [str(getattr(detail, "name", detail)) for detail in details if detail is not None]
    return f"{kind.replace('_', ' ')}: {' '.join(named)}"


@contextmanager
def locked_url(url: str) -> Iterator[sa.Connection]:
    """For ``env.py`` in a checkout: connect, begin and lock; commit at the end."""
    database = open_database(url)
    try:
        with _locked(database) as connection:
            yield connection
    finally:
        database.close()
