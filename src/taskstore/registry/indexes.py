"""The indexes over the records in memory.

A full garbage collection blocks every thread while Python's garbage collector visits all tracked
objects.  The indexes therefore contain records and strings, which the garbage collector does not
track.  No index is a dictionary whose values are tuples, because the garbage collector can begin to
track such a dictionary.  An index contains a list only for a value that several tasks share.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from msgspec.structs import astuple

from taskstore.model.query import CHUNK_ITEMS, chunked_sort
from taskstore.model.records import OPTIONAL_KEYS, TaskRecord

Key = tuple[int, str]
"""The sort key of a record: (created_at, task_id)."""

_FieldIndex = dict[object, str | list[Key]]
"""The index of one field.  A value that only one task has is mapped to the id of this task; a value
that several tasks have is mapped to the sort keys of these tasks."""

INDEXED = ("status", "runtime", *sorted({*OPTIONAL_KEYS} - {"run_digest", "lease_token"}))
"""The names of the indexed record fields."""

_indexed_of = attrgetter(*INDEXED)
_creation_fields_of = attrgetter("created_at", "run_id", "run_digest", "runtime")
# The smallest slice of a record that contains all indexed fields has few other fields.
_POSITIONS = sorted(map(TaskRecord.__struct_fields__.index, ("created_at", "run_digest", *INDEXED)))
_INDEXED_SLICE = slice(_POSITIONS[0], _POSITIONS[-1] + 1)
_NO_RECORDS: Mapping[str, TaskRecord] = MappingProxyType({})


class Indexes:
    """The records by id, their sort keys, and an index of each indexed field.

    Only one thread at a time is allowed to use the indexes.  ``keys`` are the sort keys of all
    records, in order.  ``by_dedup_key`` maps a dedup key to its task id; the two parts of a dedup
    key are joined by a NUL character; neither part contains NUL.
    """

    def __init__(self, records: Mapping[str, TaskRecord] = _NO_RECORDS) -> None:
        self.records: dict[str, TaskRecord] = {}
        self.keys: list[Key] = []
        self._by_field: dict[str, _FieldIndex] = {field: {} for field in INDEXED}
        self.by_dedup_key: dict[str, str] = {}
        # Records are inserted in the order of their sort keys, so that each insertion is an append.
        keys = [(record.created_at, task_id) for task_id, record in records.items()]
        for _, task_id in sorted(keys) if len(keys) <= CHUNK_ITEMS else chunked_sort(keys):
            record = records[task_id]
            self._insert(record)
            self.records[task_id] = record

    def put(self, record: TaskRecord) -> TaskRecord | None:
        """Insert or replace a record; return the previous record with this id, or ``None``."""
        previous = self.records.get(record.task_id)
        if previous is None:
            self._insert(record)
        elif astuple(previous)[_INDEXED_SLICE] != astuple(record)[_INDEXED_SLICE]:
            self._update(previous, record)
        self.records[record.task_id] = record
        return previous

    def remove(self, task_id: str) -> TaskRecord | None:
        """Remove a record; returns the removed record, or ``None`` if the id is unknown."""
        record = self.records.pop(task_id, None)
        if record is not None:
            self._remove(record)
        return record

    def keys_of(self, field: str, value: object) -> Sequence[Key]:
        """Return the sort keys of the records with this value of an indexed field, in order."""
        entry = self._by_field[field].get(value, ())
        return [self.records[entry].sort_key] if isinstance(entry, str) else entry

    def counts(self, field: str) -> dict[str, int]:
        """Return the number of records per value of an indexed field."""
        entries = self._by_field[field].items()
        return {str(value): 1 if isinstance(entry, str) else len(entry) for value, entry in entries}

    def clear(self) -> None:
        """Remove all records in small steps, so that other threads run between the steps."""
        _clear_stepwise(self.records)
        _clear_stepwise(self.by_dedup_key)
        for index in self._by_field.values():
            _clear_stepwise(index)
        while self.keys:
            del self.keys[-1000:]

    def _insert(self, record: TaskRecord) -> None:
        key = (record.created_at, record.task_id)
        if not self.keys or self.keys[-1] < key:  # the usual case: a new task
            self.keys.append(key)
        else:
            insort(self.keys, key)
        self._add_key(zip(self._by_field.values(), _indexed_of(record), strict=True), key)
        if record.run_digest is not None and record.run_id is not None:
            self.by_dedup_key["\0".join((record.run_id, record.run_digest))] = record.task_id

    def _remove(self, record: TaskRecord) -> None:
        key = record.sort_key
        _remove_sorted(self.keys, key)
        for index, value in zip(self._by_field.values(), _indexed_of(record), strict=True):
            if value is not None:
                _remove_key(index, value, key)
        if record.run_digest is not None and record.run_id is not None:
            dedup_key = "\0".join((record.run_id, record.run_digest))
            if self.by_dedup_key.get(dedup_key) == record.task_id:
                del self.by_dedup_key[dedup_key]

    def _update(self, old: TaskRecord, new: TaskRecord) -> None:
        """Update the indexes of the fields whose value has changed."""
        if _creation_fields_of(old) != _creation_fields_of(new):
            self._remove(old)
            self._insert(new)
            return
        key = new.sort_key
        values = zip(self._by_field.values(), _indexed_of(old), _indexed_of(new), strict=True)
        changed = [each for each in values if each[1] != each[2]]
        for index, before, _ in changed:
            if before is not None:
                _remove_key(index, before, key)
        self._add_key(((index, after) for index, _, after in changed), key)

    def _add_key(self, targets: Iterable[tuple[_FieldIndex, str | None]], key: Key) -> None:
        """For each pair (index, value), add a sort key to the index under the value, except if the
        value is ``None``."""
        for index, value in targets:
            if value is None:
                continue
            entry = index.get(value)
            if entry is None:
                index[value] = key[1]
                continue
            if isinstance(entry, str):
                first = self.records[entry]
                entry = index[value] = [(first.created_at, entry)]
            if entry[-1] < key:  # the usual case: a new task
                entry.append(key)
            else:
                insort(entry, key)


def _remove_key(index: _FieldIndex, value: object, key: Key) -> None:
    entry = index[value]
    if not isinstance(entry, str):
        _remove_sorted(entry, key)
        if entry:
            return
    del index[value]


def _remove_sorted(keys: list[Key], key: Key) -> None:
    position = bisect_left(keys, key)
    if position < len(keys) and keys[position] == key:
        del keys[position]


def _clear_stepwise(mapping: MutableMapping[Any, Any]) -> None:
    """Remove all items from a mapping, one at a time."""
    while mapping:
        mapping.popitem()
