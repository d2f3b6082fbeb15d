"""The ``taskstore`` command for tests, in a new process or in this one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from taskstore.cli import main
from taskstore.cli.ledger import URL_VARIABLE

TASKSTORE = [sys.executable, "-m", "taskstore"]


class CLI:
    """The ``taskstore`` command on one ledger."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.env = {**os.environ, URL_VARIABLE: url}
        self._started: list[subprocess.Popen[bytes]] = []

    def __call__(self, *words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Run the command in a new process, to its end."""
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("timeout", 60)
        return subprocess.run(
            [*TASKSTORE, *words],
            check=False,
            env=self.env,
            capture_output=True,
            **options,
        )

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        self._started.append(subprocess.Popen([*TASKSTORE, *words], env=self.env, **options))
        return self._started[-1]

    def end(self) -> None:
        """Kill all started processes, and close their pipes."""
        for process in self._started:
            with process:
                process.kill()

    def json(self, *words: str) -> Any:
        """Run the command in this process, which is faster, and parse its JSON."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = main([*words, "--json", "--url", self.url])
        assert status == 0
        return json.loads(out.getvalue())

    def tasks(self) -> list[dict[str, Any]]:
        return self.json("list")["tasks"]

    def only_task(self) -> dict[str, Any]:
        [task] = self.tasks()
        return task


class Result:
    """The output and the exit status of a command in this process."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err

    @property
    def lines(self) -> list[list[str]]:
        return [line.split("\t") for line in self.out.splitlines()]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Invoke = Callable[..., Result]
