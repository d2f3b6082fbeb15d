"""An error prints one line and sets the exit status, without a traceback or a password."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from cli_process import CLI, TASKSTORE, Invoke

from taskstore import TaskRegistry, __version__
from taskstore.cli import app
from taskstore.cli.render import escape_controls, to_json

HOSTILE = (
    "\x1b]0;owned\x07[red]not red[/red] \x9b31m\u202eevil\r\nsecond \U0001f468\u200d\U0001f469"
)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["list", "--url", "foo:///x"],
            2,
            "no backend for the URL scheme 'foo' is installed; installed schemes: json:",
        ),
        (["list", "--url", "nothing"], 2, "is not a URL"),
        (["list", "--after", "zzz"], 2, "after: 'zzz' is not the next_cursor of a page"),
        (["list", "--status", "done"], 2, "'done' is not one of"),
        (["list", "--since", "12"], 2, "add a unit: '12h'"),
        (["list", "--since", "1700000000"], 2, "in seconds, use 1700000000000"),
        (["list", "--since", "tomorrow"], 2, "is not a time"),
        (["list", "--limit", "0"], 2, "Invalid value for '--limit'"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["show"], 2, "Missing argument"),
        (["list", "--owner", "x\ud800"], 2, "lone surrogate"),
        (["run", "--timeout", "0", "--", "true"], 2, "is not a positive duration"),
        (["run", "--label", "x" * 256, "--", "true"], 2, "label: is 256 bytes"),
        (["run", "--id-file", "/nowhere/x", "--", "true"], 2, "--id-file /nowhere/x: No such file"),
        (["compact", "--erase-deleted", "--if-due"], 2, "--erase-deleted cannot be combined"),
        (["list"], 3, "does not exist"),
        (["cancel", "x"], 3, "does not exist"),
        (["compact"], 3, "does not exist"),
        (["list", "--url", "json:////etc/hostname"], 3, "/etc/hostname"),
        (["list", "--url", "sqlite:////etc/hostname"], 3, "/etc/hostname"),
    ],
)
def test_errors(
    invoke: Invoke, tmp_path: Path, words: list[str], status: int, message: str
) -> None:
    result = invoke(*words)
    assert (result.status, result.out) == (status, "")
    assert message in result.err
    assert result.err.startswith("taskstore: ")
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_error_contains_the_password(invoke: Invoke) -> None:
    where = "postgresql+psycopg://me:s3cr3t@127.0.0.1:1/db"
    for words in (["list"], ["run", "true"], ["verify"]):
        result = invoke("--url", where, *words)
        assert result.status == 3
        assert "s3cr3t" not in result.err
        assert "127.0.0.1" in result.err


def test_an_unexpected_error_prints_one_line(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("at x://u:s3cr3t@h\nand more")

    monkeypatch.setattr("taskstore.cli.ledger.open_reader", broken)
    result = invoke("list")
    assert result.status == 3
    assert result.err.startswith("taskstore: unexpected RuntimeError: at x://u:***@h")
    assert result.err.count("\n") == 1
    monkeypatch.setenv(app.DEBUG_VARIABLE, "1")
    with pytest.raises(RuntimeError):
        invoke("list")


def test_an_interrupt_prints_nothing(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("taskstore.cli.ledger.open_reader", interrupted)
    result = invoke("list")
    assert (result.status, result.err) == (130, "")


def test_a_closed_output_pipe_is_no_error(cli: CLI, url: str) -> None:
    with TaskRegistry.open(url) as registry, registry.batch():
        for _ in range(3):
            registry.create(runtime="cli", task="x" * 100_000)
    listing = cli.start("list")
    assert listing.stdout is not None
    assert listing.stderr is not None
    listing.stdout.read(10)
    listing.stdout.close()
    assert (listing.wait(30), listing.stderr.read()) == (141, b"")
    listing.stderr.close()


AS_NOBODY = """
import os, sys
from taskstore.cli import main
main(["list"])  # imports all modules as the current user
os.chmod(sys.argv[1], 0)
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(main(["list"]))
"""


def test_a_ledger_without_read_permission(cli: CLI, url: str, tmp_path: Path) -> None:
    with TaskRegistry.open(url) as registry:
        registry.create(runtime="cli", task="x")
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(tmp_path / "tasks.db")],
        env=cli.env,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("taskstore: ")
    assert "ermission denied" in done.stderr
    assert str(tmp_path / "tasks.db") in done.stderr
    assert "unexpected" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_control_characters_in_a_ledger_are_escaped(invoke: Invoke, cli: CLI, url: str) -> None:
    with TaskRegistry.open(url) as registry:
        task = registry.create(
            runtime="cli", task=HOSTILE, label=HOSTILE, status="running", run_id="r", owner_key="o"
        )
        registry.finish(task.task_id, "failed", error=HOSTILE)
    for words in (["list"], ["show", "r"], ["log", "r"], ["changes"], ["list", "--json"]):
        plain = invoke(*words).out
        assert not set(plain) & set("\x1b\x07\x9b\u202e\r"), words
        if "--json" not in words:
            assert "[red]not red[/red]" in plain
            assert "\\x1b]0;owned\\x07" in plain
    for words in (["list"], ["log", "r"]):
        output = on_a_terminal(cli, *words)
        assert "\x1b]0" not in output, words
        assert not set(output) & set("\x07\x9b\u202e"), words
        assert "\\x1b]0;owned\\x07[red]not red[/red]" in output
    assert invoke("show", "r", "--json").json["task"] == HOSTILE


def on_a_terminal(cli: CLI, *words: str) -> str:
    """The output of a command on a terminal."""
    ours, theirs = pty.openpty()
    env = {**cli.env, "TERM": "xterm", "COLUMNS": "300"}
    process = subprocess.Popen([*TASKSTORE, *words], env=env, stdout=theirs, stdin=theirs)
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux reports that the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    assert process.wait(30) == 0
    return output.decode()


def test_control_characters_are_escaped() -> None:
    assert escape_controls(
        "plain \N{LATIN SMALL LETTER E WITH ACUTE} \U0001f468\u200d\U0001f469"
    ) == ("plain \N{LATIN SMALL LETTER E WITH ACUTE} \U0001f468\u200d\U0001f469")
    assert escape_controls("a\tb\nc\x00\x9b\u2028\U000e0001") == (
        "a\\tb\\nc\\x00\\x9b\\u2028\\U000e0001"
    )
    assert to_json({"a": "\x9b\u202e\x7f"}) == '{"a": "\\u009b\\u202e\\u007f"}'


def test_version_and_help(invoke: Invoke) -> None:
    assert invoke("--version").out == f"taskstore {__version__}\n"
    bare = invoke()
    assert bare.status == 0
    assert "Usage: taskstore" in bare.out
    assert "Usage: taskstore list" in invoke("list", "--help").out
    assert "Usage: taskstore db" in invoke("db").out


def test_the_url_may_precede_the_command(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = (f"json:///{tmp_path / name}" for name in ("before", "after"))
    for where in (before, after):
        TaskRegistry.open(where).close()
    assert invoke("--url", before, "list").status == 0
    assert invoke("--url", "foo:", "list", "--url", after).status == 0
    monkeypatch.delenv("TASKSTORE_URL")
    monkeypatch.setattr("taskstore.cli.ledger.default_url", lambda: before)
    assert invoke("list").status == 0


def test_the_command_line_imports_no_heavy_module() -> None:
    code = "import sys, taskstore.cli; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], encoding="utf-8").split()
    heavy = {"rich", "sqlalchemy", "alembic", "filelock", "taskstore.registry.registry"}
    assert not heavy & set(loaded) - {"taskstore.registry.registry"}
