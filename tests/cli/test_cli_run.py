"""``taskstore run``: the copied output, exit statuses, signals and records."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_process import CLI

from taskstore import TaskRegistry
from taskstore.testing.threads import until

PY = sys.executable


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The JSON store starts fastest; the demo records on SQLite."""
    return f"json:///{tmp_path / 'ledger'}"


def is_alive(pid: int) -> bool:
    """Return whether a process is running and not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return sys.platform != "linux"
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_every_byte_is_copied(cli: CLI) -> None:
    script = (
        "import sys; data = sys.stdin.buffer.read();"
        "sys.stdout.buffer.write(data * 20000); sys.stderr.buffer.write(data[::-1])"
    )
    every_byte = bytes(range(256))
    done = cli("run", "--", PY, "-c", script, input=every_byte, stdin=None)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(every_byte * 20000).digest()
    assert done.stderr == every_byte[::-1]
    task = cli.only_task()
    assert task["status"] == "succeeded"
    assert "\0" not in task["progress_summary"]


def test_the_record_of_a_success(cli: CLI, tmp_path: Path) -> None:
    done = cli(
        "run", "--label", "greet", "--owner", "me", "--session", "s-1",
        "sh", "-c", "echo one; echo 'two  words' >&2", cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"one\n", b"two  words\n")
    task = cli.only_task()
    assert (task["runtime"], task["status"], task["error"]) == ("cli", "succeeded", None)
    assert task["task"] == "sh -c 'echo one; echo '\"'\"'two  words'\"'\"' >&2'"
    assert (task["label"], task["owner_key"], task["requester_session_key"]) == (
        "greet",
        "me",
        "s-1",
    )
    assert task["terminal_summary"] in {"one", "two words"}
    metadata = task["metadata"]
    assert metadata["argv"] == ["sh", "-c", "echo one; echo 'two  words' >&2"]
    assert metadata["cwd"] == str(tmp_path)
    assert metadata["exit_status"] == 0
    assert metadata["pid"] != metadata["child_pid"]
    assert task["created_at"] <= task["started_at"] <= task["ended_at"]


@pytest.mark.parametrize(
    ("command", "status", "error"),
    [
        (["sh", "-c", "exit 3"], 3, "exit status 3"),
        (["sh", "-c", "kill -9 $$"], 137, "killed by SIGKILL"),
        (["no-such-command"], 127, "cannot run no-such-command: No such file or directory"),
        (["/"], 126, "cannot run /: Permission denied"),
    ],
)
def test_the_exit_status_is_copied_and_sets_the_status(
    cli: CLI, command: list[str], status: int, error: str
) -> None:
    done = cli("run", "--", *command)
    assert done.returncode == status
    task = cli.only_task()
    assert (task["status"], task["error"]) == ("failed", error)
    assert task["metadata"]["exit_status"] == status


def test_the_task_is_recorded_before_the_command_starts(cli: CLI, tmp_path: Path) -> None:
    id_file = tmp_path / "id"
    done = cli("run", "--id-file", str(id_file), "--", "cat", str(id_file))
    assert done.stdout.decode().strip() == cli.only_task()["task_id"]


def test_a_command_that_cannot_be_recorded_is_not_started(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    done = CLI(f"json:///{tmp_path}/file/ledger")("run", "--", "touch", str(tmp_path / "made"))
    assert done.returncode == 3
    assert done.stderr.startswith(b"taskstore: ")
    assert not (tmp_path / "made").exists()


def test_arguments_after_the_command_belong_to_it(cli: CLI) -> None:
    assert cli("run", "echo", "--help", "--", "-x").stdout == b"--help -- -x\n"
    assert cli("run", "--", "echo", "--", "--url").stdout == b"-- --url\n"
    assert cli("run").returncode == 2


def test_bytes_that_are_not_text_can_be_arguments(cli: CLI) -> None:
    done = cli("run", "--", "printf", b"%s", b"a\xffb")  # type: ignore[arg-type]
    assert done.stdout == b"a\xffb"
    assert cli.only_task()["metadata"]["argv"] == ["printf", "%s", "a\N{REPLACEMENT CHARACTER}b"]


def test_a_run_is_recorded_once(cli: CLI, tmp_path: Path) -> None:
    words = ("run", "--run-id", "nightly", "--", "sh", "-c", f"echo x >> {tmp_path}/count")
    assert cli(*words).returncode == 0
    again = cli(*words)
    assert again.returncode == 1
    assert b"already recorded" in again.stderr
    assert (tmp_path / "count").read_text() == "x\n"


def test_a_process_outside_the_group_is_not_waited_for(cli: CLI) -> None:
    script = "setsid sleep 300 & echo $!; exec sleep 300"
    # A wait for the whole grace period would exceed the test timeout.
    done = cli("run", "--timeout", "2s", "--grace", "1h", "--", "sh", "-c", script)
    os.kill(int(done.stdout), signal.SIGKILL)
    assert done.returncode == 124
    assert cli.only_task()["status"] == "timed_out"


def test_the_group_has_its_grace_period_after_its_leader_exits(cli: CLI, tmp_path: Path) -> None:
    there = tmp_path / "cleaned up"
    inner = f"trap 'sleep 3; touch \"{there}\"; exit' TERM; while :; do sleep 0.1; done"
    script = f"({inner}) & exec sleep 30"
    assert cli("run", "--timeout", "2s", "--", "sh", "-c", script).returncode == 124
    assert there.exists()


def test_a_timeout_ends_the_whole_group(cli: CLI, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"trap '' TERM; sleep 300 & echo $! > {pids}; echo $$ >> {pids}; echo begun; wait"
    done = cli("run", "--timeout", "2s", "--grace", "0.3", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (124, b"begun\n")
    for pid in pids.read_text().split():
        assert not is_alive(int(pid))
    task = cli.only_task()
    assert (task["status"], task["error"]) == ("timed_out", "timed out after 2.0s")
    assert task["progress_summary"] == "begun"


def test_a_process_that_outlives_the_leader_is_killed(cli: CLI, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    deaf = f"trap '' TERM; echo $$ > {pid_file}; exec sleep 81"
    script = f"sh -c \"{deaf}\" >/dev/null 2>&1 & trap 'exit 0' TERM; while :; do sleep 0.05; done"
    script = script.replace("$$", "\\$\\$")
    assert cli("run", "--timeout", "2", "--", "sh", "-c", script).returncode == 124
    pid = int(pid_file.read_text())
    until(lambda: not is_alive(pid))


def test_a_command_may_exit_by_itself_after_sigterm(cli: CLI, tmp_path: Path) -> None:
    # The message of sh about its terminated sleep would be the last line.
    script = "exec 2>&-; trap 'echo cleaned up; exit 0' TERM; while :; do sleep 0.05; done"
    done = cli("run", "--timeout", "2", "--", "sh", "-c", script)
    assert done.returncode == 124
    assert cli.only_task()["progress_summary"] == "cleaned up"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_forwarded_and_cancels_the_task(cli: CLI, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo got {name}; exit 0' {name}; echo ready; while :; do sleep 0.05; done"
    recorder = cli.start("run", "--", "sh", "-c", script)
    assert recorder.stdout is not None
    assert recorder.stdout.readline() == b"ready\n"
    recorder.send_signal(number)
    out, _ = recorder.communicate(timeout=20)
    assert (recorder.returncode, out) == (128 + number, f"got {name}\n".encode())
    task = cli.only_task()
    assert (task["status"], task["error"]) == ("cancelled", f"ended by {number.name}")


def test_a_second_signal_kills(cli: CLI) -> None:
    script = "trap 'echo not yet' TERM; echo ready; while :; do sleep 0.05; done"
    recorder = cli.start("run", "--grace", "1h", "--", "sh", "-c", script)
    assert recorder.stdout is not None
    assert recorder.stdout.readline() == b"ready\n"
    recorder.terminate()
    assert recorder.stdout.readline() == b"not yet\n"
    recorder.terminate()
    recorder.communicate(timeout=20)
    assert recorder.returncode == 143
    assert cli.only_task()["status"] == "cancelled"


def test_a_command_gets_sigpipe_when_the_output_is_closed(cli: CLI) -> None:
    recorder = cli.start("run", "--", "yes", stderr=subprocess.DEVNULL)
    assert recorder.stdout is not None
    recorder.stdout.readline()
    recorder.stdout.close()
    assert recorder.wait(20) == 141
    assert cli.only_task()["error"] == "killed by SIGPIPE"


def test_progress_is_recorded_at_most_once_a_second(cli: CLI) -> None:
    script = "for i in $(seq 60); do echo step $i; sleep 0.04; done"
    begun = time.monotonic()
    assert cli("run", "--", "sh", "-c", script).returncode == 0
    passed = time.monotonic() - begun
    task_id = cli.only_task()["task_id"]
    entries = cli.json("log", task_id)["entries"]
    progress = [entry for entry in entries if entry["record"]["status"] == "running"][1:]
    assert 2 <= len(progress) <= passed + 1
    times = [entry["at"] for entry in progress]
    assert all(late - early >= 990 for early, late in itertools.pairwise(times))
    assert entries[-1]["record"]["progress_summary"] == "step 60"


def test_a_killed_recorder_leaves_a_running_record(cli: CLI) -> None:
    recorder = cli.start("run", "--", "sh", "-c", "echo begun; sleep 0.2; exec sleep 78")
    assert recorder.stdout is not None
    recorder.stdout.readline()
    until(lambda: "child_pid" in cli.only_task()["metadata"])
    recorder.kill()
    recorder.communicate()
    task = cli.only_task()
    assert task["status"] == "running"
    assert task["metadata"]["pid"] == recorder.pid
    os.killpg(task["metadata"]["child_pid"], signal.SIGKILL)


def test_a_removed_ledger_does_not_stop_the_command(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    cli = CLI(f"json:///{ledger}")
    script = f"echo begun; sleep 0.5; rm -rf {ledger}; echo done; exit 5"
    done = cli("run", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (5, b"begun\ndone\n")
    assert b"NOT RECORDED: the command ended as failed (exit status 5)" in done.stderr
    assert b"Traceback" not in done.stderr


def test_an_end_by_another_writer_is_kept_unless_lost(cli: CLI, url: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = f"echo ready; while [ ! -e {go} ]; do sleep 0.05; done; exit 4"
    recorders = [cli.start("run", "--label", str(n), "--", "sh", "-c", script) for n in range(2)]
    for recorder in recorders:
        assert recorder.stdout is not None
        recorder.stdout.readline()
    with TaskRegistry.open(url) as registry:
        cancelled, lost = (registry.list(label=str(n))[0].task_id for n in range(2))
        registry.cancel(cancelled, "enough")
        registry.mark_lost(lost)
    go.touch()
    result = [recorder.communicate(timeout=20)[1] for recorder in recorders]
    assert [recorder.returncode for recorder in recorders] == [4, 4]
    assert f"task {cancelled} had already ended as cancelled".encode() in result[0]
    assert result[1] == b""
    with TaskRegistry.open(url) as registry:
        assert registry.get(cancelled).status == "cancelled"
        assert registry.get(cancelled).error == "enough"
        assert registry.get(cancelled).metadata["exit_status"] == 4
        assert registry.get(lost).status == "failed"


def test_a_closed_standard_output_does_not_become_the_database(cli: CLI) -> None:
    script = f"exec {PY} -m taskstore run -- echo into nothing >&- 2>&-"
    subprocess.run(["sh", "-c", script], env=cli.env, timeout=30, check=True)
    assert cli("verify").returncode == 0
    assert cli.only_task()["status"] == "succeeded"


def test_only_the_record_truncates_long_command_lines(cli: CLI) -> None:
    words = ["x" * 1000] * 100
    done = cli("run", "--", PY, "-c", "import sys; print(len(sys.argv))", *words)
    assert done.stdout == b"101\n"
    task = cli.only_task()
    assert "argv" not in task["metadata"]
    assert len(task["task"]) > 100_000


def test_commands_on_postgresql(postgres_url: str) -> None:
    cli = CLI(postgres_url)
    assert cli("run", "--label", "there", "--", "sh", "-c", "echo hi; exit 7").returncode == 7
    task = cli.only_task()
    assert (task["status"], task["progress_summary"]) == ("failed", "hi")
    assert cli.json("log", task["task_id"])["complete"]
    assert cli.json("compact")["compacted"]
    assert cli.json("verify")["ok"]
    assert cli.json("db", "check")["ok"]


def test_a_command_whose_name_is_longer_than_an_error(cli: CLI) -> None:
    assert cli("run", "--", "x" * 100_000).returncode == 126
    task = cli.only_task()
    assert (task["status"], task["error"][:12]) == ("failed", "cannot run x")
    assert "bytes cut]" in task["error"]
    assert task["error"].endswith("File name too long")
