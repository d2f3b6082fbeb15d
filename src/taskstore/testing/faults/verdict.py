"""The checks after a fault: outcomes compared with the stored state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from taskstore.errors import OutcomeUnknownError, StoreUnavailableError, TaskStoreError
from taskstore.model.records import TaskRecord
from taskstore.testing.faults.harness import Harness, State
from taskstore.testing.faults.injection import Fault, Step
from taskstore.testing.faults.scenarios import Effect, Operation

PROBE_LABEL = "probe"
"""The label of the task that a check creates after each fault."""


class Outcome(NamedTuple):
    """The outcome of one call: an exception, or ``None`` for success."""

    error: BaseException | None

    @property
    def name(self) -> str:
        """The name of the exception's class, or ``ok`` if the call succeeded."""
        return "ok" if self.error is None else type(self.error).__name__


def check_callers(
    operations: Sequence[Operation], outcomes: Sequence[Outcome], before: State, after: State
) -> list[str]:
    """Return the problems: wrong outcomes of calls, and changes that no call made."""
    problems = []
    for operation, outcome in zip(operations, outcomes, strict=True):
        effect = operation.effect(after.snapshot.records)
        error = outcome.error
        if effect is Effect.PARTIAL:
            problems.append(f"the caller got {outcome.name}, but the change is partly stored")
        elif error is None and effect is Effect.NONE:
            problems.append("the change was acknowledged but is not stored")
        elif error is not None and not isinstance(error, TaskStoreError):
            problems.append(f"the caller got {error!r}, which is not a TaskStoreError")
        elif effect is Effect.APPLIED and not isinstance(error, OutcomeUnknownError | NoneType):
            problems.append(f"the caller got {outcome.name}, but the change is stored")

    def unrelated(stored: State) -> dict[str, TaskRecord]:
        records = stored.snapshot.records
        return {
            task_id: record
            for task_id, record in records.items()
            if not any(operation.touches(record) for operation in operations)
        }

    if unrelated(before) != unrelated(after):
        problems.append("unrelated records have changed")
    for seq, entry in after.entries.items():
        if seq in before.entries and entry != before.entries[seq]:
            problems.append(f"the journal entry at seq {seq} has changed")
    return problems


def check_failed_sync(
    fault: Fault,
    faulted: Step | None,
    later: Sequence[Step],
    outcomes: Sequence[Outcome],
    *,
    writable: bool,
) -> list[str]:
    """Return a problem if the store ignored the failed fsync of the step ``faulted`` [4].

    ``later`` has the steps after ``faulted``.
    """
    if faulted is None or not fault.fails_sync(faulted):
        return []
    if all(outcome.error is None for outcome in outcomes):
        # If a group commit fails, the store commits each of its calls separately, to new files.
        is_group = faulted.is_new and len(outcomes) > 1
        if is_group and any(step.label == faulted.label for step in later):
            return []
        return [f"{faulted.label} failed, but no caller got an error"]
    on_a_file = faulted.name == "commit" or not _is_directory(faulted.resource)
    if on_a_file and not faulted.is_new and writable:
        return [f"{faulted.label} failed, but the instance still accepts writes"]
    return []


def _is_directory(path: Any) -> bool:
    return isinstance(path, str) and Path(path).is_dir()


def write_again(
    harness: Harness, operations: Sequence[Operation], after: State
) -> tuple[bool, list[str]]:
    """Write again after a fault; return whether the store refused the write, and the problems.

    If the store refuses the write, reopen the ledger.
    """
    refuses, problems = False, []
    error = _write_error(harness)
    if error is not None:
        refuses = True
        if not isinstance(error, StoreUnavailableError):
            problems.append(f"the next write raised {error!r}")
        elif not isinstance(_write_error(harness), StoreUnavailableError):
            problems.append("the store refused one write and accepted the next without a reopen")
        if harness.read_stored().snapshot != after.snapshot:
            problems.append("a refused write changed the stored state")
        harness.close()
        harness.open()
        error = _write_error(harness)
        if error is not None:
            problems.append(f"after a reopen, the next write raised {error!r}")
    registry = harness.opened()
    with registry.batch():  # deletes the records that would slow down later runs
        for record in registry.list():
            if record.label == PROBE_LABEL or any(op.touches(record) for op in operations):
                registry.delete(record.task_id)
    return refuses, problems


def _write_error(harness: Harness) -> Exception | None:
    """Create a task; return the exception that this write raises, or ``None``."""
    try:
        harness.opened().create(runtime="cli", task="Write after the fault", label=PROBE_LABEL)
    except Exception as error:  # noqa: BLE001 - the caller judges every error
        return error
    return None
