"""``taskstore run``: run a command and record it as a task."""

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
from taskstore.cli.child import TIMEOUT, forwarded_signals, running_child
from taskstore.cli.ledger import Url, UsageError, parse_duration, parse_positive_duration, url_of
from taskstore.errors import ConflictError, OutcomeUnknownError, TaskStoreError
from taskstore.model import lifecycle
from taskstore.model.ids import new_task_id, system_clock
from taskstore.model.journal import Put
from taskstore.model.records import METADATA_BYTES, TASK_BYTES, TaskRecord, TaskStatus
from taskstore.store.interface import TaskRegistryStore
from taskstore.store.opening import open_store

RUNTIME = "cli"
TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND, SIGNAL_BASE = 124, 126, 127, 128
"""The exit statuses that timeout(1) and the shell use; 128 + n means that signal n killed the
command."""

GRACE_S = 10.0
"""The default time between the signal that asks a command to stop and SIGKILL, in seconds."""

PROGRESS_INTERVAL_S = 1.0
"""The minimum interval between two recorded progress changes, in seconds."""

RETRY_TIMEOUT_S = 5.0
"""How long ``taskstore run`` retries to record the final status after store errors, in seconds."""

RETRY_INTERVAL_S = 0.2
"""The interval between two retries to record the final status, in seconds."""

STORE_TIMEOUT_S = 45.0
"""The maximum wait, in seconds, until the final status is stored.  This wait is longer than the
lock timeout of a store (30 s)."""


class CommandResult(NamedTuple):
    """The final status of a command, and the exit status of ``taskstore run``."""

    status: TaskStatus
    exit_status: int
    error: str | None = None


Timeout = Annotated[
    float | None,
    typer.Option(
        parser=parse_positive_duration,
        metavar="S",
        help="Stop the command after this time: 90, 5m, 2h...",
    ),
]
Grace = Annotated[
    float | None,
    typer.Option(
        parser=parse_duration,
        metavar="S",
        help=f"The time from the first signal to SIGKILL; default {GRACE_S:g}.",
    ),
]


def run(
    ctx: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="CMD", help="The command to run.", show_default=False)
    ],
    *,
    label: Annotated[str | None, typer.Option(help="A short name for lists.")] = None,
    owner: Annotated[str | None, typer.Option(help="The owner key of the task.")] = None,
    session: Annotated[str | None, typer.Option(help="The requester's session key.")] = None,
    run_id: Annotated[
        str | None,
        typer.Option(
            help="The run id. If the run is already recorded, the command is not started (exit 1)."
        ),
    ] = None,
    timeout: Timeout = None,
    grace: Grace = None,
    id_file: Annotated[
        Path | None,
        typer.Option(help="Write the task id to this file before the command starts."),
    ] = None,
    url: Url = None,
) -> int:
    """Run a command and record it as a task.

    The output is copied unchanged; the last line becomes the task's progress. The command writes
    to pipes and has no controlling terminal. The command counts as ended when it has exited and no
    process has its output open; a shell uses the same rule for a pipeline. The exit status is the
    exit status of the command. The exit status is 128+n if signal n killed the command, 124 if the
    command exceeded the timeout, and 126 or 127 if the command cannot be started. If the task
    cannot be recorded, the command is not started (exit status 3). Later store errors are printed
    and do not stop the command. Ctrl-C, SIGTERM and SIGHUP are forwarded to the command; a second
    signal kills the command.
    """
    fields = {
        "label": label,
        "owner_key": owner,
        "requester_session_key": session,
        "run_id": run_id,
    }
    # Build the record first, so that an invalid field raises before any side effect.
    new_command_record(command, **fields)
    id_out = _open_id_file(id_file)
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
    """Record the task, run the command, record the final status; return the exit status."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(store)
        queue = stack.enter_context(forwarded_signals())
        record = new_command_record(command, **fields)
        try:
            created = _create(store, record)
        finally:
            # The operator sees the notices before any output of the command.  Some notices need
            # the time of the last commit, which the store knows only after the creation.
            render.print_report(store)
        if not created:
            return 1
        if id_out is not None:
            with id_out:
                id_out.write(f"{record.task_id}\n")
        recorder = Recorder(store, record)
        try:
            with running_child(command, queue, recorder.progress) as child:
                recorder.add_metadata(child_pid=child.pid)
                end = child.wait(timeout_s=timeout_s, grace_s=grace_s)
            result = result_of(*end, timeout_s)
        except OSError as error:
            reason = f"cannot run {_as_utf8(command[0])}: {error.strerror or error}"
            render.print_note(reason)
            status = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
            result = CommandResult(TaskStatus.FAILED, status, reason)
        if not recorder.finish(*result):
            stack.pop_all()  # the store does not respond, so closing the store would block
    _warn_if_unrecorded(recorder, result)
    return result.exit_status


def new_command_record(command: Sequence[str], **fields: Any) -> TaskRecord:
    """Return the first record of a command's task; the status is ``running``.

    Text that is too long is truncated; bytes that are not UTF-8 are replaced.
    """
    argv = [_as_utf8(word) for word in command]
    try:
        cwd = _as_utf8(os.getcwd())  # noqa: PTH109 (Path.cwd adds nothing)
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


def result_of(returncode: int, cause: int | None, timeout_s: float) -> CommandResult:
    """Return the result of a command; ``cause`` is ``None`` if the command ended by itself."""
    if cause == TIMEOUT:
        error = f"timed out after {render.duration(timeout_s)}"
        return CommandResult(TaskStatus.TIMED_OUT, TIMED_OUT, error)
    if cause is not None:
        return CommandResult(
            TaskStatus.CANCELLED, SIGNAL_BASE + cause, f"ended by {_signal_name(cause)}"
        )
    if returncode < 0:
        error = f"killed by {_signal_name(-returncode)}"
        return CommandResult(TaskStatus.FAILED, SIGNAL_BASE - returncode, error)
    if returncode:
        return CommandResult(TaskStatus.FAILED, returncode, f"exit status {returncode}")
    return CommandResult(TaskStatus.SUCCEEDED, 0)


def _create(store: TaskRegistryStore, record: TaskRecord) -> bool:
    """Record the task and return true.

    If the run of the task is already recorded, print a note and return false.
    """
    try:
        store.apply([Put(record)])
    except ConflictError as error:
        existing_id = next(
            (c.existing_task_id for c in error.conflicts if c.existing_task_id is not None), None
        )
        if existing_id is None:
            raise
        existing = ledger.get(store, existing_id)
        render.print_note(
            f"run {record.run_id} of this command is already recorded as task {existing_id} "
            f"({existing.status}); the command was not started again"
        )
        return False
    return True


def _warn_if_unrecorded(recorder: Recorder, result: CommandResult) -> None:
    """Print a warning if the ledger does not contain the final status of the command."""
    record = recorder.record
    if record.status is result.status and recorder.recorded:
        return
    ended = f"the command ended as {result.status} (exit status {result.exit_status})"
    if recorder.recorded:
        render.print_note(
            f"{ended}, but task {record.task_id} had already ended as {record.status}"
        )
        return
    reason = recorder.failure or "the store did not answer"
    render.print_note(
        f"NOT RECORDED: {ended}, but task {record.task_id} is still {record.status}: {reason}"
    )


def _open_id_file(path: Path | None) -> TextIO | None:
    """Return the open file for the task id, or ``None`` if ``path`` is ``None``.

    The file is opened before the task is recorded: if the file cannot be opened, no task is
    recorded.
    """
    if path is None:
        return None
    try:
        return path.open("w", encoding="ascii")
    except OSError as error:
        raise UsageError(f"--id-file {path}: {error.strerror}") from None


def _as_utf8(word: str) -> str:
    """Return a command-line word as UTF-8 text; bytes that are not UTF-8 are replaced."""
    return os.fsencode(word).decode(errors="replace")


def _signal_name(number: int) -> str:
    """Return the name of a signal, or the number of a signal without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Recorder:
    """Records the progress and the final status of one task in a separate thread.

    ``record`` is the newest record that was stored.  ``progress`` and ``add_metadata`` return
    at once and never wait for the store.  If a store error prevents a change, the next call
    also stores that change.  ``failure`` is the error of the newest attempt, or ``None`` if
    that attempt succeeded.  ``recorded`` is true if the final status was recorded.
    """

    def __init__(self, store: TaskRegistryStore, record: TaskRecord) -> None:
        self.record = record
        self.failure: Exception | None = None
        self.recorded = False
        self._store = store
        self._known: TaskRecord | None = record
        self._line: str | None = None
        self._metadata: dict[str, Any] = {}
        self._end_fields: dict[str, Any] = {}
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run_thread, daemon=True)
        self._thread.start()

    def progress(self, line: str) -> None:
        """Pass the newest line of the command's output to the recording thread."""
        if line != self._line:
            self._line = line
            self._wake.set()

    def add_metadata(self, **metadata: Any) -> None:
        """Pass metadata to the recording thread, which merges the metadata into the record."""
        self._metadata = self._metadata | metadata
        self._wake.set()

    def finish(self, status: str, exit_status: int, error: str | None = None) -> bool:
        """Record the final status; return false if the store did not answer in time."""
        self._end_fields = {"status": status, "error": error, "ended_at": self._store.clock()}
        self.add_metadata(exit_status=exit_status)
        self._ending.set()
        self._thread.join(STORE_TIMEOUT_S)
        return not self._thread.is_alive()

    def _run_thread(self) -> None:
        while self._wake.wait() and not self._ending.is_set():
            self._wake.clear()
            self._attempt(self._with_progress)
            self._ending.wait(PROGRESS_INTERVAL_S)
        deadline = time.monotonic() + RETRY_TIMEOUT_S
        while not (recorded := self._attempt(self._with_end)) and time.monotonic() < deadline:
            if not isinstance(self.failure, TaskStoreError) or not (
                self.failure.retryable or isinstance(self.failure, OutcomeUnknownError)
            ):
                break
            time.sleep(RETRY_INTERVAL_S)
        self.recorded = recorded

    def _attempt(self, mutation: lifecycle.Mutation) -> bool:
        """Try to store a change of the record; return whether the attempt succeeded.

        After a failure, the next attempt reads the record first, because the failed
        change was possibly committed.
        """
        known, self._known = self._known, None
        try:
            self.record = change.change(self._store, self.record.task_id, mutation, known=known)
        except Exception as error:  # noqa: BLE001 (no store error may stop the command)
            self.failure = error
            return False
        self._known = self.record
        self.failure = None
        return True

    def _with_progress(self, record: TaskRecord, now: int) -> TaskRecord:
        """Return the record with the newest metadata; if the task is active, also with the
        newest progress."""
        line, metadata = self._line, self._metadata
        if line is not None and not record.is_terminal:
            record = lifecycle.progress(line)(record, now)
        return lifecycle.merge_metadata(metadata)(record, now) if metadata else record

    def _with_end(self, record: TaskRecord, now: int) -> TaskRecord:
        """Return the record with its final status.  If another writer has recorded a final
        status other than ``lost``, that status does not change."""
        record = self._with_progress(record, now)
        if record.status is TaskStatus.LOST:
            return lifecycle.recover(summary=self._line, **self._end_fields)(record, now)
        if record.is_terminal:
            return record
        return lifecycle.finish(summary=self._line, **self._end_fields)(record, now)
