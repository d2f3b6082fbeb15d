"""Reads of the journal: changes, the history of a task, earlier records.

All functions read a store through :class:`~taskstore.SupportsJournal`.  For a store without
a journal the functions raise :class:`~taskstore.UnsupportedError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import takewhile

from taskstore.errors import CursorExpiredError, UnsupportedError, ValidationError
from taskstore.model.ids import CLOCK_TOLERANCE_MS
from taskstore.model.journal import JournalEntry, Position, Snapshot, fold
from taskstore.model.records import MIN_UNIX_MS
from taskstore.model.validation import check_int, check_seconds
from taskstore.registry.cache import PAGE_ENTRIES, gc_paused
from taskstore.store.interface import (
    SupportsHistory,
    SupportsJournal,
    TaskRegistryStore,
    commit_id_at,
    entries_after_position,
)

WAIT_SLICE_S = 0.5
"""The longest single wait for a commit, in seconds.  After each wait, the reader checks whether the
registry is closed."""

MAX_WAIT_S = 10.0**9
"""The longest wait, in seconds: about thirty years."""


def require_journal(store: TaskRegistryStore, wanted: str) -> SupportsJournal:
    """Return the store as a ``SupportsJournal``; raise :class:`UnsupportedError` if it has no
    journal."""
    if not isinstance(store, SupportsJournal):
        raise UnsupportedError(f"{wanted} needs a journal, but {store!r} has no journal")
    return store


def entries_after(store: SupportsJournal, after: int) -> Iterator[JournalEntry]:
    """Yield all entries after a seq, including entries committed during the iteration."""
    while entries := store.read_journal(after, PAGE_ENTRIES):
        yield from entries
        after = entries[-1].seq


class JournalReader:
    """Reads a journal from a cursor, page by page, and detects a replaced journal.

    ``after`` is a seq or the ``cursor`` of an entry.  The reader skips no entry: if the next
    entries were trimmed, or the journal does not contain the position, the reader raises
    :class:`CursorExpiredError`.
    """

    def __init__(self, journal: SupportsJournal, after: int | str | Position) -> None:
        self._journal = journal
        self.position = Position.of(after)

    def check(self) -> None:
        """Raise :class:`CursorExpiredError` unless the journal contains the position.

        If the position has no commit id, the commit id is read from the current journal.
        """
        entries_after_position(self._journal, self.position, 0)
        seq = self.position.seq
        if seq and not self.position.commit_id:
            self.position = Position(seq, commit_id_at(self._journal, seq))

    def next_page(self) -> Sequence[JournalEntry]:
        """Return the entries after the position; return an empty sequence if no such entry exists
        yet."""
        if not self.position.commit_id:
            self.check()
        entries = entries_after_position(self._journal, self.position, PAGE_ENTRIES)
        if entries:
            self.position = Position(entries[-1].seq, entries[-1].commit_id)
        return entries


def changes(
    store: TaskRegistryStore,
    after: int | str | Position,
    wait: float | None,
    check: Callable[[], object] = lambda: None,
) -> Iterator[JournalEntry]:
    """Yield entries after a cursor; end at the head or after ``wait`` seconds without an entry.

    If ``wait`` is ``None``, the iteration ends at the head.  ``check`` is called before each step;
    an error that ``check`` raises ends the iteration.
    """
    journal = require_journal(store, "changes")
    reader = JournalReader(journal, after)
    if wait is not None:
        check_seconds("wait", wait, 0, MAX_WAIT_S)
    reader.check()
    return _read_and_wait(journal, reader, wait, check)


def _read_and_wait(
    journal: SupportsJournal, reader: JournalReader, wait: float | None, check: Callable[[], object]
) -> Iterator[JournalEntry]:
    deadline = time.monotonic() + (wait or 0)
    while True:
        check()
        while entries := reader.next_page():
            for entry in entries:
                yield entry
                check()
            deadline = time.monotonic() + (wait or 0)
        left = max(0.0, deadline - time.monotonic())
        if wait is None or (
            not journal.wait_for(reader.position.seq, min(left, WAIT_SLICE_S))
            and left <= WAIT_SLICE_S
        ):
            return


def history(store: TaskRegistryStore, task_id: str) -> Sequence[JournalEntry]:
    """Return the retained journal entries of a task, oldest first."""
    journal = require_journal(store, "history")
    if isinstance(store, SupportsHistory):
        return tuple(store.read_history(task_id))
    while True:
        try:
            entries = entries_after(journal, journal.floor() - 1)
            return tuple(entry for entry in entries if entry.task_id == task_id)
        except CursorExpiredError:
            continue  # trimmed between the two calls: the next attempt begins at the new floor


def as_of(store: TaskRegistryStore, moment: int | datetime) -> Snapshot:
    """Return all records as of a seq or time.

    ``moment`` is a seq, a time as Unix milliseconds (from 10**11 on), or an aware
    :class:`datetime.datetime`.  Raises :class:`CursorExpiredError` for a seq below floor - 1, and
    for a time before the commit at floor - 1.  Raises :class:`ValidationError` for a seq beyond the
    head.  The same error is raised for a time if a wrong clock set the times of later entries, and
    some of these entries were possibly committed before the given time.
    """
    journal = require_journal(store, "as_of")
    at_time = _unix_ms(moment)
    while True:
        floor = journal.floor()
        try:
            with gc_paused():
                if at_time is not None:
                    return _as_of_time(journal, at_time, store.clock())
                return _as_of_seq(journal, check_int("as_of", moment))
        except CursorExpiredError:
            # Retry if a compaction has trimmed the journal between two reads.
            if journal.floor() == floor:
                raise


def _as_of_seq(journal: SupportsJournal, seq: int) -> Snapshot:
    head = journal.head()
    if seq > head:
        reason = f"seq {seq} is beyond the head, {head}"
        if seq * 1000 >= MIN_UNIX_MS:
            reason += f"; if this is a time in seconds, pass milliseconds: {seq * 1000}"
        raise ValidationError("as_of", reason)
    base = _base_snapshot(journal, seq)
    if base.seq == seq:
        return base
    entries = takewhile(lambda entry: entry.seq <= seq, entries_after(journal, base.seq))
    return fold(base, entries)


def _as_of_time(journal: SupportsJournal, at: int, now: int) -> Snapshot:
    # Commit times never decrease, so the entries up to a time are a prefix of the journal.
    base = _base_snapshot(journal, journal.floor() - 1)
    if base.at > at:
        raise CursorExpiredError(base.seq - 1, base.seq + 1)
    seq, last_at = base.seq, base.at
    for entry in entries_after(journal, base.seq):
        if entry.at > at:
            # The true time of an entry that is later than the clock can be before or after ``at``.
            if entry.at > now + CLOCK_TOLERANCE_MS and last_at < at <= now:
                raise ValidationError(
                    "as_of",
                    f"the times of the entries from seq {entry.seq} on are later than the clock, "
                    "so they do not tell which of them were committed before the given time; "
                    f"pass a seq, {seq} or higher",
                )
            break
        seq, last_at = entry.seq, entry.at
    return _as_of_seq(journal, seq)


def _base_snapshot(journal: SupportsJournal, seq: int) -> Snapshot:
    """Return the newest snapshot at or before ``seq``.  If there is no such snapshot and no entry
    was trimmed, return an empty snapshot."""
    floor = journal.floor()
    if seq < floor - 1:
        raise CursorExpiredError(seq, floor)
    snapshot = journal.read_snapshot(seq)
    if snapshot is not None:
        return snapshot
    if floor > 1:
        raise CursorExpiredError(seq, floor)
    return Snapshot(0)


def _unix_ms(moment: object) -> int | None:
    """Return ``moment`` in Unix milliseconds, or ``None`` if ``moment`` is a seq: an integer below
    ``MIN_UNIX_MS``."""
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise ValidationError("as_of", "a datetime needs a time zone")
        return int(moment.timestamp() * 1000)
    value = check_int("as_of", moment)
    return value if value >= MIN_UNIX_MS else None
