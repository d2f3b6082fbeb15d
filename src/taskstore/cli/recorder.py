"""Recording a command while it runs, without ever holding it up."""

from __future__ import annotations

import threading
import time
from typing import Any

from taskstore import lifecycle
from taskstore.cli import ledger
from taskstore.errors import OutcomeUnknownError, TaskStoreError
from taskstore.records import TaskRecord, TaskStatus
from taskstore.store import TaskRegistryStore

INTERVAL_S = 1.0
"""The least time between two progress events."""

PATIENCE_S = 5.0
"""For how long recording the end is tried again when the store refuses it."""

RETRY_S = 0.2
"""How long to wait before the end of a task is tried again."""

HANG_S = 45.0
"""How long a store may take for the end without an answer; ours give up a lock after 30 s."""


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
            self.record = ledger.change(self._store, self.record.task_id, mutation, known=known)
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
