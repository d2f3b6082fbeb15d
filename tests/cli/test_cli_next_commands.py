"""A command that taskstore prints works as printed, and never shows a password."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import sqlalchemy as sa
from cli_process import CLI, Invoke

from taskstore import SchemaMismatchError, StoreUnavailableError, TaskRegistry, open_store
from taskstore.cli import app
from taskstore.store.opening import shell_command
from taskstore.stores.sql import SQLStore

HOSTILE = "-a b'c\"$HOME`\\\n\t\x1b[31m\u202e\N{LATIN SMALL LETTER E WITH ACUTE}"
TASKSTORE = f'taskstore() {{ {shlex.quote(sys.executable)} -m taskstore "$@"; }}\n'
"""A shell function that runs the package under test."""


def in_a_shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a printed command as a user does who copies the command into a shell."""
    return subprocess.run(
        ["bash", "-c", TASKSTORE + command], capture_output=True, check=True, encoding="utf-8"
    )


@pytest.fixture
def other(tmp_path: Path) -> str:
    """Return the URL of a ledger that is neither in the environment nor the default."""
    url = f"sqlite:///{tmp_path / 'it is other $1.db'}"
    with TaskRegistry.open(url, clock=iter(range(10**12, 10**12 + 99)).__next__) as registry:
        for label in ("one", "two", "three"):
            registry.create(runtime="cli", task="x", label=label, run_id=HOSTILE, owner_key=HOSTILE)
    return url


def printed_command(text: str) -> str:
    """Return the command in a message: from its first word to the end or the closing bracket."""
    found = re.search(r"taskstore (?!: )\w.*", text.partition("taskstore: ")[2])
    assert found is not None, text
    return found[0].removesuffix(")")


def test_the_next_page_is_of_the_same_ledger(invoke: Invoke, url: str, other: str) -> None:
    with TaskRegistry.open(url) as registry:
        registry.create(runtime="cli", task="the ledger in the environment")
    for words in (
        ["--url", other, "list", "--limit=1", "--owner", HOSTILE, "--status=queued"],
        ["list", "--limit=1", f"--owner={HOSTILE}", "--since=1970-01-01", "--url", other],
    ):
        first = invoke(*words)
        command, lines = printed_command(first.err), first.out.splitlines()
        while command:
            page = in_a_shell(command)
            lines += page.stdout.splitlines()
            command = printed_command(page.stderr) if page.stderr else ""
        assert [line.split("\t")[7] for line in lines] == ["three", "two", "one"]


def test_other_hints_name_the_ledger_of_the_option(invoke: Invoke, other: str) -> None:
    for words in (["show", "--", HOSTILE], ["cancel", "--", HOSTILE]):
        command = printed_command(invoke("--url", other, *words).err)
        assert len(in_a_shell(command).stdout.splitlines()) == 3, command


def test_a_url_of_the_environment_is_not_printed(invoke: Invoke, url: str) -> None:
    with TaskRegistry.open(url) as registry:
        for _ in range(2):
            registry.create(runtime="cli", task="x", run_id="r", label=str(_), owner_key="o")
    assert "--url" not in invoke("list", "--limit=1").err
    assert invoke("show", "r").err.endswith("taskstore list --run r\n")


@pytest.mark.parametrize(
    ("words", "url", "command"),
    [
        (("list",), "", "taskstore list"),
        (("list",), "sqlite:///a b.db", "taskstore list --url 'sqlite:///a b.db'"),
        (
            ("run", "--", "ls", "-l"),
            "json:///x",
            "taskstore run --url json:///x -- ls -l",
        ),
        (
            ("verify",),
            "postgresql+psycopg://me:s3@cr3t@h:5432/d?password=s3cr3t",
            "taskstore verify --url 'postgresql+psycopg://me:***@h:5432/d?password=***'",
        ),
        (("show", "a\nb'\\c"), "", "taskstore show $'a\\012b\\047\\134c'"),
        (("show", "\udcff"), "", "taskstore show $'\\377'"),
    ],
)
def test_commands_are_quoted_without_password(
    words: tuple[str, ...], url: str, command: str
) -> None:
    assert shell_command(*words, url=url) == command


def test_a_command_with_a_masked_password_says_what_to_do(
    invoke: Invoke, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "postgresql+psycopg://me:s3cr3t@127.0.0.1/x"
    monkeypatch.setattr(
        "taskstore.cli.ledger.open_store", lambda _, **options: open_store(other, **options)
    )
    for words in (["list", "--limit=1"], ["show", "--", HOSTILE], ["delete", "--", HOSTILE]):
        text = invoke("--url", secret, *words).err
        assert "--url 'postgresql+psycopg://me:***@127.0.0.1/x'" in text
        assert "put the password in place of ***" in text
        assert "s3cr3t" not in text


def test_the_hint_for_a_missing_schema_works_as_printed(cli: CLI, tmp_path: Path) -> None:
    path = tmp_path / "a b.db"
    path.touch()
    engine = sa.create_engine(f"sqlite:///{path}")
    for ledger in (f"sqlite:///{path}", engine):
        with pytest.raises(SchemaMismatchError) as caught:
            if isinstance(ledger, str):
                open_store(ledger, migrate="never")
            else:
                SQLStore(ledger, migrate="never")
        assert str(caught.value).endswith(f"(run: taskstore db upgrade --url 'sqlite:///{path}')")
    engine.dispose()
    _, words = str(caught.value)[:-1].split("run: taskstore ")
    assert cli(*shlex.split(words)).returncode == 0
    open_store(f"sqlite:///{path}", migrate="never").close()


def test_an_error_that_names_two_urls_is_not_garbled(capsys: pytest.CaptureFixture[str]) -> None:
    """The text between the port of one URL and the user of the next URL is no password."""
    url = "postgresql+psycopg://me@h:5432/d"
    app.print_error(f"{url} contains no ledger (run: taskstore db upgrade --url {url})")
    app.print_error(f"{url} contains no ledger (run: taskstore db upgrade --url {url})", url=url)
    app.print_error("at x://me:s3c/r3t@h/d and x://me:s3c/r3t@i", url="x://me:s3c/r3t@h/d")
    assert capsys.readouterr().err.splitlines() == [
        f"taskstore: {url} contains no ledger (run: taskstore db upgrade --url {url})",
        f"taskstore: {url} contains no ledger (run: taskstore db upgrade --url {url})",
        "taskstore: at x://me:***@h/d and x://me:***@i",
    ]


MAIL = "imap://inbox:42@mail.example/7?password=none"
"""A run id and session key that looks like a URL with a password."""


@pytest.mark.parametrize("command", ["show", "cancel", "notify", "delete"])
@pytest.mark.parametrize("field", ["run_id", "requester_session_key"])
def test_an_id_that_looks_like_a_url_is_not_masked(
    invoke: Invoke, url: str, other: str, command: str, field: str
) -> None:
    with TaskRegistry.open(other) as registry:
        for label in ("four", "five"):
            registry.create(runtime="cli", task="x", label=label, owner_key=label, **{field: MAIL})
    words = [command, MAIL, *(["silent"] if command == "notify" else [])]
    text = invoke("--url", other, *words).err
    assert "***" not in text
    listed = in_a_shell(printed_command(text)).stdout
    assert [line.split("\t")[7] for line in listed.splitlines()] == ["five", "four"]
    assert f"no task {MAIL!r}" in invoke("show", "--url", url_without_task(url), MAIL).err


def url_without_task(url: str) -> str:
    TaskRegistry.open(url).close()
    return url


@pytest.mark.parametrize(
    "text",
    [
        "postgresql+psycopg://me:s3cr3t@h:port/d",
        "postgresql+psycopg://me:s3cr3t@127.0.0.1:1/d",
        "postgresql+psycopg://me:s3cr3t@127.0.0.1:1/d?nonsense=1",
        "postgresql+psycopg://me@127.0.0.1:1/d?password=s3cr3t",
        "postgresql+psycopg://me:s3cr3t%40@127.0.0.1:1/d",
        "mariadb+pymysql://me:s3cr3t@127.0.0.1:1/d",
        "postgres://me:s3cr3t@h/d",
        "sqlite://me:s3cr3t@h/d",
        "json://me:s3cr3t@h/d",
        "ab/c://me:s3cr3t@h/d",
    ],
)
@pytest.mark.parametrize(
    "words", [["list"], ["run", "--", "true"], ["db", "current"], ["compact"], ["contract"]]
)
def test_no_error_shows_the_password_of_the_ledger(
    invoke: Invoke, words: list[str], text: str
) -> None:
    command = ["contract", text] if words == ["contract"] else ["--url", text, *words]
    result = invoke(*command)
    assert result.status != 0
    assert "s3cr3t" not in result.err + result.out


def test_an_unexpected_error_and_a_misplaced_url_show_no_password(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "postgresql+psycopg://me:s3 cr3t@h/d"

    for failure in (RuntimeError, OSError, StoreUnavailableError):
        error = failure(f"cannot open {secret} or {secret.replace('/d', '/e')}")
        monkeypatch.setattr("taskstore.cli.ledger.open_store", Mock(side_effect=error))
        text = invoke("list", "--url", secret).err
        assert "cr3t" not in text
        assert "me:***@h/e" in text
    assert "s3cr3t" not in invoke("list", "postgresql+psycopg://me:s3cr3t@h/d").err
