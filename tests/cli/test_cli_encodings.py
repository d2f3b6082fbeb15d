"""Output on any stream: JSON is valid in every encoding; a closed or full stream is no crash."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cli_process import CLI

from taskstore import TaskRegistry

TEXT = (
    "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{RIGHTWARDS ARROW} \N{GRINNING FACE} + ~ \\u0041 \"'"
)
ENCODINGS = ["utf-8-sig", "ascii:strict", "cp1252", "utf-16", "cp037"]
"""Encodings that are not UTF-8; the last two are not supersets of ASCII."""


@pytest.fixture
def task_id(url: str) -> str:
    """Create a ledger with one ended task whose text needs more than ASCII; return the id."""
    with TaskRegistry.open(url) as registry:
        task = registry.create(
            runtime="cli", task=TEXT, label=TEXT, status="running", metadata={TEXT: TEXT}
        )
        registry.finish(task.task_id, "failed", error=TEXT)
        return task.task_id


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_valid_utf8_in_every_encoding(cli: CLI, task_id: str, encoding: str) -> None:
    cli.env["PYTHONIOENCODING"] = encoding
    for words in (["list"], ["show", task_id], ["log", task_id], ["changes"]):
        done = cli(*words, "--json")
        assert (done.returncode, done.stderr) == (0, b"")
        documents = [json.loads(line.decode("utf-8")) for line in done.stdout.splitlines()]
        if words[0] == "list":
            assert documents[0]["tasks"][0]["task"] == TEXT
            assert documents[0]["tasks"][0]["metadata"] == {TEXT: TEXT}
        if words[0] == "show":
            assert documents[0]["error"] == TEXT
        if words[0] == "log":
            assert documents[0]["entries"][0]["changed"]["label"] == [None, TEXT]
        if words[0] == "changes":
            assert [line["record"]["task"] for line in documents] == [TEXT, TEXT]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_output_works_in_every_encoding(cli: CLI, task_id: str, encoding: str) -> None:
    cli.env["PYTHONIOENCODING"] = encoding
    for words in (["list"], ["show", task_id], ["list", "--help"]):
        done = cli(*words)
        assert (done.returncode, done.stderr) == (0, b""), words
        assert done.stdout
    failed = cli("list", "--status", TEXT)
    assert failed.returncode == 2
    assert b"Traceback" not in failed.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_file_name_that_is_not_text(tmp_path: Path, encoding: str) -> None:
    """A file name can contain bytes that no text has; JSON shows them as U+FFFD."""
    cli = CLI(f"json:///{tmp_path}/b\udcffd")
    with TaskRegistry.open(cli.url) as registry:
        registry.create(runtime="cli", task="x")
        registry.create(runtime="cli", task="y")
    [segment] = (tmp_path / "b\udcffd").glob("*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b'"x"', b'"z"'))
    cli.env["PYTHONIOENCODING"] = encoding
    done = cli("verify", "--json")
    assert done.returncode == 1
    assert "b\ufffdd" in json.loads(done.stdout.decode("utf-8"))["problems"][0]


def test_a_closed_pipe_ends_every_command_quietly(cli: CLI, url: str) -> None:
    with TaskRegistry.open(url) as registry, registry.batch():
        for _ in range(3):
            registry.create(runtime="cli", task="x" * 100_000)
    for words in (["list", "--json"], ["changes"]):
        running = cli.start(*words)
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(10)
        running.stdout.close()
        # The system can accept one long write before it reports that the pipe is closed.
        assert running.wait(30) in ((0, 141) if "--json" in words else (141,)), words
        assert running.stderr.read() == b""
        running.stderr.close()


def test_closed_standard_error_is_no_crash(cli: CLI) -> None:
    """Nobody reads the error message: the exit status still tells that the command failed."""
    running = cli.start("list", stderr=subprocess.PIPE)
    assert running.stderr is not None
    running.stderr.close()
    assert running.wait(30) in (3, 141)


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["--version"]])
def test_a_full_output_device_is_an_error(cli: CLI, task_id: str, words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        running = cli.start(*words, stdout=full)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 3
    assert errors == b"taskstore: the output cannot be written: No space left on device\n"
