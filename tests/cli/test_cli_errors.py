"""What goes wrong gets one line, a status, and never a traceback or a password."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from cli_process import CLI, TASKSTORE, Say

from taskstore import TaskRegistry, __version__
from taskstore.cli import app
from taskstore.cli.render import to_json, visible

HOSTILE = (
    "\x1b]0;owned\x07[red]not red[/red] \x9b31m\u202eevil\r\nsecond \U0001f468\u200d\U0001f469"
)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["list", "--url", "foo:///x"], 2, "no backend for the URL scheme 'foo'; installed: json:"),
        (["list", "--url", "nothing"], 2, "is not a URL"),
        (["list", "--after", "zzz"], 2, "after: is not the next_cursor of a page"),
        (["list", "--status", "done"], 2, "'done' is not one of"),
        (["list", "--since", "12"], 2, "write a unit, as in 12h"),
        (["list", "--since", "tomorrow"], 2, "is not a time"),
        (["list", "--limit", "0"], 2, "Invalid value for '--limit'"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["show"], 2, "Missing argument"),
        (["list", "--owner", "x\ud800"], 2, "lone surrogate"),
        (["run", "--timeout", "0", "--", "true"], 2, "is not a time that can be waited for"),
        (["run", "--label", "x" * 256, "--", "true"], 2, "label: is 256 bytes"),
        (["run", "--id-file", "/nowhere/x", "--", "true"], 2, "--id-file /nowhere/x: No such file"),
        (["compact", "--erase-deleted", "--if-due"], 2, "--erase-deleted keeps nothing"),
        (["list"], 3, "does not exist"),
        (["cancel", "x"], 3, "does not exist"),
        (["compact"], 3, "does not exist"),
        (["list", "--url", "json:////etc/hostname"], 3, "/etc/hostname"),
        (["list", "--url", "sqlite:////etc/hostname"], 3, "/etc/hostname"),
    ],
)
def test_errors(say: Say, tmp_path: Path, words: list[str], status: int, says: str) -> None:
    said = say(*words)
    assert (said.status, said.out) == (status, "")
    assert says in said.err
    assert said.err.startswith("taskstore: ")
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_never_told(say: Say) -> None:
    where = "postgresql+psycopg://me:s3cr3t@127.0.0.1:1/db"
    for words in (["list"], ["run", "true"], ["verify"]):
        said = say("--url", where, *words)
        assert said.status == 3
        assert "s3cr3t" not in said.err
        assert "127.0.0.1" in said.err


def test_an_unexpected_error_is_a_line_too(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("at x://u:s3cr3t@h\nand more")

    monkeypatch.setattr("taskstore.cli.ledger.open_reader", broken)
    said = say("list")
    assert said.status == 3
    assert said.err.startswith("taskstore: unexpected RuntimeError: at x://u:***@h")
    assert said.err.count("\n") == 1
    monkeypatch.setenv(app.DEBUG_VARIABLE, "1")
    with pytest.raises(RuntimeError):
        say("list")


def test_an_interrupt_is_quiet(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("taskstore.cli.ledger.open_reader", interrupted)
    said = say("list")
    assert (said.status, said.err) == (130, "")


def test_a_reader_that_goes_away_is_no_error(cli: CLI, url: str) -> None:
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
main(["list"])  # as whoever we are: everything is imported by now
os.chmod(sys.argv[1], 0)
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(main(["list"]))
"""


def test_a_ledger_that_may_not_be_read(cli: CLI, url: str, tmp_path: Path) -> None:
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


def test_hostile_text_is_shown_and_not_obeyed(say: Say, cli: CLI, url: str) -> None:
    with TaskRegistry.open(url) as registry:
        task = registry.create(
            runtime="cli", task=HOSTILE, label=HOSTILE, status="running", run_id="r", owner_key="o"
        )
        registry.finish(task.task_id, "failed", error=HOSTILE)
    for words in (["list"], ["show", "r"], ["log", "r"], ["changes"], ["list", "--json"]):
        plain = say(*words).out
        assert not set(plain) & set("\x1b\x07\x9b\u202e\r"), words
        if "--json" not in words:
            assert "[red]not red[/red]" in plain
            assert "\\x1b]0;owned\\x07" in plain
    for words in (["list"], ["log", "r"]):
        seen = on_a_terminal(cli, *words)
        assert "\x1b]0" not in seen, words
        assert not set(seen) & set("\x07\x9b\u202e"), words
        assert "\\x1b]0;owned\\x07[red]not red[/red]" in seen
    assert say("show", "r", "--json").json["task"] == HOSTILE


def on_a_terminal(cli: CLI, *words: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    env = {**cli.env, "TERM": "xterm", "COLUMNS": "300"}
    process = subprocess.Popen([*TASKSTORE, *words], env=env, stdout=theirs, stdin=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    assert process.wait(30) == 0
    return seen.decode()


def test_what_is_made_visible() -> None:
    assert visible("plain \N{LATIN SMALL LETTER E WITH ACUTE} \U0001f468\u200d\U0001f469") == (
        "plain \N{LATIN SMALL LETTER E WITH ACUTE} \U0001f468\u200d\U0001f469"
    )
    assert visible("a\tb\nc\x00\x9b\u2028\U000e0001") == ("a\\tb\\nc\\x00\\x9b\\u2028\\U000e0001")
    assert to_json({"a": "\x9b\u202e\x7f"}) == '{"a": "\\u009b\\u202e\\u007f"}'


def test_version_and_help(say: Say) -> None:
    assert say("--version").out == f"taskstore {__version__}\n"
    bare = say()
    assert bare.status == 0
    assert "Usage: taskstore" in bare.out
    assert "Usage: taskstore list" in say("list", "--help").out
    assert "Usage: taskstore db" in say("db").out


def test_the_url_may_stand_before_the_command(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = (f"json:///{tmp_path / name}" for name in ("before", "after"))
    for where in (before, after):
        TaskRegistry.open(where).close()
    assert say("--url", before, "list").status == 0
    assert say("--url", "foo:", "list", "--url", after).status == 0
    monkeypatch.delenv("TASKSTORE_URL")
    monkeypatch.setattr("taskstore.cli.ledger.default_url", lambda: before)
    assert say("list").status == 0


def test_only_what_is_needed_is_imported() -> None:
    code = "import sys, taskstore.cli; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], encoding="utf-8").split()
    heavy = {"rich", "sqlalchemy", "alembic", "filelock", "taskstore.registry.registry"}
    assert not heavy & set(loaded) - {"taskstore.registry.registry"}
