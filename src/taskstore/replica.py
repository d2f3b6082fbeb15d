"""Memory kept the same as the store: after our own commits, after those of others, and anew.

Everything here is called with the commit lock held.  Hooks hear of what is
mirrored in the order of the journal; they are called later, without the lock.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter

from taskstore.errors import CursorExpiredError
from taskstore.hooks import Deleted, Event, Hooks, Restored, Upserted
from taskstore.journal import Change, Commit, JournalEntry, Position, Put
from taskstore.mirror import Mirror
from taskstore.store import SupportsJournal, TaskRegistryStore, commit_id_at, entries_beyond
from taskstore.yielding import collector_paused

logger = logging.getLogger("taskstore")

PAGE_ENTRIES = 1000
"""How many journal entries are read at a time.  A commit of no more becomes visible as a
whole; lookups would wait too long for one of very many."""


class Replica:
    """What a mirror has of a store, and how it gets what it lacks.

    ``stale`` is set when memory may not be what the store has, and nobody
    knows what it lacks: then it is loaded anew before its next use.
    """

    def __init__(self, store: TaskRegistryStore, mirror: Mirror, hooks: Hooks) -> None:
        self._store = store
        self._mirror = mirror
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
        snapshot = store.load_snapshot()
        if isinstance(store, SupportsJournal) and snapshot.seq != head:  # others are committing
            commit_id = commit_id_at(store, snapshot.seq)
        self._mirror.reset(snapshot, commit_id)
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
            before = self._mirror.seq
            self.load()
            return before != self._mirror.seq
        return False

    def read_on(self, journal: SupportsJournal, end: int | None = None) -> set[str]:
        """Mirror what comes after memory in the journal, up to seq ``end`` if that is given.

        Returns which tasks that concerns.  Raises :class:`CursorExpiredError`
        when the journal is not the one that memory is of, or was trimmed.
        """
        changed = set[str]()
        with collector_paused():
            while end is None or self._mirror.position.seq < end:
                limit = PAGE_ENTRIES
                if end is not None:
                    limit = min(limit, end - self._mirror.position.seq)
                page = entries_beyond(journal, self._mirror.position, limit)
                entries = page if len(page) < PAGE_ENTRIES else _whole_commits(page)
                self._mirror_entries(entries)
                changed.update(entry.task_id for entry in entries)
                if len(page) < limit:
                    break
        return changed

    def publish(self, commit: Commit, changes: Sequence[Change]) -> None:
        """Mirror a commit, and before it what others committed in between."""
        if commit.first_seq != self._mirror.position.seq + 1 and self._catch_up_with(commit):
            return
        events: list[Event] = []
        seq = commit.first_seq
        for start in range(0, len(changes), PAGE_ENTRIES):
            with self._mirror.lock:
                for change in changes[start : start + PAGE_ENTRIES]:
                    record = change.record if isinstance(change, Put) else None
                    position = Position(seq, commit.commit_id)
                    if record is not None:
                        previous = self._mirror.publish(position, record.task_id, record)
                        events.append(Upserted(seq, commit.at, record, previous))
                    else:
                        previous = self._mirror.publish(position, change.task_id, None)
                        events.append(Deleted(seq, commit.at, change.task_id, previous))
                    seq += 1
        # What is stale the hooks hear of when it is loaded anew.
        if self._hooks.registered and not self.stale:
            self._hooks.emit(events)

    def _catch_up_with(self, commit: Commit) -> bool:
        """Mirror what others committed before our commit; whether that brought the commit too."""
        before = commit.first_seq - 1
        try:
            if isinstance(self._store, SupportsJournal) and self._mirror.position.seq < before:
                with suppress(CursorExpiredError):
                    self.read_on(self._store, before)
            if self._mirror.position.seq != before:
                self.load()
        except Exception:
            # The change is committed: whatever this is, it must not look like a failure.
            logger.exception("cannot read what was committed before seq %d", commit.first_seq)
            self.stale = True
        # Where memory could not be loaded, the writer can see its own commit at least.
        return self._mirror.position.seq != before and not self.stale

    def _catch_up(self, store: SupportsJournal) -> bool:
        """Mirror everything that is in the journal and not in memory.

        When the journal does not hold what was mirrored last, or no longer, it
        is loaded anew: going on from there would mix two histories.
        """
        try:
            return bool(self.read_on(store))
        except CursorExpiredError:
            self.load()
            return True

    def _mirror_entries(self, entries: Sequence[JournalEntry]) -> None:
        """Mirror what others committed, each commit as a whole."""
        events: list[Event] = []
        for _, commit in groupby(entries, attrgetter("commit_id")):
            with self._mirror.lock:
                for entry in commit:
                    seq, at, record = entry.seq, entry.at, entry.record
                    position = Position(seq, entry.commit_id)
                    previous = self._mirror.publish(position, entry.task_id, record)
                    if record is not None:
                        events.append(Upserted(seq, at, record, previous, local=False))
                    elif entry.set_aside is None:  # what does not decode is no event
                        events.append(Deleted(seq, at, entry.task_id, previous, local=False))
        self._hooks.emit(events)


def _whole_commits(page: Sequence[JournalEntry]) -> Sequence[JournalEntry]:
    """A full page without its last commit, which may go on after it; all of it, if that is one."""
    last = page[-1].commit_id
    end = next((n for n in range(len(page), 0, -1) if page[n - 1].commit_id != last), 0)
    return page[:end] or page
