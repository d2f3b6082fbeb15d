"""The past: what was committed, and what stood at an earlier time.

Everything here reads a store through :class:`~taskstore.SupportsJournal`;
one without it raises :class:`~taskstore.UnsupportedError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import takewhile

from taskstore.errors import CursorExpiredError, UnsupportedError, ValidationError
from taskstore.model.journal import JournalEntry, Position, Snapshot, fold
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
"""How long one waits for news at a time, in seconds: so soon it is seen that nobody wants any."""

LONGEST_S = 10.0**9
"""The longest wait, in seconds: some thirty years."""

EARLIEST_TIME = 10**11
"""Integers from here on are Unix milliseconds (this one is in March 1973), below it seqs."""


def journal_of(store: TaskRegistryStore, wanted: str) -> SupportsJournal:
    """Return the store as one with a journal; raises :class:`UnsupportedError`."""
    if not isinstance(store, SupportsJournal):
        raise UnsupportedError(f"{wanted} needs a journal, which {store!r} does not keep")
    return store


def entries_after(store: SupportsJournal, after: int) -> Iterator[JournalEntry]:
    """Yield every entry after a seq that is there now or comes while reading."""
    while entries := store.read_journal(after, PAGE_ENTRIES):
        yield from entries
        after = entries[-1].seq


class Tail:
    """Reads a journal onward from a cursor, and notices when its history is another.

    ``after`` is a seq or the ``cursor`` of an entry.  Raises
    :class:`CursorExpiredError` for what is no longer complete, and for a
    position that the journal does not hold: nothing is skipped in silence.
    """

    def __init__(self, journal: SupportsJournal, after: int | str | Position) -> None:
        self._journal = journal
        self.position = Position.of(after)

    def check(self) -> None:
        """Raise :class:`CursorExpiredError` unless there is a way on from here.

        A seq alone is taken to be of the history that is there now, and from now on of that one.
        """
        entries_after_position(self._journal, self.position, 0)
        seq = self.position.seq
        if seq and not self.position.commit_id:
            self.position = Position(seq, commit_id_at(self._journal, seq))

    def page(self) -> Sequence[JournalEntry]:
        """The next entries that are there, none if it is at the end."""
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
    """Yield the entries after a cursor; with ``wait``, go on until none came for so many seconds.

    ``check`` is called now and then, to raise when it is time to give up.
    """
    journal = journal_of(store, "changes")
    tail = Tail(journal, after)
    if wait is not None:
        check_seconds("wait", wait, 0, LONGEST_S)
    tail.check()
    return _follow(journal, tail, wait, check)


def _follow(
    journal: SupportsJournal, tail: Tail, wait: float | None, check: Callable[[], object]
) -> Iterator[JournalEntry]:
    deadline = time.monotonic() + (wait or 0)
    while True:
        check()
        while entries := tail.page():
            for entry in entries:
                yield entry
                check()
            deadline = time.monotonic() + (wait or 0)
        left = max(0.0, deadline - time.monotonic())
        if wait is None or (
            not journal.wait_for(tail.position.seq, min(left, WAIT_SLICE_S))
            and left <= WAIT_SLICE_S
        ):
            return


def history(store: TaskRegistryStore, task_id: str) -> Sequence[JournalEntry]:
    """Return a task's entries while they are kept, oldest first."""
    journal = journal_of(store, "history")
    if isinstance(store, SupportsHistory):
        return tuple(store.read_history(task_id))
    while True:
        try:
            entries = entries_after(journal, journal.floor() - 1)
            return tuple(entry for entry in entries if entry.task_id == task_id)
        except CursorExpiredError:
            continue  # trimmed between the two calls: begin where it begins now


def as_of(store: TaskRegistryStore, moment: int | datetime) -> Snapshot:
    """Return every record as it stood at a seq or time.

    ``moment`` is a seq, a time as Unix milliseconds (from 10**11 on), or an
    aware :class:`datetime.datetime`.  Raises :class:`CursorExpiredError`
    for what lies before floor - 1 and :class:`ValidationError` for a seq
    beyond the head.
    """
    journal = journal_of(store, "as_of")
    at_time = _milliseconds(moment)
    while True:
        floor = journal.floor()
        try:
            with gc_paused():
                if at_time is not None:
                    return _as_of_time(journal, at_time)
                return _as_of_seq(journal, check_int("as_of", moment))
        except CursorExpiredError:
            # Compaction may have passed by between two reads: then begin anew.
            if journal.floor() == floor:
                raise


def _as_of_seq(journal: SupportsJournal, seq: int) -> Snapshot:
    if seq > journal.head():
        raise ValidationError("as_of", f"seq {seq} is beyond the head, {journal.head()}")
    base = _base(journal, seq)
    if base.seq == seq:
        return base
    entries = takewhile(lambda entry: entry.seq <= seq, entries_after(journal, base.seq))
    return fold(base, entries)


def _as_of_time(journal: SupportsJournal, at: int) -> Snapshot:
    # The times of commits never go back, so the entries up to a time are a prefix.
    base = _base(journal, journal.floor() - 1)
    if base.at > at:
        raise CursorExpiredError(base.seq - 1, base.seq + 1)
    seq = base.seq
    for entry in entries_after(journal, base.seq):
        if entry.at > at:
            break
        seq = entry.seq
    return _as_of_seq(journal, seq)


def _base(journal: SupportsJournal, seq: int) -> Snapshot:
    """The newest snapshot at or before a seq; the empty one before the first entry."""
    floor = journal.floor()
    if seq < floor - 1:
        raise CursorExpiredError(seq, floor)
    snapshot = journal.read_snapshot(seq)
    if snapshot is not None:
        return snapshot
    if floor > 1:
        raise CursorExpiredError(seq, floor)
    return Snapshot(0)


def _milliseconds(moment: object) -> int | None:
    """The time that ``moment`` is, or ``None`` if it is a seq."""
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise ValidationError("as_of", "a time needs a time zone")
        return int(moment.timestamp() * 1000)
    value = check_int("as_of", moment)
    return value if value >= EARLIEST_TIME else None
