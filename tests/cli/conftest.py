"""The command line as a user meets it: real processes on real files."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_process import CLI, Said, Say

from taskstore.cli import main
from taskstore.cli.child import FORWARDED
from taskstore.cli.ledger import URL_VARIABLE


@pytest.fixture(autouse=True)
def heard_signals() -> Iterator[None]:
    """Signals that the test run ignores, as under ``nohup``, are not ignored by the tests."""
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
def say(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Say:
    """Run a command in this process: for everything that needs no process of its own."""
    monkeypatch.setenv(URL_VARIABLE, url)

    def run(*words: str) -> Said:
        capsys.readouterr()
        status = main(words)
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return run
