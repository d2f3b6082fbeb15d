"""New, empty ledgers for tests, on the backend of any URL.

To support test ledgers, a backend declares an entry point in the group ``taskstore.scratch``; the
name of the entry point is the URL scheme of the backend.  The entry point is a callable that takes
a URL and returns a context manager.  The context manager yields a callable that opens the new
ledger and takes the same arguments as the callable that ``make_store`` returns.  On exit, the
context manager removes the ledger.  If a backend has no such entry point, the URL must have only a
scheme and the path of a file or directory.  :func:`scratch` then creates a temporary directory next
to that path, and the new ledger in the temporary directory.
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

from taskstore.errors import (
    StoreUnavailableError,
    TaskStoreError,
    UnsupportedError,
    ValidationError,
)
from taskstore.store.interface import TaskRegistryStore
from taskstore.store.opening import backends_of, open_store, redacted, scheme_of
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.types import OpenStore

if TYPE_CHECKING:
    import sqlalchemy

GROUP = "taskstore.scratch"
"""The entry-point group of the callables that create test ledgers."""


def scratch(url: str) -> AbstractContextManager[OpenStore]:
    """Create a new, empty ledger at a URL of its own, on the same server or disk as ``url``.

    The call does not change the data at ``url``.

    Raises :class:`~taskstore.BackendNotFoundError` for an unknown scheme,
    :class:`~taskstore.ValidationError` for a malformed URL, and
    :class:`~taskstore.UnsupportedError` for a backend that cannot create test ledgers.
    """
    scheme = scheme_of(url)
    for entry in entry_points(group=GROUP, name=scheme):
        ledger: AbstractContextManager[OpenStore] = entry.load()(url)
        return ledger
    backends_of(scheme)  # an unknown scheme raises here
    path = url.partition(":")[2]
    if path.startswith("///") and path != "///" and "?" not in path:
        return _in_temporary_directory(scheme, Path(path[3:]))
    _check_form(url)
    if path.startswith("///") and "?" in path:
        raise UnsupportedError(
            f"a test ledger of the scheme {scheme!r} takes no options in its URL",
            hint=f"remove the options: {redacted(url).partition('?')[0]}",
        )
    raise UnsupportedError(
        f"the backend of {redacted(url)} has no entry point that creates a test ledger",
        hint=f"declare an entry point in the group {GROUP!r}, or subclass StoreContract",
    )


def _check_form(url: str) -> None:
    """Raise :class:`~taskstore.ValidationError` if the backend refuses the form of a URL.

    Only the backend knows the forms of its URLs, so the function opens the ledger read-only, which
    changes nothing.  Any other error says nothing about the form.
    """
    try:
        open_store(url, migrate="never", read_only=True).close()
    except ValidationError:
        raise
    except TaskStoreError:
        pass


@contextmanager
def _in_temporary_directory(scheme: str, path: Path) -> Iterator[OpenStore]:
    """Yield a callable that opens a ledger in a new temporary directory.  The temporary
    directory is in the nearest existing parent directory of ``path``."""
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix="taskstore-contract-", dir=parent) as directory:
        yield opener(f"{scheme}:///{directory}/ledger")


def opener(url: str) -> partial[TaskRegistryStore]:
    """Return a callable that opens the ledger at ``url``; each call opens a new instance."""
    return partial(open_store, url)


@contextmanager
def memory(url: str) -> Iterator[OpenStore]:
    """Yield a callable; each call opens one more store instance on the same ledger in memory."""
    del url
    storage = MemoryStorage()
    yield lambda *, read_only=False: MemoryStore(storage, read_only=read_only)


@contextmanager
def postgresql(url: str) -> Iterator[OpenStore]:
    """Yield a callable that opens a ledger in a new schema of the database at ``url``."""
    name = _new_name()
    with _server(url) as (parsed, execute):
        try:
            yield opener(_rendered(parsed.update_query_dict({"schema": name})))
        finally:
            execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")


@contextmanager
def mariadb(url: str) -> Iterator[OpenStore]:
    """Yield a callable that opens a ledger in a new database on the server at ``url``."""
    name = _new_name()
    with _server(url) as (parsed, execute):
        execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        try:
            yield opener(_rendered(parsed.set(database=name)))
        finally:
            execute(f"DROP DATABASE {name}")


def _new_name() -> str:
    return f"taskstore_contract_{secrets.token_hex(6)}"


def _rendered(url: sqlalchemy.URL) -> str:
    return url.render_as_string(hide_password=False)


@contextmanager
def _server(url: str) -> Iterator[tuple[sqlalchemy.URL, Callable[[str], object]]]:
    """Yield the parsed URL and a function that executes one statement on the server."""
    import sqlalchemy as sa

    from taskstore.stores.sql.dialects import open_database

    database = open_database(url)

    def execute(statement: str) -> None:
        try:
            with database.engine.connect() as connection:
                connection.exec_driver_sql(statement)
        except sa.exc.SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or type(error).__name__).strip()
            # ``from None`` hides the original error, whose text can contain the URL's password.
            raise StoreUnavailableError(
                f"{redacted(url)}: cannot create a test ledger: {reason}"
            ) from None

    try:
        yield sa.make_url(url), execute
    finally:
        database.close()
