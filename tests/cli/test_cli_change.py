"""cancel, notify, delete; compact, verify, backends; db."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pysqlite3
import pytest
from cli_process import CLI, Say
from msgspec.structs import replace

from taskstore import ConflictError, TaskRecord, TaskRegistry
from taskstore.cli import change, ledger, maintain


@pytest.fixture
def registry(url: str) -> TaskRegistry:
    with TaskRegistry.open(url) as opened:
        opened.create(runtime="cli", task="a", task_id="a", run_id="solo", owner_key="o")
        for name in ("b", "c"):
            opened.create(runtime="cli", task=name, task_id=name, run_id="pair", owner_key="o")
    return opened


def test_cancel(say: Say, registry: TaskRegistry) -> None:
    assert say("cancel", "solo", "--reason", "no use").out == "cancelled a\n"
    record = say("show", "a", "--json").json
    assert (record["status"], record["error"], record["revision"]) == ("cancelled", "no use", 2)
    assert say("cancel", "a").status == 0
    assert say("show", "a", "--json").json["revision"] == 2
    assert say("cancel", "nothing").status == 1


def test_what_has_ended_is_not_cancelled(say: Say, registry: TaskRegistry, url: str) -> None:
    with TaskRegistry.open(url) as opened:
        opened.finish("a", "succeeded")
    said = say("cancel", "a")
    assert said.status == 1
    assert said.err == "taskstore: task 'a' is succeeded: cannot cancel it\n"


def test_a_token_of_several_tasks_changes_none(say: Say, registry: TaskRegistry) -> None:
    for words in (["cancel", "pair"], ["notify", "pair", "silent"], ["delete", "pair", "--yes"]):
        said = say(*words)
        assert said.status == 2
        assert "'pair' names several tasks" in said.err
        assert "taskstore list --run pair" in said.err
    assert say("cancel", "b").status == 0
    assert say("cancel", "pair").out == "cancelled c\n"


def test_cancel_tells_of_the_process(say: Say, url: str) -> None:
    with TaskRegistry.open(url) as opened:
        for name, pid in (("mine", os.getpid()), ("gone", 2**22 + 1), ("odd", -1)):
            opened.create(
                runtime="cli",
                task="x",
                task_id=name,
                metadata={"pid": pid, "host": socket.gethostname()},
            )
        opened.create(runtime="cli", task="x", task_id="far", metadata={"pid": 7, "host": "h"})
    assert f"not stopped by this: kill {os.getpid()}" in say("cancel", "mine").err
    assert say("cancel", "gone").err == ""
    assert say("cancel", "odd").err == ""
    assert "pid 7 on h" in say("cancel", "far").err


def test_notify(say: Say, registry: TaskRegistry) -> None:
    assert say("notify", "a", "silent").out == "a notifies silent\n"
    assert say("show", "a", "--json").json["notify_policy"] == "silent"
    assert say("notify", "a", "loud").status == 2


def test_delete_asks_first(cli: CLI, say: Say, registry: TaskRegistry) -> None:
    refused = cli("delete", "a")
    assert refused.returncode == 2
    assert b"--yes" in refused.stderr
    assert say("delete", "a", "--yes").out == "deleted a\n"
    assert say("delete", "a", "--yes").status == 1
    assert [line[0] for line in say("list").lines] == ["c", "b"]


def test_a_change_that_lost_a_race_is_tried_again(
    registry: TaskRegistry, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, raced = ledger.get, []

    def get_and_race(store: object, task_id: str) -> object:
        record = get(store, task_id)  # type: ignore[arg-type]
        if len(raced) < 3:
            with TaskRegistry.open(url) as other:
                raced.append(other.update_metadata("a", {"n": len(raced)}))
        return record

    monkeypatch.setattr(ledger, "get", get_and_race)
    with ledger.open_existing(url) as store:
        record = change.change(store, "a", lambda record, _: _labelled(record, "mine"))
    assert (record.revision, record.metadata, record.label) == (5, {"n": 2}, "mine")
    monkeypatch.setattr(change, "ATTEMPTS", 1)
    raced.clear()
    with ledger.open_existing(url) as store, pytest.raises(ConflictError):
        change.change(store, "a", lambda record, _: _labelled(record, "other"))


def _labelled(record: TaskRecord, label: str) -> TaskRecord:
    return replace(record, label=label)


def test_compact(say: Say, registry: TaskRegistry) -> None:
    assert say("compact", "--if-due").out.startswith("nothing to do: not due")
    report = say("compact", "--json").json
    assert (report["compacted"], report["records"], report["trimmed"]) == (True, 3, 0)
    say("delete", "a", "--yes")
    report = say("compact", "--keep-days", "0", "--json").json
    assert (report["records"], report["trimmed"], report["floor"]) == (2, 4, 5)
    assert say("log", "b").status == 1
    assert [line[0] for line in say("list").lines] == ["c", "b"]


def test_what_was_erased_is_in_no_file(say: Say, url: str, tmp_path: Path) -> None:
    secret = "the-text-of-a-deleted-task"
    with TaskRegistry.open(url) as opened:
        opened.create(runtime="cli", task=secret, task_id="s")
    say("delete", "s", "--yes")
    assert any(secret.encode() in path.read_bytes() for path in tmp_path.iterdir())
    assert say("compact", "--erase-deleted").status == 0
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_verify(say: Say, registry: TaskRegistry, tmp_path: Path) -> None:
    assert say("verify").out == "whole: 3 records, 3 journal entries, seq 3\n"
    assert say("verify", "--json").json["ok"] is True
    connection = pysqlite3.connect(tmp_path / "tasks.db")
    connection.execute("DELETE FROM tasks WHERE task_id = 'b'")
    connection.commit()
    connection.close()
    said = say("verify")
    assert said.status == 1
    assert "problem: " in said.out
    report = say("verify", "--json")
    assert (report.status, report.json["ok"]) == (1, False)
    assert report.json["problems"]


def test_backends(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {backend["scheme"]: backend for backend in say("backends", "--json").json["backends"]}
    assert {"memory", "json", "sqlite", "postgresql+psycopg"} <= set(found)
    assert found["sqlite"]["usable"]
    assert found["sqlite"]["package"] == "taskstore"
    assert found["sqlite"]["abilities"] == list(maintain.ABILITIES)

    def no_driver(_: str) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setattr(maintain.importlib, "import_module", no_driver)
    lines = {line[0]: line[4] for line in say("backends").lines}
    assert lines["sqlite:"] == "yes"
    assert lines["postgresql+psycopg:"] == "no: ModuleNotFoundError: No module named 'psycopg'"


# -- db -----------------------------------------------------------------------


def test_a_schema_goes_up_and_down(say: Say, tmp_path: Path) -> None:
    assert say("db", "current").status == 3
    assert list(tmp_path.iterdir()) == []
    assert say("db", "upgrade").out == "the schema is at revision 0001, was none\n"
    assert say("db", "current").out == "0001 (head)\n"
    assert say("db", "current", "--json").json == {"revision": "0001", "head": "0001"}
    assert say("db", "check").out == "the schema is as declared, at revision 0001\n"
    assert say("list").status == 0
    assert say("db", "downgrade").out == "the schema is at revision none, was 0001\n"
    assert say("db", "current").out == "none\n"
    assert say("db", "check").status == 1
    assert say("list").status == 3
    assert say("db", "downgrade").status == 2


def test_records_are_not_dropped_unasked(say: Say, registry: TaskRegistry) -> None:
    refused = say("db", "downgrade", "base")
    assert refused.status == 2
    assert "--yes" in refused.err
    assert len(say("list").lines) == 3
    assert say("db", "downgrade", "base", "--yes").status == 0
    assert say("list").status == 3


def test_a_schema_that_differs_is_told(say: Say, registry: TaskRegistry, tmp_path: Path) -> None:
    connection = pysqlite3.connect(tmp_path / "tasks.db")
    connection.execute("ALTER TABLE tasks ADD COLUMN shoe_size INTEGER")
    connection.commit()
    connection.close()
    said = say("db", "check")
    assert said.status == 1
    assert "shoe_size" in said.out
    assert say("db", "check", "--json").json["ok"] is False


def test_db_history(say: Say, registry: TaskRegistry, url: str) -> None:
    assert say("db", "history").lines[-1][:2] == ["0001", ""]
    assert say("db", "history", "--url", url).lines[-1][:2] == ["0001", "current"]
    assert say("db", "history", "--json").json["revisions"][-1]["revision"] == "0001"


def test_db_is_for_sql(say: Say, tmp_path: Path) -> None:
    for command in ("upgrade", "downgrade", "current", "check"):
        said = say("db", command, "--url", f"json:///{tmp_path}/x")
        assert said.status == 2
        assert "is not an SQL ledger" in said.err
    assert say("db", "upgrade", "9999").status == 2
    assert say("db", "check", "--url", "foo:x").status == 2
