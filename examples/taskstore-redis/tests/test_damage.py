"""Damaged keys: detected and reported, without effect on other tasks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import redis
from taskstore import (
    CompactionPolicy,
    ConflictError,
    CorruptStoreError,
    Quarantined,
    Remove,
    SchemaMismatchError,
    Snapshot,
    TaskQuery,
    TaskRegistry,
)
from taskstore.testing import OpenStore, create, delete, make_put, next_of, play, update

from taskstore_redis import RedisStore, open_redis
from taskstore_redis.layout import image_of

FOLD = CompactionPolicy(force=True)
ERASE = CompactionPolicy(erase_deleted=True)
KEYS = ("head", "rows", "facts", "index", "bookings", "journal", "commits", "deleted", "aside_ids")


class RawKeys:
    """Commands on the keys of a ledger."""

    def __init__(self, client: redis.Redis, namespace: str) -> None:
        self.client = client
        self.prefix = f"{{{namespace}}}:".encode()

    def __call__(self, command: str, key: str, *rest: object) -> object:
        return self.client.execute_command(command, self.prefix + key.encode(), *rest)


@pytest.fixture
def keys(client: redis.Redis, namespace: str) -> RawKeys:
    return RawKeys(client, namespace)


@pytest.mark.parametrize(
    "damage", ["flipped bit", "cut", "empty", "another version", "another task"]
)
def test_a_damaged_row_is_quarantined(make_store: OpenStore, keys: RawKeys, damage: str) -> None:
    """[12] The damaged row keeps its bytes, id and revision until a change replaces the row."""
    with make_store() as store:
        good = create(store, task_id="good", label="x")
        bad = update(store, create(store, task_id="bad", label="x"))
        image = keys("HGET", "rows", "bad")
        assert isinstance(image, bytes)
        newer = image[8:].replace(b'"v":"1.1"', b'"v":"9.0"')
        broken = {
            "flipped bit": image[:30] + bytes([image[30] ^ 1]) + image[31:],
            "cut": image[:40],
            "empty": b"",
            "another version": image_of(newer),
            "another task": keys("HGET", "rows", "good"),
        }[damage]
        keys("HSET", "rows", "bad", broken)
        loaded = store.load_snapshot()
        assert dict(loaded.records) == {"good": good}
        [item] = loaded.quarantined
        assert (item.task_id, item.revision, item.raw) == ("bad", 2, broken[8:])
        assert "rows, field 'bad'" in item.where
        assert store.report().quarantined == (item,)
        assert [record.task_id for record in store.query(TaskQuery(label="x"))] == ["good"]
        assert any("bad" in problem for problem in store.verify().problems)
        with pytest.raises(ConflictError):
            create(store, task_id="bad")
        for policy in (FOLD, ERASE):
            report = store.compact(policy)
            kept = store.read_snapshot(report.seq)
            assert [each.raw for each in kept.quarantined] == [broken[8:]]
            assert store.load_snapshot().quarantined[0].raw == broken[8:]
            update(store, store.load_snapshot().records["good"])
        repaired = update(store, bad, label="repaired")
        assert store.load_snapshot().records["bad"] == repaired
        assert store.load_snapshot().quarantined == ()


@pytest.mark.parametrize("removed", [False, True], ids=["updated", "removed"])
def test_a_change_over_a_quarantined_record(make_store: OpenStore, *, removed: bool) -> None:
    """[12] A change replaces a saved quarantined record if the change has the next revision."""
    future = [
        Quarantined(
            f'{{"v":"9.{n}","task_id":"future"}}'.encode(), "elsewhere", "format 9", "future", 3
        )
        for n in range(2)
    ]
    other = Quarantined(b"\0\xff", "elsewhere", "damaged")
    with make_store() as store:
        store.save_snapshot(Snapshot(1, {}, 0, (*future, other)))
        store.compact(CompactionPolicy(erase_deleted=True))
        for revision in (1, 3, 5):
            with pytest.raises(ConflictError) as caught:
                store.apply([make_put(task_id="future", revision=revision)])
            assert caught.value.conflicts[0].found == 3
        put = make_put(task_id="future", revision=4)
        store.apply([Remove("future", 4) if removed else put])
        loaded = store.load_snapshot()
        assert loaded.quarantined == (other,)
        assert dict(loaded.records) == ({} if removed else {"future": put.record})
        assert store.verify().problems == ()
        kept = store.read_snapshot(store.compact(FOLD).seq)
        assert kept.quarantined == (other,)
        assert store.verify().problems == ()


def test_a_damaged_entry_is_quarantined(make_store: OpenStore, keys: RawKeys) -> None:
    """[12] The journal continues after the damaged entry; history and change feed have its
    bytes."""
    with make_store() as store:
        record = create(store, task_id="task")
        second = update(store, record, label="second")
        third = update(store, second, label="third")
        [(_, fields)] = keys.client.xrange(keys.prefix + b"journal", "2-0", "2-0")
        fields[b"p"] = fields[b"p"].replace(b"second", b"sekond")
        entries = keys.client.xrange(keys.prefix + b"journal")
        keys("DEL", "journal")
        for name, values in entries:
            keys.client.xadd(
                keys.prefix + b"journal", fields if name == b"2-0" else values, id=name
            )
        for entries in (store.read_journal(0, 10), store.read_history("task")):
            assert [entry.record for entry in entries] == [record, None, third]
            quarantined = entries[1].quarantined
            assert quarantined is not None
            assert (quarantined.task_id, quarantined.revision) == ("task", 2)
            assert b"sekond" in quarantined.raw
        assert any("seq 2" in problem for problem in store.verify().problems)


@pytest.mark.parametrize("seq", [1, 2, 3])
def test_a_missing_entry(make_store: OpenStore, keys: RawKeys, seq: int) -> None:
    with make_store() as store:
        record = create(store, task_id="task")
        update(store, update(store, record))
        keys("XDEL", "journal", f"{seq}-0")
        with pytest.raises(CorruptStoreError, match=f"seq {seq} is missing"):
            store.read_journal(0, 10)
        assert any(f"seq {seq} is missing" in problem for problem in store.verify().problems)
        with pytest.raises(CorruptStoreError, match=f"seq {seq} is missing"):
            store.read_history("task")
        assert len(store.load_snapshot().records) == 1


def test_damaged_facts(make_store: OpenStore, keys: RawKeys) -> None:
    with make_store() as store:
        record = create(store, task_id="task")
        other = create(store, task_id="other")
        keys("HSET", "facts", "task", "gibberish")
        with pytest.raises(CorruptStoreError, match="facts, field 'task'"):
            store.apply([next_of(other), next_of(record)])
        update(store, other)
        assert store.load_snapshot().records["task"] == record
        assert store.verify().problems


def test_a_snapshot_with_a_missing_or_damaged_chunk(
    make_store: OpenStore, keys: RawKeys, client: redis.Redis
) -> None:
    with make_store() as store:
        play(store)
        seq = store.compact(FOLD).seq
        create(store)
        [key] = client.keys(keys.prefix.replace(b"{", b"\\{") + b"snap:*")
        chunk = client.hget(key, "0")
        assert isinstance(chunk, bytes)
        for broken, reason in (
            (chunk[:-1], "ends too early"),
            (chunk + b"\0", "ends too early"),
            (b"", "has 0 records"),
        ):
            client.hset(key, "0", broken)
            with pytest.raises(CorruptStoreError, match=reason):
                store.read_snapshot(seq)
            assert store.verify().problems
        client.hdel(key, "0")
        with pytest.raises(CorruptStoreError, match="chunk 0: is missing"):
            store.read_snapshot(seq)
        assert len(store.load_snapshot().records) > 0


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_another_type(make_store: OpenStore, keys: RawKeys, key: str) -> None:
    """Nothing is written: a script must detect the wrong type before its first write."""
    with make_store() as store:
        record = create(store, run_id="run")
        gone = create(store)
        delete(store, gone)
        names = [name.removeprefix(keys.prefix) for name in _names(keys)]
        keys("DEL", key)
        keys("SET", key, "a string")
        before = {name: _dump(keys, name) for name in names}
        with pytest.raises(CorruptStoreError, match="has the wrong type"):
            store.apply([next_of(record), make_put(run_id="other")])
        assert {name: _dump(keys, name) for name in names} == before


def _names(keys: RawKeys) -> list[bytes]:
    pattern = keys.prefix.replace(b"{", b"\\{") + b"*"
    return list(keys.client.scan_iter(match=pattern, count=1000))


def _dump(keys: RawKeys, name: bytes) -> object:
    return keys.client.dump(keys.prefix + name)


def test_a_head_that_was_evicted(make_store: OpenStore, keys: RawKeys) -> None:
    """[2] A new ledger that starts at seq 1 would give acknowledged seqs a second time."""
    with make_store() as store:
        create(store)
        keys("DEL", "head")
        with pytest.raises(CorruptStoreError, match="head of the ledger is missing"):
            create(store)


def test_another_layout_is_refused(make_store: OpenStore, keys: RawKeys) -> None:
    with make_store() as store:
        create(store)
        keys("HSET", "head", "format", "2")
        for call in (lambda: create(store), store.load_snapshot, store.head, make_store):
            with pytest.raises(SchemaMismatchError, match="format 2") as caught:
                call()
            assert (caught.value.found, caught.value.needed) == ("2", "1")


def facts(keys: RawKeys) -> bytes:
    found = keys("HGET", "facts", "task")
    assert isinstance(found, bytes)
    return found


DAMAGES: dict[str, Callable[[RawKeys], object]] = {
    "an extra row": lambda keys: keys("HSET", "rows", "ghost", "00000000{}"),
    "a missing row": lambda keys: keys("HDEL", "rows", "task"),
    "missing facts": lambda keys: keys("HDEL", "facts", "task"),
    "wrong facts": lambda keys: keys(
        "HSET",
        "facts",
        "task",
        str(keys("HGET", "facts", "task"), "utf-8").replace("queued", "lost"),
    ),
    "a wrong last seq": lambda keys: keys("HSET", "facts", "task", b"1" + facts(keys)[1:]),
    "an extra index member": lambda keys: keys("ZADD", "index", 0, "s\0lost\0" + "0" * 16 + "task"),
    "a missing index member": lambda keys: keys("ZPOPMIN", "index"),
    "an extra dedup key": lambda keys: keys("HSET", "bookings", "run\0digest", "task"),
    "missing dedup keys": lambda keys: keys("DEL", "bookings"),
    "an extra deletion": lambda keys: keys("ZADD", "deleted", 3, "task"),
    "missing deletions": lambda keys: keys("DEL", "deleted"),
    "a missing journal": lambda keys: keys("DEL", "journal"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds(make_store: OpenStore, keys: RawKeys, damage: str) -> None:
    with make_store() as store:
        create(store, task_id="gone", run_id="gone")
        store.apply([make_put(task_id="task", run_id="run")])
        update(store, store.load_snapshot().records["task"], error="x")
        delete(store, store.load_snapshot().records["gone"])
        assert store.verify().problems == ()
        DAMAGES[damage](keys)
        assert store.verify().problems != ()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("small_steps")
def test_verify_beside_writers(make_store: OpenStore, seed: int) -> None:
    """Concurrent changes are not reported as problems."""
    rng = random.Random(seed)
    done = threading.Event()

    def write(store: RedisStore) -> None:
        while not done.is_set():
            try:
                records = list(store.load_snapshot().records.values())
                if records and rng.random() < 0.7:
                    record = rng.choice(records)
                    if rng.random() < 0.2:
                        delete(store, record)
                    else:
                        update(store, record, created_at=rng.randrange(9))
                else:
                    create(store, run_id=f"run-{rng.random()}")
            except ConflictError:
                continue

    with make_store() as store, make_store() as one, make_store() as two:
        threads = [threading.Thread(target=write, args=(each,)) for each in (one, two)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(15):
                assert store.verify().problems == ()
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert store.verify().problems == ()


def test_a_registry_opens_despite_a_quarantined_record(url: str, keys: RawKeys) -> None:
    with TaskRegistry.open(url) as registry:
        task = registry.create(runtime="cli", task="bad")
        registry.create(runtime="cli", task="good")
    keys("HSET", "rows", task.task_id, "00000000gibberish")
    with TaskRegistry.open(url) as registry:
        assert [each.task for each in registry.list()] == ["good"]
        [item] = registry.store.report().quarantined
        assert isinstance(item, Quarantined)
        assert item.raw == b"gibberish"
    with open_redis(url, read_only=True) as store:
        assert store.load_snapshot().quarantined
