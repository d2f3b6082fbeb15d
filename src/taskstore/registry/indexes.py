"""By which fields the records in memory are found.

What is held for each task is such that the garbage collector does not look
at it: a full collection holds up every thread for as long as it has objects
to look at, and each new one may bring a dictionary of tuples back into its
view.  So records, and text as keys and values; lists only where several
tasks have the same value.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType

from msgspec.structs import astuple

from taskstore.model.chunked import RUN_ITEMS, chunked_sort, clear_in_chunks
from taskstore.model.records import OPTIONAL_KEYS, TaskRecord

Key = tuple[int, str]
"""A record's place in the order of lists: (created_at, task_id)."""

_Groups = dict[object, str | list[Key]]
"""Of each value of a field, the id of its only task, or the keys of several in order."""

INDEXED = ("status", "runtime", *sorted({*OPTIONAL_KEYS} - {"run_digest", "lease_token"}))
"""Fields by which records are found without reading others."""

_indexed_of = attrgetter(*INDEXED)
_fixed_of = attrgetter("created_at", "run_id", "run_digest", "runtime")
# What decides where a record stands, and little else: they are next to each other.
_PLACES = sorted(map(TaskRecord.__struct_fields__.index, ("created_at", "run_digest", *INDEXED)))
_PLACE = slice(_PLACES[0], _PLACES[-1] + 1)
_NO_RECORDS: Mapping[str, TaskRecord] = MappingProxyType({})


class Indexes:
    """Records by id, in order, and by the value of each indexed field.

    For one thread at a time.  ``keys`` are those of all records, in order;
    ``holders`` has the id of the task by dedup key, whose parts are joined by
    NUL, which neither holds.
    """

    def __init__(self, records: Mapping[str, TaskRecord] = _NO_RECORDS) -> None:
        self.records: dict[str, TaskRecord] = {}
        self.keys: list[Key] = []
        self._groups: dict[str, _Groups] = {field: {} for field in INDEXED}
        self.by_dedup_key: dict[str, str] = {}
        # In order, so that every index is filled by appending.
        keys = [(record.created_at, task_id) for task_id, record in records.items()]
        for _, task_id in sorted(keys) if len(keys) <= RUN_ITEMS else chunked_sort(keys):
            record = records[task_id]
            self._add(record)
            self.records[task_id] = record

    def put(self, record: TaskRecord) -> TaskRecord | None:
        """Take in a record, in the place of the one with its id; returns that one."""
        previous = self.records.get(record.task_id)
        if previous is None:
            self._add(record)
        elif astuple(previous)[_PLACE] != astuple(record)[_PLACE]:
            self._move(previous, record)
        self.records[record.task_id] = record
        return previous

    def remove(self, task_id: str) -> TaskRecord | None:
        """Forget a record; returns it, or ``None`` when there was none."""
        record = self.records.pop(task_id, None)
        if record is not None:
            self._discard(record)
        return record

    def group(self, field: str, value: object) -> Sequence[Key]:
        """The keys of the records with this value in an indexed field, in order."""
        held = self._groups[field].get(value, ())
        return [self.records[held].sort_key] if isinstance(held, str) else held

    def sizes(self, field: str) -> dict[str, int]:
        """How many records have which value in an indexed field."""
        groups = self._groups[field].items()
        return {str(value): 1 if isinstance(held, str) else len(held) for value, held in groups}

    def dismantle(self) -> None:
        """Let go of everything, so that other threads can run in between."""
        clear_in_chunks(self.records)
        clear_in_chunks(self.by_dedup_key)
        for groups in self._groups.values():
            clear_in_chunks(groups)
        while self.keys:
            del self.keys[-1000:]

    def _add(self, record: TaskRecord) -> None:
        key = (record.created_at, record.task_id)
        if not self.keys or self.keys[-1] < key:  # as new tasks are
            self.keys.append(key)
        else:
            insort(self.keys, key)
        self._group(zip(self._groups.values(), _indexed_of(record), strict=True), key)
        if record.run_digest is not None and record.run_id is not None:
            self.by_dedup_key["\0".join((record.run_id, record.run_digest))] = record.task_id

    def _discard(self, record: TaskRecord) -> None:
        key = record.sort_key
        _delete(self.keys, key)
        for groups, value in zip(self._groups.values(), _indexed_of(record), strict=True):
            if value is not None:
                _ungroup(groups, value, key)
        if record.run_digest is not None and record.run_id is not None:
            held_as = "\0".join((record.run_id, record.run_digest))
            if self.by_dedup_key.get(held_as) == record.task_id:
                del self.by_dedup_key[held_as]

    def _move(self, old: TaskRecord, new: TaskRecord) -> None:
        """Index a changed record: only the indexes whose value changed are touched."""
        if _fixed_of(old) != _fixed_of(new):
            self._discard(old)
            self._add(new)
            return
        key = new.sort_key
        moves = zip(self._groups.values(), _indexed_of(old), _indexed_of(new), strict=True)
        changed = [move for move in moves if move[1] != move[2]]
        for groups, left, _ in changed:
            if left is not None:
                _ungroup(groups, left, key)
        self._group(((groups, entered) for groups, _, entered in changed), key)

    def _group(self, places: Iterable[tuple[_Groups, str | None]], key: Key) -> None:
        """Enter a key under values; one that is ``None`` is not indexed."""
        for groups, value in places:
            if value is None:
                continue
            held = groups.get(value)
            if held is None:
                groups[value] = key[1]
                continue
            if isinstance(held, str):
                first = self.records[held]
                held = groups[value] = [(first.created_at, held)]
            if held[-1] < key:  # as new tasks are
                held.append(key)
            else:
                insort(held, key)


def _ungroup(groups: _Groups, value: object, key: Key) -> None:
    held = groups[value]
    if not isinstance(held, str):
        _delete(held, key)
        if held:
            return
    del groups[value]


def _delete(keys: list[Key], key: Key) -> None:
    position = bisect_left(keys, key)
    if position < len(keys) and keys[position] == key:
        del keys[position]
