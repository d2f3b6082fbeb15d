"""New, empty ledgers on a backend that is known by its URL only.

A backend says how to make one by a second entry point, in the group
``taskstore.scratch``: its scheme, and a callable that takes a URL and returns
a context manager; that gives what ``make_store`` returns, a callable that
opens the new ledger, and removes it at the end.  Without one, a URL that is a
scheme and a path is taken for a file or directory, and the new ledger is made
in a temporary directory beside it.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from taskstore.errors import BackendNotFoundError, StoreUnavailableError, UnsupportedError
from taskstore.store.interface import TaskRegistryStore
from taskstore.store.opening import installed_backends, open_store, redacted, scheme_of
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.types import OpenStore

if TYPE_CHECKING:
    import sqlalchemy

GROUP = "taskstore.scratch"
"""The entry-point group in which backends say how to make a new ledger."""


def scratch(url: str) -> AbstractContextManager[OpenStore]:
    """Make a new, empty ledger on the backend of ``url``; what is there stays untouched.

    Raises :class:`~taskstore.BackendNotFoundError` for an unknown scheme and
    :class:`~taskstore.UnsupportedError` for a backend that does not say how.
    """
    scheme = scheme_of(url)
    for entry in entry_points(group=GROUP, name=scheme):
        made: AbstractContextManager[OpenStore] = entry.load()(url)
        return made
    if scheme not in (installed := installed_backends()):
        raise BackendNotFoundError(scheme, installed)
    rest = url.partition(":")[2]
    if rest.startswith("///") and "?" not in rest:
        return _beside(scheme, Path(rest[3:]))
    raise UnsupportedError(
        f"the backend of {redacted(url)} does not say how to make a ledger for tests",
        hint=f"it can, by an entry point in the group {GROUP}; or subclass StoreContract",
    )


@contextmanager
def _beside(scheme: str, path: Path) -> Iterator[OpenStore]:
    """A ledger in a file or directory, on the same file system as ``path``."""
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix="taskstore-contract-", dir=parent) as directory:
        yield opener(f"{scheme}:///{directory}/ledger")


def opener(url: str) -> partial[TaskRegistryStore]:
    """Return a callable that opens the ledger at ``url`` again and again."""
    return partial(open_store, url)


@contextmanager
def memory(url: str) -> Iterator[OpenStore]:
    """Make a ledger in memory, which its instances share."""
    del url
    storage = MemoryStorage()
    yield lambda *, read_only=False: MemoryStore(storage, read_only=read_only)


@contextmanager
def postgresql(url: str) -> Iterator[OpenStore]:
    """Make a ledger in a schema of its own, in the database at ``url``."""
    name = _new_name()
    with _server(url) as (parsed, execute):
        execute(f"CREATE SCHEMA {name}")
        try:
            options = f"{parsed.query.get('options', '')} -csearch_path={name}".strip()
            yield opener(_text(parsed.update_query_dict({"options": options})))
        finally:
            execute(f"DROP SCHEMA {name} CASCADE")


@contextmanager
def mariadb(url: str) -> Iterator[OpenStore]:
    """Make a ledger in a database of its own, on the server at ``url``."""
    name = _new_name()
    with _server(url) as (parsed, execute):
        execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        try:
            yield opener(_text(parsed.set(database=name)))
        finally:
            execute(f"DROP DATABASE {name}")


def _new_name() -> str:
    return f"taskstore_contract_{secrets.token_hex(6)}"


def _text(url: sqlalchemy.URL) -> str:
    return url.render_as_string(hide_password=False)


@contextmanager
def _server(url: str) -> Iterator[tuple[sqlalchemy.URL, Callable[[str], object]]]:
    """The URL as SQLAlchemy reads it, and a function that executes one statement there."""
    import sqlalchemy as sa

    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")

    def execute(statement: str) -> None:
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql(statement)
        except sa.exc.SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or type(error).__name__).strip()
            # From None: the cause may repeat the URL with its password.
            raise StoreUnavailableError(
                f"{redacted(url)}: no ledger can be made for the tests: {reason}"
            ) from None

    try:
        yield engine.url, execute
    finally:
        engine.dispose()
