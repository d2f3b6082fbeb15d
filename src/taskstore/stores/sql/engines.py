"""Engines of our own, one set-up per dialect, and what we make of a host's."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import sqlalchemy as sa
from sqlalchemy import event

from taskstore.backends import scheme_of
from taskstore.errors import StoreUnavailableError, ValidationError
from taskstore.stores.sql.dialects import (
    DIALECTS,
    LOCK_S,
    SYNCHRONOUS,
    Database,
    PostgreSQLDatabase,
    SQLiteDatabase,
)
from taskstore.stores.sql.errors import Translator, sqlite_fault
from taskstore.stores.sql.sqlite_files import (
    ImmutableWatch,
    create_privately,
    needs_immutable,
    opener,
    sqlite_module,
)


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
    return kind(engine, owned=False, durability=durability, read_only=read_only)


def open_database(url: str, *, durability: str = "full", read_only: bool = False) -> Database:
    """Make the engine for a URL.  A new SQLite file is created, empty and private.

    Raises :class:`~taskstore.ValidationError` for a URL that we do not
    understand, :class:`~taskstore.StoreUnavailableError` for a path that
    cannot be used.
    """
    if scheme_of(url) == "sqlite":
        return _open_sqlite(_path_of(url), durability=durability, read_only=read_only)
    return _open_server(_parse(url), durability=durability, read_only=read_only)


def _path_of(url: str) -> Path:
    """The file that an SQLite URL names; escapes are decoded, as everywhere in URLs."""
    rest = url.partition(":")[2]
    if rest in ("", "//", "///") or ":memory:" in rest:
        raise ValidationError("url", "an in-memory SQLite database is not durable: use memory:")
    if not rest.startswith("///") or "?" in rest:
        raise ValidationError("url", f"{url!r} is not sqlite:/// and a path, without options")
    path = os.fsdecode(unquote_to_bytes(rest[3:]))
    if "\0" in path:
        raise ValidationError("url", "holds a NUL character")
    # Links are followed, so that the file itself is made private and locked by one name.
    return Path(os.path.realpath(path))


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
        kind = DIALECTS.get(parsed.get_backend_name())
        driver = parsed.get_driver_name()
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ValueError):
        # From None: the cause may repeat the URL with its password.
        raise ValidationError("url", "is not a database URL") from None
    if kind is None or driver != kind.driver:
        known = "sqlite:, postgresql+psycopg:"
        raise ValidationError("url", f"{parsed.drivername}: is not one of {known}")
    return parsed


def _open_sqlite(path: Path, *, durability: str, read_only: bool) -> SQLiteDatabase:
    module = sqlite_module()
    driver_errors = Translator(str(path), module.Error, sqlite_fault)
    watch = None
    if read_only:
        with driver_errors:
            watch = ImmutableWatch(path) if needs_immutable(module, path) else None
    else:
        create_privately(path)
    connect = opener(
        module,
        path,
        busy_timeout_s=1.0 if read_only else 5.0,
        read_only=read_only,
        immutable=watch is not None,
    )
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        module=module,
        creator=connect,
        poolclass=sa.QueuePool,
        isolation_level="AUTOCOMMIT",
    )
    pragmas = _READ_PRAGMAS if read_only else _write_pragmas(durability)

    @event.listens_for(engine, "connect")
    def configure(raw: Any, _record: object) -> None:
        # Damaged text is for the checksums to find, not a reason to stop reading.
        raw.text_factory = _lenient
        for pragma in pragmas:
            raw.execute(pragma)

    return SQLiteDatabase(
        engine, owned=True, durability=durability, read_only=read_only, watch=watch
    )


_READ_PRAGMAS = ("PRAGMA query_only = ON",)


def _write_pragmas(durability: str) -> tuple[str, ...]:
    pragmas = [
        f"PRAGMA synchronous = {SYNCHRONOUS[durability]}",
        # Four times the default: checkpoints are what NORMAL mostly waits for.
        "PRAGMA wal_autocheckpoint = 4000",
        f"PRAGMA journal_size_limit = {64 * 1024 * 1024}",
        # Deleted text is overwritten where it stood.
        "PRAGMA secure_delete = ON",
    ]
    if sys.platform == "darwin" and durability == "full":
        pragmas += ["PRAGMA fullfsync = ON", "PRAGMA checkpoint_fullfsync = ON"]
    return tuple(pragmas)


def _lenient(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _open_server(url: sa.URL, *, durability: str, read_only: bool) -> Database:
    defaults = {"application_name": "taskstore", "connect_timeout": 10}
    try:
        engine = sa.create_engine(
            url,
            isolation_level="AUTOCOMMIT",
            client_encoding="utf8",
            hide_parameters=True,
            connect_args={name: defaults[name] for name in defaults.keys() - url.query.keys()},
        )
    except ImportError as error:
        raise StoreUnavailableError(
            f"the driver of {url.drivername} is not installed: {error}",
            hint="pip install 'taskstore[postgres]'",
        ) from error
    settings = [f"lock_timeout = '{LOCK_S}s'", f"idle_in_transaction_session_timeout = '{LOCK_S}s'"]
    if read_only:
        settings.append("default_transaction_read_only = on")

    @event.listens_for(engine, "connect")
    def configure(raw: Any, _record: object) -> None:
        for setting in settings:
            raw.execute(f"SET {setting}")
        raw.commit()

    return PostgreSQLDatabase(engine, owned=True, durability=durability, read_only=read_only)
