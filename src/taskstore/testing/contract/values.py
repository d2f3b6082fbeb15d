"""Core: nasty values are stored exactly or refused alike, wherever they pass through."""

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
    """A record with these fields, as a ``Put`` would hold it."""
    return Put(make_record(**fields)).record


def unchecked(fields: dict[str, Any]) -> TaskRecord:
    """A record with these fields, past every check that is not the store's own."""
    metadata = fields.get("metadata")
    if metadata is not None and not isinstance(metadata, Raw):
        fields = {**fields, "metadata": Raw(json.dumps(metadata).encode())}
    return make_record(**fields)


def root_of(field: str) -> str:
    """The record field of a path such as ``metadata.a[0]``."""
    return field.split(".", maxsplit=1)[0].split(" ", maxsplit=1)[0].split("[", maxsplit=1)[0]


def same(found: TaskRecord, stored: TaskRecord) -> bool:
    """Whether two records are the same to the last byte, and of the same types."""
    types = [type(getattr(found, field)) for field in TaskRecord.__struct_fields__]
    return types == [
        type(getattr(stored, field)) for field in TaskRecord.__struct_fields__
    ] and encode_record(found) == encode_record(stored)


def finds(store: FullStore, row: Nasty, record: TaskRecord, other: TaskRecord | None) -> None:
    """Check that asking for the nasty value finds its record, and not the twin."""
    for field in row.fields:
        if field in ("metadata", "requester_origin"):
            continue
        value = getattr(record, field)
        found = {item.task_id for item in store.query(TaskQuery(**{field: value}))}
        assert record.task_id in found, f"{field}={value!r} does not find its record"
        if other is not None and getattr(other, field) != value:
            assert other.task_id not in found, f"{field}={value!r} finds the twin"


class ValuesContract(ContractBase):
    """The table of nasty values, one clause for each row."""

    @pytest.mark.parametrize("row", STORED, ids=lambda row: row.name)
    def test_nasty_value_is_stored_exactly(self, ledger: Ledger, row: Nasty) -> None:
        """[11] The value comes back the same from records, journal, query and snapshots."""
        record = record_of(row.fields)
        twin = record_of(row.twin) if row.twin is not None else None
        expected = {item.task_id: item for item in (record, twin) if item is not None}
        for item in expected.values():
            ledger.store.apply([Put(item)])
        self._check(ledger.store, expected)
        self._find(ledger.store, row, record, twin)
        changed = next_of(record, status=TaskStatus.RUNNING).record
        ledger.store.apply([Put(changed)])
        expected[record.task_id] = changed
        if isinstance(ledger.store, SupportsCompaction):
            ledger.store.compact(FOLD)
        for store in ledger.twice():
            self._check(store, expected)
            self._find(store, row, changed, twin)
        ledger.store.save_snapshot(Snapshot(1000, expected))
        self._check(ledger.reopened(), expected)

    def _find(
        self, store: FullStore, row: Nasty, record: TaskRecord, twin: TaskRecord | None
    ) -> None:
        if isinstance(store, SupportsQuery):
            finds(store, row, record, twin)

    def _check(self, store: FullStore, expected: dict[str, TaskRecord]) -> None:
        """Compare everything that the store holds, byte by byte."""
        loaded = store.load_snapshot()
        assert loaded.quarantined == ()
        assert set(loaded.records) == set(expected)
        for task_id, record in expected.items():
            assert same(loaded.records[task_id], record)
        if isinstance(store, SupportsJournal):
            last = {entry.task_id: entry.record for entry in journal_of(store)}
            for task_id, found in last.items():
                assert found is not None
                assert same(found, expected[task_id])
            kept = store.read_snapshot(store.head())
            for record in kept.records.values() if kept is not None else ():
                assert same(record, expected[record.task_id])

    @pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
    def test_nasty_value_is_refused(self, ledger: Ledger, row: Nasty) -> None:
        """[11] The value is refused naming its field, and nothing is written."""
        good = make_record()
        with ledger.unchanged():
            with pytest.raises(ValidationError) as caught:
                ledger.store.apply([Put(good), Put(make_record(**row.fields))])
            assert root_of(caught.value.field) == row.refused
            try:
                bad = unchecked(row.fields)
            except TypeError:
                return  # what JSON cannot say cannot be in a record either
            with pytest.raises(ValidationError) as caught:
                ledger.store.save_snapshot(Snapshot(3, {good.task_id: good, bad.task_id: bad}))
            assert root_of(caught.value.field) == row.refused

    def test_all_nasty_values_together(self, ledger: Ledger) -> None:
        """[11] All values in one batch, beside each other, stay apart."""
        rows = [fields for row in STORED for fields in (row.fields, row.twin) if fields is not None]
        records: dict[str, TaskRecord] = {}
        runs: set[str | None] = {None}
        for fields in rows:
            record = record_of(fields)
            if record.run_id not in runs or record.run_id is None:
                records.setdefault(record.task_id, record)
            runs.add(record.run_id)
        ledger.store.apply([Put(record) for record in records.values()])
        for store in ledger.twice():
            assert dict(store.load_snapshot().records) == records

    def test_every_field_at_once(self, ledger: Ledger) -> None:
        """[11] A record with every field set, each to another value, is not mixed up."""
        full: dict[str, Any] = {
            field: f"{field}-value"
            for field in TaskRecord.__struct_fields__
            if field not in ("metadata_json", "unknown_json", "revision", "runtime")
        }
        times = ("created_at", *OPTIONAL_TIMES)
        full |= {field: 1000 + place for place, field in enumerate(times)}
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
        for store in ledger.twice():
            assert same(store.load_snapshot().records[record.task_id], record)
