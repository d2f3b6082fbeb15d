"""Tools that observe and change a store from outside."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taskstore.stores.sql import SQLStore


class Spy:
    """A layer between a store and its driver that records statements, and may act on them.

    ``before`` and ``after`` are called with each statement; what they raise
    is what the driver is seen to raise.
    """

    def __init__(self, store: SQLStore) -> None:
        self.statements: list[str] = []
        self.before: Callable[[str], None] = lambda _sql: None
        self.after: Callable[[str], None] = lambda _sql: None
        self._database = store._database
        self._cursor = self._database.cursor
        pool = store._transactions.pool
        if (writing := pool.write_session) is not None:
            pool.write_session = None  # the next one has a spied cursor
            pool.release(writing)
        self._database.cursor = self._wrapped  # type: ignore[method-assign]

    def _wrapped(self, raw: Any) -> Any:
        return _SpiedCursor(self._cursor(raw), self)

    def matching(self, text: str) -> list[str]:
        return [sql for sql in self.statements if text in sql]


class _SpiedCursor:
    def __init__(self, cursor: Any, spy: Spy) -> None:
        self._real = cursor
        self._spy = spy

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        self._spy.statements.append(sql)
        self._spy.before(sql)
        result = self._real.execute(sql, parameters)
        self._spy.after(sql)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def write(store: SQLStore, work: Callable[[Any], Any]) -> Any:
    """Run ``work`` in one write transaction of a store, with the store's retries."""
    for attempt in store._transactions.attempts():
        with attempt, store._transactions.write() as tx:
            return work(tx)
    raise AssertionError


def in_process(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a Python script in another process."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _started.append(process)
    return process


def reap() -> None:
    """Kill the processes that a test has left running."""
    while _started:
        with _started.pop() as process:
            process.kill()


_started: list[subprocess.Popen[str]] = []


def output_of(process: subprocess.Popen[str]) -> str:
    """The output of a process, which must succeed."""
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return printed


LOGS = ("-wal", "-shm")


def put_in_place(backup, path, *, remove=LOGS):
    """Replace a file by a copy with the same bytes, as ``cp`` and ``mv`` do."""
    incoming = path.with_name("incoming")
    shutil.copy(backup, incoming)
    for suffix in remove:
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    incoming.replace(path)


def remove_logs(path, suffixes=LOGS):
    for suffix in suffixes:
        Path(f"{path}{suffix}").unlink()
