"""Checking a whole ledger: everything that is written twice has to agree."""

from __future__ import annotations

from pathlib import Path

from taskstore.errors import CorruptStoreError
from taskstore.journal import EntryKind
from taskstore.store import VerifyReport
from taskstore.stores.jsonfile.index import keys_of
from taskstore.stores.jsonfile.layout import Layout, SegmentFile, read_layout, settled
from taskstore.stores.jsonfile.lines import Entry
from taskstore.stores.jsonfile.segments import Found, Walk
from taskstore.stores.jsonfile.snapshots import opened
from taskstore.stores.jsonfile.writing import Writer

_SHOWN = 3

_Content = dict[str, tuple[int, bytes]]
"""Revision and payload by task id."""


def verify(directory: Path, writer: Writer | None) -> VerifyReport:
    """Check the files of a directory, and what a writer remembers of them.

    Once more when something is wrong: files may have changed meanwhile.
    """
    report = settled(directory, lambda _: _verify(directory, writer))
    return report if report.ok else settled(directory, lambda _: _verify(directory, writer))


def _verify(directory: Path, writer: Writer | None) -> VerifyReport:
    try:
        return _Check(read_layout(directory)).report(writer)
    except CorruptStoreError as error:
        return VerifyReport(0, 0, 0, (str(error),))


class _Check:
    """One pass over the ledger: the snapshot at floor - 1, brought forward over
    the journal, has to equal each later snapshot at its seq."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.problems: list[str] = [layout.lost] if layout.lost else []
        self.entries = 0
        self.content: _Content = {}
        self.deleted: set[str] = set()
        self.whole = True
        self.at = 0

    def report(self, writer: Writer | None) -> VerifyReport:
        layout = self.layout
        base = layout.floor - 1
        if base in layout.snapshots:
            found = self._snapshot(base)
            self.whole = found is not None
            self.content = found or {}
        seq = base
        for segment in layout.segments:
            if segment.first > seq + 1 and self.whole:
                self._damaged(f"{segment.path}: seq {seq + 1} to {segment.first - 1} are missing")
            if segment.first - 1 > base:
                self._compare(segment.first - 1)
            seq = self._segment(segment)
        if layout.newest is not None and layout.newest.seq == seq and seq > base:
            self._compare(seq)
        if writer is not None and self.whole:
            self._compare_index(writer, seq)
        return VerifyReport(seq, len(self.content), self.entries, tuple(self.problems))

    def _segment(self, segment: SegmentFile) -> int:
        """Check the commits of one segment; returns the last seq that was found."""
        walk = Walk(self.layout, self.layout.start_of(segment))
        self.at = max(self.at, segment.at)
        try:
            for found in walk.within(segment):
                self._line(found)
        except CorruptStoreError as error:
            self._damaged(str(error))
        return walk.place.seq

    def _damaged(self, problem: str) -> None:
        self.problems.append(problem)
        self.whole = False

    def _line(self, found: Found) -> None:
        line = found.line
        self.entries += len(line.entries)
        if line.at < self.at:
            self.problems.append(f"{found.where}: the time goes back from {self.at} to {line.at}")
        self.at = max(self.at, line.at)
        for seq, entry in enumerate(line.entries, line.seq):
            if self.whole:
                self._entry(entry, f"{found.where}: seq {seq}, task {entry.task_id!r}")

    def _entry(self, entry: Entry, where: str) -> None:
        known = self.content.get(entry.task_id)
        base = known[0] if known is not None else 0
        if known is None and entry.task_id in self.deleted:
            self.problems.append(f"{where}: a change after its deletion")
        elif entry.revision != base + 1 and (known is None or base):
            self.problems.append(f"{where}: revision {entry.revision} follows revision {base}")
        if entry.kind is EntryKind.DELETED:
            self.content.pop(entry.task_id, None)
            self.deleted.add(entry.task_id)
            return
        payload = bytes(entry.record)
        keys = keys_of(payload)
        if keys is not None and (keys.task_id, keys.revision) != (entry.task_id, entry.revision):
            self.problems.append(f"{where}: its record is {keys.task_id!r} at {keys.revision}")
        self.content[entry.task_id] = (entry.revision, payload)

    def _compare(self, seq: int) -> None:
        """Compare the snapshot at a seq, if there is one, with what the journal says."""
        if seq not in self.layout.snapshots:
            return
        found = self._snapshot(seq)
        if found is None or not self.whole:
            return
        path = self.layout.snapshot_path(seq)
        for what, ids in (
            ("lacks", self.content.keys() - found.keys()),
            ("has too much", found.keys() - self.content.keys()),
            ("disagrees with the journal on", _different(found, self.content)),
        ):
            if ids:
                shown = ", ".join(sorted(ids)[:_SHOWN])
                self.problems.append(f"{path}: {what} {len(ids)} tasks: {shown}")

    def _compare_index(self, writer: Writer, seq: int) -> None:
        """Compare what a writer remembers, if that is of the same moment."""
        before, index = writer.place, writer.index
        if index is None or before.seq != seq:
            return
        revisions = dict(index.revisions)
        stored = {task_id: revision for task_id, (revision, _) in self.content.items()}
        if writer.place == before and revisions != stored:
            ids = [task_id for task_id, _ in revisions.items() ^ stored.items()]
            self.problems.append(f"the writer's index is wrong about {sorted(set(ids))[:_SHOWN]}")

    def _snapshot(self, seq: int) -> _Content | None:
        """The content of a snapshot, or ``None`` and a problem."""
        content: _Content = {}
        last = ""
        try:
            with opened(self.layout, seq) as reader:
                for payload in reader:
                    keys = keys_of(payload)
                    if keys is None:
                        content[repr(payload)] = (0, payload)
                        continue
                    if keys.task_id <= last and last:
                        self.problems.append(
                            f"{self.layout.snapshot_path(seq)}: {keys.task_id!r} follows {last!r}"
                        )
                    last = keys.task_id
                    content[keys.task_id] = (keys.revision, payload)
                for item in reader.aside:
                    if item.superseded:
                        continue  # of a change that the journal no longer has
                    content[item.task_id or repr(item.raw)] = (item.revision or 0, item.raw)
        except CorruptStoreError as error:
            self.problems.append(str(error))
            return None
        return content


def _different(found: _Content, content: _Content) -> set[str]:
    return {
        task_id
        for task_id in found.keys() & content.keys()
        if found[task_id][1] != content[task_id][1]
    }
