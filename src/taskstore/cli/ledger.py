"""The ledger as single commands use it: one question or one change, nothing loaded.

A command asks or changes a handful of records and ends; a
:class:`~taskstore.TaskRegistry`, which mirrors the whole ledger first, would
make that cost as much as the ledger is large.  The rules of a task's life
are the same pure functions that the registry uses, and the store's
compare-and-set is what makes them hold against other writers.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from taskstore.backends import open_store
from taskstore.errors import ConflictError, TaskNotFound
from taskstore.journal import Put, Remove
from taskstore.lifecycle import Mutation
from taskstore.query import SESSION_KEY, Page, Summary, TaskQuery, evaluate
from taskstore.records import ACTIVE_STATUSES, TaskRecord
from taskstore.store import SupportsQuery, TaskRegistryStore
from taskstore.stores.retry import Backoff

_T = TypeVar("_T")

ATTEMPTS = 20
"""How often a change is tried while other writers are faster."""

PAGE_RECORDS = 1000
"""How many records are read at a time where all of them count."""


def open_reader(url: str) -> TaskRegistryStore:
    """Open a ledger to read it; nothing is created or changed."""
    return open_store(url, read_only=True, migrate="never")


def open_existing(url: str) -> TaskRegistryStore:
    """Open a ledger to change it; a mistyped URL creates nothing."""
    open_reader(url).close()
    return open_store(url, migrate="never")


def ask(store: TaskRegistryStore, query: TaskQuery) -> Page:
    """Answer a query: by the store itself, or over its snapshot where it cannot."""
    if isinstance(store, SupportsQuery):
        return store.query(query)
    snapshot = store.load_snapshot()
    return evaluate(query, snapshot.records.values(), snapshot.seq)


def get(store: TaskRegistryStore, task_id: str) -> TaskRecord:
    """Return one record; raises :class:`~taskstore.TaskNotFound`."""
    page = ask(store, TaskQuery(task_id=task_id, limit=1))
    if not page:
        raise TaskNotFound(task_id)
    return page[0]


class Found(NamedTuple):
    """What a token names: a record, the field that it matched, and whether others match too."""

    record: TaskRecord
    field: str
    others: bool

    def listing(self, token: str) -> str:
        """The command that lists all that the token names."""
        option = "--run" if self.field == "run_id" else "--session"
        return f"taskstore list {option} {shlex.quote(token)}"


def find(store: TaskRegistryStore, token: str) -> Found:
    """Return the task with this id, or else of this run, or else of this session.

    Of a run's or session's tasks the newest active one, or the newest.
    Raises :class:`~taskstore.TaskNotFound`.
    """
    for field in ("task_id", "run_id", SESSION_KEY):
        named: dict[str, Any] = {field: token}
        newest = ask(store, TaskQuery(**named, limit=2))
        if not newest:
            continue
        if len(newest) == 1:
            return Found(newest[0], field, others=False)
        active = ask(store, TaskQuery(**named, status=ACTIVE_STATUSES, limit=1))
        return Found((active or newest)[0], field, others=True)
    raise TaskNotFound(token)


def change(
    store: TaskRegistryStore,
    task_id: str,
    mutation: Mutation,
    *,
    known: TaskRecord | None = None,
) -> TaskRecord:
    """Run a pure function over one record and store what comes out.

    ``known`` is the record as last seen: with it nothing is read first.
    When another writer was faster the function runs again on the fresh record.
    """

    def attempt() -> TaskRecord:
        nonlocal known
        record, known = known or get(store, task_id), None
        after = mutation(record, store.clock())
        if after is not record:
            # One revision, however many steps of the lifecycle the function takes.
            after = replace(after, revision=record.revision + 1)
            store.apply([Put(after)])
        return after

    return _until_no_conflict(attempt)


def remove(store: TaskRegistryStore, task_id: str) -> None:
    """Delete the record of a task, whatever revision it has come to."""
    _until_no_conflict(lambda: store.apply([Remove(task_id, get(store, task_id).revision + 1)]))


def _until_no_conflict(attempt: Callable[[], _T]) -> _T:
    """Do it again while other writers are faster, after a few milliseconds."""
    backoff = Backoff(0.002, 0.05)
    for _ in range(1, ATTEMPTS):
        with suppress(ConflictError):
            return attempt()
        backoff.sleep()
    return attempt()


def count(store: TaskRegistryStore) -> Summary:
    """Count the tasks by status and runtime, a page at a time.

    Tasks created while counting are not counted; ``seq`` is where it began.
    """
    statuses, runtimes = Counter[str](), Counter[str]()
    page = ask(store, TaskQuery(limit=PAGE_RECORDS))
    seq = page.seq
    while True:
        statuses.update(str(record.status) for record in page)
        runtimes.update(record.runtime for record in page)
        if page.next_cursor is None:
            return Summary.of(statuses, runtimes, seq)
        page = ask(store, TaskQuery(limit=PAGE_RECORDS, after=page.next_cursor))
