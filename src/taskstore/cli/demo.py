"""``taskstore demo``: the main job, shown on real work and checked on the way."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from taskstore import history
from taskstore.backends import open_store, redacted
from taskstore.cli import ledger, render
from taskstore.cli.demo_jobs import CANCELLED, ORPHANED, jobs
from taskstore.cli.options import URL_VARIABLE, Misuse, Url
from taskstore.errors import UnsupportedError
from taskstore.journal import JournalEntry
from taskstore.records import TaskRecord
from taskstore.store import SupportsJournal

if TYPE_CHECKING:
    from rich.table import Table

TASKSTORE = (sys.executable, "-m", "taskstore")
"""Our own command line, in a process of its own."""

POLL_S = 0.1
CANCEL_AFTER_S, KILL_AFTER_S = 3.0, 4.0
"""When the demo cancels one command, and kills another's recorder, at the earliest."""
PATIENCE_S = 90.0
"""Something must have gone wrong when no command has ended for so long."""


class NotAsPromised(Exception):
    """What the demo saw is not what taskstore promises."""


def demo(
    *,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where to put everything; new or empty. Default: a fresh one."),
    ] = None,
    url: Url = None,
) -> int:
    """Record real commands side by side, kill a recorder, restart, compact, verify.

    Takes some 15 seconds and checks what it claims: exits 1 if anything is
    not as promised.
    """
    place = _empty_directory(directory)
    url = f"sqlite:///{quote((place / 'tasks.db').as_posix())}" if url is None else url
    try:
        _Story(place, url).tell()
    except NotAsPromised as broken:
        render.note(f"NOT AS PROMISED: {broken}; everything is left as it is in {place}")
        return 1
    return 0


def _empty_directory(wanted: Path | None) -> Path:
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="taskstore-demo-"))
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(wanted.iterdir()):
            raise Misuse(f"--dir {wanted} is not empty")
    except OSError as error:
        raise Misuse(f"--dir {wanted}: {error.strerror}") from None
    return wanted.resolve()


class _Story:
    """The demo, step by step."""

    def __init__(self, place: Path, url: str) -> None:
        self._place = place
        self._url = url
        self._jobs = jobs(place)
        self._recorders: dict[str, subprocess.Popen[bytes]] = {}
        self._records: dict[str, TaskRecord] = {}
        self._checks = 0
        self._started = self._last_end = time.monotonic()

    def tell(self) -> None:
        """Do everything in order."""
        with open_store(self._url) as store:
            if not isinstance(store, SupportsJournal):
                raise UnsupportedError(f"the demo watches the journal, which {store!r} has not")
            begin, location = store.head(), store.location
        _say(f"{len(self._jobs)} commands, recorded side by side in {location}")
        try:
            self._start()
            self._watch(begin)
        finally:
            self._end_all()
        acknowledged = self._check_recorders()
        self._restart(acknowledged)
        self._reconcile(acknowledged)
        self._look_back(acknowledged[ORPHANED])
        self._compact_and_verify()
        self._farewell(location, acknowledged[ORPHANED])

    # -- recording ----------------------------------------------------------

    def _start(self) -> None:
        for job in self._jobs:
            id_file = self._place / f"{job.label}.id"
            words = ["run", "--label", job.label, "--id-file", str(id_file), *job.options]
            with (self._place / f"{job.label}.out").open("wb") as output:
                self._recorders[job.label] = subprocess.Popen(  # noqa: S603 (our own command line)
                    [*TASKSTORE, *words, "--", *job.argv],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )

    def _watch(self, begin: int) -> None:
        """Show what the journal brings until no recorder is left."""
        ended: set[str] = set()
        with ledger.open_reader(self._url) as store, self._display() as show:
            while True:
                over = all(recorder.poll() is not None for recorder in self._recorders.values())
                for entry in history.changes(store, begin, None):
                    begin = entry.seq
                    if entry.record is not None and entry.record.is_terminal:
                        self._last_end = time.monotonic()
                    if entry.record is not None and entry.record.label is not None:
                        self._records[entry.record.label] = entry.record
                        show(entry)
                if over:
                    return
                self._meddle(ended)
                if time.monotonic() - self._last_end > PATIENCE_S:
                    raise NotAsPromised(f"no command has ended for {PATIENCE_S:g} s")
                time.sleep(POLL_S)

    def _meddle(self, ended: set[str]) -> None:
        """Cancel one command and kill the recorder of another, once they are under way."""
        for label, after_s, number in (
            (CANCELLED, CANCEL_AFTER_S, signal.SIGTERM),
            (ORPHANED, KILL_AFTER_S, signal.SIGKILL),
        ):
            record = self._records.get(label)
            late_enough = time.monotonic() - self._started >= after_s
            if (
                label not in ended
                and record is not None
                and record.progress_summary
                and late_enough
            ):
                ended.add(label)
                self._recorders[label].send_signal(number)

    def _end_all(self) -> None:
        for recorder in self._recorders.values():
            if recorder.poll() is None:
                recorder.terminate()
        for recorder in self._recorders.values():
            recorder.wait()

    @contextlib.contextmanager
    def _display(self) -> Iterator[Callable[[JournalEntry], object]]:
        """A live table on a terminal, elsewhere a line for each change."""
        if not sys.stdout.isatty():
            yield self._print_change
            return
        from rich.live import Live

        with Live(console=render.console(), get_renderable=self._table, refresh_per_second=10):
            yield lambda _: None

    def _print_change(self, entry: JournalEntry) -> None:
        record = self._records[entry.record.label or ""] if entry.record else None
        if record is not None:
            passed = f"{time.monotonic() - self._started:5.1f}s"
            last = render.last_word(record)
            render.print_lines([(passed, record.label or "", record.status, last)])
            sys.stdout.flush()

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
        for column in ("COMMAND", "STATUS", "TOOK"):
            table.add_column(column, no_wrap=True)
        table.add_column("LAST WORD", no_wrap=True, overflow="ellipsis", ratio=1)
        for job in self._jobs:
            record = self._records.get(job.label)
            cells = (
                (job.label, "", "", "")
                if record is None
                else (job.label, record.status, render.took(record), render.last_word(record))
            )
            table.add_row(*map(render.safe_text, cells))
        return table

    # -- checking -----------------------------------------------------------

    def _check_recorders(self) -> dict[str, str]:
        """Check how the recorders ended; returns the ids that they acknowledged, by label."""
        acknowledged = {}
        for job in self._jobs:
            status = self._recorders[job.label].returncode
            self._check(
                status == job.exit_status,
                f"{job.label!r} was to exit with {job.exit_status} and did with {status}",
            )
            acknowledged[job.label] = (self._place / f"{job.label}.id").read_text().strip()
        return acknowledged

    def _restart(self, acknowledged: dict[str, str]) -> None:
        _say("A new process reads the ledger: every acknowledged task is there")
        found = {task["task_id"]: task for task in self._ask("list", "--limit=1000")["tasks"]}
        for job in self._jobs:
            task = found.get(acknowledged[job.label])
            self._check(task is not None, f"task {acknowledged[job.label]} is gone")
            wanted = "running" if job.label == ORPHANED else job.ends
            self._check(
                task is not None and task["status"] == wanted, f"{job.label!r} is not {wanted}"
            )
        kept = len(set(acknowledged.values()) & set(found))
        render.print_line(f"{len(acknowledged)} acknowledged, {kept} found")
        render.print_line(f"{ORPHANED!r} still says running: its recorder was killed with SIGKILL")

    def _reconcile(self, acknowledged: dict[str, str]) -> None:
        """Mark as lost what nobody records any more, as a host does when it starts."""
        from taskstore.registry import TaskRegistry

        _say("Nobody is left to tell what became of it: it is marked lost")
        lost = []
        with TaskRegistry.open(self._url) as registry:
            for task in registry.active():
                pid = task.metadata.get("pid")
                if task.task_id in acknowledged.values() and not _is_alive(pid):
                    registry.mark_lost(task.task_id, error=f"its recorder, pid {pid}, is gone")
                    lost.append(task.task_id)
        self._check(lost == [acknowledged[ORPHANED]], f"the lost tasks are {lost}")
        self._show("list", "--status=lost")

    def _look_back(self, task_id: str) -> None:
        _say("Its history")
        told = self._ask("log", task_id)
        self._check(told["complete"], "the history does not begin at revision 1")
        last = told["entries"][-1]["record"]["status"]
        self._check(last == "lost", f"the history ends with {last}")
        self._show("log", task_id, last=8)

    def _compact_and_verify(self) -> None:
        _say("Compaction folds the journal into a snapshot and changes no answer")
        before = self._ask("list", "--limit=1000")["tasks"]
        self._show("compact")
        self._check(before == self._ask("list", "--limit=1000")["tasks"], "answers have changed")
        self._show("verify")

    def _farewell(self, location: str, task_id: str) -> None:
        passed = time.monotonic() - self._started
        _say(f"Everything as promised: {self._checks} checks, {passed:.1f}s")
        render.print_line(f"The ledger lies in {location}. Go on with:")
        for words in (
            f"export {URL_VARIABLE}={shlex.quote(redacted(self._url))}",
            "taskstore list",
            f"taskstore show {task_id}",
            "taskstore changes --follow &",
            "taskstore run --label mine -- ls -l",
        ):
            render.print_line(f"  {words}")

    def _check(self, held: bool, otherwise: str) -> None:
        self._checks += 1
        if not held:
            raise NotAsPromised(otherwise)

    # -- our own command line -------------------------------------------------

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, URL_VARIABLE: self._url, "PYTHONUNBUFFERED": "1"}

    def _ask(self, *words: str) -> Any:
        return json.loads(self._run(*words, "--json"))

    def _show(self, *words: str, last: int | None = None) -> None:
        """Run a command and print it with what it says, or the last lines of that."""
        tail = "" if last is None else f" | tail -n {last}"
        render.print_line(f"$ taskstore {shlex.join(words)}{tail}")
        for line in self._run(*words).splitlines()[-(last or 0) :]:
            render.print_line(render.visible(line.expandtabs(2)))

    def _run(self, *words: str) -> str:
        done = subprocess.run(  # noqa: S603 (our own command line)
            [*TASKSTORE, *words],
            env=self._environment,
            check=False,
            capture_output=True,
            encoding="utf-8",
        )
        self._check(
            done.returncode == 0,
            f"taskstore {words[0]} exited with {done.returncode}: {done.stderr.strip()}",
        )
        return done.stdout


def _say(text: str) -> None:
    """A heading."""
    render.print_line(f"\n== {render.visible(text)}")
    sys.stdout.flush()


def _is_alive(pid: object) -> bool:
    """Whether a process of this machine is there."""
    if type(pid) is not int or pid <= 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
