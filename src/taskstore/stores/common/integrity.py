"""Checking a ledger against itself: one pass over its journal, pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from taskstore.errors import CorruptStoreError
from taskstore.model.journal import EntryKind, JournalEntry, Snapshot
from taskstore.model.records import TaskRecord
from taskstore.store.interface import VerifyReport

MOST = 100
"""How many problems are told one by one."""
SHOWN = 3
"""How many tasks one problem names."""

Content = dict[str | bytes, tuple[int, TaskRecord | bytes]]
"""Revision (0 where it cannot be told) and record by task id.  An image that does not
decode stands as its bytes, and under them if its id cannot be told."""


class IntegrityCheck:
    """Brings a ledger forward from its floor over the journal, and compares what is stored.

    ``retained`` says where its snapshots lie, by seq, and ``read`` reads one.  The store
    calls :meth:`journal`, :meth:`compare` with its current records, then :meth:`report`.

    Behind a part of the journal that is lost, a task is unknown until its next entry
    or the next snapshot, so that no damage is told twice.  ``content`` is what is known
    as of ``seq``, ``whole`` says whether that is every task (``bool``), and ``problems``
    are sentences.
    """

    def __init__(
        self, floor: int, retained: Mapping[int, str], read: Callable[[int], Snapshot]
    ) -> None:
        self.seq = floor - 1
        self.content: Content = {}
        self.whole = floor == 1 and 0 not in retained
        self.problems: list[str] = []
        self._retained = retained
        self._read = read
        self._ahead = sorted((seq for seq in retained if seq >= self.seq), reverse=True)
        self._deleted: set[str] = set()
        self._at = self._entries = 0

    def journal(
        self, entries: Iterable[JournalEntry | CorruptStoreError], head: int | None = None
    ) -> None:
        """Check the entries from the floor on, in order, and each snapshot at its seq.

        An error stands for entries that could not be read.  ``head`` is the last seq
        that there has to be, where the store notes that beside its journal.
        """
        if not self.whole and self.seq not in self._retained:
            self.problems.append(f"there is no snapshot at seq {self.seq}, before the floor")
        self._snapshots()
        told = False
        for entry in entries:
            if isinstance(entry, CorruptStoreError):
                self.problems.append(str(entry))
                told = True
                continue
            if entry.seq > self.seq + 1 or told:
                gap = f"seq {self.seq + 1} to {entry.seq - 1} are missing"
                self._lose("" if told else gap, entry.seq - 1)
                told = False
            self._entry(entry)
            self._snapshots()
        last = max([self.seq, *self._ahead]) if head is None else head
        if self.seq != last or told:
            end = f"the journal ends at seq {self.seq}, the head is {last}"
            self._lose("" if told else end, last)
        self.problems += [f"{self._retained[seq]} is ahead of head {last}" for seq in self._ahead]

    def _lose(self, problem: str, seq: int) -> None:
        """Go on behind ``seq`` without what is before it."""
        if problem:
            self.problems.append(problem)
        self.content, self.whole, self.seq = {}, False, seq
        self._snapshots()

    def _snapshots(self) -> None:
        """Compare the snapshots up to the seq that was reached."""
        while self._ahead and self._ahead[-1] <= self.seq:
            seq = self._ahead.pop()
            try:
                found = self._read(seq)
            except CorruptStoreError as error:
                self.problems.append(str(error))
            else:
                self.compare(self._retained[seq], found)

    def _entry(self, entry: JournalEntry) -> None:
        where = f"seq {entry.seq}, task {entry.task_id!r}"
        if entry.seq <= self.seq:
            self.problems.append(f"{where}: follows seq {self.seq}")
        if entry.at < self._at:
            self.problems.append(f"{where}: the time goes back from {self._at} to {entry.at}")
        known = self.content.get(entry.task_id)
        before = known[0] if known is not None else 0
        can_be_told = before > 0 or (known is None and self.whole)
        if known is None and entry.task_id in self._deleted:
            self.problems.append(f"{where}: a change after its deletion")
        elif can_be_told and entry.revision != before + 1:
            self.problems.append(f"{where}: revision {entry.revision} follows revision {before}")
        self.seq, self._at = entry.seq, entry.at
        self._entries += 1
        record = entry.record
        if entry.kind is EntryKind.DELETED:
            self.content.pop(entry.task_id, None)
            self._deleted.add(entry.task_id)
        elif record is not None:
            if (record.task_id, record.revision) != (entry.task_id, entry.revision):
                what = f"{record.task_id!r} at revision {record.revision}"
                self.problems.append(f"{where}: its record is {what}")
            self.content[entry.task_id] = (entry.revision, record)
        elif entry.quarantined is not None:
            self.content[entry.task_id] = (entry.revision, entry.quarantined.raw)

    def compare(self, place: str, found: Snapshot) -> None:
        """Compare what a place holds with what the journal leads to, as far as that is known.

        Where that is not every task, what was found is gone on with.
        """
        there, right = _content_of(found), self.content
        surplus = there.keys() - right.keys()
        differing = {key for key in there.keys() & right.keys() if there[key][1] != right[key][1]}
        for trouble, keys in (
            ("lacks tasks of the journal", right.keys() - there.keys()),
            ("has tasks beyond the journal", surplus if self.whole else surplus & self._deleted),
            ("disagrees with the journal on tasks", differing),
        ):
            if keys:
                shown = ", ".join(sorted(map(repr, keys))[:SHOWN])
                self.problems.append(f"{place} {trouble} ({len(keys)}): {shown}")
        if not self.whole and found.seq == self.seq:
            self.content, self.whole = there, True

    def report(self) -> VerifyReport:
        """What was found, at most ``MOST`` problems one by one."""
        shown, more = self.problems[:MOST], len(self.problems) - MOST
        if more > 0:
            shown.append(f"and {more} more")
        return VerifyReport(self.seq, len(self.content), self._entries, tuple(shown))


def _content_of(snapshot: Snapshot) -> Content:
    """What a snapshot says of each task, but for older images of tasks that went on."""
    content: Content = {
        task_id: (record.revision, record) for task_id, record in snapshot.records.items()
    }
    for item in snapshot.quarantined:
        if not item.superseded:
            content.setdefault(item.task_id or item.raw, (item.revision or 0, item.raw))
    return content
