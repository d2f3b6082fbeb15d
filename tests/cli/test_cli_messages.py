"""Messages say what was wrong, and name what the user probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import Invoke

from taskstore import CursorExpiredError, TaskRegistry, ValidationError, open_store
from taskstore.cli.ledger import URL_VARIABLE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "--status", "done"], "Invalid value for '--status': 'done' is not one of"),
        (["notify", "x", "never"], "Invalid value for 'policy': 'never' is not one of"),
        (["list", "--after", "zz"], "after: 'zz' is not the next_cursor of a page"),
        (["list", "--after", "7:00ff"], "but a seq or a cursor of the journal"),
        (["changes", "--after", "soon"], "a seq such as 42, or the whole cursor"),
        (["changes", "--after", "99"], "seq 99 is beyond the head of the journal: the newest seq"),
        (["changes", "--after", "1:00ff"], "the cursor is not complete"),
        (["changes", "--after", "1:"], "the whole cursor of a journal entry"),
        (["changes", "--after", "0:"], "the whole cursor of a journal entry"),
        (["db", "current", "--url", "postgres://h/d"], "did you mean 'postgresql+psycopg:'?"),
        (["db", "check", "--url", "sqllite:///x.db"], "did you mean 'sqlite:'?"),
        (["contract", "postgres://h/d"], "did you mean 'postgresql+psycopg:'?"),
        (["contract", "mysql://h/d"], "did you mean 'mariadb+pymysql:'?"),
        (["contract", "tasks.db"], "did you mean 'sqlite:///tasks.db'?"),
        (["contract", "sqlite:///x.db?links=allow"], "remove the options: sqlite:///x.db"),
        (["list", "--url", "postgres://h/d"], "did you mean 'postgresql+psycopg:'?"),
        (["list", "--url", "postgresql+psycopg2://h/d"], "did you mean 'postgresql+psycopg:'?"),
        (["list", "--url", "mysql://h/d"], "did you mean 'mariadb+pymysql:'?"),
        (["list", "--url", "sqlite3:///x.db"], "did you mean 'sqlite:'?"),
        (["list", "--url", "sqllite:///x.db"], "did you mean 'sqlite:'?"),
        (["list", "--url", "file:///x.db"], "did you mean 'sqlite:///PATH'"),
        (["list", "--url", "tasks.db"], "did you mean 'sqlite:///tasks.db'?"),
        (["list", "--url", "/srv/tasks/"], "did you mean 'json:////srv/tasks/'?"),
    ],
)
def test_the_message_says_what_is_wrong(
    invoke: Invoke, url: str, words: list[str], message: str
) -> None:
    with TaskRegistry.open(url) as registry:
        registry.create(runtime="cli", task="x")
    result = invoke(*words)
    assert result.status != 0
    assert message in result.err
    assert "Value error" not in result.err


@pytest.mark.parametrize(
    "text",
    ["sqlite:tasks.db", "sqlite://tasks.db", "sqlite://", "sqlite:///", "json:x", "json:///x?y=1"],
)
def test_contract_refuses_a_malformed_url_like_list(invoke: Invoke, text: str) -> None:
    listed, tested = invoke("list", "--url", text), invoke("contract", text)
    assert listed.status == tested.status == 2
    assert tested.err == listed.err


def test_an_expired_cursor_names_a_command(invoke: Invoke, url: str) -> None:
    with TaskRegistry.open(url) as registry:
        for n in range(3):
            registry.create(runtime="cli", task="x", label=str(n))
    retained = ["changes", "--json", "--limit=2", "--url", url]
    command = f"taskstore changes --json --limit=2 --url {url}"
    for after in ("99", "1:00ff"):
        expired = invoke(*retained, "--after", after)
        assert (expired.status, expired.out) == (1, "")
        assert f"run: {command})" in expired.err
        assert "snapshot" not in expired.err
    assert len(invoke(*retained).lines) == 2
    assert invoke("compact", "--erase-deleted").status == 0
    trimmed = invoke("changes", "--after", "1")
    assert trimmed.status == 1
    assert trimmed.err.endswith(
        "(to print all changes that the journal retains, run: taskstore changes)\n"
    )


@pytest.mark.parametrize("words", [["list"], ["cancel", "x"], ["db", "current"]])
def test_the_default_ledger_is_named_as_such(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.delenv(URL_VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    result = invoke(*words)
    assert result.status == 3
    assert "this is the default ledger; name another ledger with --url or TASKSTORE_URL" in (
        result.err
    )


def test_unknown_fields_name_the_similar_field() -> None:
    with TaskRegistry.open("memory:") as registry:
        for given, similar in (("labl", "label"), ("ownerkey", "owner_key"), ("meta", "metadata")):
            with pytest.raises(ValidationError, match=f"did you mean '{similar}'"):
                registry.create(runtime="cli", task="x", **{given: "x"})
        with pytest.raises(ValidationError, match="did you mean 'status'"):
            registry.list(statuss="queued")
        with pytest.raises(ValidationError, match="did you mean 'limit'"):
            registry.list(limits=5)
        with pytest.raises(ValidationError, match="did you mean 'channel'"):
            registry.create(runtime="cli", task="x", requester_origin={"chanel": "x"})
        with pytest.raises(ValidationError, match=r"is not a field of a record$"):
            registry.create(runtime="cli", task="x", zzzzzz="x")


def test_a_seq_beyond_the_head_names_the_head() -> None:
    with TaskRegistry.open("memory:") as registry:
        registry.create(runtime="cli", task="x")
        for after in (2, "2", 2**53 - 1):
            with pytest.raises(CursorExpiredError, match="the newest seq is 1") as caught:
                registry.changes(after)
            assert (caught.value.head, caught.value.replaced) == (1, True)
        with pytest.raises(CursorExpiredError, match="a backup was restored") as caught:
            registry.changes(f"2:{'0' * 32}")
        assert caught.value.head is None


def test_a_url_with_a_password_is_no_suggestion() -> None:
    with pytest.raises(ValidationError) as caught:
        open_store("ab/c://me:s3cr3t@h/d")
    assert "s3cr3t" not in str(caught.value)


def test_the_repr_of_a_record_shows_its_metadata() -> None:
    with TaskRegistry.open("memory:") as registry:
        record = registry.create(runtime="cli", task="x", metadata={"n": [1, None]})
    assert "metadata={'n': [1, None]}" in repr(record)
    assert "Raw object" not in repr([record])
    assert repr(record).startswith(f"TaskRecord(task_id={record.task_id!r}, revision=1, ")
