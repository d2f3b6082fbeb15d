"""The ledger check finds lost, duplicated and wrong changes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from taskstore import TaskRegistry
from taskstore.stores.memory import MemoryStore
from taskstore.testing.crash.acknowledged import AcknowledgedChange, check_ledger


@pytest.fixture
def registry() -> TaskRegistry:
    return TaskRegistry(MemoryStore())


@pytest.fixture
def changes(registry: TaskRegistry) -> list[AcknowledgedChange]:
    """The acknowledged changes of two writers to one task."""
    task = registry.create(runtime="cli", task="x", status="running").task_id
    registry.record_progress(task, "a 1")
    registry.update_metadata(task, {"b": 1})
    registry.update_metadata(task, {"a": 2})
    return [
        AcknowledgedChange(task, 2, "a", 1, progress=True),
        AcknowledgedChange(task, 3, "b", 1, progress=False),
        AcknowledgedChange(task, 4, "a", 2, progress=False),
    ]


def problems(registry: TaskRegistry, changes: list[AcknowledgedChange], cached: int = 4) -> str:
    task_id = changes[0].task_id
    return "\n".join(check_ledger(registry.store, 0, [task_id], changes, [{task_id: cached}]))


def test_a_consistent_ledger_has_no_problem(registry, changes):
    assert problems(registry, changes) == ""


def test_a_missing_change(registry, changes):
    lost = AcknowledgedChange(changes[0].task_id, 5, "a", 3, progress=True)
    assert "is not in the journal" in problems(registry, [*changes, lost])


def test_an_unacknowledged_change(registry, changes):
    assert "was not acknowledged" in problems(registry, changes[:-1])


def test_a_revision_acknowledged_twice(registry, changes):
    assert "the same revision" in problems(registry, [*changes, replace(changes[1], writer="c")])


def test_a_change_with_another_value(registry, changes):
    changes[1] = replace(changes[1], count=2)
    assert "is not the previous record with" in problems(registry, changes)


def test_a_lost_update(registry, changes):
    record = registry.get(changes[0].task_id)
    registry.store.storage.journal[-1] = replace(
        registry.store.storage.journal[-1], record=replace(record, progress_summary=None)
    )
    assert "is not the previous record with" in problems(registry, changes)


def test_a_record_that_differs_from_the_journal(registry, changes):
    storage, task_id = registry.store.storage, changes[0].task_id
    storage.current[task_id] = replace(storage.current[task_id], label="other")
    assert "differs from the last journal entry" in problems(registry, changes)


def test_a_gap_in_the_journal(registry, changes, monkeypatch):
    read = MemoryStore.read_journal
    monkeypatch.setattr(
        MemoryStore,
        "read_journal",
        lambda *where: tuple(entry for entry in read(*where) if entry.seq != 2),
    )
    assert "seq 3 follows seq 1" in problems(registry, changes)


def test_a_stale_record_cache(registry, changes):
    assert "a record cache has" in problems(registry, changes, cached=3)
