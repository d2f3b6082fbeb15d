"""The indexes answer like a scan of all records, after any sequence of changes."""

from __future__ import annotations

import gc
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskstore.model.journal import JournalEntry, Snapshot, dedup_key
from taskstore.model.query import CHUNK_ITEMS, TaskQuery, chunked_sort, evaluate
from taskstore.registry.cache import RecordCache
from taskstore.registry.indexes import INDEXED, Indexes
from taskstore.testing import make_record

FEW = st.sampled_from([None, "a", "b"])
RECORDS = st.builds(
    # The stores ensure that no two tasks have the same dedup key.
    lambda task_id, **fields: make_record(task_id=task_id, run_digest=task_id, **fields),
    task_id=st.sampled_from(["1", "2", "3", "4", "5"]),
    created_at=st.integers(0, 3),
    status=st.sampled_from(["queued", "running", "failed"]),
    runtime=st.sampled_from(["cli", "cron"]),
    run_id=FEW,
    child_session_key=FEW,
    requester_session_key=FEW,
    label=FEW,
)
STEPS = st.lists(st.one_of(RECORDS, st.sampled_from(["1", "2", "3", "4", "5"])), max_size=30)


def check(indexes, records):
    assert indexes.records == records
    assert indexes.keys == sorted(record.sort_key for record in records.values())
    for field in INDEXED:
        values = {getattr(record, field) for record in records.values()} - {None}
        for value in values | {"stranger"}:
            found = [r.sort_key for r in records.values() if getattr(r, field) == value]
            assert list(indexes.keys_of(field, value)) == sorted(found)
        counts = {str(v): len(indexes.keys_of(field, v)) for v in values}
        assert indexes.counts(field) == counts
    for record in records.values():
        key = dedup_key(record)
        if key is not None:
            assert indexes.by_dedup_key["\0".join(key)] == record.task_id


@given(STEPS)
def test_indexes_agree_with_the_records(steps):
    indexes, records = Indexes(), {}
    for step in steps:
        if isinstance(step, str):
            assert indexes.remove(step) == records.pop(step, None)
        else:
            assert indexes.put(step) == records.get(step.task_id)
            records[step.task_id] = step
        check(indexes, records)
    check(Indexes(records), records)
    indexes.clear()
    check(indexes, {})


@given(st.dictionaries(st.text(max_size=2), RECORDS), FEW)
def test_the_cache_answers_like_a_scan_of_all_records(given_records, session):
    records = {record.task_id: record for record in given_records.values()}
    cache = RecordCache()
    cache.reset(Snapshot(1, records))
    for query in (
        TaskQuery(),
        TaskQuery(label="a"),
        TaskQuery(session_key="a"),
        TaskQuery(status=["queued", "failed"], limit=2),
    ):
        assert cache.page(query, 1) == evaluate(query, records.values(), 1)


@pytest.mark.parametrize(
    "count", [0, 1, CHUNK_ITEMS, CHUNK_ITEMS + 1, 3 * CHUNK_ITEMS, 5 * CHUNK_ITEMS - 1]
)
def test_chunked_sort_sorts(count):
    chance = random.Random(count)
    items = [(chance.randrange(50), str(number)) for number in range(count)]
    assert chunked_sort(items) == sorted(items)


def test_an_index_adds_no_tracked_object_per_task():
    """A full collection blocks every thread, also that of the event loop."""
    records = {
        str(n): make_record(
            task_id=str(n),
            run_id=f"r{n}",
            run_digest="b",
            child_session_key=f"s{n}",
            owner_key="me",
        )
        for n in range(1000)
    }
    gc.collect()
    before = len(gc.get_objects())
    indexes = Indexes(records)
    entries = [JournalEntry(n, 0, "upserted", str(n), 1, records[str(n)]) for n in range(1000)]
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert len(indexes.records) == len(entries)
