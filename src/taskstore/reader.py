"""Looking records up: answered from memory, whatever the store is doing."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from taskstore.errors import StoreClosedError, ValidationError
from taskstore.journal import Position
from taskstore.mirror import Lookups, Mirror
from taskstore.query import Page, Summary, TaskQuery
from taskstore.records import ACTIVE_STATUSES, KEY_BYTES, TaskRecord
from taskstore.store import TaskRegistryStore, forked
from taskstore.validation import check_key, check_text


class LedgerReader(ABC):
    """The lookups of a registry.  None of them waits for a commit or the store."""

    def __init__(self, store: TaskRegistryStore) -> None:
        self._store = store
        self._mirror = Mirror()
        self._closed = False
        self._opened_by = os.getpid()

    @property
    def store(self) -> TaskRegistryStore:
        """The store underneath."""
        return self._store

    @property
    def seq(self) -> int:
        """The last seq mirrored (``int``, 0 before the first)."""
        return self._mirror.seq

    # -- looking up ---------------------------------------------------------

    def get(self, task_id: str) -> TaskRecord:
        """Return the task with this id; raises :class:`TaskNotFound`."""
        check_key("task_id", task_id)
        with self._reading() as records:
            return records.require(task_id)

    def find(self, token: str) -> TaskRecord | None:
        """Return the task with this id, or else of this run, or else of this session.

        Of a run's or session's tasks the newest active one, or the newest; or ``None``.
        """
        check_text("token", token, KEY_BYTES)
        with self._reading() as records:
            return records.find(token)

    def find_by_run(self, run_id: str) -> TaskRecord | None:
        """Return the run's newest active task, or its newest, or ``None``."""
        check_text("run_id", run_id, KEY_BYTES)
        with self._reading() as records:
            return records.find_by_run(run_id)

    def list(self, query: TaskQuery | None = None, /, **filters: Any) -> Page:
        """Return the tasks that match, newest first.

        Takes a :class:`TaskQuery` or its arguments: record field names,
        ``since``, ``limit`` (default: no limit) and ``after`` (a cursor).
        Raises :class:`ValidationError` for what is not one of them.
        """
        if query is None:
            query = TaskQuery(**filters)
        elif filters:
            raise ValidationError(next(iter(filters)), "give a query or filters, not both")
        elif not isinstance(query, TaskQuery):
            raise ValidationError("query", f"must be a TaskQuery, not {type(query).__name__}")
        with self._reading() as records:
            return records.page(query, self._mirror.seq)

    def active(self) -> Page:
        """Return the tasks that have not ended, newest first."""
        return self.list(status=ACTIVE_STATUSES)

    def children(self, task_id: str) -> Page:
        """Return the tasks whose ``parent_task_id`` is this id, newest first."""
        return self.list(parent_task_id=check_key("task_id", task_id))

    def summary(self) -> Summary:
        """Return how many tasks there are, by status and by runtime."""
        with self._reading() as records:
            return records.summary()

    def _cursor(self, after: int | str) -> int | str | Position:
        """The same cursor, with the history to it where it is the seq that memory is at."""
        position = self._mirror.position
        return position if type(after) is int and after == position.seq else after

    @abstractmethod
    def _records(self) -> Lookups:
        """What the calling thread sees: the mirror, or its batch laid over it."""

    @contextmanager
    def _reading(self) -> Iterator[Lookups]:
        """Keep what the calling thread sees as it is while it looks something up."""
        self._check_open()
        with self._mirror.lock:
            yield self._records()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError(f"the registry over {self._store.location} is closed")
        if self._opened_by != os.getpid():
            raise forked(f"the registry over {self._store.location}")
