"""Core clauses: the nasty values are stored exactly or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import Raw

from taskstore.errors import ValidationError
from taskstore.model.codec import encode_record
from taskstore.model.journal import Put, Snapshot
from taskstore.model.query import TaskQuery
from taskstore.model.records import OPTIONAL_TIMES, DeliveryContext, TaskRecord, TaskStatus
from taskstore.store.interface import SupportsCompaction, SupportsJournal, SupportsQuery
from taskstore.testing.contract.base import ContractBase, Ledger, journal_of
from taskstore.testing.contract.compaction import FOLD
from taskstore.testing.factories import make_record, next_of, play
from taskstore.testing.types import FullStore
from taskstore.testing.values import REFUSED, STORED, Nasty


def record_of(fields: dict[str, Any]) -> TaskRecord:
    """Return a valid record with these fields; invalid fields raise ``ValidationError``."""
    return Put(make_record(**fields)).record


def unchecked(fields: dict[str, Any]) -> TaskRecord:
    """Return a record with these fields, without any validation."""
    metadata = fields.get("metadata")
    if metadata is not None and not isinstance(metadata, Raw):
        fields = {**fields, "metadata": Raw(json.dumps(metadata).encode())}
    return make_record(**fields)


def root_of(field: str) -> str:
    """Return the first field of a path, for example ``metadata`` for ``metadata.a[0]``."""
    return field.split(".", maxsplit=1)[0].split(" ", maxsplit=1)[0].split("[", maxsplit=1)[0]


def identical(actual: TaskRecord, expected: TaskRecord) -> bool:
    """Return whether two records have the same encoded bytes and the same field types."""
    types = [type(getattr(actual, field)) for field in TaskRecord.__struct_fields__]
    return types == [
        type(getattr(expected, field)) for field in TaskRecord.__struct_fields__
    ] and encode_record(actual) == encode_record(expected)


def check_query(store: FullStore, row: Nasty, record: TaskRecord, twin: TaskRecord | None) -> None:
    """Check that a query for a nasty value returns only the record that has this value."""
    for field in row.fields:
        if field in ("metadata", "requester_origin"):
            continue
        value = getattr(record, field)
        found = {item.task_id for item in store.query(TaskQuery(**{field: value}))}
        assert record.task_id in found, f"the query {field}={value!r} does not return its record"
        if twin is not None and getattr(twin, field) != value:
            assert twin.task_id not in found, f"the query {field}={value!r} returns the twin"


class ValuesContract(ContractBase):
    """The clauses about the nasty values of ``taskstore.testing.values``: the store keeps each
    value exactly, or refuses the value."""

    @pytest.mark.parametrize("row", STORED, ids=lambda row: row.name)
    def test_nasty_value_is_stored_exactly(self, ledger: Ledger, row: Nasty) -> None:
        """[11] Loads, journal reads, queries and snapshot reads return a nasty value unchanged."""
        record = record_of(row.fields)
        twin = record_of(row.twin) if row.twin is not None else None
        expected = {item.task_id: item for item in (record, twin) if item is not None}
        for item in expected.values():
            ledger.store.apply([Put(item)])
        self._check(ledger.store, expected)
        self._check_query(ledger.store, row, record, twin)
        changed = next_of(record, status=TaskStatus.RUNNING).record
        ledger.store.apply([Put(changed)])
        expected[record.task_id] = changed
        if isinstance(ledger.store, SupportsCompaction):
            ledger.store.compact(FOLD)
        for store in ledger.before_and_after_reopen():
            self._check(store, expected)
            self._check_query(store, row, changed, twin)
        ledger.store.save_snapshot(Snapshot(1000, expected))
        self._check(ledger.reopened(), expected)

    def _check_query(
        self, store: FullStore, row: Nasty, record: TaskRecord, twin: TaskRecord | None
    ) -> None:
        if isinstance(store, SupportsQuery):
            check_query(store, row, record, twin)

    def _check(self, store: FullStore, expected: dict[str, TaskRecord]) -> None:
        """Compare all stored records with the expected records, byte by byte."""
        loaded = store.load_snapshot()
        assert loaded.quarantined == ()
        assert set(loaded.records) == set(expected)
        for task_id, record in expected.items():
            assert identical(loaded.records[task_id], record)
        if isinstance(store, SupportsJournal):
            last = {entry.task_id: entry.record for entry in journal_of(store)}
            for task_id, newest in last.items():
                assert newest is not None
                assert identical(newest, expected[task_id])
            kept = store.read_snapshot(store.head())
            for record in kept.records.values() if kept is not None else ():
                assert identical(record, expected[record.task_id])

    @pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
    def test_nasty_value_is_refused(self, ledger: Ledger, row: Nasty) -> None:
        """[11] The store refuses an invalid value, names the field, and writes nothing."""
        valid = make_record()
        with ledger.unchanged():
            with pytest.raises(ValidationError) as caught:
                ledger.store.apply([Put(valid), Put(make_record(**row.fields))])
            assert root_of(caught.value.field) == row.refused
            try:
                invalid = unchecked(row.fields)
            except TypeError:
                return  # a value that JSON cannot represent cannot be in a record
            with pytest.raises(ValidationError) as caught:
                ledger.store.save_snapshot(Snapshot(3, {r.task_id: r for r in (valid, invalid)}))
            assert root_of(caught.value.field) == row.refused

    def test_all_nasty_values_together(self, ledger: Ledger) -> None:
        """[11] One batch can store all nasty values, each value in its own record."""
        rows = [fields for row in STORED for fields in (row.fields, row.twin) if fields is not None]
        records: dict[str, TaskRecord] = {}
        runs: set[str | None] = {None}
        for fields in rows:
            record = record_of(fields)
            if record.run_id not in runs or record.run_id is None:
                records.setdefault(record.task_id, record)
            runs.add(record.run_id)
        ledger.store.apply([Put(record) for record in records.values()])
        for store in ledger.before_and_after_reopen():
            assert dict(store.load_snapshot().records) == records

    def test_every_field_at_once(self, ledger: Ledger) -> None:
        """[11] A record with a different value in every field is stored unchanged."""
        full: dict[str, Any] = {
            field: f"{field}-value"
            for field in TaskRecord.__struct_fields__
            if field not in ("metadata_json", "unknown_json", "revision", "runtime")
        }
        times = ("created_at", *OPTIONAL_TIMES)
        full |= {field: 1000 + index for index, field in enumerate(times)}
        full |= {
            "status": "lost",
            "scope_kind": "session",
            "delivery_status": "session_queued",
            "notify_policy": "silent",
            "terminal_outcome": "blocked",
            "requester_origin": DeliveryContext(channel="c", to="t", account_id="a", thread_id="h"),
            "metadata": {"m": 1},
        }
        record = record_of(full)
        play(ledger.store)
        ledger.store.apply([Put(record)])
        for store in ledger.before_and_after_reopen():
            assert identical(store.load_snapshot().records[record.task_id], record)
