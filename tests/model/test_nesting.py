"""The nesting limit of JSON; it does not depend on the interpreter or the stack."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from taskstore.errors import CorruptStoreError, ValidationError
from taskstore.model.codec import decode_or_quarantine, decode_record, encode_record
from taskstore.model.journal import Quarantined
from taskstore.model.records import METADATA_DEPTH, PAYLOAD_DEPTH
from taskstore.model.validation import exceeds_depth, validated
from taskstore.stores.jsonfile import lines
from taskstore.stores.jsonfile.index import decode_stub
from taskstore.testing import make_record

JSON = st.recursive(
    st.none() | st.text('"\\[]{}é\n'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('"\\[]{}'), inner),
)


def depth_of(value):
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def arrays(depth):
    return b"[" * depth + b"]" * depth


def newer(depth):
    """A payload of a newer version with this nesting depth, its own object included."""
    payload = encode_record(make_record(task_id="t")).replace(b'"v":"1.1"', b'"v":"1.7"')
    return payload[:-1] + b',"x":' + arrays(depth - 1) + b"}"


@given(JSON, st.booleans())
def test_the_depth_is_that_of_the_decoded_value(value, ascii_only):
    encoded = json.dumps(value, ensure_ascii=ascii_only).encode()
    depth = depth_of(value)
    assert not exceeds_depth(encoded, depth)
    assert depth == 0 or exceeds_depth(encoded, depth - 1)


def test_siblings_do_not_add_depth():
    assert not exceeds_depth(b"[" + b",".join([b'{"a":[]}'] * 1000) + b"]", 3)
    assert exceeds_depth(b"[" + b",".join([b'{"a":[]}'] * 1000) + b"]", 2)


def test_unclosed_brackets_count():
    assert exceeds_depth(b"[" * 100, 99)
    assert not exceeds_depth(b"[" * 100, 100)


def test_metadata_that_was_encoded_elsewhere():
    def with_metadata(depth):
        return make_record(metadata_json=Raw(b'{"a":' + arrays(depth - 1) + b"}"))

    assert validated(with_metadata(METADATA_DEPTH))
    with pytest.raises(ValidationError, match="metadata: is nested more than 64 levels deep"):
        validated(with_metadata(METADATA_DEPTH + 1))


def test_reading_and_storing_unknown_members_have_one_limit():
    record = decode_record(newer(PAYLOAD_DEPTH))
    assert encode_record(validated(record)) != b""
    with pytest.raises(CorruptStoreError, match="nested more than 128 levels deep"):
        decode_record(newer(PAYLOAD_DEPTH + 1))
    deeper = Raw(b'{"x":' + arrays(PAYLOAD_DEPTH) + b"}")
    with pytest.raises(ValidationError, match="unknown_json: is nested more than 128 levels deep"):
        validated(make_record(unknown_json=deeper))


@pytest.mark.parametrize("depth", [PAYLOAD_DEPTH + 1, 5000, 100_000])
def test_a_payload_over_the_limit_is_quarantined(depth):
    payload = newer(depth)
    item = decode_or_quarantine(payload, "here")
    assert isinstance(item, Quarantined)
    assert item.raw == payload
    assert decode_stub(payload) is None


def test_a_line_of_the_journal_holds_the_deepest_payload():
    def line(depth):
        entry = b'{"kind":"upserted","task_id":"t","revision":1,"record":%b}' % newer(depth)
        return b'{"crc":"00000000","commit":"c","seq":1,"at":1,"entries":[%b]}\n' % entry

    decoded = lines.decode_commit(line(PAYLOAD_DEPTH), "here", 0)
    entry = lines.journal_entry(decoded, 0, "here", strict=True)
    assert entry.record is not None
    with pytest.raises(CorruptStoreError, match="nested"):
        lines.decode_commit(line(PAYLOAD_DEPTH + 1), "here", 7)
    with pytest.raises(CorruptStoreError, match="nested"):
        lines.decode_header(b'{"x":' + arrays(5000) + b"}\n", "here")
