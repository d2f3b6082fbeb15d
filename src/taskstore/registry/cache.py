"""The record cache, its lookups, its replication, and the staging of changes.

:class:`Lookups` is the only interface by which the registry looks records up.  :class:`RecordCache`
answers lookups from indexes over committed records.  :class:`Staging` answers lookups as if
uncommitted changes were already applied to another ``Lookups`` object, its base.
:class:`ReplicatedCache` follows the journal of one store.
"""

from __future__ import annotations

import gc
import heapq
import logging
import os
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import attrgetter
from typing import Any

from taskstore.errors import Conflict, ConflictError, CursorExpiredError, TaskNotFound
from taskstore.model.journal import (
    Change,
    Commit,
    JournalEntry,
    Position,
    Put,
    Remove,
    Snapshot,
    dedup_key,
    entries_of,
    unchecked_put,
)
from taskstore.model.query import SESSION_KEY, Page, Summary, TaskQuery, page_of
from taskstore.model.records import ACTIVE_STATUSES, MAX_INT, DedupKey, TaskRecord
from taskstore.model.validation import check_int
from taskstore.registry.hooks import Deleted, Event, Hooks, Restored, Upserted
from taskstore.registry.indexes import INDEXED, Indexes, Key
from taskstore.store.interface import (
    SupportsJournal,
    TaskRegistryStore,
    commit_id_at,
    entries_after_position,
)

logger = logging.getLogger("taskstore")

PAGE_ENTRIES = 1000
"""The number of journal entries that are read and applied at a time.  A commit with more entries
becomes visible in parts: a lookup waits at most while one part is applied."""


class Lookups(ABC):
    """The lookups of records: four abstract methods, and methods that call the abstract methods."""

    __slots__ = ()

    @abstractmethod
    def get(self, task_id: str) -> TaskRecord | None:
        """Return the record of a task id; ``None`` if there is no such task."""

    @abstractmethod
    def select(self, query: TaskQuery) -> Iterator[TaskRecord]:
        """Yield the records after the query's cursor that match the query, newest first, without a
        limit."""

    @abstractmethod
    def by_dedup_key(self, key: DedupKey) -> TaskRecord | None:
        """Return the task with this dedup key; ``None`` if no task has the key."""

    @abstractmethod
    def summary(self) -> Summary:
        """Return the number of records, by status and by runtime."""

    def require(self, task_id: str) -> TaskRecord:
        """Return the record of a task id; raise :class:`TaskNotFound` if there is no such task."""
        record = self.get(task_id)
        if record is None:
            raise TaskNotFound(task_id)
        return record

    def find_by_run(self, run_id: str) -> TaskRecord | None:
        """Return the newest active task of a run, else the run's newest task, else ``None``."""
        return self._newest_preferring_active(run_id=run_id)

    def find(self, reference: str) -> TaskRecord | None:
        """Return the task with the id ``reference``, else a task with this run id or session, else
        ``None``."""
        return (
            self.get(reference)
            or self._newest_preferring_active(run_id=reference)
            or self._newest_preferring_active(**{SESSION_KEY: reference})
        )

    def page(self, query: TaskQuery, seq: int) -> Page:
        """Return one page of the records that match the query; ``seq`` becomes the page's seq."""
        return page_of(self.select(query), query, seq)

    def run_scope(
        self, run_id: str, runtime: str | None, session_key: str | None
    ) -> list[TaskRecord]:
        """Return the tasks of a run, oldest first; an empty list if the run is ambiguous.

        A run is ambiguous if its tasks differ in their runtime, scope kind, owner
        or child session.
        """
        filters: dict[str, Any] = {"run_id": run_id}
        if runtime is not None:
            filters["runtime"] = runtime
        if session_key is not None:
            filters["child_session_key"] = session_key
        records = list(self.select(TaskQuery(**filters)))
        scopes = {(r.runtime, r.scope_kind, r.owner_key, r.child_session_key) for r in records}
        return records[::-1] if len(scopes) == 1 else []

    def _newest_preferring_active(self, **filters: Any) -> TaskRecord | None:
        active = next(self.select(TaskQuery(status=ACTIVE_STATUSES, **filters)), None)
        return active or next(self.select(TaskQuery(**filters)), None)


class RecordCache(Lookups):
    """The committed records as of the last applied journal entry.

    ``position`` is the position of the last applied entry.  If an interrupt leaves the indexes
    incomplete, ``interrupted`` is true until the next load.  A thread that changes the cache must
    hold the registry's commit lock; a thread that uses the indexes must hold the ``lock`` of the
    cache.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.position = Position(0)
        self.interrupted = False
        self._indexes = Indexes()

    @property
    def seq(self) -> int:
        """The seq of the last applied entry (``int``, 0 before the first entry)."""
        return self.position.seq

    @property
    def records(self) -> Mapping[str, TaskRecord]:
        """A mapping from task id to record, for all records."""
        return self._indexes.records

    def reset(self, snapshot: Snapshot, commit_id: str = "") -> None:
        """Replace all records with the records of a snapshot; ``commit_id`` is the id of
        the commit at the snapshot's seq (empty if unknown).

        Lookups see the old records until the new records are indexed.  The method holds ``lock``
        only for the exchange of the indexes, so lookups do not wait for the indexing.
        """
        indexes = Indexes(snapshot.records)
        with self.lock:
            self._indexes, old = indexes, self._indexes
            self.position = Position(snapshot.seq, commit_id)
            self.interrupted = False
        if old.records:
            old.clear()

    def get(self, task_id: str) -> TaskRecord | None:
        """Return the record of a task id; ``None`` if there is no such task."""
        return self._indexes.records.get(task_id)

    def by_dedup_key(self, key: DedupKey) -> TaskRecord | None:
        """Return the task with this dedup key; ``None`` if no task has the key."""
        indexes = self._indexes
        task_id = indexes.by_dedup_key.get("\0".join(key))
        return None if task_id is None else indexes.records[task_id]

    def summary(self) -> Summary:
        """Return the number of records, by status and by runtime, from the indexes alone."""
        indexes = self._indexes
        return Summary(
            total=len(indexes.records),
            by_status=indexes.counts("status"),
            by_runtime=indexes.counts("runtime"),
            seq=self.seq,
        )

    def select(self, query: TaskQuery) -> Iterator[TaskRecord]:
        """Yield the matching records, newest first.  To find them, read the smallest index that
        contains all of them."""
        last: Key | None = None
        for key in self._candidates(query):
            if query.since is not None and key[0] < query.since:
                return
            # A record whose two session keys both match is in two of the merged indexes.
            if key != last:
                last = key
                record = self._indexes.records[key[1]]
                if query.matches(record):
                    yield record

    def _candidates(self, query: TaskQuery) -> Iterator[Key]:
        """Return the sort keys, newest first, of the records after the cursor that possibly
        match."""
        best: list[Sequence[Key]] = [self._indexes.keys]
        for field, wanted in query.where.items():
            lists = self._index_lists(field, wanted)
            if lists is not None and sum(map(len, lists)) < sum(map(len, best)):
                best = lists
        cursor = query.cursor
        before = [
            _backwards(keys, len(keys) if cursor is None else bisect_left(keys, cursor))
            for keys in best
        ]
        return before[0] if len(before) == 1 else heapq.merge(*before, reverse=True)

    def _index_lists(self, field: str, wanted: Iterable[object]) -> list[Sequence[Key]] | None:
        """Return lists with the sort keys of all records that have one of the wanted values.
        Return ``None`` if the field is not indexed, or if ``None`` is one of the wanted values."""
        if field == SESSION_KEY:
            fields: tuple[str, ...] = ("child_session_key", "requester_session_key")
        elif field in INDEXED:
            fields = (field,)
        else:
            return None
        if None in wanted:
            return None
        return [self._indexes.keys_of(name, value) for name in fields for value in wanted]


class ReplicatedCache(RecordCache):
    """The record cache of one store: it applies local commits and the commits of other writers.

    The caller of a method that changes the cache must hold the commit lock.  Events are queued in
    the order of the journal, and delivered after the commit lock is released.  If ``stale`` is
    true, the cache can differ from the store in an unknown way, and the next commit or refresh
    loads all records anew.
    """

    def __init__(self, store: TaskRegistryStore, hooks: Hooks) -> None:
        super().__init__()
        self._store = store
        self._hooks = hooks
        self.stale = True  # nothing is loaded yet

    def load(self) -> None:
        """Load all records from the store, and queue the event :class:`Restored`."""
        store, head, commit_id = self._store, 0, ""
        # The commit id is read before the records.  If another history replaces the journal between
        # these two reads, the next read of the journal detects the replacement.
        if isinstance(store, SupportsJournal):
            head = store.head()
            commit_id = commit_id_at(store, head)
        with gc_paused():
            snapshot = store.load_snapshot()
            if isinstance(store, SupportsJournal) and snapshot.seq != head:  # a new commit exists
                commit_id = commit_id_at(store, snapshot.seq)
            self.reset(snapshot, commit_id)
        self.stale = False
        self._hooks.enqueue([Restored(snapshot.seq, len(snapshot.records), snapshot.records)])

    def refresh(self) -> None:
        """Apply the commits of other writers to the cache."""
        if self.stale or not isinstance(self._store, SupportsJournal):
            self.load()
        else:
            self._catch_up_journal(self._store)

    def catch_up(self, *, reload: bool = False) -> bool:
        """Bring the cache up to date with the store; return whether the cache was outdated
        before."""
        if isinstance(self._store, SupportsJournal):
            return self._catch_up_journal(self._store)
        if reload:
            # A store without a journal has only one writer.  With such a store, the cache
            # can be outdated only after a commit with an unknown outcome.
            before = self.seq
            self.load()
            return before != self.seq
        return False

    def apply_remote(self, journal: SupportsJournal, end: int | None = None) -> set[str]:
        """Apply the journal entries after ``position``, up to seq ``end`` if given.

        Returns the ids of the changed tasks.  Raises :class:`CursorExpiredError` if another
        history has replaced the journal, or if entries after ``position`` were trimmed.
        """
        changed = set[str]()
        with gc_paused():
            while end is None or self.position.seq < end:
                limit = PAGE_ENTRIES
                if end is not None:
                    limit = min(limit, end - self.position.seq)
                page = entries_after_position(journal, self.position, limit)
                entries = page if len(page) < PAGE_ENTRIES else _whole_commits(page)
                for _, commit in groupby(entries, attrgetter("commit_id")):
                    self._apply_entries(commit, local=False)
                changed.update(entry.task_id for entry in entries)
                if len(page) < limit:
                    break
        return changed

    def apply_local(self, commit: Commit, changes: Sequence[Change]) -> None:
        """Apply a local commit to the cache, after all earlier commits of other writers."""
        if commit.first_seq != self.position.seq + 1 and self._catch_up_before(commit):
            return
        entries = entries_of(changes, commit)
        for start in range(0, len(entries), PAGE_ENTRIES):
            self._apply_entries(entries[start : start + PAGE_ENTRIES], local=True)

    def _catch_up_before(self, commit: Commit) -> bool:
        """Apply the commits before the local commit; return whether the local commit was applied
        too."""
        before = commit.first_seq - 1
        try:
            if isinstance(self._store, SupportsJournal) and self.position.seq < before:
                with suppress(CursorExpiredError):
                    self.apply_remote(self._store, before)
            if self.position.seq != before:
                self.load()
        except Exception:
            # The local change is committed: this error must not look like a failed commit.
            logger.exception("cannot read the commits before seq %d", commit.first_seq)
            self.stale = True
        # If the load fails, ``apply_local`` applies at least the local commit.
        return self.position.seq != before and not self.stale

    def _catch_up_journal(self, store: SupportsJournal) -> bool:
        """Apply all new journal entries; returns whether there were new entries.

        If the journal does not contain ``position``, all records are loaded anew, because entries
        of another history must not be applied to the current records.
        """
        try:
            return bool(self.apply_remote(store))
        except CursorExpiredError:
            self.load()
            return True

    def _apply_entries(self, entries: Iterable[JournalEntry], *, local: bool) -> None:
        """Apply entries in one step: a lookup sees all or none of the entries.  Then queue the
        events of the entries."""
        events: list[Event] = []
        with self.lock:
            for entry in entries:
                seq, at, task_id, record = entry.seq, entry.at, entry.task_id, entry.record
                if record is not None:
                    previous = self._indexes.put(record)
                    events.append(Upserted(seq, at, record, previous, local))
                else:
                    previous = self._indexes.remove(task_id)
                    if entry.quarantined is None:  # a quarantined record causes no event
                        events.append(Deleted(seq, at, task_id, previous, local))
                self.position = Position(seq, entry.commit_id)
        # If the cache is stale, the next load queues :class:`Restored` instead of these events.
        if self._hooks.registered and not self.stale:
            self._hooks.enqueue(events)


class Staging(Lookups):
    """The lookups of ``base`` with uncommitted (staged) changes applied.

    ``changes`` lists the staged changes for the store, in order.  ``unverified`` is true after an
    operation that left a record unchanged.  For this record the store checks no revision, so the
    store cannot detect that the cache is outdated.
    """

    __slots__ = ("_base", "_by_dedup_key", "_overlay", "changes", "unverified")

    def __init__(self, base: Lookups) -> None:
        self._base = base
        self._overlay: dict[str, TaskRecord | None] = {}
        self._by_dedup_key: dict[DedupKey, str] = {}
        self.changes: list[Change] = []
        self.unverified = False

    def get(self, task_id: str) -> TaskRecord | None:
        """Return the task's record with the staged changes applied; ``None`` if there is no
        record."""
        overlay = self._overlay
        return overlay[task_id] if task_id in overlay else self._base.get(task_id)

    def by_dedup_key(self, key: DedupKey) -> TaskRecord | None:
        """Return the task with this dedup key, with the staged changes applied, or ``None``."""
        task_id = self._by_dedup_key.get(key)
        if task_id is not None:
            return self.get(task_id)
        record = self._base.by_dedup_key(key)
        return record if record is None else self.get(record.task_id)

    def select(self, query: TaskQuery) -> Iterator[TaskRecord]:
        """Yield the matching records, newest first; the staged changes are applied before the
        match."""
        if not self._overlay:
            return self._base.select(query)
        overlay, cursor = self._overlay, query.cursor
        staged = sorted(
            (
                record
                for record in overlay.values()
                if record is not None
                and query.matches(record)
                and (cursor is None or record.sort_key < cursor)
            ),
            key=lambda record: record.sort_key,
            reverse=True,
        )
        base = (record for record in self._base.select(query) if record.task_id not in overlay)
        return heapq.merge(base, staged, key=lambda record: record.sort_key, reverse=True)

    def summary(self) -> Summary:
        """Return the number of records, by status and by runtime, with the staged changes
        applied."""
        base = self._base.summary()
        statuses, runtimes = Counter(base.by_status), Counter(base.by_runtime)
        for task_id, after in self._overlay.items():
            for record, step in ((self._base.get(task_id), -1), (after, 1)):
                if record is not None:
                    statuses[str(record.status)] += step
                    runtimes[record.runtime] += step
        return Summary.from_counts(+statuses, +runtimes, base.seq)

    def create(self, record: TaskRecord, key: DedupKey | None) -> TaskRecord:
        """Stage a new task and its dedup key; raise :class:`ConflictError` if the id exists."""
        overlay = self._overlay
        task_id = record.task_id
        existing = overlay[task_id] if task_id in overlay else self._base.get(task_id)
        if existing is not None:
            raise ConflictError([Conflict(record.task_id, 0, existing.revision)])
        if key is not None:
            self._by_dedup_key[key] = record.task_id
        self.changes.append(unchecked_put(record))
        self._overlay[record.task_id] = record
        return record

    def update(self, before: TaskRecord, after: TaskRecord) -> TaskRecord:
        """Stage the next revision, ``after``, of the record ``before``; if ``after is before``,
        stage nothing."""
        if after is before:
            self.unverified = True
            return before
        if after.revision > MAX_INT:
            check_int("revision", after.revision)
        self.changes.append(unchecked_put(after))
        self._overlay[after.task_id] = after
        return after

    def creates(self, task_id: str) -> bool:
        """Return whether this task exists only in the staged changes."""
        return task_id in self._overlay and self._base.get(task_id) is None

    def delete(self, record: TaskRecord) -> None:
        """Stage the deletion of a task."""
        self.changes.append(Remove(record.task_id, record.revision + 1))
        self._overlay[record.task_id] = None

    def rollback(self, savepoint: int) -> None:
        """Keep the first ``savepoint`` staged changes, and discard all later staged changes."""
        kept = self.changes[:savepoint]
        self._overlay, self._by_dedup_key, self.changes = {}, {}, []
        self._append(kept)

    def merge(self, inner: Staging) -> None:
        """Append the staged changes of ``inner``, a staging whose base is this object."""
        self._append(inner.changes)

    def _append(self, changes: Sequence[Change]) -> None:
        for change in changes:
            record = change.record if isinstance(change, Put) else None
            self._overlay[change.task_id] = record
            key = None if record is None or record.revision > 1 else dedup_key(record)
            if key is not None:
                self._by_dedup_key[key] = change.task_id
        self.changes += changes


def _backwards(keys: Sequence[Key], end: int) -> Iterator[Key]:
    """Return the keys before index ``end``, in reverse order."""
    return map(keys.__getitem__, range(end - 1, -1, -1))


def _whole_commits(page: Sequence[JournalEntry]) -> Sequence[JournalEntry]:
    """Return a page without the entries of its last commit, because this commit can be incomplete.
    If the page contains only one commit, return the whole page."""
    last = page[-1].commit_id
    end = next((n for n in range(len(page), 0, -1) if page[n - 1].commit_id != last), 0)
    return page[:end] or page


_pause_lock = threading.Lock()
_gc_disabled = False


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause Python's garbage collector in the body of a ``with`` that creates many records.

    Records cannot form cycles, and each full collection blocks every thread.  A pause that begins
    during another pause has no effect.  Only the first pause disables the collector; at the end of
    the first pause, the collector is enabled again.
    """
    global _gc_disabled  # noqa: PLW0603 - there is one collector per process
    first = _pause_lock.acquire(blocking=False)
    try:
        if first and gc.isenabled():
            _gc_disabled = True
            gc.disable()
        yield
    finally:
        if first:
            if _gc_disabled:
                gc.enable()
                _gc_disabled = False
            _pause_lock.release()


def end_gc_pause_after_fork() -> None:
    """End a gc pause in a forked child; the thread that began the pause exists only in the
    parent."""
    global _pause_lock, _gc_disabled  # noqa: PLW0603
    _pause_lock = threading.Lock()
    if _gc_disabled:
        gc.enable()
        _gc_disabled = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=end_gc_pause_after_fork)
