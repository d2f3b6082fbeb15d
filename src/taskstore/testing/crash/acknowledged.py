"""The ledger check: acknowledged changes compared with the journal.

Several writers change the same tasks and record each acknowledged change.
:func:`check_ledger` then reads the journal.  Each acknowledged change must be in the
journal exactly once, at the acknowledged revision.  A change of the progress must leave the
metadata unchanged, and a change of the metadata must leave the progress unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from taskstore.model.journal import JournalEntry
from taskstore.model.records import TaskRecord
from taskstore.testing.types import FullStore

PAGE_ENTRIES = 1000


class AcknowledgedChange(Struct, frozen=True):
    """An acknowledged change: the ``count``-th change of ``writer``.

    If ``progress`` is true, the change set the progress summary; otherwise the change set a
    metadata member.
    """

    task_id: str
    revision: int
    writer: str
    count: int
    progress: bool


def check_ledger(
    store: FullStore,
    after: int,
    task_ids: Sequence[str],
    changes: Iterable[AcknowledgedChange],
    caches: Iterable[Mapping[str, int]] = (),
) -> list[str]:
    """Compare ``changes`` with the journal entries above seq ``after``; return the problems.

    The creations of all tasks have seqs above ``after``, and only ``changes`` changed the tasks.
    Each item of ``caches`` maps task ids to the revisions in the record cache of one process.
    """
    problems: list[str] = []
    acknowledged: dict[tuple[str, int], AcknowledgedChange | None] = {}
    for change in changes:
        other = acknowledged.setdefault((change.task_id, change.revision), change)
        if other is not change:
            problems.append(f"{other} and {change} were acknowledged with the same revision")
    newest: dict[str, TaskRecord] = {}
    for entry in _journal(store, after, problems):
        if entry.task_id in task_ids:
            expected = acknowledged.pop((entry.task_id, entry.revision), None)
            problems += _check_entry(entry, newest.get(entry.task_id), expected)
            if entry.record is not None:
                newest[entry.task_id] = entry.record
    problems += [f"{change} is not in the journal" for change in acknowledged.values()]
    current = store.load_snapshot().records
    for task_id in task_ids:
        if current.get(task_id) != newest.get(task_id):
            problems.append(f"{task_id}: the record differs from the last journal entry")
    revisions = {task_id: newest[task_id].revision for task_id in task_ids if task_id in newest}
    problems += [
        f"a record cache has the revisions {cache}, but the journal has {revisions}"
        for cache in caches
        if cache != revisions
    ]
    return problems


def _journal(store: FullStore, after: int, problems: list[str]) -> Iterator[JournalEntry]:
    seq = after
    while entries := store.read_journal(seq, PAGE_ENTRIES):
        for entry in entries:
            if entry.seq != seq + 1:
                problems.append(f"seq {entry.seq} follows seq {seq}")
            seq = entry.seq
            yield entry


def _check_entry(
    entry: JournalEntry, before: TaskRecord | None, change: AcknowledgedChange | None
) -> list[str]:
    """Return the problems of an entry; ``before`` is the previous record of the task."""
    label, record = f"{entry.task_id} at revision {entry.revision}", entry.record
    if entry.revision != (1 if before is None else before.revision + 1):
        return [f"{label} follows revision {before and before.revision}"]
    if before is None:
        return []
    if change is None:
        return [f"{label} was not acknowledged"]
    if record is None:
        return [f"{label} has no record"]
    progress, metadata = before.progress_summary, before.metadata
    if change.progress:
        progress = f"{change.writer} {change.count}"
    else:
        metadata[change.writer] = change.count
    if (record.progress_summary, record.metadata) != (progress, metadata):
        return [f"{label} is not the previous record with {change} applied: {record}"]
    return []
