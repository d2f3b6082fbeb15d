"""Checking the files of a whole ledger against each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from taskstore.errors import CorruptStoreError
from taskstore.journal import JournalEntry
from taskstore.records import MAX_INT
from taskstore.store import VerifyReport
from taskstore.stores.integrity import SHOWN, IntegrityCheck
from taskstore.stores.jsonfile.layout import Layout, read_layout, read_snapshot, settled
from taskstore.stores.jsonfile.lines import journal_entry
from taskstore.stores.jsonfile.segments import Walk
from taskstore.stores.jsonfile.writing import Writer


def verify(directory: Path, writer: Writer | None) -> VerifyReport:
    """Check the files of a directory, and what a writer remembers of them.

    Once more when something is wrong: files may have changed meanwhile.
    """
    report = settled(directory, lambda _: _verify(directory, writer))
    return report if report.ok else settled(directory, lambda _: _verify(directory, writer))


def _verify(directory: Path, writer: Writer | None) -> VerifyReport:
    try:
        layout = read_layout(directory)
    except CorruptStoreError as error:
        return VerifyReport(0, 0, 0, (str(error),))
    places = {seq: str(layout.snapshot_path(seq)) for seq in layout.snapshots}
    check = IntegrityCheck(
        layout.floor, places, lambda seq: read_snapshot(layout, seq, strict=False)
    )
    if layout.lost:
        check.problems.append(layout.lost)
    check.journal(_entries(layout))
    if writer is not None and check.whole:
        _compare_index(writer, check)
    return check.report()


def _entries(layout: Layout) -> Iterator[JournalEntry | CorruptStoreError]:
    """The journal, with an error for what is missing of it and for what cannot be read."""
    seq = layout.floor - 1
    for segment in layout.segments:
        if segment.first > seq + 1:
            reason = f"seq {seq + 1} to {segment.first - 1} are missing before it"
            yield CorruptStoreError(str(segment.path), reason)
        walk = Walk(layout, layout.start_of(segment))
        try:
            for found in walk.within(segment):
                for index in range(len(found.line.entries)):
                    yield journal_entry(found.line, index, found.where, strict=False)
            seq = walk.place.seq
        except CorruptStoreError as error:
            yield error
            seq = MAX_INT  # where it ends is not known


def _compare_index(writer: Writer, check: IntegrityCheck) -> None:
    """Compare what a writer remembers, if that is of the same moment."""
    before, index = writer.place, writer.index
    if index is None or before.seq != check.seq:
        return
    revisions = dict(index.revisions)
    stored = {key: revision for key, (revision, _) in check.content.items() if type(key) is str}
    if writer.place == before and revisions != stored:
        wrong = {task_id for task_id, _ in revisions.items() ^ stored.items()}
        check.problems.append(f"the writer's index is wrong about {sorted(wrong)[:SHOWN]}")
