"""The scenarios: registry calls under a fault, and their effect on stored records."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple

from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.journal import Snapshot
from taskstore.model.records import TaskRecord
from taskstore.registry.compactor import compact
from taskstore.registry.registry import TaskRegistry
from taskstore.store.interface import SupportsCompaction, SupportsJournal, TaskRegistryStore
from taskstore.testing.faults.harness import Harness

Records = Mapping[str, TaskRecord]

CALLERS = 4
"""The number of concurrent threads in the group commit scenario."""

POLICY = CompactionPolicy(history_s=0, history_entries=2, keep_snapshots=1).forced()


class Effect(Enum):
    """The effect of one call on the stored records."""

    APPLIED = "applied"
    NONE = "none"
    PARTIAL = "partial"
    UNCHANGED = "unchanged"
    """The call changes no record, whether it succeeds or fails."""


class Operation(NamedTuple):
    """One call that a scenario makes while a fault can be injected.

    ``effect`` computes from the stored records how much of the call took effect.
    ``touches`` selects the records that the call is allowed to change.
    """

    call: Callable[[], object]
    effect: Callable[[Records], Effect]
    touches: Callable[[TaskRecord], bool]


class Scenario(NamedTuple):
    """A name, and a function that returns the operations to run under a fault.

    ``prepare`` runs without faults and returns the operations.  If there are several operations,
    each operation runs in its own thread.  If ``stale`` is true, the scenario changes the ledger
    without the registry under test, so a check must first refresh this registry.  If ``new_ledger``
    is true, every run starts on storage without a ledger.
    """

    name: str
    prepare: Callable[[Harness], Sequence[Operation]]
    needs: type = TaskRegistryStore
    stale: bool = False
    new_ledger: bool = False


def _no_record(_: TaskRecord) -> bool:
    return False


def _unchanged(_: Records) -> Effect:
    return Effect.UNCHANGED


def _labelled(label: str) -> Callable[[TaskRecord], bool]:
    return lambda record: record.label == label


def _effect_of(flags: Iterable[bool]) -> Effect:
    """Return the effect of a call; each flag says whether one change of the call is stored."""
    distinct = set(flags)
    if len(distinct) > 1:
        return Effect.PARTIAL
    return Effect.APPLIED if distinct.pop() else Effect.NONE


def _new(registry: TaskRegistry, label: str) -> TaskRecord:
    return registry.create(runtime="cli", task="under faults", owner_key="faults", label=label)


def _create_operation(registry: TaskRegistry) -> Operation:
    label = secrets.token_hex(8)
    is_own = _labelled(label)
    return Operation(
        lambda: _new(registry, label),
        lambda records: _effect_of([any(map(is_own, records.values()))]),
        is_own,
    )


def _update_operation(registry: TaskRegistry, task: TaskRecord) -> Operation:
    word = secrets.token_hex(8)
    return Operation(
        lambda: registry.record_progress(task.task_id, word),
        lambda records: _effect_of([records[task.task_id].progress_summary == word]),
        lambda record: record.task_id == task.task_id,
    )


def _create(harness: Harness) -> Sequence[Operation]:
    return [_create_operation(harness.opened())]


def _update(harness: Harness) -> Sequence[Operation]:
    registry = harness.opened()
    return [_update_operation(registry, _new(registry, "updated"))]


def _delete(harness: Harness) -> Sequence[Operation]:
    registry = harness.opened()
    task = _new(registry, "deleted")
    return [
        Operation(
            lambda: registry.delete(task.task_id),
            lambda records: _effect_of([task.task_id not in records]),
            lambda record: record.task_id == task.task_id,
        )
    ]


def _batch(harness: Harness) -> Sequence[Operation]:
    registry = harness.opened()
    creates = [_create_operation(registry) for _ in range(2)]
    operations = [*_update(harness), *_delete(harness), *creates]

    def call() -> None:
        with registry.batch():
            for operation in operations:
                operation.call()

    return [
        Operation(
            call,
            lambda records: _effect_of(op.effect(records) is Effect.APPLIED for op in operations),
            lambda record: any(operation.touches(record) for operation in operations),
        )
    ]


def _group_commit(harness: Harness) -> Sequence[Operation]:
    operations = [*_update(harness), *_delete(harness)]
    creates = (_create_operation(harness.opened()) for _ in range(CALLERS - len(operations)))
    return [*operations, *creates]


def _update_stale(harness: Harness) -> Sequence[Operation]:
    """Update a task through a registry that has not read the commit of another writer."""
    operations = _update(harness)
    _commit_elsewhere(harness)
    return operations


def _refresh(harness: Harness) -> Sequence[Operation]:
    _commit_elsewhere(harness)
    return [Operation(harness.opened().refresh, _unchanged, _no_record)]


def _commit_elsewhere(harness: Harness) -> None:
    with harness.open_store() as store, TaskRegistry(store) as registry:
        _new(registry, "by another writer")


def _compact(harness: Harness) -> Sequence[Operation]:
    registry = harness.opened()
    compact(registry.store, POLICY)  # removes the history of the previous run
    task = _new(registry, "compacted")
    registry.mark_running(task.task_id)
    registry.delete(_new(registry, "compacted").task_id)
    return [Operation(partial(compact, registry.store, POLICY), _unchanged, _no_record)]


def _save(harness: Harness) -> Sequence[Operation]:
    """Save a snapshot that has all current records except one record."""
    registry = harness.opened()
    task, store = _new(registry, "dropped by the save"), registry.store
    records = {
        record.task_id: record for record in registry.list() if record.task_id != task.task_id
    }
    snapshot = Snapshot(registry.seq + 10, records, store.clock())
    return [
        Operation(
            lambda: store.save_snapshot(snapshot),
            lambda records: _effect_of([task.task_id not in records]),
            lambda record: record.task_id == task.task_id,
        )
    ]


def _open(harness: Harness) -> Sequence[Operation]:
    harness.close()
    return [Operation(harness.open, _unchanged, _no_record)]


SCENARIOS: Sequence[Scenario] = (
    Scenario("create", _create),
    Scenario("update", _update),
    Scenario("delete", _delete),
    Scenario("batch", _batch),
    Scenario("group commit", _group_commit),
    Scenario("update behind another", _update_stale, SupportsJournal, stale=True),
    Scenario("refresh", _refresh, SupportsJournal, stale=True),
    Scenario("compact", _compact, SupportsCompaction),
    Scenario("save", _save, stale=True),
    Scenario("open", _open),
    Scenario("first open", _open, new_ledger=True),
)
"""All scenarios, in the order in which they run."""
