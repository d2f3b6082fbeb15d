"""Tests of list, show, log, summary and changes."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pysqlite3
import pytest
from cli_process import CLI, Invoke

from taskstore import (
    DeliveryContext,
    Page,
    Snapshot,
    StoreUnavailableError,
    TaskQuery,
    TaskRecord,
    TaskRegistry,
    TaskRegistryStore,
    open_store,
)
from taskstore.cli import ledger, main, render
from taskstore.testing import make_record

T0 = 1_700_000_000_000


@pytest.fixture(params=["json", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}:///{tmp_path / 'ledger'}"


@pytest.fixture
def ids(url: str) -> dict[str, str]:
    """Create a ledger with various tasks; return their ids by label."""
    with TaskRegistry.open(url, clock=iter(range(T0, T0 + 10**6, 1000)).__next__) as registry:
        make = registry.create
        done = make(runtime="cli", task="make", label="done", owner_key="me", status="running")
        registry.record_progress(done.task_id, "half")
        registry.finish(done.task_id, "succeeded", summary="made")
        origin = DeliveryContext(channel="mail", to="x@y")
        make(
            runtime="subagent", task="think", label="thinking", run_id="run-1", owner_key="you",
            child_session_key="s-1", requester_origin=origin, metadata={"n": [1, 2.5, None]},
        )  # fmt: skip
        make(runtime="subagent", task="again", label="again", run_id="run-1", owner_key="you")
        gone = make(runtime="cron", task="gone", label="gone")
        registry.cancel(gone.task_id, "no use")
        registry.delete(gone.task_id)
        tasks = {task.label or "": task.task_id for task in registry.list()}
        return {**tasks, "gone": gone.task_id}


@pytest.mark.parametrize(
    ("filters", "labels"),
    [
        ((), ["again", "thinking", "done"]),
        (("--status", "queued"), ["again", "thinking"]),
        (("--status", "queued", "--status", "succeeded"), ["again", "thinking", "done"]),
        (("--runtime", "cli"), ["done"]),
        (("--owner", "you"), ["again", "thinking"]),
        (("--session", "s-1"), ["thinking"]),
        (("--run", "run-1"), ["again", "thinking"]),
        (("--limit", "1"), ["again"]),
        (("--since", "2023-11-14T22:13:30"), []),
        (("--since", "2023-11-14T23:13:22+01:00"), ["again", "thinking"]),
        (("--since", str(T0 + 2000)), ["again", "thinking"]),
        (("--since", "1h"), []),
        (("--since", "10000d"), ["again", "thinking", "done"]),
        (("--since", "20000d"), ["again", "thinking", "done"]),
        (("--since", "1969-12-31"), ["again", "thinking", "done"]),
        (("--since", "0"), ["again", "thinking", "done"]),
    ],
)
def test_filters(
    invoke: Invoke, ids: dict[str, str], filters: tuple[str, ...], labels: list[str]
) -> None:
    result = invoke("list", *filters)
    assert result.status == 0
    assert [line[7] for line in result.lines] == labels
    assert [line[0] for line in result.lines] == [ids[label] for label in labels]
    answer = invoke("list", *filters, "--json").json
    assert [task["label"] for task in answer["tasks"]] == labels
    assert set(answer) == {"tasks", "next_cursor", "seq"}


def test_the_printed_command_gives_the_next_page(invoke: Invoke, ids: dict[str, str]) -> None:
    collected, words = [], ["list", "--limit", "1", "--runtime", "subagent"]
    while words:
        result = invoke(*words)
        collected += [line[7] for line in result.lines]
        _, more, command = result.err.strip().partition("next page: taskstore ")
        words = command.split() if more else []
    assert collected == ["again", "thinking"]


def test_the_json_of_a_record_has_every_field(invoke: Invoke, ids: dict[str, str]) -> None:
    record = invoke("show", ids["thinking"], "--json").json
    fields = set(TaskRecord.__struct_fields__) - {"metadata_json", "unknown_json"} | {"metadata"}
    assert set(record) == fields
    assert record["metadata"] == {"n": [1, 2.5, None]}
    assert record["requester_origin"] == {
        "channel": "mail",
        "to": "x@y",
        "account_id": None,
        "thread_id": None,
    }
    assert T0 < record["created_at"] < T0 + 10_000
    assert record["ended_at"] is None


def test_show_finds_by_id_run_and_session(invoke: Invoke, ids: dict[str, str]) -> None:
    assert f"task_id: {ids['done']}\n" in invoke("show", ids["done"]).out
    by_run = invoke("show", "run-1")
    assert f"task_id: {ids['again']}\n" in by_run.out
    assert "other tasks also match; to list all of them: taskstore list --run run-1" in by_run.err
    assert invoke("show", "s-1", "--json").json["task_id"] == ids["thinking"]
    missing = invoke("show", "nothing")
    assert (missing.status, missing.out) == (1, "")
    assert missing.err == "taskstore: there is no task 'nothing'\n"


def test_log_shows_the_changes_of_each_revision(invoke: Invoke, ids: dict[str, str]) -> None:
    entries = invoke("log", ids["done"], "--json").json["entries"]
    assert [entry["revision"] for entry in entries] == [1, 2, 3]
    assert entries[0]["changed"]["status"] == [None, "running"]
    assert entries[1]["changed"] == {"progress_summary": [None, "half"]}
    assert entries[2]["changed"]["status"] == ["running", "succeeded"]
    assert entries[2]["record"]["terminal_summary"] == "made"
    lines = [line for line in invoke("log", ids["done"]).lines if line[2] == "3"]
    assert [line[3:] for line in lines if line[3] == "status"] == [
        ["status", "running", "succeeded"]
    ]


def test_log_of_a_deleted_task(invoke: Invoke, ids: dict[str, str]) -> None:
    result = invoke("log", ids["gone"])
    assert result.status == 0
    assert result.lines[-1][2:] == ["3", "deleted", "-", "-"]
    assert invoke("show", ids["gone"]).status == 1
    assert invoke("log", "never-was").status == 1


def test_log_reports_a_trimmed_history(invoke: Invoke, ids: dict[str, str], url: str) -> None:
    assert invoke("compact", "--keep-days", "0").status == 0
    with TaskRegistry.open(url) as registry:
        registry.set_notify_policy(ids["done"], "silent")
    result = invoke("log", ids["done"])
    assert "compaction removed the history before revision 4" in result.err
    assert invoke("log", ids["done"], "--json").json["complete"] is False


@pytest.mark.parametrize("command", [["compact", "--erase-deleted"], ["compact", "--keep-days=0"]])
def test_log_of_a_task_without_history_shows_the_record(
    invoke: Invoke, ids: dict[str, str], command: list[str]
) -> None:
    assert invoke(*command).status == 0
    result = invoke("log", ids["done"])
    assert result.status == 0
    assert "compaction removed the history of this task; history is kept from seq 9" in result.err
    assert {tuple(line[:3]) for line in result.lines} == {("-", "-", "3")}
    assert ["status", "-", "succeeded"] in [line[3:] for line in result.lines]
    assert ["terminal_summary", "-", "made"] in [line[3:] for line in result.lines]
    document = invoke("log", ids["done"], "--json").json
    assert (document["complete"], document["kept_from"], document["entries"]) == (False, 9, [])
    assert document["record"] == invoke("show", ids["done"], "--json").json
    assert invoke("log", ids["gone"]).status == 1


def test_summary(invoke: Invoke, ids: dict[str, str]) -> None:
    counted = invoke("summary", "--json").json
    assert (counted["total"], counted["active"]) == (3, 2)
    assert counted["by_status"] == {
        "queued": 2,
        "running": 0,
        "succeeded": 1,
        "failed": 0,
        "timed_out": 0,
        "cancelled": 0,
        "lost": 0,
    }
    assert counted["by_runtime"] == {"cli": 1, "subagent": 2}
    assert ["runtime", "subagent", "2"] in invoke("summary").lines


def test_summary_of_a_store_that_cannot_count(
    ids: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PAGE_RECORDS", 1)
    with open_store(url) as store:
        expected = store.summary()  # type: ignore[attr-defined]
        monkeypatch.setattr(ledger, "SupportsSummary", SupportsUnknown)
        assert ledger.count(store) == expected
        monkeypatch.setattr(ledger, "SupportsQuery", SupportsUnknown)
        assert ledger.count(store) == expected


class SupportsUnknown:
    """An ability that no store has."""


def test_changes(invoke: Invoke, ids: dict[str, str]) -> None:
    lines = [json.loads(line) for line in invoke("changes", "--json").out.splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, 9))
    assert (lines[-1]["kind"], lines[-1]["record"]) == ("deleted", None)
    assert lines[2]["record"]["status"] == "succeeded"
    assert [line[0] for line in invoke("changes", "--after", "6").lines] == ["7", "8"]
    assert [line[0] for line in invoke("changes", "--limit", "2").lines] == ["1", "2"]
    assert invoke("changes", "--after", "head").out == ""
    assert invoke("changes", "--after", "soon").status == 2


def test_changes_before_the_floor(invoke: Invoke, ids: dict[str, str]) -> None:
    invoke("compact", "--keep-days", "0")
    result = invoke("changes", "--after", "1")
    assert result.status == 1
    assert "the journal begins at seq 9" in result.err
    assert invoke("changes").status == 0


def test_changes_follow(cli: CLI, url: str, ids: dict[str, str]) -> None:
    following = cli.start("changes", "--follow", "--after", "7", "--json")
    assert following.stdout is not None
    assert json.loads(following.stdout.readline())["seq"] == 8
    with TaskRegistry.open(url) as registry:
        registry.set_notify_policy(ids["done"], "silent")
    assert json.loads(following.stdout.readline())["record"]["notify_policy"] == "silent"
    following.send_signal(signal.SIGINT)
    assert following.communicate(timeout=20)[1] == b""
    assert following.returncode == 130


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_no_command_loads_the_ledger(
    invoke: Invoke, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the ledger was loaded")

    monkeypatch.setattr("taskstore.stores.sql.store.SQLStore.load_snapshot", refuse)
    monkeypatch.setattr("taskstore.registry.registry.TaskRegistry.__init__", refuse)
    for words in (["list"], ["show", "run-1"], ["log", ids["done"]], ["summary"], ["changes"]):
        assert invoke(*words).status == 0
    for words in (["cancel", "s-1"], ["notify", ids["done"], "silent"], ["delete", "s-1", "--yes"]):
        assert invoke(*words).status == 0


class Minimal(TaskRegistryStore):
    """A store without optional abilities."""

    def __init__(self, inner: TaskRegistryStore) -> None:
        super().__init__()
        self._inner = inner

    def load_snapshot(self) -> Snapshot:
        return self._inner.load_snapshot()

    def save_snapshot(self, snapshot: Snapshot) -> None:
        self._inner.save_snapshot(snapshot)

    def close(self) -> None:
        self._inner.close()


def test_a_store_without_queries_is_queried_over_its_snapshot(
    invoke: Invoke, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ledger, "open_store", lambda url, **options: Minimal(open_store(url, **options))
    )
    assert [line[7] for line in invoke("list").lines] == ["again", "thinking", "done"]
    assert invoke("show", "run-1", "--json").json["task_id"] == ids["again"]
    assert invoke("cancel", "s-1").status == 0
    for words in (["log", ids["done"]], ["changes"], ["verify"], ["compact"]):
        assert invoke(*words).status == 2


@pytest.mark.parametrize("option", ["--runtime", "--owner", "--session", "--run"])
def test_an_empty_filter_does_not_list_everything(
    invoke: Invoke, ids: dict[str, str], option: str
) -> None:
    result = invoke("list", option, "")
    assert (result.status, result.out) == (0, "")


def test_an_age_of_any_length(invoke: Invoke, ids: dict[str, str]) -> None:
    everything = invoke("list").lines
    assert invoke("list", "--since", f"{'9' * 400}d").lines == everything != []


# -- SQL only ---------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_list_is_one_select_with_a_limit(
    invoke: Invoke, ids: dict[str, str], statements: list[str]
) -> None:
    assert invoke("list", "--status", "queued", "--limit", "2").status == 0
    assert statements, "nothing was traced"
    of_tasks = [text for text in statements if re.search(r"FROM tasks\b", text)]
    assert len(of_tasks) == 1, of_tasks
    assert "LIMIT" in of_tasks[0]
    assert not [text for text in statements if text.startswith(("INSERT", "UPDATE", "CREATE"))]


LIST_AND_PRINT_PEAK = """
import re, sys
from taskstore.cli import main
main(["list", "--limit", "10", "--url", sys.argv[1]])
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_the_memory_of_a_list_does_not_depend_on_the_size(tmp_path: Path, url: str) -> None:
    peaks = []
    for count in (10, 100_000):
        where = f"sqlite:///{tmp_path}/{count}.db"
        with open_store(where) as store:
            records = {
                f"t-{number:06}": TaskRecord(
                    task_id=f"t-{number:06}",
                    revision=1,
                    runtime="cli",
                    task=f"task {number}",
                    status="queued",  # type: ignore[arg-type]
                    created_at=T0 + number,
                )
                for number in range(count)
            }
            store.save_snapshot(Snapshot(count, records, T0))
        # ru_maxrss would include the memory of this process, from which the child is forked.
        out = subprocess.check_output(
            [sys.executable, "-c", LIST_AND_PRINT_PEAK, where], encoding="utf-8"
        )
        *listed, peak = out.splitlines()
        assert len(listed) == 10
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 10 * 1024, peaks


def test_the_memory_of_json_does_not_depend_on_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak is that of one part of the page and of the output that is kept in memory."""
    monkeypatch.setattr(render, "HELD_CHARACTERS", 10_000)
    monkeypatch.setattr("taskstore.stores.sql.query.PAGE", 200)
    monkeypatch.setattr(ledger, "PAGE_RECORDS", 200)
    words = ("list", "--json", "--limit=100000")
    peaks = []
    for count in (400, 4_000):
        where = f"sqlite:///{tmp_path}/{count}.db"
        with TaskRegistry.open(where) as registry, registry.batch():
            for number in range(count):
                registry.create(runtime="cli", task=f"task {number}" * 10)
        for _ in range(2):  # the first run imports modules
            with (tmp_path / "out").open("w+") as out, contextlib.redirect_stdout(out):
                tracemalloc.start()
                assert main([*words, "--url", where]) == 0
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                out.seek(0)
                assert len(json.load(out)["tasks"]) == count
        peaks.append(peak)
    # All records of the larger ledger, as JSON and as objects, take several megabytes.
    assert peaks[1] < peaks[0] + 1_000_000, peaks


@pytest.mark.parametrize("indent", [None, 2])
def test_json_that_is_written_in_parts(indent: int | None) -> None:
    cases: list[dict[str, Any]] = [
        {"tasks": [{"a": {"b": [1, {}]}, "c": []}, {}, "text\nline"], "next": None, "seq": 8},
        {"id": "x", "record": {"a": {"b": []}}, "entries": [], "z": {}},
        {"entries": [[]]},
    ]
    for case in cases:
        members = ((k, iter(v) if isinstance(v, list) else v) for k, v in case.items())
        assert (
            "".join(render._json_chunks(members, indent)) == json.dumps(case, indent=indent) + "\n"
        )


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_an_error_in_the_middle_prints_no_part_of_a_document(
    invoke: Invoke, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ledger.stream_query

    def broken(store: TaskRegistryStore, query: TaskQuery) -> Iterator[Page]:
        yield from read(store, query)
        raise StoreUnavailableError("the disk is gone")

    monkeypatch.setattr(ledger, "stream_query", broken)
    for words in (["list"], ["list", "--json"]):
        result = invoke(*words)
        assert (result.status, result.out) == (3, "")
        assert "the disk is gone" in result.err


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_quarantined_record_is_reported(
    invoke: Invoke, ids: dict[str, str], tmp_path: Path
) -> None:
    connection = pysqlite3.connect(tmp_path / "ledger")
    connection.execute("UPDATE tasks SET payload = 'oops' WHERE task_id = ?", (ids["thinking"],))
    connection.commit()
    connection.close()
    result = invoke("list")
    assert [line[7] for line in result.lines] == ["again", "done"]
    assert f"quarantined: {ids['thinking']}" in result.err
    assert f"quarantined: {ids['thinking']}" in invoke("show", ids["thinking"]).err
    assert invoke("verify").status == 1


@pytest.mark.parametrize(
    ("started_at", "ended_at", "text"),
    [
        (T0, T0 + 4200, "4.2s"),
        (T0, T0, "0.0s"),
        (T0 + 1, T0, "-"),
        (T0 + 10**9, T0, "-"),
        (None, T0, "-"),
        (T0, None, "-"),
    ],
)
def test_a_run_time_is_never_negative(
    started_at: int | None, ended_at: int | None, text: str
) -> None:
    record = make_record(started_at=started_at, ended_at=ended_at)
    assert render.elapsed_of(record) == text
