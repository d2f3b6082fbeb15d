"""Properties of the encoding: round trips, and detection of any damage."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskstore.errors import CorruptStoreError
from taskstore.model.codec import (
    checksum,
    decode_or_quarantine,
    decode_record,
    decode_snapshot,
    encode_record,
    encode_snapshot,
)
from taskstore.model.journal import Quarantined, Snapshot
from taskstore.model.records import TaskRecord
from taskstore.model.validation import validated
from taskstore.testing.strategies import metadata, records


@given(records())
def test_record_round_trip(record):
    assert validated(record) == record
    payload = encode_record(record)
    assert decode_record(payload) == record
    assert encode_record(decode_record(payload)) == payload
    assert decode_record(payload).metadata == record.metadata


@given(records(), st.dictionaries(st.text("xyz", min_size=1), metadata(), max_size=3))
def test_round_trip_of_a_newer_record(record, unknown):
    members = json.loads(encode_record(record))
    members |= {"v": "1.7", **unknown}
    payload = json.dumps(members).encode()
    newer = decode_record(payload)
    assert {**members, "metadata": newer.metadata} == {
        **json.loads(encode_record(newer)),
        "metadata": newer.metadata,
    }
    assert decode_record(encode_record(newer)) == newer
    assert validated(newer) is newer


@given(records(), st.data())
def test_a_damaged_payload_is_corrupt_or_a_record(record, data):
    payload = bytearray(encode_record(record))
    for _ in range(data.draw(st.integers(1, 3))):
        offset = data.draw(st.integers(0, len(payload) - 1))
        payload[offset] = data.draw(st.integers(0, 255))
    damaged = bytes(payload)[: data.draw(st.integers(0, len(payload)))]
    try:
        decoded = decode_record(damaged)
    except CorruptStoreError:
        assert isinstance(decode_or_quarantine(damaged, "here"), Quarantined)
    else:
        assert isinstance(decoded, TaskRecord)


@given(st.binary(max_size=200))
def test_any_bytes_are_corrupt_or_a_record(raw):
    assert isinstance(decode_or_quarantine(raw, "here"), TaskRecord | Quarantined)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(records(), st.sampled_from(TaskRecord.__struct_fields__), JSON, st.sampled_from("08"))
def test_any_value_in_any_field_is_corrupt_or_a_record(record, field, value, minor):
    field = {"metadata_json": "metadata", "unknown_json": "_unknown"}.get(field, field)
    members = json.loads(encode_record(record)) | {field: value, "v": f"1.{minor}"}
    raw = json.dumps(members).encode()
    decoded = decode_or_quarantine(raw, "here")
    if isinstance(decoded, TaskRecord):
        encode_record(decoded)


@given(st.lists(records(), max_size=4), st.integers(0, 99), st.lists(st.binary(max_size=9)))
def test_snapshot_round_trip(some, seq, raw):
    quarantined = tuple(Quarantined(each, "here", "why") for each in raw)
    by_run = {(r.run_id, r.run_digest): r for r in some if r.run_id and r.run_digest}
    kept = [r for r in some if by_run.get((r.run_id, r.run_digest), r) is r]
    snapshot = Snapshot(seq, {record.task_id: record for record in kept}, seq, quarantined)
    assert decode_snapshot(encode_snapshot(snapshot)) == snapshot


@given(records(), st.data())
def test_a_damaged_snapshot_is_corrupt(record, data):
    whole = bytearray(encode_snapshot(Snapshot(3, {record.task_id: record}, 5)))
    offset = data.draw(st.integers(0, len(whole) - 1))
    whole[offset] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptStoreError):
        decode_snapshot(bytes(whole))


@given(st.binary(min_size=1, max_size=50), st.data())
def test_the_checksum_detects_one_changed_byte(payload, data):
    changed = bytearray(payload)
    changed[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    assert checksum(bytes(changed)) != checksum(payload)
