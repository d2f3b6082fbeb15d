"""Compaction with concurrent writers, kills at every step, and leftover keys."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import redis
from taskstore import CompactionPolicy, ConflictError, Put, Remove, Snapshot, StoreBusyError
from taskstore.testing import (
    Model,
    OpenStore,
    as_of,
    create,
    delete,
    make_record,
    next_of,
    play,
    update,
)

from taskstore_redis import RedisStore
from taskstore_redis.compaction import Compactor
from taskstore_redis.link import Link
from taskstore_redis.writing import Writer

FOLD = CompactionPolicy(force=True)
TRIM = CompactionPolicy(force=True, history_entries=0, history_s=0, keep_snapshots=1)
IDS = [f"task-{n}" for n in range(12)]


def keys_of(client: redis.Redis, namespace: str) -> set[str]:
    prefix = f"{{{namespace}}}:"
    return {key.decode().removeprefix(prefix) for key in client.scan_iter(match=f"{prefix}*")}


def assert_equal_to_model(store: RedisStore, model: Model) -> None:
    loaded = store.load_snapshot()
    assert (loaded.seq, dict(loaded.records)) == (model.head, dict(model.records))
    assert (store.head(), store.floor()) == (model.head, model.floor)
    for seq, records in model.states.items():
        assert dict(as_of(store, seq).records) == records, f"as of seq {seq}"
    assert store.verify().problems == ()


def change_something(store: RedisStore, model: Model, rng: random.Random) -> None:
    """Commit a few changes: create, update (also ``created_at``) and remove tasks."""
    changes: list[Put | Remove] = []
    for task_id in rng.sample(IDS, rng.randint(1, 3)):
        record = model.records.get(task_id)
        facts = {
            "created_at": rng.randrange(5),
            "label": rng.choice("abc"),
            "status": rng.choice(["queued", "running"]),
        }
        if record is None and task_id not in model.deleted:
            changes.append(Put(make_record(task_id=task_id, **facts)))
        elif record is not None and rng.random() < 0.2:
            changes.append(Remove(task_id, record.revision + 1))
        elif record is not None:
            changes.append(next_of(record, **facts))
    if changes:
        store.apply(changes)
        model.commit(list(changes))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.usefixtures("small_steps")
def test_a_snapshot_is_of_one_seq_despite_concurrent_commits(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """[7] Other commits are made between the steps of the compactor."""
    rng = random.Random(seed)
    model = Model()
    with make_store() as store, make_store() as writer:
        for _ in range(12):
            change_something(store, model, rng)
        step = Compactor._step

        def step_and_change(self: Compactor, name: str, *rest: Any) -> Any:
            reply = step(self, name, *rest)
            for _ in range(rng.randrange(3)):
                change_something(writer, model, rng)
            return reply

        monkeypatch.setattr(Compactor, "_step", step_and_change)
        for policy in (FOLD, TRIM, FOLD, TRIM):
            report = store.compact(policy)
            if not report.compacted:
                continue
            kept = store.read_snapshot(report.seq)
            assert dict(kept.records) == model.states[report.seq]
            assert len(kept.records) == report.records
            model.trim(report.floor)
            assert_equal_to_model(store, model)


class KilledError(BaseException):
    """Simulates SIGKILL: no command of the store succeeds after this error."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, *, after: bool) -> Callable[[], None]:
    """Fail the n-th command, before or after it is sent, and all later commands; returns the
    undo."""
    count = 0
    run, run_once, call = Link.run, Link.run_once, Link.call

    def dying(original: Any) -> Any:
        def method(self: Link, *arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count > number or (count == number and not after):
                raise KilledError
            reply = original(self, *arguments)
            if count == number:
                raise KilledError
            return reply

        return method

    patch = pytest.MonkeyPatch()
    for name, original in (("run", run), ("run_once", run_once), ("call", call)):
        patch.setattr(Link, name, dying(original))
    return patch.undo


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("policy", [FOLD, TRIM], ids=["fold", "trim"])
@pytest.mark.usefixtures("small_steps")
def test_killed_at_every_step(
    make_store: OpenStore,
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
    namespace: str,
    policy: CompactionPolicy,
    *,
    after: bool,
) -> None:
    """[7] No data is lost, the next writer continues, the next compaction cleans up."""
    for number in range(1, 100):
        with make_store() as store:
            empty = Snapshot(store.head() + 1)
            store.save_snapshot(empty)
            model = play(store, Model(empty))
            store.compact(FOLD)
            play(store, model)
            restore = kill_at(monkeypatch, number, after=after)
            try:
                store.compact(policy)
            except KilledError:
                survived = False
            else:
                survived = True
            finally:
                restore()
        with make_store() as store:
            model.trim(store.floor())
            assert_equal_to_model(store, model)
            play(store, model)
            assert_equal_to_model(store, model)
            play(store, model)
            model.trim(store.compact(policy).floor)
            assert_equal_to_model(store, model)
            left = keys_of(client, namespace)
            snapshots = {key for key in left if key.startswith("snap:")}
            published = store._reader.snapshots()
            assert snapshots == {f"snap:{each.token}" for each in published if each.records}
            assert not left & {"staging", "cut", "saved", "lease"}
        if survived:
            return
    pytest.fail("no attempt completed")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.usefixtures("small_steps")
def test_a_save_killed_at_every_step(
    make_store: OpenStore,
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
    namespace: str,
    *,
    after: bool,
) -> None:
    """[5] The content is the old or the new content; a later compaction deletes the staged keys."""
    for number in range(1, 100):
        with make_store() as store:
            empty = Snapshot(store.head() + 1)
            store.save_snapshot(empty)
            before = play(store, Model(empty))
            saved = {f"new-{n}": make_record(task_id=f"new-{n}") for n in range(5)}
            restore = kill_at(monkeypatch, number, after=after)
            try:
                store.save_snapshot(Snapshot(before.head + 10, saved))
            except KilledError:
                survived = False
            else:
                survived = True
            finally:
                restore()
        with make_store() as store:
            loaded = store.load_snapshot()
            if loaded.seq == before.head:
                assert_equal_to_model(store, before)
                assert not survived
            else:
                assert (loaded.seq, dict(loaded.records)) == (before.head + 10, saved)
                assert store.verify().problems == ()
            staged = client.hgetall(f"{{{namespace}}}:staging")
            for token in staged:  # ten minutes later
                client.hset(f"{{{namespace}}}:staging", token, 1)
            create(store)
            store.compact(FOLD)
            assert not [key for key in keys_of(client, namespace) if key.startswith("staging")]
            assert store.verify().problems == ()
        if survived:
            return
    pytest.fail("no attempt completed")


@pytest.mark.usefixtures("small_steps")
def test_a_saved_snapshot_ends_a_compaction(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_store() as store, make_store() as other:
        head = play(store).head
        step = Compactor._step

        def step_and_save(self: Compactor, name: str, *rest: Any) -> Any:
            if name == "copy":
                other.save_snapshot(Snapshot(head + 1))
                monkeypatch.undo()
            return step(self, name, *rest)

        monkeypatch.setattr(Compactor, "_step", step_and_save)
        with pytest.raises(StoreBusyError, match="overtaken"):
            store.compact(FOLD)
        loaded = store.load_snapshot()
        assert (loaded.seq, dict(loaded.records)) == (head + 1, {})
        assert store.verify().problems == ()


@pytest.mark.usefixtures("small_steps")
def test_writers_stop_saving_records_for_a_dead_compactor(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch, client: redis.Redis, namespace: str
) -> None:
    """If writers did not stop, the key ``saved`` would grow until the next compaction."""
    prefix = f"{{{namespace}}}:"
    with make_store() as store, make_store() as writer:
        records = [create(store, created_at=n) for n in range(9)]
        restore = kill_at(monkeypatch, 5, after=True)
        try:
            with pytest.raises(KilledError):
                store.compact(FOLD)
        finally:
            restore()
        records = [update(writer, record) for record in records]
        assert client.exists(prefix + "cut", prefix + "saved") == 2
        client.delete(prefix + "lease")  # it expires
        update(writer, records[0])
        assert client.exists(prefix + "cut", prefix + "saved") == 0


@pytest.mark.usefixtures("small_steps")
def test_records_saved_for_a_dead_compactor_are_not_copied(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch, client: redis.Redis, namespace: str
) -> None:
    with make_store() as store, make_store() as writer:
        records = [create(store, created_at=n) for n in range(9)]
        restore = kill_at(monkeypatch, 5, after=True)
        try:
            with pytest.raises(KilledError):
                store.compact(FOLD)
        finally:
            restore()
        records = [update(writer, record) for record in records]
        client.delete(f"{{{namespace}}}:lease")
        report = writer.compact(FOLD)
        kept = writer.read_snapshot(report.seq)
        assert set(kept.records.values()) == set(records)
        assert writer.verify().problems == ()


def test_an_id_is_free_once_the_floor_has_passed_its_deletion(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch, client: redis.Redis, namespace: str
) -> None:
    """[3] The id is free even if the compactor was killed before it trimmed."""
    with make_store() as store:
        delete(store, create(store, task_id="again"))
        trim = Compactor._trim
        calls: list[int] = []

        def trim_once(self: Compactor) -> None:
            calls.append(1)
            if len(calls) > 1:
                raise KilledError
            trim(self)

        monkeypatch.setattr(Compactor, "_trim", trim_once)
        with pytest.raises(KilledError):
            store.compact(TRIM)
        monkeypatch.undo()
        assert store.floor() == 3
        record = create(store, task_id="again")
        assert [entry.seq for entry in store.read_history("again")] == [3]
        assert store.verify().problems == ()
        store.compact(TRIM)
        assert client.exists(f"{{{namespace}}}:deleted") == 0
        with pytest.raises(ConflictError):
            create(store, task_id="again")
        delete(store, record)
        with pytest.raises(ConflictError) as caught:
            create(store, task_id="again")
        assert caught.value.conflicts[0].deleted
        assert store.verify().problems == ()


def test_a_save_that_a_commit_overtakes_while_it_is_staged(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch, client: redis.Redis, namespace: str
) -> None:
    """[2] The script compares the head when it replaces the content, not earlier."""
    with make_store() as store, make_store() as other:
        record = create(store)
        stage = Writer._stage

        def stage_and_commit(self: Writer, *rest: Any) -> Any:
            chunks = stage(self, *rest)
            other.apply([next_of(record)])
            return chunks

        monkeypatch.setattr(Writer, "_stage", stage_and_commit)
        with pytest.raises(ConflictError, match="the head at 2"):
            store.save_snapshot(Snapshot(2))
        assert store.load_snapshot().records[record.task_id].revision == 2
        assert store.verify().problems == ()
        assert not [key for key in keys_of(client, namespace) if key.startswith("staging")]


def test_one_compactor_at_a_time(make_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_store() as store, make_store() as other:
        play(store)
        step = Compactor._step

        def step_concurrently(self: Compactor, *rest: Any) -> Any:
            monkeypatch.undo()
            with pytest.raises(StoreBusyError, match="its lease ends in"):
                other.compact(FOLD)
            return step(self, *rest)

        monkeypatch.setattr(Compactor, "_step", step_concurrently)
        assert store.compact(FOLD).compacted
        update(store, create(store))
        assert other.compact(FOLD).compacted


def test_a_compactor_whose_lease_ran_out_publishes_nothing(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch, client: redis.Redis, namespace: str
) -> None:
    with make_store() as store, make_store() as other:
        model = play(store)
        step = Compactor._step
        reports = []

        def step_late(self: Compactor, name: str, *rest: Any) -> Any:
            if name == "publish":
                monkeypatch.undo()
                client.delete(f"{{{namespace}}}:lease")
                reports.append(other.compact(TRIM))
            return step(self, name, *rest)

        monkeypatch.setattr(Compactor, "_step", step_late)
        with pytest.raises(StoreBusyError, match="overtaken"):
            store.compact(FOLD)
        model.trim(reports[0].floor)
        assert_equal_to_model(store, model)
