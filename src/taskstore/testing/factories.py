"""Factories of records, changes and a model ledger for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Raw
from msgspec.structs import replace

from taskstore.model.ids import new_task_id
from taskstore.model.journal import Change, EntryKind, Put, Remove, Snapshot
from taskstore.model.lifecycle import run_digest
from taskstore.model.records import TaskRecord, TaskStatus
from taskstore.model.validation import encode_metadata
from taskstore.store.interface import TaskRegistryStore

EPOCH_MS = 1_700_000_000_000
"""The default ``created_at`` of test records, in Unix milliseconds."""


def make_record(**fields: Any) -> TaskRecord:
    """Return a record at revision 1: a queued task that has a new id and no owner.

    ``fields`` replace these defaults.  ``metadata`` can be a mapping.  If ``run_id`` is given
    without ``run_digest``, this function computes ``run_digest``.  This function does not
    validate the record; ``Put`` validates the record.
    """
    metadata = fields.pop("metadata", None)
    if metadata is not None:
        fields["metadata_json"] = (
            metadata if isinstance(metadata, Raw) else encode_metadata(metadata)
        )
    record = TaskRecord(
        **{
            "task_id": new_task_id(),
            "revision": 1,
            "runtime": "subagent",
            "task": "Summarise the inbox",
            "status": TaskStatus.QUEUED,
            "created_at": EPOCH_MS,
            **fields,
        }
    )
    if record.run_id is not None and "run_digest" not in fields:
        record = replace(record, run_digest=run_digest(record))
    return record


def make_put(**fields: Any) -> Put:
    """Return the change that creates ``make_record(**fields)``."""
    return Put(make_record(**fields))


def next_of(record: TaskRecord, **fields: Any) -> Put:
    """Return a Put of the next revision of ``record``; ``fields`` replace fields of ``record``."""
    return Put(replace(record, **{"revision": record.revision + 1, **fields}))


def removal_of(record: TaskRecord) -> Remove:
    """Return the change that deletes ``record``."""
    return Remove(record.task_id, record.revision + 1)


def create(store: TaskRegistryStore, **fields: Any) -> TaskRecord:
    """Create a task in one commit and return its record."""
    change = make_put(**fields)
    store.apply([change])
    return change.record


def update(store: TaskRegistryStore, record: TaskRecord, **fields: Any) -> TaskRecord:
    """Store the next revision of a task in one commit and return the new record."""
    change = next_of(record, **fields)
    store.apply([change])
    return change.record


def delete(store: TaskRegistryStore, *records: TaskRecord) -> None:
    """Delete tasks in one commit."""
    store.apply([removal_of(record) for record in records])


class Model:
    """The expected content of a ledger in plain dicts, for comparison with a store.

    ``states`` maps each seq to the records as of that seq.  ``entries`` is the
    expected journal, as a list of tuples ``(seq, kind, task_id, revision, record)``.
    """

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        snapshot = snapshot if snapshot is not None else Snapshot(0)
        self.head = snapshot.seq
        self.floor = snapshot.seq + 1
        self.states: dict[int, dict[str, TaskRecord]] = {snapshot.seq: dict(snapshot.records)}
        self.entries: list[tuple[int, EntryKind, str, int, TaskRecord | None]] = []

    @property
    def records(self) -> Mapping[str, TaskRecord]:
        """The expected records as of the head of the model."""
        return self.states[self.head]

    @property
    def deleted(self) -> set[str]:
        """The ids of the tasks whose deletion is in ``entries``."""
        return {entry[2] for entry in self.entries if entry[1] is EntryKind.DELETED}

    def accepts(self, changes: list[Change], *, remembers_deletions: bool = True) -> bool:
        """Return whether a batch has no conflict of revisions, deleted tasks or dedup keys [3]."""
        records = dict(self.records)
        deleted_ids = self.deleted if remembers_deletions else set()
        for change in changes:
            stored = records.pop(change.task_id, None)
            base = 0 if stored is None else stored.revision
            if change.task_id in deleted_ids or change.revision != base + 1:
                return False
            if isinstance(change, Put):
                records[change.task_id] = change.record
            else:
                deleted_ids.add(change.task_id)
        keys = [(r.run_id, r.run_digest) for r in records.values() if r.run_id and r.run_digest]
        return len(keys) == len(set(keys))

    def commit(self, changes: list[Change]) -> None:
        """Apply a batch to the model; :meth:`accepts` must be true for the batch."""
        for change in changes:
            records = dict(self.records)
            self.head += 1
            if isinstance(change, Put):
                records[change.task_id] = change.record
                kind, record = EntryKind.UPSERTED, change.record
            else:
                del records[change.task_id]
                kind, record = EntryKind.DELETED, None
            self.states[self.head] = records
            self.entries.append((self.head, kind, change.task_id, change.revision, record))

    def trim(self, floor: int) -> None:
        """Drop the entries below seq ``floor`` and the states below seq ``floor - 1``."""
        self.floor = floor
        self.entries = [entry for entry in self.entries if entry[0] >= floor]
        self.states = {seq: state for seq, state in self.states.items() if seq >= floor - 1}


def play(store: TaskRegistryStore, model: Model | None = None) -> Model:
    """Apply a mixed history to ``store`` and return a model of the expected content.

    The history has creations, updates, deletions, and batches that mix these changes.  One
    batch changes the same task several times, and one batch creates and deletes a task.  A
    run is created again after the task of the run was deleted.
    """
    model = model if model is not None else Model(store.load_snapshot())
    first = make_record(label="first", run_id=f"run-{model.head}", metadata={"n": 1})
    repeated = make_record(label="first", run_id=f"run-{model.head}", metadata={"n": 2})
    others = [make_record(label=f"many {n}", created_at=EPOCH_MS + n % 3) for n in range(6)]
    transient = make_record(label="transient")
    second = next_of(first, status=TaskStatus.RUNNING, started_at=EPOCH_MS + 5)
    third = next_of(second.record, error="no answer", metadata_json=encode_metadata({"n": [1, {}]}))
    batches: list[list[Change]] = [
        [Put(first)],
        [second],
        [Put(record) for record in others],
        [Put(transient), next_of(transient, error="gone"), Remove(transient.task_id, 3)],
        [third, next_of(others[0], label="changed"), removal_of(others[1])],
        [removal_of(third.record), removal_of(others[2])],
        [Put(repeated), next_of(repeated, status=TaskStatus.FAILED), next_of(others[3], label="")],
        [next_of(others[4], progress_summary="3 of 10")],
    ]
    for changes in batches:
        store.apply(changes)
        model.commit(changes)
    return model
