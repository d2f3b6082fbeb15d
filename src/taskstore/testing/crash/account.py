"""The account: whether what writers were told is what the ledger holds.

A writer that changes tasks which others change too notes what it was told.
:func:`problems_of` then goes through the journal: each change has to be there
once, at the revision that was told, having changed what it said and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from taskstore.model.journal import JournalEntry
from taskstore.model.records import TaskRecord
from taskstore.testing.types import FullStore

PAGE_ENTRIES = 1000


class Change(Struct, frozen=True):
    """A change that was acknowledged: the ``count``-th of ``writer``.

    It is the task's new progress summary, or else a member of its metadata.
    """

    task_id: str
    revision: int
    writer: str
    count: int
    progress: bool


def problems_of(
    store: FullStore,
    start: int,
    task_ids: Sequence[str],
    changes: Iterable[Change],
    mirrors: Iterable[Mapping[str, int]] = (),
) -> list[str]:
    """Compare acknowledged changes with the journal after seq ``start``; returns what is wrong.

    The tasks were created there, and nothing but ``changes`` happened to
    them.  ``mirrors`` are revisions by task id, as processes see them.
    """
    problems: list[str] = []
    acknowledged: dict[tuple[str, int], Change | None] = {}
    for change in changes:
        other = acknowledged.setdefault((change.task_id, change.revision), change)
        if other is not change:
            problems.append(f"{other} and {change} got the same revision")
    last: dict[str, TaskRecord] = {}
    for entry in _journal(store, start, problems):
        if entry.task_id in task_ids:
            told = acknowledged.pop((entry.task_id, entry.revision), None)
            problems += _entry_problems(entry, last.get(entry.task_id), told)
            if entry.record is not None:
                last[entry.task_id] = entry.record
    problems += [f"{change} is not in the journal" for change in acknowledged.values()]
    current = store.load_snapshot().records
    for task_id in task_ids:
        if current.get(task_id) != last.get(task_id):
            problems.append(f"{task_id}: the record is not the last one in the journal")
    revisions = {task_id: last[task_id].revision for task_id in task_ids if task_id in last}
    problems += [
        f"a mirror has {mirror}, the journal {revisions}"
        for mirror in mirrors
        if mirror != revisions
    ]
    return problems


def _journal(store: FullStore, start: int, problems: list[str]) -> Iterator[JournalEntry]:
    seq = start
    while entries := store.read_journal(seq, PAGE_ENTRIES):
        for entry in entries:
            if entry.seq != seq + 1:
                problems.append(f"seq {entry.seq} comes after {seq}")
            seq = entry.seq
            yield entry


def _entry_problems(
    entry: JournalEntry, before: TaskRecord | None, change: Change | None
) -> list[str]:
    """What is wrong with an entry, after the one before it of the same task."""
    where, record = f"{entry.task_id} at revision {entry.revision}", entry.record
    if entry.revision != (1 if before is None else before.revision + 1):
        return [f"{where} comes after {before and before.revision}"]
    if before is None:
        return []
    if change is None:
        return [f"{where} was acknowledged to nobody"]
    if record is None:
        return [f"{where} is gone"]
    progress, metadata = before.progress_summary, before.metadata
    if change.progress:
        progress = f"{change.writer} {change.count}"
    else:
        metadata[change.writer] = change.count
    if (record.progress_summary, record.metadata) != (progress, metadata):
        return [f"{where} is not what {change} makes of the one before: {record}"]
    return []
