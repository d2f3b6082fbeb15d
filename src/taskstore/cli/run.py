"""``taskstore run``: record a real command."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO

import typer

from taskstore.cli import change, ledger, render
from taskstore.cli.child import TIMEOUT, forwarded_signals, running
from taskstore.cli.ledger import Misuse, Url, positive_seconds, seconds, url_of
from taskstore.errors import ConflictError, OutcomeUnknownError, TaskStoreError
from taskstore.model import lifecycle
from taskstore.model.ids import new_task_id, system_clock
from taskstore.model.journal import Put
from taskstore.model.records import METADATA_BYTES, TASK_BYTES, TaskRecord, TaskStatus
from taskstore.store.interface import TaskRegistryStore
from taskstore.store.opening import open_store

RUNTIME = "cli"
TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND, BY_SIGNAL = 124, 126, 127, 128
"""Exit statuses as in timeout(1) and the shell; death by signal n is 128 + n."""

GRACE_S = 10.0
"""How long a command that was told to end may take, before SIGKILL."""

INTERVAL_S = 1.0
"""The least time between two progress events."""

PATIENCE_S = 5.0
"""For how long recording the end is tried again when the store refuses it."""

RETRY_S = 0.2
"""How long to wait before the end of a task is tried again."""

HANG_S = 45.0
"""How long a store may take for the end without an answer; ours give up a lock after 30 s."""


class Verdict(NamedTuple):
    """What is recorded of an end, and the exit status that tells of it."""

    status: TaskStatus
    exit_status: int
    error: str | None = None


def run(
    ctx: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="CMD", help="The command.", show_default=False)
    ],
    *,
    label: Annotated[str | None, typer.Option(help="A short name for lists.")] = None,
    owner: Annotated[str | None, typer.Option(help="The owner key of the task.")] = None,
    session: Annotated[str | None, typer.Option(help="The requester's session key.")] = None,
    run_id: Annotated[
        str | None,
        typer.Option(help="Run it once: not started if this run of it is recorded already (1)."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(parser=positive_seconds, metavar="S", help="End it after 90, 5m, 2h..."),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            parser=seconds,
            metavar="S",
            help=f"How long it may take to end before SIGKILL; default {GRACE_S:g}.",
        ),
    ] = None,
    id_file: Annotated[
        Path | None,
        typer.Option(help="Write the task id there when it is recorded, before the start."),
    ] = None,
    url: Url = None,
) -> int:
    """Run a command and record it as a task.

    Output passes through untouched; its last line becomes the task's
    progress. The command writes to pipes and has no controlling terminal. It
    is over when it has exited and nobody holds its output open, as in a
    pipeline. Exits as the command does: 128+n when killed by signal n, 124 at
    the timeout, 126 or 127 when it cannot be started. If it cannot be
    recorded (3), it is not started; later trouble is told and it goes on.
    Ctrl-C, SIGTERM and SIGHUP are passed on; a second one kills.
    """
    fields = {
        "label": label,
        "owner_key": owner,
        "requester_session_key": session,
        "run_id": run_id,
    }
    new_command_record(command, **fields)  # what may not be stored is refused before anything
    id_out = _opened(id_file)
    store = open_store(url_of(ctx, url))
    return _run(
        store,
        command,
        fields,
        id_out,
        timeout_s=math.inf if timeout is None else timeout,
        grace_s=GRACE_S if grace is None else grace,
    )


def _run(
    store: TaskRegistryStore,
    command: Sequence[str],
    fields: dict[str, Any],
    id_out: TextIO | None,
    *,
    timeout_s: float,
    grace_s: float,
) -> int:
    """Record the task, run the command, record its end; returns the exit status."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(store)
        events = stack.enter_context(forwarded_signals())
        record = new_command_record(command, **fields)
        if not _create(store, record):
            return 1
        if id_out is not None:
            with id_out:
                id_out.write(f"{record.task_id}\n")
        recorder = Recorder(store, record)
        try:
            with running(command, events, recorder.progress) as child:
                recorder.note(child_pid=child.pid)
                ending = child.attend(timeout_s=timeout_s, grace_s=grace_s)
            verdict = verdict_of(*ending, timeout_s)
        except OSError as error:
            reason = f"cannot run {_storable(command[0])}: {error.strerror or error}"
            render.note(reason)
            status = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
            verdict = Verdict(TaskStatus.FAILED, status, reason)
        if not recorder.finish(*verdict):
            stack.pop_all()  # the store hangs: closing it would as well
    _report(recorder, verdict)
    return verdict.exit_status


def new_command_record(command: Sequence[str], **fields: Any) -> TaskRecord:
    """The first revision of a command's task, already running.

    What is too long to be stored is cut off; what is no text is replaced.
    """
    argv = [_storable(word) for word in command]
    try:
        cwd = _storable(os.getcwd())  # noqa: PTH109 (Path.cwd says the same with more)
    except OSError:
        cwd = ""
    metadata: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "cwd": cwd}
    if sum(2 * len(word.encode()) + 8 for word in argv) < METADATA_BYTES // 2:
        metadata["argv"] = argv
    return lifecycle.new_record(
        now=system_clock(),
        task_id=new_task_id(),
        runtime=RUNTIME,
        task=shlex.join(argv).encode()[:TASK_BYTES].decode(errors="ignore"),
        status="running",
        fields={**fields, "metadata": metadata},
    )


def verdict_of(returncode: int, cause: int | None, timeout_s: float) -> Verdict:
    """What it means how a command ended, and why it was told to."""
    if cause == TIMEOUT:
        error = f"timed out after {render.duration(timeout_s)}"
        return Verdict(TaskStatus.TIMED_OUT, TIMED_OUT, error)
    if cause is not None:
        return Verdict(TaskStatus.CANCELLED, BY_SIGNAL + cause, f"ended by {_name(cause)}")
    if returncode < 0:
        error = f"killed by {_name(-returncode)}"
        return Verdict(TaskStatus.FAILED, BY_SIGNAL - returncode, error)
    if returncode:
        return Verdict(TaskStatus.FAILED, returncode, f"exit status {returncode}")
    return Verdict(TaskStatus.SUCCEEDED, 0)


def _create(store: TaskRegistryStore, record: TaskRecord) -> bool:
    """Record the task as running; false, and told, if its run is recorded already."""
    try:
        store.apply([Put(record)])
    except ConflictError as error:
        holder = next(
            (c.existing_task_id for c in error.conflicts if c.existing_task_id is not None), None
        )
        if holder is None:
            raise
        standing = ledger.get(store, holder)
        render.note(
            f"run {record.run_id} of this command is recorded already, as {holder} "
            f"({standing.status}); it was not started again"
        )
        return False
    return True


def _report(recorder: Recorder, verdict: Verdict) -> None:
    """Say so, loudly, if the ledger does not tell what became of the command."""
    record = recorder.record
    if record.status is verdict.status and recorder.recorded:
        return
    ended = f"the command ended as {verdict.status} (exit status {verdict.exit_status})"
    if recorder.recorded:
        render.note(f"{ended}, but task {record.task_id} had been ended as {record.status} before")
        return
    reason = recorder.failure or "the store did not answer"
    render.note(
        f"NOT RECORDED: {ended}, but task {record.task_id} still says {record.status}: {reason}"
    )


def _opened(path: Path | None) -> TextIO | None:
    """Open the id file before anything happens, so that it is no surprise later."""
    if path is None:
        return None
    try:
        return path.open("w", encoding="ascii")
    except OSError as error:
        raise Misuse(f"--id-file {path}: {error.strerror}") from None


def _storable(word: str) -> str:
    """A word of the command line as text: bytes that are not UTF-8 are replaced."""
    return os.fsencode(word).decode(errors="replace")


def _name(number: int) -> str:
    """A signal's name, or its number where it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Recorder:
    """Writes what becomes of one task from a thread of its own.

    ``record`` is the task as created.  ``progress`` and ``note`` only leave
    word and return at once; the store may be as slow as it likes.  A store
    that fails is tried again at the next event; ``failure`` is the last
    error, ``None`` after a success.  ``recorded`` tells whether the end was.
    """

    def __init__(self, store: TaskRegistryStore, record: TaskRecord) -> None:
        self.record = record
        self.failure: Exception | None = None
        self.recorded = False
        self._store = store
        self._known: TaskRecord | None = record
        self._line: str | None = None
        self._metadata: dict[str, Any] = {}
        self._end: dict[str, Any] = {}
        self._word = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def progress(self, line: str) -> None:
        """Leave word of a new last line."""
        if line != self._line:
            self._line = line
            self._word.set()

    def note(self, **metadata: Any) -> None:
        """Leave word of something for the metadata."""
        self._metadata = self._metadata | metadata
        self._word.set()

    def finish(self, status: str, exit_status: int, error: str | None = None) -> bool:
        """Record the end; returns whether the store answered at all."""
        self._end = {"status": status, "error": error, "ended_at": self._store.clock()}
        self.note(exit_status=exit_status)
        self._over.set()
        self._thread.join(HANG_S)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while self._word.wait() and not self._over.is_set():
            self._word.clear()
            self._attempt(self._progressed)
            self._over.wait(INTERVAL_S)
        give_up_at = time.monotonic() + PATIENCE_S
        while not (done := self._attempt(self._ended)) and time.monotonic() < give_up_at:
            if not isinstance(self.failure, TaskStoreError) or not (
                self.failure.retryable or isinstance(self.failure, OutcomeUnknownError)
            ):
                break
            time.sleep(RETRY_S)
        self.recorded = done

    def _attempt(self, mutation: lifecycle.Mutation) -> bool:
        """Store a change of the record; returns whether the ledger has it.

        After a failure the record is read again first: the change may be there.
        """
        known, self._known = self._known, None
        try:
            self.record = change.change(self._store, self.record.task_id, mutation, known=known)
        except Exception as error:  # noqa: BLE001 (whatever a store raises, the command goes on)
            self.failure = error
            return False
        self._known = self.record
        self.failure = None
        return True

    def _progressed(self, record: TaskRecord, now: int) -> TaskRecord:
        """The record with what is known by now; only metadata once somebody ended it."""
        line, metadata = self._line, self._metadata
        if line is not None and not record.is_terminal:
            record = lifecycle.progress(line)(record, now)
        return lifecycle.merge_metadata(metadata)(record, now) if metadata else record

    def _ended(self, record: TaskRecord, now: int) -> TaskRecord:
        """The record with its end.  Another's end stands, unless it only says that we were lost."""
        record = self._progressed(record, now)
        if record.status is TaskStatus.LOST:
            return lifecycle.recover(summary=self._line, **self._end)(record, now)
        if record.is_terminal:
            return record
        return lifecycle.finish(summary=self._line, **self._end)(record, now)
