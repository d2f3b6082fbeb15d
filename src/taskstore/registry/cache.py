"""The records in memory, how they are found, and how they are kept like the store.

:class:`Lookups` is the one interface through which the registry looks
records up.  :class:`RecordCache` answers from indexes over what is committed,
:class:`Staging` from the same with uncommitted changes laid over it.
:class:`ReplicatedCache` is the mirror of one store.
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
"""How many journal entries are read at a time.  A commit of no more becomes visible as a
whole; lookups would wait too long for one of very many."""


class Lookups(ABC):
    """Finding records: everything follows from four questions."""

    __slots__ = ()

    @abstractmethod
    def get(self, task_id: str) -> TaskRecord | None:
        """Return the record of an id, or ``None``."""

    @abstractmethod
    def select(self, query: TaskQuery) -> Iterator[TaskRecord]:
        """Yield what matches, newest first, after the query's cursor; its limit is not applied."""

    @abstractmethod
    def by_dedup_key(self, key: DedupKey) -> TaskRecord | None:
        """Return the task that has a dedup key, or ``None``."""

    @abstractmethod
    def summary(self) -> Summary:
        """Count the records."""

    def require(self, task_id: str) -> TaskRecord:
        """Return the record of an id; raises :class:`TaskNotFound`."""
        record = self.get(task_id)
        if record is None:
            raise TaskNotFound(task_id)
        return record

    def find_by_run(self, run_id: str) -> TaskRecord | None:
        """Return the run's newest active task, or its newest, or ``None``."""
        return self._preferred(run_id=run_id)

    def find(self, token: str) -> TaskRecord | None:
        """Return the task with this id, or of this run, or of this session, or ``None``."""
        return (
            self.get(token)
            or self._preferred(run_id=token)
            or self._preferred(**{SESSION_KEY: token})
        )

    def page(self, query: TaskQuery, seq: int) -> Page:
        """Return one page of what matches."""
        return page_of(self.select(query), query, seq)

    def run_scope(
        self, run_id: str, runtime: str | None, session_key: str | None
    ) -> list[TaskRecord]:
        """Return the tasks of a run, oldest first; none when the run is ambiguous.

        A run is ambiguous when its tasks belong to more than one (runtime,
        scope kind, owner, child session).
        """
        filters: dict[str, Any] = {"run_id": run_id}
        if runtime is not None:
            filters["runtime"] = runtime
        if session_key is not None:
            filters["child_session_key"] = session_key
        records = list(self.select(TaskQuery(**filters)))
        scopes = {(r.runtime, r.scope_kind, r.owner_key, r.child_session_key) for r in records}
        return records[::-1] if len(scopes) == 1 else []

    def _preferred(self, **filters: Any) -> TaskRecord | None:
        active = next(self.select(TaskQuery(status=ACTIVE_STATUSES, **filters)), None)
        return active or next(self.select(TaskQuery(**filters)), None)


class RecordCache(Lookups):
    """What is committed, as far as this process has seen it.

    ``position`` is that of the last entry mirrored; ``interrupted`` tells that
    an interrupt may have left it half-way, until it is loaded anew.  Writers hold the registry's
    commit lock; ``lock`` is held while the indexes change or are read.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.position = Position(0)
        self.interrupted = False
        self._indexes = Indexes()

    @property
    def seq(self) -> int:
        """The last seq mirrored (``int``, 0 before the first)."""
        return self.position.seq

    @property
    def records(self) -> Mapping[str, TaskRecord]:
        """All records by id."""
        return self._indexes.records

    def reset(self, snapshot: Snapshot, commit_id: str = "") -> None:
        """Start over from a snapshot, whose last commit is ``commit_id`` as far as it is known.

        The lock is held for a moment only: lookups see what was there before
        until everything is indexed.
        """
        indexes = Indexes(snapshot.records)
        with self.lock:
            self._indexes, before = indexes, self._indexes
            self.position = Position(snapshot.seq, commit_id)
            self.interrupted = False
        if before.records:
            before.dismantle()

    def get(self, task_id: str) -> TaskRecord | None:
        """Return the record of an id, or ``None``."""
        return self._indexes.records.get(task_id)

    def by_dedup_key(self, key: DedupKey) -> TaskRecord | None:
        """Return the task that has a dedup key, or ``None``."""
        indexes = self._indexes
        task_id = indexes.by_dedup_key.get("\0".join(key))
        return None if task_id is None else indexes.records[task_id]

    def summary(self) -> Summary:
        """Count the records, without looking at them."""
        indexes = self._indexes
        return Summary(
            total=len(indexes.records),
            by_status=indexes.sizes("status"),
            by_runtime=indexes.sizes("runtime"),
            seq=self.seq,
        )

    def select(self, query: TaskQuery) -> Iterator[TaskRecord]:
        """Yield what matches, newest first, from the smallest index that has it all."""
        last: Key | None = None
        for key in self._candidates(query):
            if query.since is not None and key[0] < query.since:
                return
            # A record of both sessions stands in two merged indexes.
            if key != last:
                last = key
                record = self._indexes.records[key[1]]
                if query.matches(record):
                    yield record

    def _candidates(self, query: TaskQuery) -> Iterator[Key]:
        """The keys that may match, newest first, after the cursor."""
        best: list[Sequence[Key]] = [self._indexes.keys]
        for field, wanted in query.where.items():
            lists = self._indexed(field, wanted)
            if lists is not None and sum(map(len, lists)) < sum(map(len, best)):
                best = lists
        cursor = query.cursor
        before = [
            _descending(keys, len(keys) if cursor is None else bisect_left(keys, cursor))
            for keys in best
        ]
        return before[0] if len(before) == 1 else heapq.merge(*before, reverse=True)

    def _indexed(self, field: str, wanted: Iterable[object]) -> list[Sequence[Key]] | None:
        """The keys of all records with one of these values, where there is an index."""
        if field == SESSION_KEY:
            fields: tuple[str, ...] = ("child_session_key", "requester_session_key")
        elif field in INDEXED:
            fields = (field,)
        else:
            return None
        if None in wanted:
            return None
        return [self._indexes.group(name, value) for name in fields for value in wanted]


class ReplicatedCache(RecordCache):
    """A mirror that is kept like a store: after our commits, after those of others, and anew.

    What brings it forward is called with the commit lock held.  Hooks hear of
    what is mirrored in the order of the journal; they are called later,
    without the lock.  ``stale`` is set when memory may not be what the store
    has, and what it lacks is not known: it is loaded anew before its next use.
    """

    def __init__(self, store: TaskRegistryStore, hooks: Hooks) -> None:
        super().__init__()
        self._store = store
        self._hooks = hooks
        self.stale = True  # nothing is loaded yet

    def load(self) -> None:
        """Start over from the store, and say so to the hooks."""
        store, head, commit_id = self._store, 0, ""
        # Which history it is, is asked first: should another take its place before
        # the records are read, the next look at the journal shows it.
        if isinstance(store, SupportsJournal):
            head = store.head()
            commit_id = commit_id_at(store, head)
        with gc_paused():
            snapshot = store.load_snapshot()
            if isinstance(store, SupportsJournal) and snapshot.seq != head:  # others are committing
                commit_id = commit_id_at(store, snapshot.seq)
            self.reset(snapshot, commit_id)
        self.stale = False
        self._hooks.emit([Restored(snapshot.seq, len(snapshot.records), snapshot.records)])

    def refresh(self) -> None:
        """Bring in what other writers committed."""
        if self.stale or not isinstance(self._store, SupportsJournal):
            self.load()
        else:
            self._catch_up(self._store)

    def behind(self, *, reload: bool = False) -> bool:
        """Catch up with the store; returns whether there was anything to catch up with."""
        if isinstance(self._store, SupportsJournal):
            return self._catch_up(self._store)
        if reload:
            # Without a journal there is one writer, and only a lost outcome
            # explains that memory differs.
            before = self.seq
            self.load()
            return before != self.seq
        return False

    def apply_remote(self, journal: SupportsJournal, end: int | None = None) -> set[str]:
        """Mirror what comes after memory in the journal, up to seq ``end`` if that is given.

        Returns which tasks that concerns.  Raises :class:`CursorExpiredError`
        when the journal is not the one that memory is of, or was trimmed.
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
                    self._take_in(commit, local=False)
                changed.update(entry.task_id for entry in entries)
                if len(page) < limit:
                    break
        return changed

    def publish(self, commit: Commit, changes: Sequence[Change]) -> None:
        """Mirror a commit, and before it what others committed in between."""
        if commit.first_seq != self.position.seq + 1 and self._catch_up_with(commit):
            return
        entries = entries_of(changes, commit)
        for start in range(0, len(entries), PAGE_ENTRIES):
            self._take_in(entries[start : start + PAGE_ENTRIES], local=True)

    def _catch_up_with(self, commit: Commit) -> bool:
        """Mirror what others committed before our commit; whether that brought the commit too."""
        before = commit.first_seq - 1
        try:
            if isinstance(self._store, SupportsJournal) and self.position.seq < before:
                with suppress(CursorExpiredError):
                    self.apply_remote(self._store, before)
            if self.position.seq != before:
                self.load()
        except Exception:
            # The change is committed: whatever this is, it must not look like a failure.
            logger.exception("cannot read what was committed before seq %d", commit.first_seq)
            self.stale = True
        # Where memory could not be loaded, the writer can see its own commit at least.
        return self.position.seq != before and not self.stale

    def _catch_up(self, store: SupportsJournal) -> bool:
        """Mirror everything that is in the journal and not in memory.

        When the journal does not hold what was mirrored last, or no longer, it
        is loaded anew: going on from there would mix two histories.
        """
        try:
            return bool(self.apply_remote(store))
        except CursorExpiredError:
            self.load()
            return True

    def _take_in(self, entries: Iterable[JournalEntry], *, local: bool) -> None:
        """Mirror the next entries, which become visible as a whole, and let the hooks know."""
        events: list[Event] = []
        with self.lock:
            for entry in entries:
                seq, at, task_id, record = entry.seq, entry.at, entry.task_id, entry.record
                if record is not None:
                    previous = self._indexes.put(record)
                    events.append(Upserted(seq, at, record, previous, local))
                else:
                    previous = self._indexes.remove(task_id)
                    if entry.quarantined is None:  # what does not decode is no event
                        events.append(Deleted(seq, at, task_id, previous, local))
                self.position = Position(seq, entry.commit_id)
        # What is stale the hooks hear of when it is loaded anew.
        if self._hooks.registered and not self.stale:
            self._hooks.emit(events)


class Staging(Lookups):
    """Changes that are not committed yet, laid over what they change.

    ``changes`` is what the store will be asked for, in order.  ``in_doubt``
    tells that an operation found nothing to do: nothing that the store checks
    says whether that still holds.
    """

    __slots__ = ("_holders", "_over", "_under", "changes", "in_doubt")

    def __init__(self, under: Lookups) -> None:
        self._under = under
        self._over: dict[str, TaskRecord | None] = {}
        self._holders: dict[DedupKey, str] = {}
        self.changes: list[Change] = []
        self.in_doubt = False

    def get(self, task_id: str) -> TaskRecord | None:
        """Return the record of an id as it would be, or ``None``."""
        over = self._over
        return over[task_id] if task_id in over else self._under.get(task_id)

    def by_dedup_key(self, key: DedupKey) -> TaskRecord | None:
        """Return the task that would have a dedup key, or ``None``."""
        task_id = self._holders.get(key)
        if task_id is not None:
            return self.get(task_id)
        holder = self._under.by_dedup_key(key)
        return holder if holder is None else self.get(holder.task_id)

    def select(self, query: TaskQuery) -> Iterator[TaskRecord]:
        """Yield what would match, newest first."""
        if not self._over:
            return self._under.select(query)
        over, cursor = self._over, query.cursor
        staged = sorted(
            (
                record
                for record in over.values()
                if record is not None
                and query.matches(record)
                and (cursor is None or record.sort_key < cursor)
            ),
            key=lambda record: record.sort_key,
            reverse=True,
        )
        under = (record for record in self._under.select(query) if record.task_id not in over)
        return heapq.merge(under, staged, key=lambda record: record.sort_key, reverse=True)

    def summary(self) -> Summary:
        """Count the records as they would be."""
        under = self._under.summary()
        statuses, runtimes = Counter(under.by_status), Counter(under.by_runtime)
        for task_id, after in self._over.items():
            for record, step in ((self._under.get(task_id), -1), (after, 1)):
                if record is not None:
                    statuses[str(record.status)] += step
                    runtimes[record.runtime] += step
        return Summary.of(+statuses, +runtimes, under.seq)

    def create(self, record: TaskRecord, key: DedupKey | None) -> TaskRecord:
        """Stage a new task that claims a dedup key; raises :class:`ConflictError` if its id is
        taken."""
        over = self._over
        task_id = record.task_id
        standing = over[task_id] if task_id in over else self._under.get(task_id)
        if standing is not None:
            raise ConflictError([Conflict(record.task_id, 0, standing.revision)])
        if key is not None:
            self._holders[key] = record.task_id
        self.changes.append(unchecked_put(record))
        self._over[record.task_id] = record
        return record

    def update(self, before: TaskRecord, after: TaskRecord) -> TaskRecord:
        """Stage what became of a record, one revision on; nothing if it is still the same."""
        if after is before:
            self.in_doubt = True
            return before
        if after.revision > MAX_INT:
            check_int("revision", after.revision)
        self.changes.append(unchecked_put(after))
        self._over[after.task_id] = after
        return after

    def creates(self, task_id: str) -> bool:
        """Whether this task is one that is only staged so far."""
        return task_id in self._over and self._under.get(task_id) is None

    def delete(self, record: TaskRecord) -> None:
        """Stage a deletion."""
        self.changes.append(Remove(record.task_id, record.revision + 1))
        self._over[record.task_id] = None

    def undo(self, mark: int) -> None:
        """Forget the changes from the one at index ``mark`` on."""
        kept = self.changes[:mark]
        self._over, self._holders, self.changes = {}, {}, []
        self._take_over(kept)

    def absorb(self, later: Staging) -> None:
        """Take over what was staged on top of this."""
        self._take_over(later.changes)

    def _take_over(self, changes: Sequence[Change]) -> None:
        for change in changes:
            record = change.record if isinstance(change, Put) else None
            self._over[change.task_id] = record
            key = None if record is None or record.revision > 1 else dedup_key(record)
            if key is not None:
                self._holders[key] = change.task_id
        self.changes += changes


def _descending(keys: Sequence[Key], end: int) -> Iterator[Key]:
    """The keys before ``end``, last first."""
    return map(keys.__getitem__, range(end - 1, -1, -1))


def _whole_commits(page: Sequence[JournalEntry]) -> Sequence[JournalEntry]:
    """A full page without its last commit, which may go on after it; all of it, if that is one."""
    last = page[-1].commit_id
    end = next((n for n in range(len(page), 0, -1) if page[n - 1].commit_id != last), 0)
    return page[:end] or page


_pausing = threading.Lock()
_turned_off = False


@contextmanager
def gc_paused() -> Iterator[None]:
    """Leave Python's garbage collector off in the body of a ``with``: many records are made there.

    It would look again and again for cycles among objects that cannot have
    any, and each of its great looks holds up every other thread.  A pause
    that begins during another one changes nothing: the first turns the
    collector off, and on again at its end.
    """
    global _turned_off  # noqa: PLW0603 - the collector is one for the whole process
    first = _pausing.acquire(blocking=False)
    try:
        if first and gc.isenabled():
            _turned_off = True
            gc.disable()
        yield
    finally:
        if first:
            if _turned_off:
                gc.enable()
                _turned_off = False
            _pausing.release()


def restore_gc() -> None:
    """End the pause of another thread, which is not there in a forked child."""
    global _pausing, _turned_off  # noqa: PLW0603
    _pausing = threading.Lock()
    if _turned_off:
        gc.enable()
        _turned_off = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=restore_gc)
