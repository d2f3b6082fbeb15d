"""The one place for what differs between databases.

A :class:`Database` is one database as its dialect wants to be spoken to: how
its engine is made, how transactions begin, how seqs are claimed, what
durability takes.  Adding a dialect is adding a module here with a subclass
and a way to open a URL, naming them in ``DIALECTS`` and below, and saying in
``errors.py`` what the driver's errors mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import sqlalchemy as sa

from taskstore.backends import scheme_of
from taskstore.errors import StoreUnavailableError, ValidationError
from taskstore.stores.sql.dialects.base import Database, Guard
from taskstore.stores.sql.dialects.mariadb import MariaDBDatabase, open_mariadb
from taskstore.stores.sql.dialects.postgresql import PostgreSQLDatabase, open_postgresql
from taskstore.stores.sql.dialects.sqlite import SQLiteDatabase, open_sqlite, path_of

DIALECTS: dict[str, type[Database]] = {
    "sqlite": SQLiteDatabase,
    "postgresql": PostgreSQLDatabase,
    "mysql": MariaDBDatabase,
    "mariadb": MariaDBDatabase,
}
"""The dialects that there are, by SQLAlchemy's names for them."""

__all__ = [
    "DIALECTS",
    "Database",
    "Guard",
    "MariaDBDatabase",
    "PostgreSQLDatabase",
    "SQLiteDatabase",
    "host_database",
    "open_database",
]

_SERVERS: dict[str, tuple[Callable[..., Database], str]] = {
    "postgresql": (open_postgresql, "postgres"),
    "mysql": (open_mariadb, "mysql"),
    "mariadb": (open_mariadb, "mysql"),
}
"""What opens a URL, and our extra that installs the driver."""

_SEVERAL_HOSTS = re.compile(r"@[^/?@]*,[^/?@]*(/|\?|$)")
"""Hosts as libpq reads them, and SQLAlchemy does not."""


def host_database(engine: sa.Engine, *, durability: str, read_only: bool) -> Database:
    """The database of an engine that belongs to the host.

    Raises :class:`~taskstore.ValidationError` for an engine that we cannot use.
    """
    if not isinstance(engine, sa.Engine):
        raise ValidationError("engine", f"must be an Engine, not {type(engine).__name__}")
    kind = DIALECTS.get(engine.dialect.name)
    if kind is None or engine.dialect.driver != kind.driver:
        known = ", ".join(f"{name}+{kind.driver}" for name, kind in DIALECTS.items())
        raise ValidationError(
            "engine", f"is of {engine.dialect.name}+{engine.dialect.driver}; supported: {known}"
        )
    _refuse_at_sign("engine", engine.url)
    return kind(engine, owned=False, durability=durability, read_only=read_only)


def open_database(url: str, *, durability: str = "full", read_only: bool = False) -> Database:
    """Make the engine for a URL.  A new SQLite file is created, empty and private.

    Raises :class:`~taskstore.ValidationError` for a URL that we do not
    understand, :class:`~taskstore.StoreUnavailableError` for a path that
    cannot be used.
    """
    if scheme_of(url) == "sqlite":
        return open_sqlite(path_of(url), durability=durability, read_only=read_only)
    parsed = _parse(url)
    opener, extra = _SERVERS[parsed.get_backend_name()]
    try:
        return opener(parsed, durability=durability, read_only=read_only)
    except ImportError as error:
        raise StoreUnavailableError(
            f"the driver of {parsed.drivername} is not installed: {error}",
            hint=f"pip install 'taskstore[{extra}]'",
        ) from error


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
        kind = DIALECTS.get(parsed.get_backend_name())
        driver = parsed.get_driver_name()
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ValueError):
        # From None: the cause may repeat the URL with its password.
        reason = "is not a database URL"
        if _SEVERAL_HOSTS.search(url):
            reason += "; several hosts are written ?host=one:5432&host=two:5432"
        raise ValidationError("url", reason) from None
    _refuse_at_sign("url", parsed)
    if kind is None or driver != kind.driver:
        known = ", ".join(["sqlite:", *(f"{name}+{DIALECTS[name].driver}:" for name in _SERVERS)])
        raise ValidationError("url", f"{parsed.drivername}: is not one of {known}")
    return parsed


def _refuse_at_sign(name: str, url: sa.URL) -> None:
    if "@" in (url.host or ""):
        raise ValidationError(name, "has an @ in its user name or password: write it as %40")
