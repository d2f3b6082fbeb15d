"""Commands that write print the notices of the store on standard error, like those that read."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cli_process import CLI, Invoke

from taskstore import TaskRegistry, open_store

HOUR_MS = 3_600_000


def create_task(url: str, ahead_ms: int = 0) -> str:
    """Create a task in the ledger, with a clock that is ahead; return the task's id."""

    def clock() -> int:
        return time.time_ns() // 1_000_000 + ahead_ms

    with TaskRegistry.open(url, clock=clock) as registry:
        return registry.create(runtime="cli", task="x").task_id


def words_of(command: str, task_id: str) -> list[str]:
    """Return the command line of a writing command for a task."""
    return {
        "run": ["run", "--", "true"],
        "cancel": ["cancel", task_id],
        "notify": ["notify", task_id, "silent"],
        "delete": ["delete", task_id, "--yes"],
    }[command]


COMMANDS = ["run", "cancel", "notify", "delete"]


def test_run_says_that_an_empty_file_becomes_a_ledger(cli: CLI, tmp_path: Path) -> None:
    (tmp_path / "tasks.db").touch()
    done = cli("run", "--", "sh", "-c", "echo the output; echo the errors >&2")
    assert (done.returncode, done.stdout) == (0, b"the output\n")
    notice, _, rest = done.stderr.decode().partition("\n")
    assert notice.startswith("taskstore: note: ")
    assert "empty" in notice
    assert rest.endswith("the errors\n")  # the notices come before the output of the command
    assert "note: " not in rest.partition("the errors")[2]


@pytest.mark.parametrize("scheme", ["sqlite", "json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_clock_that_was_ahead_is_told(
    invoke: Invoke, tmp_path: Path, scheme: str, command: str
) -> None:
    url = f"{scheme}:///{tmp_path / 'ahead'}"
    task_id = create_task(url, ahead_ms=3 * HOUR_MS)
    result = invoke("--url", url, *words_of(command, task_id))
    assert result.status == 0
    assert "taskstore: note: " in result.err
    assert "ahead of" in result.err or "later than" in result.err
    assert "note: " not in result.out


@pytest.mark.parametrize("words", [["cancel", "none"], ["notify", "none", "silent"], ["run"]])
def test_the_notices_are_printed_too_if_the_command_fails(invoke: Invoke, words: list[str]) -> None:
    with open_store("memory:") as store:
        [expected] = store.report().notices
    if words == ["run"]:
        words = ["run", "--", "/nonexistent"]
    result = invoke("--url", "memory:", *words)
    assert result.status != 0
    assert f"taskstore: note: {expected}" in result.err
