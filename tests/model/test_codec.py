"""The encoding of payloads and snapshots; damage raises only CorruptStoreError."""

from __future__ import annotations

import json

import pytest
from msgspec import Raw
from msgspec.structs import replace

from taskstore.errors import CorruptStoreError, ValidationError
from taskstore.model import codec
from taskstore.model.codec import (
    checksum,
    decode_or_quarantine,
    decode_record,
    decode_snapshot,
    encode_record,
    encode_snapshot,
    quarantine,
)
from taskstore.model.journal import Quarantined, Snapshot
from taskstore.model.records import FORMAT_VERSION, NO_METADATA, TaskStatus
from taskstore.testing import make_record

BASE = {
    "task_id": "a",
    "revision": 1,
    "runtime": "cli",
    "task": "x",
    "status": "queued",
    "created_at": 1,
}


def payload(version=FORMAT_VERSION, **members) -> bytes:
    return json.dumps({"v": version, **BASE, **members}).encode()


def test_the_format_version_comes_first():
    assert encode_record(make_record()).startswith(
        b'{"v":"%s","task_id":' % FORMAT_VERSION.encode()
    )


def test_defaults_are_left_out():
    assert json.loads(
        encode_record(
            make_record(task_id="a", **{k: BASE[k] for k in ("runtime", "task", "created_at")})
        )
    ) == {
        "v": FORMAT_VERSION,
        **BASE,
    }


def test_metadata_does_not_keep_the_payload_in_memory():
    record = decode_record(encode_record(make_record(task="x" * 10_000, metadata={"a": 1})))
    assert len(memoryview(record.metadata_json).obj) < 100


def test_no_metadata_is_shared():
    assert decode_record(payload()).metadata_json is NO_METADATA


@pytest.mark.parametrize("version", ["1.2", "1.7", "1.99999"])
def test_a_newer_minor_version_keeps_unknown_members(version):
    raw = payload(version, colour=["red", {"deep": 1}], metadata={"b": 1.5}, _unknown={"x": 1})
    record = decode_record(raw)
    assert record.status is TaskStatus.QUEUED
    assert record.metadata == {"b": 1.5}
    again = encode_record(replace(record, revision=2))
    assert json.loads(again) == {**json.loads(raw), "revision": 2}
    assert decode_record(again) == replace(record, revision=2)


def test_the_version_before_leases_is_read_as_this_one():
    now = encode_record(make_record(metadata={"a": 1}))
    before = now.replace(b'{"v":"1.1",', b'{"v":"1.0",')
    assert before != now
    assert encode_record(decode_record(before)) == now
    assert encode_record(decode_record(before.replace(b'{"v"', b'{ "v"'))) == now
    kept = decode_record(before.replace(b'{"v":"1.0",', b'{"v":"1.0","colour":"red",'))
    assert json.loads(encode_record(kept)) == {**json.loads(now), "colour": "red"}


def test_unknown_fields_of_this_version_are_kept():
    assert json.loads(encode_record(decode_record(payload(colour="red"))))["colour"] == "red"


@pytest.mark.parametrize(
    "version",
    ["0.9", "2.0", "10.0", "1", "1.", "1.x", "01.0", "", 1, 1.0, None, True, ["1.0"], {"v": "1.0"}],
)
def test_other_versions_are_refused(version):
    with pytest.raises(CorruptStoreError) as caught:
        decode_record(payload(version), "here")
    assert caught.value.where == "here"


def test_upcasters_lead_from_version_to_version(monkeypatch):
    def from_0_8(members):
        task = members.pop("what")
        return {**members, "v": "0.9", "task": task}

    def from_0_9(members):
        return {**members, "v": "1.0", "status": members["status"].lower()}

    monkeypatch.setitem(codec.UPCASTERS, "0.8", from_0_8)
    monkeypatch.setitem(codec.UPCASTERS, "0.9", from_0_9)
    old = {**BASE, "v": "0.8", "what": "x", "status": "QUEUED"}
    del old["task"]
    assert decode_record(json.dumps(old).encode()) == decode_record(payload())


def test_an_upcaster_that_fails_on_damage(monkeypatch):
    monkeypatch.setitem(codec.UPCASTERS, "0.9", lambda members: {**members, "v": members["next"]})
    with pytest.raises(CorruptStoreError):
        decode_record(payload("0.9"))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b"\xff\xfe",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"v":"1.1","metadata":' + b"[" * 100_000,
        payload()[:-1],
        payload() + b"x",
        payload(status="paused"),
        payload(status=5),
        payload(revision="1"),
        payload(created_at=1.5),
        payload(task_id=None),
        payload(label=5),
        payload(requester_origin=[]),
        payload(requester_origin={"to": 5}),
        payload()[:-1] + b',"metadata":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        payload("1.7")[:-1] + b',"metadata":{"a":1e999}}',
        payload("1.7")[:-1] + b',"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
        payload(metadata=5),
        payload(metadata=[]),
        payload(metadata=None),
        payload("1.7", metadata="x"),
        payload(task="\ud800"),
        b'{"v":"1.1","task_id":"\xff\xff"}',
    ],
)
def test_damage_raises_only_corrupt_store_error(raw):
    with pytest.raises(CorruptStoreError):
        decode_record(raw)
    quarantined = decode_or_quarantine(raw, "row 5")
    assert isinstance(quarantined, Quarantined)
    assert (quarantined.raw, quarantined.where) == (raw, "row 5")
    assert quarantined.reason


def test_quarantine_reads_the_id_and_revision_if_possible():
    quarantined = quarantine(payload("9.0", revision=4), "here", "why")
    assert (quarantined.task_id, quarantined.revision, quarantined.reason) == ("a", 4, "why")
    quarantined = quarantine(b'{"task_id":5,"revision":true}', "here", "why")
    assert (quarantined.task_id, quarantined.revision) == (None, None)


def test_checksum_is_crc_32():
    assert checksum(b"123456789") == 0xCBF43926


# -- snapshots ------------------------------------------------------------


def snapshot() -> Snapshot:
    records = [make_record(task_id=f"t{n}", metadata={"n": n}) for n in range(3)]
    quarantined = Quarantined(b"\x00\xff", "row 1", "damaged", "t9", 4)
    return Snapshot(7, {r.task_id: r for r in records}, 99, (quarantined,))


def test_snapshot_round_trip():
    assert decode_snapshot(encode_snapshot(snapshot())) == snapshot()
    assert decode_snapshot(encode_snapshot(Snapshot(0))) == Snapshot(0)


def test_the_same_snapshot_gives_the_same_bytes():
    one = snapshot()
    other = Snapshot(7, dict(reversed(one.records.items())), 99, one.quarantined)
    assert encode_snapshot(one) == encode_snapshot(other)


def test_a_snapshot_is_a_json_document():
    document = json.loads(encode_snapshot(snapshot()))
    assert document["format"] == codec.SNAPSHOT_FORMAT
    assert [record["task_id"] for record in document["records"]] == ["t0", "t1", "t2"]


def test_every_damaged_byte_is_detected():
    right, whole = snapshot(), encode_snapshot(snapshot())
    for offset in range(len(whole)):
        for change in (1, 0x80, whole[offset] ^ ord("\n") or 2):
            damaged = bytearray(whole)
            damaged[offset] ^= change
            with pytest.raises(CorruptStoreError) as caught:
                decode_snapshot(bytes(damaged), "file")
            assert caught.value.where == "file"
    assert decode_snapshot(whole) == right


def test_every_truncation_is_detected():
    whole = encode_snapshot(snapshot())
    for end in range(len(whole)):
        with pytest.raises(CorruptStoreError):
            decode_snapshot(whole[:end])
    for extra in (b"\n", b"x", whole):
        with pytest.raises(CorruptStoreError):
            decode_snapshot(whole + extra)


def test_every_missing_or_duplicate_line_is_detected():
    lines = encode_snapshot(snapshot()).splitlines(keepends=True)
    for index in range(len(lines)):
        for changed in (lines[:index] + lines[index + 1 :], lines[: index + 1] + lines[index:]):
            with pytest.raises(CorruptStoreError):
                decode_snapshot(b"".join(changed))


@pytest.mark.parametrize(
    "header",
    [
        {"seq": -1, "at": 0},
        {"seq": 1},
        {"seq": "1", "at": 0},
        {"seq": 1.0, "at": 0},
        {"seq": 2**53, "at": 0},
        {"seq": True, "at": 0},
    ],
)
def test_an_invalid_header(header):
    document = b"".join(codec.encode_snapshot_blocks(header, []))
    with pytest.raises(CorruptStoreError, match=r"`(seq|at)`|\.seq"):
        decode_snapshot(document)


def test_a_record_that_does_not_decode_is_quarantined():
    lines = [encode_record(make_record(task_id="good")), payload("9.0", task_id="future")]
    document = b"".join(codec.encode_snapshot_blocks({"seq": 3, "at": 5}, lines))
    loaded = decode_snapshot(document, "file")
    assert set(loaded.records) == {"good"}
    assert [(item.raw, item.task_id) for item in loaded.quarantined] == [(lines[1], "future")]


def test_encoding_validates():
    with pytest.raises(ValidationError):
        encode_snapshot(Snapshot(1, {"a": make_record(task_id="a", label="\0")}))
    with pytest.raises(ValidationError):
        encode_snapshot(Snapshot(1, {"b": make_record(task_id="a")}))


def test_raw_metadata_stays_as_it_is():
    record = make_record(metadata=Raw(b'{"a":[1,2.5,"\\u0001"]}'))
    assert bytes(decode_record(encode_record(record)).metadata_json) == b'{"a":[1,2.5,"\\u0001"]}'
