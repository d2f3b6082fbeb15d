"""Fixtures for tests of the command line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from cli_process import CLI, Invoke, Result

from taskstore.cli import main
from taskstore.cli.child import FORWARDED
from taskstore.cli.ledger import URL_VARIABLE


@pytest.fixture(autouse=True)
def default_signals() -> Iterator[None]:
    """Restore the default handling of signals that the test run ignores, as under ``nohup``."""
    ignored = [number for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'tasks.db'}"


@pytest.fixture
def cli(url: str) -> Iterator[CLI]:
    cli = CLI(url)
    yield cli
    cli.end()


@pytest.fixture
def invoke(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in this process, for tests that need no new process."""
    monkeypatch.setenv(URL_VARIABLE, url)

    def run(*words: str) -> Result:
        capsys.readouterr()
        status = main(words)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Every statement that reaches SQLite."""
    collected: list[str] = []

    def trace(connection: Any, _: object) -> None:
        connection.set_trace_callback(collected.append)

    sqlalchemy.event.listen(sqlalchemy.Pool, "connect", trace)
    yield collected
    sqlalchemy.event.remove(sqlalchemy.Pool, "connect", trace)
