"""The integrity check: one read-only pass over a ledger's journal and snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from taskstore.errors import CorruptStoreError
from taskstore.model.journal import EntryKind, JournalEntry, Snapshot
from taskstore.model.records import TaskRecord
from taskstore.store.interface import VerifyReport

MAX_PROBLEMS = 100
"""The maximum number of problems that a report lists; further problems are only counted."""
MAX_TASKS_NAMED = 3
"""The maximum number of tasks that one problem names."""

Content = dict[str | bytes, tuple[int, TaskRecord | bytes]]
"""Maps each task id to the revision (0 if unknown) and the record.  For a record that does not
decode, the value has the record's bytes.  If the task id of such a record is unknown, the bytes are
also the key."""


class IntegrityCheck:
    """Replays a ledger's journal from the floor, and compares the result with stored content.

    ``snapshots`` maps the seq of each retained snapshot to a name for problem texts; ``read`` is a
    function that reads the snapshot at a seq.  The store calls :meth:`journal`, then
    :meth:`compare` with the current records, then :meth:`report`.

    After a gap in the journal, the check treats each task as unknown until the next entry of
    the task or the next snapshot.  Each damage is therefore reported only once.
    ``content`` is the known content as of ``seq``.  ``complete`` is true if ``content`` covers
    every task.  ``problems`` has one text for each problem found.
    """

    def __init__(
        self, floor: int, snapshots: Mapping[int, str], read: Callable[[int], Snapshot]
    ) -> None:
        self.seq = floor - 1
        self.content: Content = {}
        self.complete = floor == 1 and 0 not in snapshots
        self.problems: list[str] = []
        self._snapshots = snapshots
        self._read = read
        self._ahead = sorted((seq for seq in snapshots if seq >= self.seq), reverse=True)
        self._deleted: set[str] = set()
        self._at = self._entries = 0
        self._entry_seq = 0

    def journal(
        self, entries: Iterable[JournalEntry | CorruptStoreError], head: int | None = None
    ) -> None:
        """Check the entries from the floor on, in order, and compare each snapshot with the
        replayed content at the snapshot's seq.

        In ``entries``, an error stands for the entries that could not be read.  A store that keeps
        the head outside the journal passes this value as ``head``, the expected seq of the newest
        entry.
        """
        if not self.complete and self.seq not in self._snapshots:
            self.problems.append(f"there is no snapshot at seq {self.seq}, before the floor")
        self._compare_snapshots()
        reported = False
        for entry in entries:
            if isinstance(entry, CorruptStoreError):
                self.problems.append(str(entry))
                reported = True
                continue
            if entry.seq > self.seq + 1 or reported:
                gap = f"the entries from seq {self.seq + 1} to {entry.seq - 1} are missing"
                self._skip_gap("" if reported else gap, entry.seq - 1)
                reported = False
            self._check_entry(entry)
            self._compare_snapshots()
        last = max([self.seq, *self._ahead]) if head is None else head
        if self.seq != last or reported:
            end = f"the journal ends at seq {self.seq}, but the head is {last}"
            self._skip_gap("" if reported else end, last)
        self.problems += [f"{self._snapshots[seq]} is ahead of head {last}" for seq in self._ahead]

    def _skip_gap(self, problem: str, seq: int) -> None:
        """Record ``problem``, and continue the replay after ``seq`` as if no task were known."""
        if problem:
            self.problems.append(problem)
        self.content, self.complete, self.seq = {}, False, seq
        self._compare_snapshots()

    def _compare_snapshots(self) -> None:
        """Compare each snapshot that the replay has reached with the known content."""
        while self._ahead and self._ahead[-1] <= self.seq:
            seq = self._ahead.pop()
            try:
                snapshot = self._read(seq)
            except CorruptStoreError as error:
                self.problems.append(str(error))
            else:
                self.compare(self._snapshots[seq], snapshot)

    def _check_entry(self, entry: JournalEntry) -> None:
        where = f"seq {entry.seq}, task {entry.task_id!r}"
        if entry.seq <= self.seq:
            self.problems.append(f"{where}: this entry follows seq {self.seq}")
        if entry.at < self._at:
            self.problems.append(f"{where}: the time goes back from {self._at} to {entry.at}")
        known = self.content.get(entry.task_id)
        before = known[0] if known is not None else 0
        before_is_known = before > 0 or (known is None and self.complete)
        if known is None and entry.task_id in self._deleted:
            self.problems.append(f"{where}: a change after its deletion")
        elif before_is_known and entry.revision != before + 1:
            self.problems.append(f"{where}: revision {entry.revision} follows revision {before}")
        self.seq = self._entry_seq = entry.seq
        self._at = entry.at
        self._entries += 1
        record = entry.record
        if entry.kind is EntryKind.DELETED:
            self.content.pop(entry.task_id, None)
            self._deleted.add(entry.task_id)
        elif record is not None:
            if (record.task_id, record.revision) != (entry.task_id, entry.revision):
                actual = f"{record.task_id!r} at revision {record.revision}"
                self.problems.append(f"{where}: the entry's record is {actual}")
            self.content[entry.task_id] = (entry.revision, record)
        elif entry.quarantined is not None:
            self.content[entry.task_id] = (entry.revision, entry.quarantined.raw)

    def compare(self, name: str, snapshot: Snapshot) -> None:
        """Compare a stored snapshot with the replayed content; problem texts begin with ``name``.

        If the replayed content is incomplete, the stored snapshot replaces the replayed content.
        """
        stored, expected = _content_of(snapshot), self.content
        surplus = stored.keys() - expected.keys()
        common = stored.keys() & expected.keys()
        differing = {key for key in common if stored[key][1] != expected[key][1]}
        for difference, keys in (
            ("lacks tasks of the journal", expected.keys() - stored.keys()),
            ("has tasks not in the journal", surplus if self.complete else surplus & self._deleted),
            ("disagrees with the journal on tasks", differing),
        ):
            if keys:
                shown = ", ".join(sorted(map(repr, keys))[:MAX_TASKS_NAMED])
                self.problems.append(f"{name} {difference} ({len(keys)}): {shown}")
        if snapshot.seq == self.seq:
            self._compare_times(name, snapshot.at)
            if not self.complete:
                self.content, self.complete = stored, True

    def _compare_times(self, name: str, at: int) -> None:
        """Compare the time of a snapshot with the time of the entry at the same seq.  If the entry
        was trimmed, the next entry must not have an earlier time than the snapshot."""
        if self._entries and self._entry_seq == self.seq and at != self._at:
            self.problems.append(
                f"{name} has the time {at}, but the entry at seq {self.seq} has the time {self._at}"
            )
        elif at < self._at:
            self.problems.append(f"{name}: the time goes back from {self._at} to {at}")
        self._at = max(self._at, at)

    def report(self) -> VerifyReport:
        """Return the report of the check; it lists at most ``MAX_PROBLEMS`` problems."""
        return VerifyReport(self.seq, len(self.content), self._entries, listed(self.problems))


def listed(problems: Sequence[str]) -> tuple[str, ...]:
    """Return the first ``MAX_PROBLEMS`` problems; a last text tells how many further problems
    exist."""
    more = len(problems) - MAX_PROBLEMS
    further = [f"and {more} more problems"] if more > 0 else []
    return (*problems[:MAX_PROBLEMS], *further)


def _content_of(snapshot: Snapshot) -> Content:
    """Return the content of a snapshot, without superseded records."""
    content: Content = {
        task_id: (record.revision, record) for task_id, record in snapshot.records.items()
    }
    for item in snapshot.quarantined:
        if not item.superseded:
            content.setdefault(item.task_id or item.raw, (item.revision or 0, item.raw))
    return content
