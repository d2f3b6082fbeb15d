"""The account of a hammered ledger finds what it is for."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from taskstore import TaskRegistry
from taskstore.stores.memory import MemoryStore
from taskstore.testing.crash.account import Change, problems_of


@pytest.fixture
def registry() -> TaskRegistry:
    return TaskRegistry(MemoryStore())


@pytest.fixture
def told(registry: TaskRegistry) -> list[Change]:
    """What two writers were told about one task."""
    task = registry.create(runtime="cli", task="x", status="running").task_id
    registry.record_progress(task, "a 1")
    registry.update_metadata(task, {"b": 1})
    registry.update_metadata(task, {"a": 2})
    return [
        Change(task, 2, "a", 1, progress=True),
        Change(task, 3, "b", 1, progress=False),
        Change(task, 4, "a", 2, progress=False),
    ]


def problems(registry: TaskRegistry, told: list[Change], mirror: int = 4) -> str:
    task_id = told[0].task_id
    return "\n".join(problems_of(registry.store, 0, [task_id], told, [{task_id: mirror}]))


def test_what_adds_up_is_no_problem(registry, told):
    assert problems(registry, told) == ""


def test_a_change_that_is_not_there(registry, told):
    lost = Change(told[0].task_id, 5, "a", 3, progress=True)
    assert "is not in the journal" in problems(registry, [*told, lost])


def test_a_change_that_nobody_was_told_of(registry, told):
    assert "acknowledged to nobody" in problems(registry, told[:-1])


def test_a_change_that_two_were_told_of(registry, told):
    assert "the same revision" in problems(registry, [*told, replace(told[1], writer="c")])


def test_a_change_that_is_not_what_was_told(registry, told):
    told[1] = replace(told[1], count=2)
    assert "is not what" in problems(registry, told)


def test_a_change_that_undid_another(registry, told):
    record = registry.get(told[0].task_id)
    registry.store.storage.journal[-1] = replace(
        registry.store.storage.journal[-1], record=replace(record, progress_summary=None)
    )
    assert "is not what" in problems(registry, told)


def test_a_record_that_is_not_the_last_of_the_journal(registry, told):
    storage, task_id = registry.store.storage, told[0].task_id
    storage.current[task_id] = replace(storage.current[task_id], label="other")
    assert "is not the last one" in problems(registry, told)


def test_a_gap(registry, told, monkeypatch):
    read = MemoryStore.read_journal
    monkeypatch.setattr(
        MemoryStore,
        "read_journal",
        lambda *where: tuple(entry for entry in read(*where) if entry.seq != 2),
    )
    assert "seq 3 comes after 1" in problems(registry, told)


def test_a_mirror_that_lags_behind(registry, told):
    assert "a mirror has" in problems(registry, told, mirror=3)
