"""``taskstore demo``: a demonstration that records real commands and checks results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from taskstore.cli import ledger, render
from taskstore.cli.change import is_alive
from taskstore.cli.ledger import URL_VARIABLE, Url, UsageError, url_option
from taskstore.model.records import TaskRecord
from taskstore.registry import history
from taskstore.store.opening import open_store, password_note, redacted, shell_command

TASKSTORE = (sys.executable, "-m", "taskstore")
"""The words that start the command line of taskstore in a new process."""

NO_CHANGE_TIMEOUT_S = 90.0
"""The demo fails if the ledger records no change for this many seconds."""

_CHILD_VARIABLES = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
"""The environment variables of the started commands, whose output the demo reads as UTF-8."""

PRIMES = """
import itertools
found = 0
for number in itertools.count(2):
    if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
        found += 1
        if found % 2000 == 0:
            print(f"{found} primes found, the last is {number}", flush=True)
"""


class Job(NamedTuple):
    """A command that the demo records, and the expected result of the command.

    ``status`` is the expected status in the ledger.  ``exit_status`` is the expected exit
    status of the recorder; a negative number -n means that signal n killed the recorder.
    """

    label: str
    argv: tuple[str, ...]
    status: str = "succeeded"
    exit_status: int = 0
    options: tuple[str, ...] = ()


CANCELLED, ORPHANED = "cancelled", "orphaned"
"""The labels of the jobs that the demo itself stops."""


class DemoFailed(Exception):
    """The demo found that taskstore has violated a guarantee."""


def demo(
    ctx: typer.Context,
    *,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            file_okay=False,
            writable=True,
            help="A new or empty directory for all files. Default: a temporary directory.",
        ),
    ] = None,
    url: Url = None,
) -> int:
    """Record commands concurrently, kill a recorder, reopen the ledger, compact and verify.

    The demo takes about 15 seconds and checks each step. If a check fails, the exit
    status is 1.
    """
    root = Path(tempfile.mkdtemp(prefix="taskstore-demo-") if directory is None else directory)
    root = root.resolve()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise UsageError(f"--dir {root} is not empty")
    url = url_option(ctx, url) or f"sqlite:///{(root / 'tasks.db').as_posix()}"
    demo_jobs = jobs(root)
    started = time.monotonic()
    try:
        ids = _record(url, root, demo_jobs)
        _restart(url, demo_jobs, ids)
        _reconcile(url, ids)
        _check_history(url, ids[ORPHANED])
        _compact_and_verify(url)
    except DemoFailed as error:
        render.print_note(f"DEMO FAILED: {error}; all files are kept in {root}")
        return 1
    _print_heading(f"All checks passed in {time.monotonic() - started:.1f}s")
    _print_next_steps(url, ids[ORPHANED])
    return 0


def _print_next_steps(url: str, lost_id: str) -> None:
    note = password_note(url)
    render.print_line(f"Next steps{f'; {note}' if note else ''}:")
    for words in (
        ("list",),
        ("show", lost_id),
        ("changes", "--follow"),
        ("run", "--label", "mine", "--", "ls", "-l"),
    ):
        render.print_line(f"  {shell_command(*words, url=url)}")
    render.print_line(f"If you set {URL_VARIABLE} to this URL, the commands do not need --url.")


def jobs(root: Path) -> list[Job]:
    """Return the demo's jobs; write the script of some jobs to ``root``."""
    python, library = sys.executable, sysconfig.get_path("stdlib")
    packages = [f"{library}/{name}" for name in ("asyncio", "email", "encodings", "json")]
    script, tar = root / "primes.py", str(root / "library.tar")
    script.write_text(PRIMES.lstrip(), encoding="utf-8")
    primes = (python, str(script))
    return [
        Job("compress", (python, "-m", "zipfile", "-c", str(root / "library.zip"), *packages)),
        Job("archive", (python, "-m", "tarfile", "-v", "-c", tar, *packages)),
        Job("unpack", (python, "-m", "zipfile", "-e", str(script), str(root)), "failed", 1),
        Job("too long", primes, "timed_out", 124, ("--timeout", "4s")),
        Job(CANCELLED, primes, "cancelled", 143),
        Job(ORPHANED, primes, "lost", -9),
    ]


def _record(url: str, root: Path, demo_jobs: Sequence[Job]) -> dict[str, str]:
    """Run and record the jobs concurrently; return a dict that maps each job's label to its task
    id."""
    with open_store(url) as store:
        head = history.require_journal(store, "the demo").head()
    _print_heading(f"{len(demo_jobs)} commands, recorded concurrently in {redacted(url)}")
    recorders: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for job in demo_jobs:
            words = ("--label", job.label, "--id-file", str(root / f"{job.label}.id"))
            with (root / f"{job.label}.out").open("wb") as output:
                recorders[job.label] = _start(
                    url, "run", *words, *job.options, "--", *job.argv, stdout=output, stderr=output
                )
        _watch(url, head, recorders)
        for job in demo_jobs:
            status = recorders[job.label].wait()
            problem = f"{job.label!r} exited with status {status}; expected: {job.exit_status}"
            _check(status == job.exit_status, problem)
    finally:
        for recorder in recorders.values():
            recorder.terminate()
            recorder.wait()
    return {label: (root / f"{label}.id").read_text().strip() for label in recorders}


def _watch(url: str, head: int, recorders: dict[str, subprocess.Popen[bytes]]) -> None:
    """Print the changes in the journal until every recorded command has ended.

    While the commands run, the function cancels one command and kills the recorder of
    another command.
    """
    from rich.live import Live

    signals = {CANCELLED: signal.SIGTERM, ORPHANED: signal.SIGKILL}
    running = recorders.keys() - {ORPHANED}
    records: dict[str, TaskRecord] = {}
    with ledger.open_reader(url) as store, Live(console=render.console()) as display:
        for entry in history.changes(store, head, NO_CHANGE_TIMEOUT_S):
            record = entry.record
            if record is None or record.label not in recorders:
                continue
            records[record.label] = record
            rows = (
                (label, task.status, render.elapsed_of(task), render.latest_message(task))
                for label, task in records.items()
            )
            columns = ("COMMAND", "STATUS", "TOOK", "LATEST MESSAGE")
            display.update(render.table(columns, rows, stretch="LATEST MESSAGE"))
            if record.progress_summary and record.label in signals:
                recorders[record.label].send_signal(signals.pop(record.label))
            if record.is_terminal:
                running -= {record.label}
            if not running and not signals:
                return
    raise DemoFailed(f"the ledger recorded no change for {NO_CHANGE_TIMEOUT_S:g} s")


def _restart(url: str, demo_jobs: Sequence[Job], ids: dict[str, str]) -> None:
    _print_heading("A new process reads the ledger and finds every acknowledged task")
    tasks = _query(url, "list", "--limit=1000")["tasks"]
    statuses = {task["task_id"]: task["status"] for task in tasks}
    for job in demo_jobs:
        status = statuses.get(ids[job.label])
        _check(status is not None, f"task {ids[job.label]} is missing")
        expected = "running" if job.label == ORPHANED else job.status
        _check(status == expected, f"{job.label!r} is {status}; expected: {expected}")
    render.print_line(
        f"{len(ids)} tasks acknowledged, {len(statuses.keys() & ids.values())} tasks found"
    )
    render.print_line(
        f"{ORPHANED!r} still has the status running, because SIGKILL ended its recorder"
    )


def _reconcile(url: str, ids: dict[str, str]) -> None:
    """Mark the task of the killed recorder as lost, as a host program does at its start."""
    from taskstore.registry.registry import TaskRegistry

    _print_heading("No process will record this task's end, so the demo marks the task as lost")
    lost = []
    with TaskRegistry.open(url) as registry:
        for task in registry.active():
            pid = task.metadata.get("pid")
            if task.task_id in ids.values() and not is_alive(pid):
                registry.mark_lost(task.task_id, error=f"its recorder, pid {pid}, has ended")
                lost.append(task.task_id)
    _check(lost == [ids[ORPHANED]], f"lost tasks: {lost}; expected: {ids[ORPHANED]}")
    _run_and_print(url, "list", "--status=lost")


def _check_history(url: str, task_id: str) -> None:
    _print_heading("The history of this task")
    answer = _query(url, "log", task_id)
    _check(answer["complete"], "the history does not begin at revision 1")
    last = answer["entries"][-1]["record"]["status"]
    _check(last == "lost", f"the last status in the history is {last}; expected: lost")
    _run_and_print(url, "log", task_id, last=8)


def _compact_and_verify(url: str) -> None:
    _print_heading("Compaction folds the journal into a snapshot and changes no query result")
    before = _query(url, "list", "--limit=1000")["tasks"]
    _run_and_print(url, "compact")
    _check(before == _query(url, "list", "--limit=1000")["tasks"], "compaction changed a result")
    _run_and_print(url, "verify")


def _check(passed: bool, problem: str) -> None:
    if not passed:
        raise DemoFailed(problem)


def _print_heading(text: str) -> None:
    """Print the heading of a step of the demo."""
    render.print_line(f"\n== {render.escape_controls(text)}")
    sys.stdout.flush()


def _start(url: str, *words: str, stdout: Any, stderr: Any) -> subprocess.Popen[bytes]:
    """Start a taskstore command in a new process, and return the process."""
    return subprocess.Popen(  # noqa: S603 (a command of taskstore)
        [*TASKSTORE, *words],
        env={**os.environ, URL_VARIABLE: url, **_CHILD_VARIABLES},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
    )


def _query(url: str, *words: str) -> Any:
    return json.loads(_run(url, *words, "--json"))


def _run_and_print(url: str, *words: str, last: int | None = None) -> None:
    """Run a command; print the command and its output, or only the ``last`` lines of the output."""
    tail = "" if last is None else f" | tail -n {last}"
    render.print_line(f"$ {shell_command(*words, url=url)}{tail}")
    for line in _run(url, *words).splitlines()[-(last or 0) :]:
        render.print_line(render.escape_controls(line.expandtabs(2)))


def _run(url: str, *words: str) -> str:
    """Run a taskstore command until the command ends; return the command's output."""
    process = _start(url, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = (text.decode() for text in process.communicate())
    problem = f"taskstore {words[0]} exited with status {process.returncode}: {err.strip()}"
    _check(process.returncode == 0, problem)
    return out
