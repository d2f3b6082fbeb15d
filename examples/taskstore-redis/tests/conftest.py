"""Fixtures: a Redis server, found or started, and its stores."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from taskstore.testing import OpenStore

from taskstore_redis import RedisStore, compaction, open_redis, reading, verify, writing

RUNNING = ("127.0.0.1", 6379, 15)
"""Host, port and database of a server that runs already."""

MISSING = (
    "no Redis server: none answers at 127.0.0.1:6379 and there is no redis-server to start "
    "(on Debian and Ubuntu: apt install redis-server)"
)


class Server:
    """A redis-server of the tests: on a free port, with its data in a directory."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.options = options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        self.process = subprocess.Popen(
            [
                "redis-server", "--port", str(self.port), "--bind", "127.0.0.1",
                "--dir", str(self.directory), "--loglevel", "warning", *self.options,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(redis.RedisError), self.client() as client:
                client.ping()
                return self
            assert time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.05)

    def client(self) -> redis.Redis:
        password = None
        if "--requirepass" in self.options:
            password = self.options[self.options.index("--requirepass") + 1]
        return redis.Redis("127.0.0.1", self.port, password=password)

    def url(self, namespace: str = "ns", userinfo: str = "") -> str:
        return f"redis://{userinfo}127.0.0.1:{self.port}/0?namespace={namespace}"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """A function that starts a server with options; the servers end with the test."""
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server to start (apt install redis-server)")
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Server:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            server = Server(Path(directory), *options)
            stack.callback(server.kill)
            return server.start()

        yield start


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The URL of a server and database, without a namespace."""
    host, port, db = RUNNING
    with contextlib.suppress(redis.RedisError):
        with redis.Redis(host, port, db, socket_connect_timeout=1) as client:
            client.ping()
        yield f"redis://{host}:{port}/{db}"
        return
    if shutil.which("redis-server") is None:
        pytest.skip(MISSING)
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory), "--save", "", "--appendonly", "no")
        try:
            yield f"redis://127.0.0.1:{server.start().port}/0"
        finally:
            server.kill()


@pytest.fixture
def client(server_url: str) -> Iterator[redis.Redis]:
    """A client that reads and writes the keys directly."""
    with redis.Redis.from_url(server_url) as client:
        yield client


@pytest.fixture
def namespace(client: redis.Redis) -> Iterator[str]:
    """A unique namespace; its keys are deleted after the test."""
    name = f"test-{uuid.uuid4().hex}"
    yield name
    for keys in client.scan_iter(match=f"{{{name}}}:*", count=1000):
        client.unlink(keys)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny limits for reading, copying, trimming and staging: a few records take many steps."""
    for module, name, value in (
        (reading, "PAGE_ROWS", 2),
        (reading, "JOURNAL_PAGE", 3),
        (reading, "HISTORY_PAGE", 1),
        (reading, "PAGE_GROWTH", 2),
        (verify, "PAGE_ROWS", 2),
        (verify, "JOURNAL_PAGE", 3),
        (compaction, "STEP_ROWS", 2),
        (compaction, "STEP_ENTRIES", 3),
        (writing, "STAGE_ROWS", 2),
    ):
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def url(server_url: str, namespace: str) -> str:
    return f"{server_url}?namespace={namespace}"


@pytest.fixture
def make_store(url: str) -> OpenStore:
    """A function that opens the ledger of the test."""

    def opened(*, read_only: bool = False) -> RedisStore:
        return open_redis(url, read_only=read_only)

    return opened
