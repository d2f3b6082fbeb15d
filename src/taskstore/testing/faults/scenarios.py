"""What a registry does while a fault strikes, and how to tell whether it happened."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple

from taskstore.model.journal import Snapshot
from taskstore.model.policies import CompactionPolicy
from taskstore.model.records import TaskRecord
from taskstore.registry.compactor import compact
from taskstore.registry.registry import TaskRegistry
from taskstore.store.interface import SupportsCompaction, SupportsJournal, TaskRegistryStore
from taskstore.testing.faults.stage import Stage

Records = Mapping[str, TaskRecord]

CALLERS = 4
"""How many threads come together in the scenario of group commit."""

FOLD = CompactionPolicy(history_s=0, history_entries=2, keep_snapshots=1).forced()


class State(Enum):
    """What a ledger shows of one call."""

    DONE = "done"
    UNDONE = "not done"
    HALF = "half done"
    SAME = "no different"
    """Whether the call happened or not, every record has to be as before."""


class Part(NamedTuple):
    """One call of one caller.

    ``state`` tells from a ledger's records whether it happened, and ``owns``
    which records are its own: all others have to stay as they were.
    """

    act: Callable[[], object]
    state: Callable[[Records], State]
    owns: Callable[[TaskRecord], bool]


class Scenario(NamedTuple):
    """What is done under a fault.

    ``prepare`` is called in peace and returns the calls; several are made by
    as many threads.  ``lags`` tells that the registry is behind afterwards,
    because somebody else wrote, until its next use.  With ``anew`` every time
    is the first on a storage that does not hold a ledger yet.
    """

    name: str
    prepare: Callable[[Stage], Sequence[Part]]
    needs: type = TaskRegistryStore
    lags: bool = False
    anew: bool = False


def _nobody(_: TaskRecord) -> bool:
    return False


def _same(_: Records) -> State:
    return State.SAME


def _labelled(label: str) -> Callable[[TaskRecord], bool]:
    return lambda record: record.label == label


def _one_of(flags: Iterable[bool]) -> State:
    """All of it, nothing of it, or something in between."""
    found = set(flags)
    if len(found) > 1:
        return State.HALF
    return State.DONE if found.pop() else State.UNDONE


def _new(registry: TaskRegistry, label: str) -> TaskRecord:
    return registry.create(runtime="cli", task="under faults", owner_key="faults", label=label)


def _creating(registry: TaskRegistry) -> Part:
    label = secrets.token_hex(8)
    mine = _labelled(label)
    return Part(
        lambda: _new(registry, label),
        lambda records: _one_of([any(map(mine, records.values()))]),
        mine,
    )


def _updating(registry: TaskRegistry, task: TaskRecord) -> Part:
    word = secrets.token_hex(8)
    return Part(
        lambda: registry.record_progress(task.task_id, word),
        lambda records: _one_of([records[task.task_id].progress_summary == word]),
        lambda record: record.task_id == task.task_id,
    )


def _create(stage: Stage) -> Sequence[Part]:
    return [_creating(stage.playing())]


def _update(stage: Stage) -> Sequence[Part]:
    registry = stage.playing()
    return [_updating(registry, _new(registry, "updated"))]


def _delete(stage: Stage) -> Sequence[Part]:
    registry = stage.playing()
    task = _new(registry, "deleted")
    return [
        Part(
            lambda: registry.delete(task.task_id),
            lambda records: _one_of([task.task_id not in records]),
            lambda record: record.task_id == task.task_id,
        )
    ]


def _batch(stage: Stage) -> Sequence[Part]:
    registry = stage.playing()
    parts = [*_update(stage), *_delete(stage), _creating(registry), _creating(registry)]

    def act() -> None:
        with registry.batch():
            for part in parts:
                part.act()

    return [
        Part(
            act,
            lambda records: _one_of(part.state(records) is State.DONE for part in parts),
            lambda record: any(part.owns(record) for part in parts),
        )
    ]


def _group(stage: Stage) -> Sequence[Part]:
    parts = [*_update(stage), *_delete(stage)]
    return [*parts, *(_creating(stage.playing()) for _ in range(CALLERS - len(parts)))]


def _update_behind(stage: Stage) -> Sequence[Part]:
    """Update a task after another writer has committed something."""
    parts = _update(stage)
    _elsewhere(stage)
    return parts


def _refresh(stage: Stage) -> Sequence[Part]:
    _elsewhere(stage)
    return [Part(stage.playing().refresh, _same, _nobody)]


def _elsewhere(stage: Stage) -> None:
    with stage.open_store() as store, TaskRegistry(store) as registry:
        _new(registry, "by another writer")


def _compact(stage: Stage) -> Sequence[Part]:
    registry = stage.playing()
    compact(registry.store, FOLD)  # clears up what the last time left
    task = _new(registry, "compacted")
    registry.mark_running(task.task_id)
    registry.delete(_new(registry, "compacted").task_id)
    return [Part(partial(compact, registry.store, FOLD), _same, _nobody)]


def _save(stage: Stage) -> Sequence[Part]:
    """Replace the content by itself, but for one task that goes."""
    registry = stage.playing()
    task, store = _new(registry, "gone with the save"), registry.store
    records = {
        record.task_id: record for record in registry.list() if record.task_id != task.task_id
    }
    snapshot = Snapshot(registry.seq + 10, records, store.clock())
    return [
        Part(
            lambda: store.save_snapshot(snapshot),
            lambda records: _one_of([task.task_id not in records]),
            lambda record: record.task_id == task.task_id,
        )
    ]


def _open(stage: Stage) -> Sequence[Part]:
    stage.close()
    return [Part(stage.open, _same, _nobody)]


SCENARIOS: Sequence[Scenario] = (
    Scenario("create", _create),
    Scenario("update", _update),
    Scenario("delete", _delete),
    Scenario("batch", _batch),
    Scenario("group commit", _group),
    Scenario("update behind another", _update_behind, SupportsJournal, lags=True),
    Scenario("refresh", _refresh, SupportsJournal, lags=True),
    Scenario("compact", _compact, SupportsCompaction),
    Scenario("save", _save, lags=True),
    Scenario("open", _open),
    Scenario("first open", _open, anew=True),
)
"""What is played, one after the other."""
