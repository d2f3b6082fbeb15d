"""Recording a command while it runs, without ever holding it up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from taskstore import lifecycle
from taskstore.cli import ledger
from taskstore.errors import OutcomeUnknownError, TaskStoreError
from taskstore.records import TaskRecord, TaskStatus
from taskstore.store import TaskRegistryStore

INTERVAL_S = 1.0
"""The least time between two progress events."""

RETRY_S = 0.2
"""How long to wait before the end of a task is tried again."""


class Recorder:
    """Writes what becomes of one task from a thread of its own.

    ``record`` is the task as created.  ``progress`` and ``note`` only leave
    word and return at once; the store may be as slow as it likes.  A store
    that fails is tried again at the next event; ``failure`` is the last
    error, ``None`` after a success.  ``recorded`` tells whether the end was.
    """

    def __init__(
        self, store: TaskRegistryStore, record: TaskRecord, on_recorded: Callable[[], object]
    ) -> None:
        self.record = record
        self.failure: Exception | None = None
        self.recorded = False
        self._store = store
        self._on_recorded = on_recorded
        self._known: TaskRecord | None = record
        self._changed = threading.Condition()
        self._line: str | None = None
        self._metadata: dict[str, Any] = {}
        self._dirty = False
        self._end: dict[str, Any] | None = None
        self._give_up_at = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def progress(self, line: str) -> None:
        """Leave word of a new last line."""
        with self._changed:
            if line != self._line:
                self._line = line
                self._dirty = True
                self._changed.notify()

    def note(self, **metadata: Any) -> None:
        """Leave word of something for the metadata."""
        with self._changed:
            self._metadata |= metadata
            self._dirty = True
            self._changed.notify()

    def finish(
        self, status: str, *, error: str | None, exit_status: int, patience_s: float
    ) -> None:
        """Leave word of the end; ``on_recorded`` is called when it was recorded or given up."""
        ended_at = self._store.clock()
        with self._changed:
            self._metadata["exit_status"] = exit_status
            self._end = {"status": status, "error": error, "ended_at": ended_at}
            self._give_up_at = time.monotonic() + patience_s
            self._changed.notify()

    def _work(self) -> None:
        while self._wait_for_word():
            self._attempt(self._progressed)
            self._rest()
        while not (done := self._attempt(self._ended)) and time.monotonic() < self._give_up_at:
            if not isinstance(self.failure, TaskStoreError) or not self.failure.retryable:
                break
            time.sleep(RETRY_S)
        self.recorded = done
        self._on_recorded()

    def _wait_for_word(self) -> bool:
        """Wait until there is something to record; false when it is the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._dirty or self._end is not None)
            self._dirty = False
            return self._end is None

    def _rest(self) -> None:
        """Let the interval pass, unless the end comes first."""
        with self._changed:
            self._changed.wait_for(lambda: self._end is not None, INTERVAL_S)

    def _attempt(self, mutation: lifecycle.Mutation) -> bool:
        """Store a change of the record; returns whether the ledger has it."""
        known, self._known = self._known, None
        try:
            try:
                self.record = ledger.change(self._store, self.record.task_id, mutation, known=known)
            except OutcomeUnknownError:
                # Look what became of it, and do what is left to do.
                self.record = ledger.change(self._store, self.record.task_id, mutation)
        except Exception as error:  # noqa: BLE001 (whatever a store raises, the command goes on)
            self.failure = error
            return False
        self._known = self.record
        self.failure = None
        return True

    def _progressed(self, record: TaskRecord, now: int) -> TaskRecord:
        """The record with what is known by now; only metadata once somebody ended it."""
        with self._changed:
            line, metadata = self._line, dict(self._metadata)
        if line is not None and not record.is_terminal:
            record = lifecycle.progress(line)(record, now)
        return lifecycle.merge_metadata(metadata)(record, now) if metadata else record

    def _ended(self, record: TaskRecord, now: int) -> TaskRecord:
        """The record with its end.  Another's end stands, unless it only says that we were lost."""
        assert self._end is not None
        record = self._progressed(record, now)
        if record.status is TaskStatus.LOST:
            return lifecycle.recover(summary=self._line, **self._end)(record, now)
        if record.is_terminal:
            return record
        return lifecycle.finish(summary=self._line, **self._end)(record, now)
