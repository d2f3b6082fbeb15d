"""Commands for the schema of an SQL ledger: ``taskstore db …``.

Only these commands and the creation of a new ledger change a schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from taskstore.cli import render
from taskstore.cli.ledger import AsJson, Url, UsageError, url_of, url_option
from taskstore.errors import ValidationError
from taskstore.store.opening import backends_of, redacted, scheme_of

if TYPE_CHECKING:
    from taskstore.stores.sql.dialects import Database

app = typer.Typer(help="Manage the schema of an SQL ledger.", no_args_is_help=True)

_SQL_ENTRY_PREFIX = "taskstore.stores.sql:"


@app.command()
def upgrade(
    ctx: typer.Context,
    revision: Annotated[str, typer.Argument(help="The target revision.")] = "head",
    *,
    url: Url = None,
) -> None:
    """Upgrade the schema to a revision. A missing ledger is created."""
    from taskstore.stores.sql import migrate

    with _database(sql_url_of(ctx, url)) as database:
        before = migrate.current(database)
        migrate.upgrade(database, revision)
        _print_move(before, migrate.current(database))


@app.command()
def downgrade(
    ctx: typer.Context,
    revision: Annotated[
        str | None,
        typer.Argument(
            help="The target revision; 'base' drops the tables. Default: the previous revision."
        ),
    ] = None,
    *,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Downgrade even if this drops records or history.")
    ] = False,
    url: Url = None,
) -> None:
    """Downgrade the schema to an earlier revision."""
    from taskstore.stores.sql import migrate

    where = sql_url_of(ctx, url)
    with _database(where, read_only=True, notices=False) as database:
        before = migrate.current(database)
    if before is None:
        raise UsageError("there is no ledger to downgrade")
    with _database(where) as database:
        target = _previous_revision(before) if revision is None else revision
        try:
            migrate.downgrade(database, target, allow_data_loss=yes)
        except ValidationError as error:
            raise UsageError(error.reason, hint="confirm with --yes") from error
        _print_move(before, migrate.current(database))


@app.command()
def current(ctx: typer.Context, *, as_json: AsJson = False, url: Url = None) -> None:
    """Print the revision of the ledger's schema."""
    from taskstore.stores.sql import migrate
    from taskstore.stores.sql.tables import SCHEMA_REVISIONS

    with _database(sql_url_of(ctx, url), read_only=True) as database:
        revision = migrate.current(database)
    head = SCHEMA_REVISIONS[-1]
    if as_json:
        render.print_json({"revision": revision, "head": head})
    else:
        render.print_line(f"{revision or 'none'}{' (head)' if revision == head else ''}")


@app.command()
def history(ctx: typer.Context, *, as_json: AsJson = False, url: Url = None) -> None:
    """List all revisions, newest first. With --url, mark the revision of this ledger."""
    from taskstore.stores.sql import migrate

    current_revision = None
    if url_option(ctx, url) is not None:
        with _database(sql_url_of(ctx, url), read_only=True) as database:
            current_revision = migrate.current(database)
    revisions = migrate.history()
    members = [{"revision": name, "description": text} for name, text in revisions]
    rows = ((name, "current" if name == current_revision else "", text) for name, text in revisions)
    columns = ("REVISION", "", "DESCRIPTION")
    render.print_result(as_json, {"revisions": members, "current": current_revision}, columns, rows)


@app.command()
def check(ctx: typer.Context, *, as_json: AsJson = False, url: Url = None) -> int:
    """Compare the ledger's schema with the schema that this version declares."""
    from taskstore.stores.sql import migrate

    with _database(sql_url_of(ctx, url), read_only=True) as database:
        problems = migrate.check(database)
        revision = migrate.current(database)
    members = {"ok": not problems, "revision": revision, "problems": problems}
    text = "" if problems else f"the schema is as declared, at revision {revision}"
    return render.print_check(as_json, members, text)


def sql_url_of(ctx: typer.Context, url: str | None) -> str:
    """Return the ledger's URL; raise :class:`UsageError` if the ledger is not an SQL ledger."""
    where = url_of(ctx, url)
    if not backends_of(scheme_of(where))[0].value.startswith(_SQL_ENTRY_PREFIX):
        raise UsageError(f"{redacted(where)} is not an SQL ledger, so it has no schema")
    return where


@contextmanager
def _database(url: str, *, read_only: bool = False, notices: bool = True) -> Iterator[Database]:
    """Yield the database of the ledger; raise Alembic errors as :class:`UsageError`.

    If ``notices`` is true, the notices of the database are printed after the command.
    """
    from alembic.util import CommandError

    from taskstore.stores.sql import migrate

    with closing(migrate.database_for_url(url, read_only=read_only)) as database:
        try:
            yield database
        except CommandError as error:
            raise UsageError(
                str(error), hint="'taskstore db history' lists the revisions"
            ) from error
        finally:
            if notices:
                render.print_notices(database.current_notices())


def _previous_revision(revision: str) -> str:
    """Return the schema revision before the given revision; ``"base"`` for the first revision."""
    from taskstore.stores.sql import migrate

    names = [name for name, _ in migrate.history()] + ["base"]
    if revision not in names:
        raise UsageError(f"revision {revision} is not one of {', '.join(names)}")
    return names[names.index(revision) + 1]


def _print_move(before: str | None, after: str | None) -> None:
    if before == after:
        render.print_line(f"the schema revision is still {after or 'none'}")
    else:
        render.print_line(f"the schema revision is {after or 'none'}; it was {before or 'none'}")
