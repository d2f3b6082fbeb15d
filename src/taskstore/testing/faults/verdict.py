"""The verdict on what came of a fault: what callers were told, and what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from taskstore.errors import OutcomeUnknownError, StoreUnavailableError, TaskStoreError
from taskstore.model.records import TaskRecord
from taskstore.testing.faults.door import Fault, Step
from taskstore.testing.faults.scenarios import Part, State
from taskstore.testing.faults.stage import Seen, Stage

ALIVE = "life goes on"
"""The label of what is written after a fault."""


class Outcome(NamedTuple):
    """What one caller got: nothing or an exception."""

    error: BaseException | None

    @property
    def name(self) -> str:
        """The exception's class, or ``ok``."""
        return "ok" if self.error is None else type(self.error).__name__


def judge_callers(
    parts: Sequence[Part], outcomes: Sequence[Outcome], before: Seen, after: Seen
) -> list[str]:
    """Whether each caller was told the truth, and nothing else changed."""
    problems = []
    for part, outcome in zip(parts, outcomes, strict=True):
        state = part.state(after.snapshot.records)
        error = outcome.error
        if state is State.HALF:
            problems.append(f"the caller got {outcome.name}, and the change is half done")
        elif error is None and state is State.UNDONE:
            problems.append("acknowledged, and not there")
        elif error is not None and not isinstance(error, TaskStoreError):
            problems.append(f"the caller got {error!r}, which is no error of ours")
        elif state is State.DONE and not isinstance(error, OutcomeUnknownError | NoneType):
            problems.append(f"the caller got {outcome.name}, and the change is there")

    def others(seen: Seen) -> dict[str, TaskRecord]:
        records = seen.snapshot.records
        return {
            task_id: record
            for task_id, record in records.items()
            if not any(part.owns(record) for part in parts)
        }

    if others(before) != others(after):
        problems.append("records changed that nobody has touched")
    for seq, entry in after.entries.items():
        if seq in before.entries and entry != before.entries[seq]:
            problems.append(f"the journal has another entry at seq {seq} than before")
    return problems


def judge_sync(
    fault: Fault,
    struck: Step | None,
    later: Sequence[Step],
    outcomes: Sequence[Outcome],
    *,
    goes_on: bool,
) -> list[str]:
    """Whether a failed sync was taken as seriously as it is [4]; ``later`` came after it."""
    if struck is None or not fault.grave(struck):
        return []
    if all(outcome.error is None for outcome in outcomes):
        # A group that failed is committed again, each call by itself: to new files.
        together = struck.fresh and len(outcomes) > 1
        if together and any(step.label == struck.label for step in later):
            return []
        return [f"{struck.label} failed, and nobody was told"]
    on_a_file = struck.name == "commit" or not _is_directory(struck.on)
    if on_a_file and not struck.fresh and goes_on:
        return [f"{struck.label} failed, and the instance goes on writing"]
    return []


def _is_directory(path: Any) -> bool:
    return isinstance(path, str) and Path(path).is_dir()


def go_on(stage: Stage, parts: Sequence[Part], after: Seen) -> tuple[bool, list[str]]:
    """Write once more, reopening the ledger where it insists; (whether it did, problems)."""
    refuses, problems = False, []
    refusal = _refusal(stage)
    if refusal is not None:
        refuses = True
        if not isinstance(refusal, StoreUnavailableError):
            problems.append(f"the next write raised {refusal!r}")
        elif not isinstance(_refusal(stage), StoreUnavailableError):
            problems.append("it refused one write and took the next without being reopened")
        if stage.look().snapshot != after.snapshot:
            problems.append("a write that was refused left something")
        stage.close()
        stage.open()
        refusal = _refusal(stage)
        if refusal is not None:
            problems.append(f"reopened, the next write raised {refusal!r}")
    registry = stage.playing()
    with registry.batch():  # what was made here would only slow down what comes
        for record in registry.list():
            if record.label == ALIVE or any(part.owns(record) for part in parts):
                registry.delete(record.task_id)
    return refuses, problems


def _refusal(stage: Stage) -> Exception | None:
    """What a write raises, if it does."""
    try:
        stage.playing().create(runtime="cli", task="Life goes on", label=ALIVE)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        return error
    return None
