"""[13] Reading commands beside a writer: no process waits, and nothing changes.

The writer and the commands run in separate processes.  The commands have read
permission only: as a database role that may only SELECT, or as a user that may
not write to the directory.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import sqlalchemy as sa
import typer

from taskstore import TaskRegistry
from taskstore.cli import main
from taskstore.cli.app import app
from taskstore.testing.crash.processes import Child, Report

MAX_WAIT_S = 10.0
"""Less than every lock timeout, and more than a command takes on a busy machine."""

READING = {
    "backends": [],
    "changes": ["--limit", "3", "--follow"],
    "db check": [],
    "db current": [],
    "db history": ["--url", "URL"],
    "list": [],
    "log": ["TASK"],
    "show": ["TASK"],
    "summary": [],
    "verify": [],
}
"""The reading commands and their arguments."""

WRITING = {"run", "demo", "cancel", "notify", "delete", "compact", "contract"} | {
    "db upgrade",
    "db downgrade",
}


def names_of(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from names_of(inner, (*path, name))
    else:
        yield " ".join(path)


def test_each_command_is_listed_as_reading_or_writing():
    assert set(names_of(typer.main.get_command(app))) == READING.keys() | WRITING


@pytest.fixture(autouse=True, scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import the modules of all commands here, because children may lack the permissions."""
    for url in (f"{scheme}:///{tmp_path_factory.mktemp('l')}/l" for scheme in ("json", "sqlite")):
        with TaskRegistry.open(url) as registry:
            task = registry.create(runtime="cli", task="x")
        with contextlib.redirect_stdout(io.StringIO()):
            for _, words in commands(url, task.task_id):
                main(["--url", url, *words, *(["--limit", "1"] if words[0] == "changes" else [])])


# -- processes ----------------------------------------------------------------


class Writer:
    """A process that commits continuously, or owns the ledger's write lock on request."""

    GO, HOLD, END = 0, 1, 2

    def __init__(self, url: str) -> None:
        self._url = url
        # The request, whether the writer owns the lock, its commits, its longest wait in ms.
        self._shared = memoryview(mmap.mmap(-1, 32)).cast("q")
        self._child = Child(self._work)
        self.task_id = self._child.line()

    def _work(self, report: Report) -> None:
        shared = self._shared
        with TaskRegistry.open(self._url) as registry:
            task = registry.create(runtime="cli", task="written", status="running")
            for number in range(50):
                registry.create(runtime="cli", task=f"to be read {number}", label="x" * 200)
            report(task.task_id)
            while shared[0] != self.END:
                if shared[0] == self.HOLD:
                    with registry.store.exclusive():
                        shared[1] = 1
                        while shared[0] == self.HOLD:
                            time.sleep(0.001)
                    shared[1] = 0
                started = time.monotonic()
                registry.record_progress(task.task_id, f"step {shared[2]}")
                shared[3] = max(shared[3], int((time.monotonic() - started) * 1000))
                shared[2] += 1
                time.sleep(0.001)

    def wait_for_commits(self) -> None:
        """Wait for three more commits."""
        expected, deadline = self._shared[2] + 3, time.monotonic() + MAX_WAIT_S
        while self._shared[2] < expected:
            assert time.monotonic() < deadline, "the writer waits for a reader"
            time.sleep(0.001)

    @contextlib.contextmanager
    def stopped_in_a_transaction(self) -> Iterator[None]:
        self._shared[0] = self.HOLD
        while not self._shared[1]:
            time.sleep(0.001)
        os.kill(self._child.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._child.pid, signal.SIGCONT)
            self._shared[0] = self.GO

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._shared[0] = self.END
        if kind is not None:
            self._child.kill()
        assert self._child.finish() == []
        assert self._shared[3] < MAX_WAIT_S * 1000, "the writer waited for a reader"


def commands(url: str, task_id: str) -> Iterator[tuple[str, list[str]]]:
    """Each reading command that the ledger's backend supports, with its arguments."""
    values = {"URL": url, "TASK": task_id}
    for name, words in READING.items():
        if not (name.startswith("db ") and url.startswith("json:")):
            yield name, [*name.split(), *(values.get(word, word) for word in words)]


def run(url: str, words: list[str], before: Callable[[], object] = lambda: None) -> Child:
    """Run a command in a new process, which reports its status, duration and error output."""

    def work(report: Report) -> None:
        before()
        err, started = io.StringIO(), time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            status = main(["--url", url, *words])
        report(json.dumps([status, time.monotonic() - started, err.getvalue()]))

    return Child(work)


def check(url: str, words: list[str], before: Callable[[], object] = lambda: None) -> None:
    """Run a command to its end; it must succeed without a long wait."""
    [line] = run(url, words, before).finish()
    status, seconds, errors = json.loads(line)
    assert status == 0, errors
    assert seconds < MAX_WAIT_S


class StopAt:
    """Stops this process at its n-th read step; without a number, counts the read steps."""

    STEPS = frozenset({"execute", "fetchall", "read", "readline", "readinto", "pread", "open"})

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.steps = 0

    def __call__(self) -> None:
        sys.setprofile(self._profile)

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("c_call", "call"):
            name = argument.__name__ if event == "c_call" else frame.f_code.co_name
            if name in self.STEPS:
                self.steps += 1
                if self.steps == self.number:
                    os.kill(os.getpid(), signal.SIGSTOP)


# -- ledgers --------------------------------------------------------------------


class Ledger:
    """A ledger: its URLs for the writer and for readers, and a function for its stored state."""

    def __init__(self, url: str, read_url: str, state: Callable[[], object]) -> None:
        self.url, self.read_url, self.state = url, read_url, state


def files_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All files except SQLite's shared memory, which is not part of the ledger."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
        if not path.name.endswith("-shm")
    }


@pytest.fixture(params=["json", "sqlite", "postgresql", "mariadb"])
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    yield from LEDGERS[request.param](request)


def json_ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    folder = request.getfixturevalue("tmp_path") / "ledger"
    url = f"json:///{folder}"
    yield Ledger(url, url, lambda: files_of(folder))


def sqlite_ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    folder = request.getfixturevalue("tmp_path")
    url = f"sqlite:///{folder / 'tasks.db'}"
    yield Ledger(url, url, lambda: files_of(folder))


def postgresql_ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    server, url = (request.getfixturevalue(name) for name in ("postgres_server", "postgres_url"))
    database, role = sa.make_url(url).database, f"reader_{secrets.token_hex(4)}"
    server.execute(f"CREATE ROLE {role} LOGIN")
    server.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}", database)

    def state() -> object:
        # The next transaction id of the whole server: unchanged if no session has written.
        return server.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text")

    yield Ledger(url, text_of(sa.make_url(url).set(username=role)), state)
    server.execute(f"DROP OWNED BY {role}", database)
    server.execute(f"DROP ROLE {role}")


def mariadb_ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    server, url = (request.getfixturevalue(name) for name in ("mariadb_server", "mariadb_url"))
    database, user = sa.make_url(url).database, f"reader_{secrets.token_hex(4)}"
    server.execute(f"CREATE USER {user}@'%'")
    server.execute(f"GRANT SELECT ON {database}.* TO {user}@'%'")

    def state() -> object:
        tables = server.execute(
            "SELECT table_name, create_time, update_time FROM information_schema.tables "
            f"WHERE table_schema = '{database}' ORDER BY table_name"
        )
        return [(row, server.execute(f"CHECKSUM TABLE {database}.{row[0]}"), row) for row in tables]

    yield Ledger(url, text_of(sa.make_url(url).set(username=user)), state)
    server.execute(f"DROP USER {user}@'%'")


def text_of(url: sa.URL) -> str:
    return url.render_as_string(hide_password=False)


LEDGERS = {
    "json": json_ledger,
    "sqlite": sqlite_ledger,
    "postgresql": postgresql_ledger,
    "mariadb": mariadb_ledger,
}


# -- beside a running writer ------------------------------------------------------


def test_a_writer_commits_while_commands_read(ledger):
    with Writer(ledger.url) as writer:
        for _, words in commands(ledger.read_url, writer.task_id):
            check(ledger.read_url, words)
            writer.wait_for_commits()


def test_commands_wait_for_no_writer_and_change_nothing(ledger):
    with Writer(ledger.url) as writer:
        with writer.stopped_in_a_transaction():
            before = ledger.state()
            for name, words in commands(ledger.read_url, writer.task_id):
                check(ledger.read_url, words)
                assert ledger.state() == before, name
        writer.wait_for_commits()


def test_a_writer_waits_for_no_command_that_is_stopped_while_it_reads(ledger):
    with Writer(ledger.url) as writer:
        with writer.stopped_in_a_transaction():
            steps = count_steps(ledger.read_url, ["verify"])
        assert steps > 4
        for number in {1, steps // 3, steps // 2, steps * 3 // 4}:
            reader = run(ledger.read_url, ["verify"], StopAt(number))
            os.waitid(os.P_PID, reader.pid, os.WSTOPPED | os.WNOWAIT)
            try:
                writer.wait_for_commits()
            finally:
                os.kill(reader.pid, signal.SIGCONT)
            [line] = reader.finish()
            assert json.loads(line)[0] == 0, line


def count_steps(url: str, words: list[str]) -> int:
    counter = StopAt()

    def work(report: Report) -> None:
        counter()
        with contextlib.redirect_stdout(io.StringIO()):
            main(["--url", url, *words])
        sys.setprofile(None)
        report(str(counter.steps))

    return int(Child(work).finish()[0])


# -- SQLite's files --------------------------------------------------------------------


def written(url: str, *, killed: bool) -> str:
    """Write a ledger in a process that closes it or is killed; return a task's id."""

    def work(report: Report) -> None:
        with TaskRegistry.open(url) as registry:
            task = registry.create(runtime="cli", task="written", status="running")
            for number in range(20):
                registry.record_progress(task.task_id, f"step {number}")
            report(task.task_id)
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)

    [task_id] = Child(work).finish()
    return task_id


def test_commands_do_not_change_the_log_of_a_killed_writer(tmp_path):
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    task_id = written(url, killed=True)
    before = files_of(tmp_path)
    assert before["tasks.db-wal"][2]
    for name, words in commands(url, task_id):
        check(url, words)
        assert files_of(tmp_path) == before, name


def test_commands_do_not_change_a_closed_database(tmp_path):
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    task_id = written(url, killed=False)
    before = files_of(tmp_path)
    assert list(before) == ["tasks.db"]
    for name, words in commands(url, task_id):
        check(url, words)
        after = files_of(tmp_path)
        assert after.pop("tasks.db-wal", (0, 0, b""))[2] == b"", name
        assert after == before, name


def test_commands_read_in_a_directory_without_write_permission():
    folder = Path(tempfile.mkdtemp())
    try:
        url = f"sqlite:///{folder / 'tasks.db'}"
        task_id = written(url, killed=False)
        (folder / "tasks.db").chmod(0o444)
        folder.chmod(0o555)
        before = files_of(folder)
        for name, words in commands(url, task_id):
            # The user nobody may not be allowed to read the migration scripts.
            if not name.startswith("db "):
                check(url, words, become_nobody)
                assert files_of(folder) == before, name
                assert {path.name for path in folder.iterdir()} == {"tasks.db"}, name
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def become_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
