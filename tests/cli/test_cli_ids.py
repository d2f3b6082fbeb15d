"""The end of a task id names the task, and lists show an end that names only this task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cli_process import CLI, Invoke
from test_cli_errors import on_a_terminal

from taskstore import TaskRegistry
from taskstore.cli import ledger
from taskstore.store.opening import open_store


@pytest.fixture(params=["json", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}:///{tmp_path / 'ledger'}"


def create(url: str, *ids: str, **fields: Any) -> None:
    with TaskRegistry.open(url) as registry, registry.batch():
        for task_id in ids:
            registry.create(runtime="cli", task="x", task_id=task_id, **fields)


def test_the_end_of_an_id_works_in_every_command(invoke: Invoke, url: str) -> None:
    create(url, "0189-aaaa-1111", "0189-aaaa-2222")
    assert invoke("show", "1111", "--json").json["task_id"] == "0189-aaaa-1111"
    assert invoke("log", "a-1111", "--json").json["task_id"] == "0189-aaaa-1111"
    assert invoke("notify", "2222", "silent").out.startswith("the notify policy of 0189-aaaa-2222")
    assert invoke("cancel", "2222").out == "cancelled 0189-aaaa-2222\n"
    assert invoke("delete", "2222", "--yes").out == "deleted 0189-aaaa-2222\n"
    assert invoke("show", "2222").status == 1
    assert invoke("log", "2222", "--json").json["task_id"] == "0189-aaaa-2222"
    assert invoke("log", "2222", "--json").json["record"] is None


def test_an_ambiguous_end_names_the_candidates(invoke: Invoke, url: str) -> None:
    create(url, "one-abcd", "two-abcd", "six-efgh")
    for words in (["show"], ["log"], ["cancel"], ["delete", "--yes"]):
        result = invoke(*words, "abcd")
        assert (result.status, result.out) == (2, "")
        assert "did you mean one of one-abcd, two-abcd?" in result.err
    assert invoke("show", "e-abcd", "--json").json["task_id"] == "one-abcd"
    create(url, *(f"{n}-abcd" for n in range(9)))
    assert "and others?" in invoke("show", "abcd").err


def test_a_short_end_or_another_text_matches_nothing(invoke: Invoke, url: str) -> None:
    create(url, "0189-aaaa-1111", "x_bcd", "x%bcd", "UPPER")
    short = invoke("show", "111")
    assert short.status == 1
    assert "the end of an id needs at least 4 characters" in short.err
    for reference in (
        "%1111",
        "____",
        "*111",
        "0189",
        "0189-aaaa",
        "upper",
        "1111 ",
        "a-11",
        "%bcd ",
    ):
        assert invoke("show", reference).status == 1, reference
    assert invoke("show", "_bcd", "--json").json["task_id"] == "x_bcd"
    assert invoke("show", "%bcd", "--json").json["task_id"] == "x%bcd"


def test_whole_ids_runs_and_sessions_come_before_ends(invoke: Invoke, url: str) -> None:
    create(url, "abcd", "x-abcd", "y-run-7")
    create(url, "by-run", run_id="run-7", owner_key="o")
    create(url, "by-session", child_session_key="sion", owner_key="o")
    assert invoke("show", "abcd", "--json").json["task_id"] == "abcd"
    assert invoke("show", "run-7", "--json").json["task_id"] == "by-run"
    assert invoke("show", "sion", "--json").json["task_id"] == "by-session"
    assert invoke("delete", "abcd", "--yes").status == 0
    assert invoke("log", "abcd", "--json").json["task_id"] == "abcd", "a whole id, though deleted"
    assert invoke("show", "abcd", "--json").json["task_id"] == "x-abcd"


def test_a_list_shows_ends_that_work(cli: CLI, invoke: Invoke, url: str) -> None:
    ids = ["a-same-7654321", "b-same-7654321", "short", "-7654321", "c0-00000001", "c0-00000002"]
    create(url, *ids)
    create(url, "with-run-12345678", "other")
    lines = on_a_terminal(cli, "list").splitlines()
    shown = {line.split()[0] for line in lines if "queued" in line}
    assert {"00000001", "00000002", "short", "12345678", "a-same-7654321"} <= shown
    found = [invoke("show", "--json", "--", reference).json["task_id"] for reference in shown]
    assert sorted(found) == sorted([*ids, "with-run-12345678", "other"])
    create(url, "x", run_id="12345678", owner_key="o")
    shown = {line.split()[0] for line in on_a_terminal(cli, "list").splitlines()}
    assert "with-run-12345678" in shown, "the end is the run id of another task"


def test_ids_that_all_end_alike_are_shown_whole(url: str) -> None:
    ids = [f"job-{number}/the attempt" for number in range(ledger.MAX_SHORTENED + 5)]
    create(url, *ids)
    with open_store(url) as store:
        assert ledger.short_ids(store, ids[:3]) == {task_id: task_id for task_id in ids[:3]}


# -- SQL only ---------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_search_reads_ids_and_one_record(invoke: Invoke, url: str, statements: list[str]) -> None:
    create(url, *(f"0189-aaaa-{number:04}" for number in range(50)))
    statements.clear()
    assert invoke("show", "0007").status == 0
    searches = [text for text in statements if "substr(" in text]
    assert len(searches) == 1
    assert "payload" not in searches[0]
    scans = [text for text in statements if "payload" in text and "LIMIT" not in text]
    assert scans == []


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_summary_is_one_statement_without_payloads(
    invoke: Invoke, url: str, statements: list[str]
) -> None:
    create(url, *(f"0189-aaaa-{number:04}" for number in range(50)))
    statements.clear()
    assert invoke("summary", "--json").json["total"] == 50
    of_tasks = [text for text in statements if re.search(r"FROM tasks\b", text)]
    assert len(of_tasks) == 1, of_tasks
    assert "payload" not in of_tasks[0]
