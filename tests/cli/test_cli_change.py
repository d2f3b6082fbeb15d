"""Tests of cancel, notify, delete; compact, verify, backends; db."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pysqlite3
import pytest
from cli_process import CLI, Invoke
from msgspec.structs import replace

from taskstore import ConflictError, TaskRecord, TaskRegistry
from taskstore.cli import change, ledger, maintain, render
from taskstore.model.ids import system_clock


@pytest.fixture
def registry(url: str) -> TaskRegistry:
    with TaskRegistry.open(url) as opened:
        opened.create(runtime="cli", task="a", task_id="a", run_id="solo", owner_key="o")
        for name in ("b", "c"):
            opened.create(runtime="cli", task=name, task_id=name, run_id="pair", owner_key="o")
    return opened


def test_cancel(invoke: Invoke, registry: TaskRegistry) -> None:
    assert invoke("cancel", "solo", "--reason", "no use").out == "cancelled a\n"
    record = invoke("show", "a", "--json").json
    assert (record["status"], record["error"], record["revision"]) == ("cancelled", "no use", 2)
    assert invoke("cancel", "a").status == 0
    assert invoke("show", "a", "--json").json["revision"] == 2
    assert invoke("cancel", "nothing").status == 1


@pytest.mark.parametrize("reason", [b"caf\xe9", b"x" * 100_000 + b"end", "é\n".encode() * 30_000])
def test_no_reason_prevents_a_cancel(cli: CLI, registry: TaskRegistry, reason: bytes) -> None:
    for _ in range(2):
        result = cli("cancel", "a", "--reason", os.fsdecode(reason))
        assert (result.returncode, result.stderr) == (0, b"")
    record = cli.json("show", "a")
    assert (record["status"], record["revision"]) == ("cancelled", 2)
    assert record["error"][:3] == reason.decode(errors="replace")[:3]
    assert record["error"][-2:] == reason.decode(errors="replace")[-2:]


def test_an_ended_task_is_not_cancelled(invoke: Invoke, registry: TaskRegistry, url: str) -> None:
    with TaskRegistry.open(url) as opened:
        opened.finish("a", "succeeded")
    result = invoke("cancel", "a")
    assert result.status == 1
    assert result.err == "taskstore: task 'a' is succeeded: cannot cancel it\n"


def test_an_ambiguous_token_changes_no_task(invoke: Invoke, registry: TaskRegistry) -> None:
    for words in (["cancel", "pair"], ["notify", "pair", "silent"], ["delete", "pair", "--yes"]):
        result = invoke(*words)
        assert result.status == 2
        assert "'pair' names several tasks" in result.err
        assert "taskstore list --run pair" in result.err
    assert invoke("cancel", "b").status == 0
    assert invoke("cancel", "pair").out == "cancelled c\n"


def test_cancel_names_the_running_process(invoke: Invoke, url: str) -> None:
    with TaskRegistry.open(url) as opened:
        for name, pid in (("mine", os.getpid()), ("gone", 2**22 + 1), ("odd", -1)):
            opened.create(
                runtime="cli",
                task="x",
                task_id=name,
                metadata={"pid": pid, "host": socket.gethostname()},
            )
        opened.create(runtime="cli", task="x", task_id="far", metadata={"pid": 7, "host": "h"})
    assert f"did not stop the task's process: kill {os.getpid()}" in invoke("cancel", "mine").err
    assert invoke("cancel", "gone").err == ""
    assert invoke("cancel", "odd").err == ""
    assert "pid 7 on h" in invoke("cancel", "far").err


def test_notify(invoke: Invoke, registry: TaskRegistry) -> None:
    assert invoke("notify", "a", "silent").out == "the notify policy of a is silent\n"
    assert invoke("show", "a", "--json").json["notify_policy"] == "silent"
    assert invoke("notify", "a", "loud").status == 2


def test_delete_needs_a_confirmation(cli: CLI, invoke: Invoke, registry: TaskRegistry) -> None:
    refused = cli("delete", "a")
    assert refused.returncode == 2
    assert b"--yes" in refused.stderr
    assert invoke("delete", "a", "--yes").out == "deleted a\n"
    assert invoke("delete", "a", "--yes").status == 1
    assert [line[0] for line in invoke("list").lines] == ["c", "b"]


def test_a_change_is_retried_after_a_conflict(
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
    monkeypatch.setattr(change, "MAX_ATTEMPTS", 1)
    raced.clear()
    with ledger.open_existing(url) as store, pytest.raises(ConflictError):
        change.change(store, "a", lambda record, _: _labelled(record, "other"))


def _labelled(record: TaskRecord, label: str) -> TaskRecord:
    return replace(record, label=label)


def test_compact(invoke: Invoke, registry: TaskRegistry) -> None:
    assert invoke("compact", "--if-due").out.startswith("nothing to do: not due")
    report = invoke("compact", "--json").json
    assert (report["compacted"], report["records"], report["trimmed"]) == (True, 3, 0)
    invoke("delete", "a", "--yes")
    report = invoke("compact", "--keep-days", "0", "--json").json
    assert (report["records"], report["trimmed"], report["floor"]) == (2, 4, 5)
    assert "history is kept from seq 5" in invoke("log", "b").err
    assert [line[0] for line in invoke("list").lines] == ["c", "b"]


@pytest.fixture
def month(url: str) -> list[int]:
    """A ledger with three entries on each of thirty days until now; the time of each day."""
    days = [system_clock() - 60_000 - (29 - day) * 86_400_000 for day in range(30)]
    now = [days[0]]
    with TaskRegistry.open(url, clock=lambda: now[0]) as opened:
        for now[0] in days:
            for _ in range(3):
                opened.create(runtime="cli", task="x" * 20_000)
    return days


def test_compact_keeps_what_was_asked_for(invoke: Invoke, month: list[int]) -> None:
    report = invoke("compact", "--keep-days", "14", "--json").json
    assert (report["compacted"], report["floor"], report["trimmed"]) == (True, 49, 48)
    assert report["floor_at"] == month[15]
    assert "14 days" in report["floor_reason"]
    # There is no new entry, but more history to trim.
    out = invoke("compact", "--keep-days", "7").out
    assert "21 entries trimmed" in out
    assert (
        f"seq 70, to changes after {render.iso_time(month[22])}: the entries of the last 7" in out
    )
    assert invoke("compact", "--keep-entries", "10").out.endswith("newest 10 entries are kept\n")
    assert (
        invoke("compact", "--keep-days", "2", "--keep-entries", "3", "--json").json["floor"] == 85
    )
    report = invoke("compact", "--keep-days", "30", "--keep-bytes", "50KiB", "--json").json
    assert (report["floor"], report["trimmed"]) == (89, 4)
    assert "50 KiB" in report["floor_reason"]
    again = invoke("compact", "--keep-days", "30", "--keep-bytes", "50KiB").out
    assert again.startswith("nothing to do: there is no new entry, and no more history to trim\n")
    assert invoke("compact", "--keep-days", "0", "--json").json["floor"] == 91
    assert invoke("compact", "--keep-days", "0").status == 0
    assert invoke("verify").status == 0
    assert invoke("summary", "--json").json["total"] == 90


def test_a_report_says_that_an_earlier_compaction_trimmed(
    invoke: Invoke, month: list[int], url: str
) -> None:
    earlier = "an earlier compaction trimmed the older entries"
    report = invoke("compact", "--keep-days", "60", "--json").json
    assert report["floor_reason"] == "the entries of the last 60 days are kept"
    report = invoke("compact", "--keep-days", "2", "--json").json
    assert (report["floor"], report["floor_reason"]) == (
        85,
        "the entries of the last 2 days are kept",
    )
    for keep in (["--keep-days", "14"], ["--keep-entries", "50"], []):
        out = invoke("compact", *keep).out
        assert out.startswith("nothing to do: ")
        assert "history reaches back to seq 85, to changes after " in out
        assert out.endswith(f": {earlier}\n")
    with TaskRegistry.open(url) as opened:
        opened.create(runtime="cli", task="x")
    report = invoke("compact", "--json").json
    assert (report["compacted"], report["floor_reason"]) == (True, earlier)
    report = invoke("compact", "--keep-days", "0", "--json").json
    assert (report["floor"], report["floor_reason"]) == (92, "no history is kept")
    report = invoke("compact", "--if-due", "--json").json
    assert (report["compacted"], report["snapshots"], report["floor"]) == (False, [91], 92)
    reach = f"seq 92, to changes after {render.iso_time(report['floor_at'])}: {earlier}\n"
    for option in (["--if-due"], ["--keep-days", "0"]):
        assert invoke("compact", *option).out.endswith(reach)
    erased = invoke("compact", "--erase-deleted", "--json").json
    assert erased["floor_reason"] == "deleted records were erased, with all history"


def test_keep_days_keeps_the_newest_entries_after_a_clock_was_ahead(
    invoke: Invoke, month: list[int], url: str
) -> None:
    ahead = system_clock() + 365 * 86_400_000
    with TaskRegistry.open(url, clock=lambda: ahead) as opened:
        opened.create(runtime="cli", task="x")
    with TaskRegistry.open(url) as opened:
        opened.create(runtime="cli", task="committed now")
    # The last 14 days keep 42 entries of the month, and all later entries.
    result = invoke("compact", "--keep-days", "14", "--json")
    assert "compaction keeps them by number and size" in result.err
    assert result.json["floor"] == 49
    # No entry of the month is from the last half minute.
    report = invoke("compact", "--keep-days", "0.0003", "--json").json
    assert report["floor"] == 91
    assert "have no age; the newest 10,000 of them are kept" in report["floor_reason"]
    report = invoke("compact", "--keep-days", "14", "--keep-entries", "1", "--json").json
    assert report["floor"] == 92
    assert "have no age; the newest 1 of them are kept" in report["floor_reason"]
    assert invoke("verify").status == 0
    assert invoke("compact", "--keep-days", "0", "--json").json["floor"] == 93


def test_compact_if_due_counts_bytes(invoke: Invoke, month: list[int]) -> None:
    assert invoke("compact", "--if-due", "--keep-days", "60", "--json").json["floor"] == 1
    report = invoke("compact", "--if-due", "--keep-bytes", "1MB", "--json").json
    assert report["compacted"]
    # Three quarters of 1 MB are kept; each entry has somewhat more than 20,000 bytes.
    assert 53 < report["floor"] <= 60
    assert not invoke("compact", "--if-due", "--keep-bytes", "1MB", "--json").json["compacted"]


@pytest.mark.parametrize("size", ["", "MiB", "1.5", "-3", "5 parsecs", "1e9", "9" * 400])
def test_what_is_not_a_size(invoke: Invoke, registry: TaskRegistry, size: str) -> None:
    result = invoke("compact", f"--keep-bytes={size}")
    assert result.status == (0 if size == "1.5" else 2)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("100", 100),
        ("2k", 2000),
        ("1KiB", 1024),
        ("1.5 mb", 1_500_000),
        ("3GiB", 3 << 30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert maintain.parse_size(text) == size


def test_erased_text_is_in_no_file(invoke: Invoke, url: str, tmp_path: Path) -> None:
    secret = "the-text-of-a-deleted-task"
    with TaskRegistry.open(url) as opened:
        opened.create(runtime="cli", task=secret, task_id="s")
    invoke("delete", "s", "--yes")
    assert any(secret.encode() in path.read_bytes() for path in tmp_path.iterdir())
    assert invoke("compact", "--erase-deleted").status == 0
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_verify(invoke: Invoke, registry: TaskRegistry, tmp_path: Path) -> None:
    assert invoke("verify").out == "whole: 3 records, 3 journal entries, seq 3\n"
    assert invoke("verify", "--json").json["ok"] is True
    connection = pysqlite3.connect(tmp_path / "tasks.db")
    connection.execute("DELETE FROM tasks WHERE task_id = 'b'")
    connection.commit()
    connection.close()
    result = invoke("verify")
    assert result.status == 1
    assert "problem: " in result.out
    report = invoke("verify", "--json")
    assert (report.status, report.json["ok"]) == (1, False)
    assert report.json["problems"]


def test_backends(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        backend["scheme"]: backend for backend in invoke("backends", "--json").json["backends"]
    }
    assert {"memory", "json", "sqlite", "postgresql+psycopg"} <= set(found)
    assert found["sqlite"]["usable"]
    assert found["sqlite"]["package"] == "taskstore"
    assert found["sqlite"]["abilities"] == list(maintain.ABILITIES)

    def no_driver(_: str) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setattr(maintain.importlib, "import_module", no_driver)
    lines = {line[0]: line[4] for line in invoke("backends").lines}
    assert lines["sqlite:"] == "yes"
    assert lines["postgresql+psycopg:"] == "no: ModuleNotFoundError: No module named 'psycopg'"


# -- db -----------------------------------------------------------------------


def test_a_schema_is_upgraded_and_downgraded(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("db", "current").status == 3
    assert list(tmp_path.iterdir()) == []
    assert invoke("db", "upgrade").out == "the schema revision is 0001; it was none\n"
    assert invoke("db", "current").out == "0001 (head)\n"
    assert invoke("db", "current", "--json").json == {"revision": "0001", "head": "0001"}
    assert invoke("db", "check").out == "the schema is as declared, at revision 0001\n"
    assert invoke("list").status == 0
    assert invoke("db", "downgrade").out == "the schema revision is none; it was 0001\n"
    assert invoke("db", "current").out == "none\n"
    assert invoke("db", "check").status == 1
    assert invoke("list").status == 3
    assert invoke("db", "downgrade").status == 2


def test_a_downgrade_that_drops_records_needs_a_confirmation(
    invoke: Invoke, registry: TaskRegistry
) -> None:
    refused = invoke("db", "downgrade", "base")
    assert refused.status == 2
    assert "--yes" in refused.err
    assert len(invoke("list").lines) == 3
    assert invoke("db", "downgrade", "base", "--yes").status == 0
    assert invoke("list").status == 3


def test_check_reports_a_schema_difference(
    invoke: Invoke, registry: TaskRegistry, tmp_path: Path
) -> None:
    connection = pysqlite3.connect(tmp_path / "tasks.db")
    connection.execute("ALTER TABLE tasks ADD COLUMN shoe_size INTEGER")
    connection.commit()
    connection.close()
    result = invoke("db", "check")
    assert result.status == 1
    assert "shoe_size" in result.out
    assert invoke("db", "check", "--json").json["ok"] is False


def test_db_history(invoke: Invoke, registry: TaskRegistry, url: str) -> None:
    assert invoke("db", "history").lines[-1][:2] == ["0001", ""]
    assert invoke("db", "history", "--url", url).lines[-1][:2] == ["0001", "current"]
    assert invoke("--url", url, "db", "history").lines[-1][:2] == ["0001", "current"]
    assert invoke("db", "history", "--json").json["revisions"][-1]["revision"] == "0001"


def test_db_is_for_sql(invoke: Invoke, tmp_path: Path) -> None:
    for command in ("upgrade", "downgrade", "current", "check"):
        result = invoke("db", command, "--url", f"json:///{tmp_path}/x")
        assert result.status == 2
        assert "is not an SQL ledger" in result.err
    unknown = invoke("db", "upgrade", "9999")
    assert unknown.status == 2
    assert "'taskstore db history' lists the revisions" in unknown.err
    assert invoke("db", "check", "--url", "foo:x").status == 2


def test_db_tells_that_the_file_has_a_second_name(
    invoke: Invoke, registry: TaskRegistry, url: str, tmp_path: Path
) -> None:
    assert invoke("db", "current").err == ""
    (tmp_path / "second.db").hardlink_to(tmp_path / "tasks.db")
    note = invoke("summary").err
    assert note.startswith("taskstore: note: ")
    for command in ("current", "check"):
        result = invoke("db", command)
        assert (result.status, result.err) == (0, note)
    assert invoke("db", "history", "--url", url).err == note
    assert invoke("db", "history").err == ""  # without --url, the command opens no ledger
    assert invoke("db", "current", "--url", f"{url}?links=allow").err == ""
    allowed = invoke("db", "upgrade", "--url", f"{url}?links=allow")
    assert (allowed.status, allowed.err) == (0, "")
