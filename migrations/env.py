"""Alembic's environment script, for the package and for the ``alembic`` command.

When the package runs a migration, the package passes a connection that owns the schema lock.
Except on MariaDB, this connection has an open transaction.

When the ``alembic`` command runs a migration in a checkout, this script opens the database itself.
The URL is the value of the option ``-x url=…``.  Without this option, the URL is the value of the
environment variable ``TASKSTORE_URL``.  Without this variable too, the URL is ``sqlalchemy.url`` in
``alembic.ini``.
"""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection, make_url

from taskstore.stores.sql.migrate import (
    alembic_options,
    check_table_owner,
    connect_with_schema_lock,
)

config = context.config


def _url() -> str:
    url = (
        context.get_x_argument(as_dictionary=True).get("url")
        or os.environ.get("TASKSTORE_URL")
        or config.get_main_option("sqlalchemy.url")
    )
    if not url:
        raise SystemExit("which database? alembic -x url=sqlite:///tasks.db upgrade head")
    return url


def _run(dialect: str, schema: str | None = None, **target: object) -> None:
    """Run the migrations, or write them as an SQL script in Alembic's offline mode.

    In the offline mode, ``schema`` names the PostgreSQL schema for the tables.
    """
    context.configure(
        **alembic_options(dialect),
        # In SQLite, ALTER TABLE often requires a copy of the table.
        render_as_batch=True,
        **target,  # type: ignore[arg-type]
    )
    with context.begin_transaction():
        if schema is not None:
            quoted = schema.replace('"', '""')
            context.execute(f'SET LOCAL search_path TO "{quoted}"')
        context.run_migrations()


def _run_on(connection: Connection) -> None:
    check_table_owner(connection)
    _run(connection.dialect.name, connection=connection)


given = config.attributes.get("connection")
if given is not None:
    _run_on(given)
elif context.is_offline_mode():
    schema = make_url(_url()).query.get("schema")
    assert schema is None or isinstance(schema, str)
    _run(make_url(_url()).get_backend_name(), schema, url=_url(), literal_binds=True)
else:
    with connect_with_schema_lock(_url()) as locked:
        _run_on(locked)
