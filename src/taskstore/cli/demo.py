"""``taskstore demo``: the main job, shown on real work and checked on the way."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

import typer

from taskstore.cli import ledger, render
from taskstore.cli.change import is_alive
from taskstore.cli.ledger import URL_VARIABLE, Misuse, Url
from taskstore.model.records import TaskRecord
from taskstore.registry import history
from taskstore.store.opening import open_store, redacted

TASKSTORE = (sys.executable, "-m", "taskstore")
"""Our own command line, in a process of its own."""

PATIENCE_S = 90.0
"""Something must have gone wrong when the ledger brings nothing new for so long."""

PRIMES = """
import itertools
found = 0
for number in itertools.count(2):
    if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
        found += 1
        if found % 2000 == 0:
            print(f"{found} primes found, the last is {number}", flush=True)
"""

FAREWELL = f"""\
The ledger lies in {{url}}. Go on with:
  export {URL_VARIABLE}={{quoted}}
  taskstore list
  taskstore show {{lost}}
  taskstore changes --follow &
  taskstore run --label mine -- ls -l"""


class Job(NamedTuple):
    """A command to record, and how it is to end.

    ``ends`` is the status that the ledger must show, ``exit_status`` what the
    recorder must exit with (negative: killed by that signal).
    """

    label: str
    argv: tuple[str, ...]
    ends: str = "succeeded"
    exit_status: int = 0
    options: tuple[str, ...] = ()


CANCELLED, ORPHANED = "cancelled", "orphaned"
"""The labels of the jobs that the demo itself ends."""


class NotAsPromised(Exception):
    """What the demo saw is not what taskstore promises."""


def demo(
    *,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            file_okay=False,
            writable=True,
            help="Where to put everything; new or empty. Default: a fresh one.",
        ),
    ] = None,
    url: Url = None,
) -> int:
    """Record real commands side by side, kill a recorder, restart, compact, verify.

    Takes some 15 seconds and checks what it claims: exits 1 if anything is
    not as promised.
    """
    place = Path(tempfile.mkdtemp(prefix="taskstore-demo-") if directory is None else directory)
    place = place.resolve()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(place.iterdir()):
        raise Misuse(f"--dir {place} is not empty")
    url = f"sqlite:///{quote((place / 'tasks.db').as_posix())}" if url is None else url
    work = jobs(place)
    begun = time.monotonic()
    try:
        ids = _record(url, place, work)
        _restart(url, work, ids)
        _reconcile(url, ids)
        _look_back(url, ids[ORPHANED])
        _compact_and_verify(url)
    except NotAsPromised as broken:
        render.note(f"NOT AS PROMISED: {broken}; everything is left as it is in {place}")
        return 1
    _say(f"Everything as promised: {time.monotonic() - begun:.1f}s")
    quoted = shlex.quote(redacted(url))
    render.print_line(FAREWELL.format(url=redacted(url), quoted=quoted, lost=ids[ORPHANED]))
    return 0


def jobs(place: Path) -> list[Job]:
    """Work on this Python's standard library, and a script that is written to the place."""
    python, library = sys.executable, sysconfig.get_path("stdlib")
    packages = [f"{library}/{name}" for name in ("asyncio", "email", "encodings", "json")]
    script, tar = place / "primes.py", str(place / "library.tar")
    script.write_text(PRIMES.lstrip(), encoding="utf-8")
    primes = (python, str(script))
    return [
        Job("compress", (python, "-m", "zipfile", "-c", str(place / "library.zip"), *packages)),
        Job("archive", (python, "-m", "tarfile", "-v", "-c", tar, *packages)),
        Job("unpack", (python, "-m", "zipfile", "-e", str(script), str(place)), "failed", 1),
        Job("too long", primes, "timed_out", 124, ("--timeout", "4s")),
        Job(CANCELLED, primes, "cancelled", 143),
        Job(ORPHANED, primes, "lost", -9),
    ]


def _record(url: str, place: Path, work: Sequence[Job]) -> dict[str, str]:
    """Record the jobs side by side; returns the ids that were acknowledged, by label."""
    with open_store(url) as store:
        begin = history.journal_of(store, "the demo").head()
    _say(f"{len(work)} commands, recorded side by side in {redacted(url)}")
    recorders: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for job in work:
            words = ("--label", job.label, "--id-file", str(place / f"{job.label}.id"))
            with (place / f"{job.label}.out").open("wb") as output:
                recorders[job.label] = _start(
                    url, "run", *words, *job.options, "--", *job.argv, stdout=output, stderr=output
                )
        _watch(url, begin, recorders)
        for job in work:
            status = recorders[job.label].wait()
            wanted = f"{job.label!r} was to exit with {job.exit_status} and did with {status}"
            _check(status == job.exit_status, wanted)
    finally:
        for recorder in recorders.values():
            recorder.terminate()
            recorder.wait()
    return {label: (place / f"{label}.id").read_text().strip() for label in recorders}


def _watch(url: str, begin: int, recorders: dict[str, subprocess.Popen[bytes]]) -> None:
    """Show what the journal brings until every command has ended.

    Once they are under way, one command is cancelled and the recorder of another is killed.
    """
    from rich.live import Live

    signals = {CANCELLED: signal.SIGTERM, ORPHANED: signal.SIGKILL}
    running = recorders.keys() - {ORPHANED}
    records: dict[str, TaskRecord] = {}
    with ledger.open_reader(url) as store, Live(console=render.console()) as display:
        for entry in history.changes(store, begin, PATIENCE_S):
            record = entry.record
            if record is None or record.label not in recorders:
                continue
            records[record.label] = record
            rows = (
                (label, seen.status, render.took(seen), render.last_word(seen))
                for label, seen in records.items()
            )
            columns = ("COMMAND", "STATUS", "TOOK", "LAST WORD")
            display.update(render.table(columns, rows, stretch="LAST WORD"))
            if record.progress_summary and record.label in signals:
                recorders[record.label].send_signal(signals.pop(record.label))
            if record.is_terminal:
                running -= {record.label}
            if not running and not signals:
                return
    raise NotAsPromised(f"nothing was recorded for {PATIENCE_S:g} s")


def _restart(url: str, work: Sequence[Job], ids: dict[str, str]) -> None:
    _say("A new process reads the ledger: every acknowledged task is there")
    found = {task["task_id"]: task["status"] for task in _ask(url, "list", "--limit=1000")["tasks"]}
    for job in work:
        status = found.get(ids[job.label])
        _check(status is not None, f"task {ids[job.label]} is gone")
        wanted = "running" if job.label == ORPHANED else job.ends
        _check(status == wanted, f"{job.label!r} is {status}, not {wanted}")
    render.print_line(f"{len(ids)} acknowledged, {len(found.keys() & ids.values())} found")
    render.print_line(f"{ORPHANED!r} still says running: its recorder was killed with SIGKILL")


def _reconcile(url: str, ids: dict[str, str]) -> None:
    """Mark as lost what no process records any more, as a host does when it starts."""
    from taskstore.registry.registry import TaskRegistry

    _say("No process is left to tell what became of it: it is marked lost")
    lost = []
    with TaskRegistry.open(url) as registry:
        for task in registry.active():
            pid = task.metadata.get("pid")
            if task.task_id in ids.values() and not is_alive(pid):
                registry.mark_lost(task.task_id, error=f"its recorder, pid {pid}, is gone")
                lost.append(task.task_id)
    _check(lost == [ids[ORPHANED]], f"the lost tasks are {lost}")
    _show(url, "list", "--status=lost")


def _look_back(url: str, task_id: str) -> None:
    _say("Its history")
    told = _ask(url, "log", task_id)
    _check(told["complete"], "the history does not begin at revision 1")
    last = told["entries"][-1]["record"]["status"]
    _check(last == "lost", f"the history ends with {last}")
    _show(url, "log", task_id, last=8)


def _compact_and_verify(url: str) -> None:
    _say("Compaction folds the journal into a snapshot and changes no answer")
    before = _ask(url, "list", "--limit=1000")["tasks"]
    _show(url, "compact")
    _check(before == _ask(url, "list", "--limit=1000")["tasks"], "answers have changed")
    _show(url, "verify")


def _check(held: bool, otherwise: str) -> None:
    if not held:
        raise NotAsPromised(otherwise)


def _say(text: str) -> None:
    """A heading."""
    render.print_line(f"\n== {render.visible(text)}")
    sys.stdout.flush()


def _start(url: str, *words: str, stdout: Any, stderr: Any) -> subprocess.Popen[bytes]:
    """Start one of our commands in a process of its own."""
    return subprocess.Popen(  # noqa: S603 (our own command line)
        [*TASKSTORE, *words],
        env={**os.environ, URL_VARIABLE: url, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
    )


def _ask(url: str, *words: str) -> Any:
    return json.loads(_run(url, *words, "--json"))


def _show(url: str, *words: str, last: int | None = None) -> None:
    """Run a command and print it with what it says, or the last lines of that."""
    tail = "" if last is None else f" | tail -n {last}"
    render.print_line(f"$ taskstore {shlex.join(words)}{tail}")
    for line in _run(url, *words).splitlines()[-(last or 0) :]:
        render.print_line(render.visible(line.expandtabs(2)))


def _run(url: str, *words: str) -> str:
    """Run one of our commands to its end; returns what it printed."""
    process = _start(url, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = (text.decode() for text in process.communicate())
    failed = f"taskstore {words[0]} exited with {process.returncode}: {err.strip()}"
    _check(process.returncode == 0, failed)
    return out
