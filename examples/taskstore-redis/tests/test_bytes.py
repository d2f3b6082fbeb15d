"""Edge cases of Lua and Redis: bytes, numbers, large batches, special names."""

from __future__ import annotations

import pytest
import redis
from taskstore import CompactionPolicy, Put, Remove, Snapshot, TaskQuery, ValidationError
from taskstore.model.records import MAX_INT
from taskstore.store import encode_record
from taskstore.testing import OpenStore, create, make_put, make_record, next_of, update

from taskstore_redis import open_redis, writing
from taskstore_redis.layout import image_of

TRIM = CompactionPolicy(force=True, history_entries=0, history_s=0, keep_snapshots=1)

SPECIAL = [
    "%z%d+.*^$[]()",
    "\x01\x02\x7f",
    "*",
    "=",
    ":",
    "{braces}",
    "(",
    "[",
    "+",
    "-",
    "1e15",
    "9007199254740993",
    "nan",
    "inf",
    "0x10",
    "\u2028",
    "\U0010ffff",
    "\r\n$3\r\nfoo\r\n",
    '"\\"',
]
"""Texts with a special meaning in a Lua pattern, the protocol, a range or a number."""


def test_payloads_are_stored_byte_for_byte(make_store: OpenStore, client: redis.Redis) -> None:
    texts = "".join(chr(code) for code in range(1, 0x300))
    with make_store() as store:
        record = create(store, task_id="task", task=texts, metadata={texts: [texts, 2**64 - 1]})
        prefix = store._reader.keys.prefix
        image = image_of(encode_record(record))
        assert client.hget((prefix + b"rows").decode(), "task") == image
        [(name, fields)] = client.xrange(prefix + b"journal")
        assert (name, fields[b"p"]) == (b"1-0", image)


def test_special_texts_in_every_key(make_store: OpenStore) -> None:
    """Facts and index keep values apart even if the values contain special texts."""
    with make_store() as store:
        puts = [
            make_put(
                task_id=text,
                owner_key=text,
                run_id=text,
                run_digest=text,
                child_session_key=text,
                requester_session_key=text + text,
                parent_task_id=text,
                parent_flow_id=text,
            )
            for text in SPECIAL
        ]
        store.apply(puts)
        assert store.verify().problems == ()
        for text in SPECIAL:
            for field in ("task_id", "owner_key", "run_id", "child_session_key", "session_key"):
                found = store.query(TaskQuery(**{field: text}))
                assert [record.task_id for record in found] == [text]
        for put in puts[::2]:
            update(store, put.record, owner_key="new", parent_task_id=None)
        store.apply([Remove(put.task_id, 2) for put in puts[1::2]])
        assert store.verify().problems == ()
        store.compact(TRIM)
        kept = store.read_snapshot(store.head())
        assert dict(kept.records) == dict(store.load_snapshot().records)
        store.apply([make_put(task_id=put.task_id, run_id=put.record.run_id) for put in puts[1::2]])
        assert store.verify().problems == ()


def test_numbers_up_to_the_largest(make_store: OpenStore) -> None:
    """Lua numbers are doubles, and tostring() prints 14 digits."""
    start = MAX_INT - 100
    with make_store() as store:
        old = make_record(task_id="old", revision=MAX_INT - 5, created_at=MAX_INT)
        store.save_snapshot(Snapshot(start, {"old": old}, at=start))
        store.clock = lambda: start + 1
        record = old
        for seq in range(start + 1, start + 4):
            commit = store.apply([next_of(record), make_put(task_id=f"t{seq}", created_at=seq)])
            record = next_of(record).record
            first_seq = start + 1 + 2 * (seq - start - 1)
            assert (commit.first_seq, commit.last_seq, commit.at) == (
                first_seq, first_seq + 1, start + 1,
            )  # fmt: skip
        assert [entry.seq for entry in store.read_journal(start, 10)] == [
            start + n for n in range(1, 7)
        ]
        assert [entry.revision for entry in store.read_history("old")] == [
            MAX_INT - 4, MAX_INT - 3, MAX_INT - 2,
        ]  # fmt: skip
        assert next(iter(store.query(TaskQuery()))).task_id == "old"
        assert store.load_snapshot().records["old"].revision == MAX_INT - 2
        assert store.verify().problems == ()
        report = store.compact(TRIM)
        assert (report.seq, report.floor) == (start + 6, start + 7)
        kept = store.read_snapshot(start + 6)
        assert kept.records["old"] == record
        store.apply([Remove("old", MAX_INT - 1)])
        assert store.verify().problems == ()
        assert store.wait_for(start + 6, 0)
        assert not store.wait_for(start + 7, 0.05)


def test_a_batch_beyond_the_limits_of_lua(make_store: OpenStore) -> None:
    """The batch has more changes than unpack() and the C stack accept."""
    with make_store() as store:
        puts = [make_put(task_id=f"task-{n:05}", run_id=f"run-{n}") for n in range(12_000)]
        assert store.apply(puts).last_seq == 12_000
        store.apply([next_of(put.record) for put in puts])
        assert len(store.load_snapshot().records) == 12_000
        store.apply([Remove(put.task_id, 3) for put in puts])
        assert store.verify().problems == ()
        store.save_snapshot(Snapshot(100_000, {put.task_id: put.record for put in puts}))
        assert store.verify().problems == ()


def test_a_batch_larger_than_a_command(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MAX_BATCH_BYTES", 100_000)
    with make_store() as store:
        with pytest.raises(ValidationError, match="one commit takes 100000 at most"):
            store.apply([Put(make_record(task="x" * 60_000)) for _ in range(2)])
        assert store.head() == 0


@pytest.mark.parametrize("name", ["a b", "tasks*", "[x]", "ns:sub", "héhé", "?", "a\\b"])
def test_special_namespaces(server_url: str, client: redis.Redis, name: str) -> None:
    from urllib.parse import quote

    from taskstore_redis.scratch import remove

    twin = name.replace("*", "x").replace("?", "x").replace("[x]", "x").replace("\\", "")
    stores = [open_redis(f"{server_url}?namespace={quote(each)}") for each in {name, twin}]
    try:
        for store in stores:
            create(store)
            assert store.head() == 1
    finally:
        for store in stores:
            remove(store._link, store._reader.keys)
            assert store.head() == 0
            store.close()
    assert len(stores) == (1 if name == twin else 2)
