"""The dedup key: the same run scope is the same task, across processes too."""

from __future__ import annotations

import threading

import pytest

from taskstore import ConflictError, TaskRegistry
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.factories import EPOCH_MS

SCOPE = {"runtime": "subagent", "task": "mail", "owner_key": "me", "run_id": "r1"}


def test_the_same_scope_is_the_same_task(registry):
    first = registry.create(**SCOPE)
    again = registry.create(**SCOPE)
    assert again == first
    assert registry.seq == 1


@pytest.mark.parametrize(
    "other",
    [
        {"run_id": "r2"},
        {"runtime": "acp"},
        {"owner_key": "you"},
        {"child_session_key": "c"},
        {"parent_flow_id": "f"},
        {"label": "l"},
        {"task": "post"},
        {"scope_kind": "system"},
    ],
)
def test_every_part_of_the_scope_counts(registry, other):
    first = registry.create(**SCOPE)
    assert registry.create(**{**SCOPE, **other}).task_id != first.task_id


def test_a_repeat_fills_only_empty_fields(registry):
    first = registry.create(**SCOPE, agent_id="a1")
    filled = registry.create(
        **SCOPE, agent_id="a2", source_id="s", metadata={"k": 1}, requester_origin={"to": "x"}
    )
    assert filled.task_id == first.task_id
    assert (filled.agent_id, filled.source_id, filled.metadata) == ("a1", "s", {"k": 1})
    assert filled.requester_origin.to == "x"
    assert filled.revision == 2
    assert registry.create(**SCOPE, metadata={"k": 2}) == filled


def test_an_ended_task_is_returned_unchanged(registry):
    first = registry.create(**SCOPE)
    ended = registry.finish(first.task_id, "failed")
    assert registry.create(**SCOPE, agent_id="a", metadata={"k": 1}) == ended


def test_without_a_run_every_create_is_new(registry):
    scope = {**SCOPE, "run_id": None}
    assert registry.create(**scope).task_id != registry.create(**scope).task_id


def test_the_dedup_key_stays_when_the_flow_changes(registry):
    first = registry.create(**SCOPE)
    moved = registry.link_flow(first.task_id, "flow")
    assert registry.create(**SCOPE).task_id == first.task_id
    assert registry.create(**SCOPE) == moved


def test_a_deletion_frees_the_dedup_key(registry):
    first = registry.create(**SCOPE)
    registry.delete(first.task_id)
    assert registry.create(**SCOPE).task_id != first.task_id


def test_another_registry_finds_the_first_registrys_task(open_ledger):
    one, two = open_ledger(), open_ledger()
    first = one.create(**SCOPE)
    assert two.create(**SCOPE) == first
    assert two.get(first.task_id) == first
    assert two.create(**SCOPE, agent_id="a").revision == 2


def test_threads_that_create_the_same_run_get_one_task():
    storage = MemoryStorage()
    registries = [TaskRegistry(MemoryStore(storage)) for _ in range(8)]
    ids = []

    def create(registry):
        ids.extend(registry.create(**{**SCOPE, "run_id": f"r{n}"}).task_id for n in range(50))

    threads = [threading.Thread(target=create, args=(registry,)) for registry in registries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 400
    assert len(set(ids)) == 50


def test_an_id_is_used_once(registry):
    registry.create(runtime="cli", task="x", task_id="mine")
    with pytest.raises(ConflictError) as raised:
        registry.create(runtime="cli", task="y", task_id="mine")
    (conflict,) = raised.value.conflicts
    assert (conflict.task_id, conflict.expected, conflict.found) == ("mine", 0, 1)
    registry.delete("mine")
    with pytest.raises(ConflictError):
        registry.create(runtime="cli", task="y", task_id="mine")
    assert registry.seq == 2


def test_filled_times_respect_the_times_of_the_first_task(registry):
    first = registry.create(**SCOPE)
    filled = registry.create(**SCOPE, created_at=EPOCH_MS + 10, cleanup_after=EPOCH_MS + 20)
    assert filled.cleanup_after == first.created_at
