"""The survey, which runs scenarios and checks each of their crash states."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from msgspec import Struct, field

from taskstore.testing.powerloss.expected import Expected, OpenOn, check
from taskstore.testing.powerloss.model import CrashState, Model
from taskstore.testing.powerloss.recorder import (
    Expects,
    Omits,
    Recorder,
    Removed,
    Synced,
    SyncOmitted,
)
from taskstore.testing.powerloss.scenarios import SCENARIOS
from taskstore.testing.powerloss.workload import Workload

MAX_STATES = 32
"""The default maximum number of crash states that are opened per crash point."""

_STEPS = (
    *("open", "close", "pwrite", "truncate", "rename", "unlink", "mkdir"),
    *("sync_data", "sync_file", "sync_directory"),
)
_SHOWN = 5


class Survey(Struct, kw_only=True):
    """The result of a survey: counts, and the problems.

    ``crash_points`` counts the simulated power losses, and ``exhaustive`` counts the
    power losses for which every crash state was built.  ``possible`` counts the crash states
    that the model allows, ``built`` counts the built crash states, and ``opened`` counts the
    distinct crash states that were opened.  ``steps`` counts the file operations of the
    workloads by name, and ``sites`` counts these operations by call site.
    """

    steps: Counter[str] = field(default_factory=Counter)
    sites: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    crash_points: int = 0
    exhaustive: int = 0
    possible: int = 0
    built: int = 0
    opened: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def uncovered_steps(self) -> list[str]:
        """The names of the disk operations that no workload used."""
        return [step for step in _STEPS if not self.steps[step]]

    def __str__(self) -> str:
        steps = ", ".join(f"{self.steps[step]} {step}" for step in _STEPS)
        return "\n".join(
            [
                f"file operations      {self.steps.total()} ({steps})",
                f"crash points         {self.crash_points}, {self.exhaustive} with every state",
                f"states possible      {_number(self.possible)}",
                f"states built         {self.built}",
                f"states opened        {self.opened} distinct states, in {self.seconds:.1f} s",
                f"problems             {len(self.problems) or 'none'}",
                *(f"  {problem}" for problem in self.problems[:_SHOWN]),
            ]
        )


def survey(
    open_on: OpenOn,
    *,
    scenarios: Sequence[Callable[[Workload], object]] = SCENARIOS,
    omits: Omits | None = None,
    max_states: int = MAX_STATES,
    seed: int = 20261122,
    stop: bool = False,
) -> Survey:
    """Check the crash states of a file-based store, and return the counts and problems.

    ``open_on`` opens the store; each of ``scenarios`` runs on a new ledger.  If a crash point has
    more than ``max_states`` crash states, the survey opens a sample of ``max_states`` crash states;
    ``seed`` determines the sample.  If ``stop`` is true, the survey ends at the first problem.
    ``omits`` selects fsyncs to omit (see :meth:`Recorder.disk`); with this parameter, a test shows
    that each fsync is needed.
    """
    started = time.monotonic()
    result = Survey()
    with fast_directory() as scratch:
        for number, scenario in enumerate(scenarios):
            (root := scratch / f"scenario-{number}").mkdir()
            recorder = Recorder(root)
            scenario(workload := Workload(recorder, open_on, omits))
            model = Model(max_states=max_states, seed=seed)
            result.steps += recorder.steps
            result.sites += recorder.sites
            directory = scratch / "state" / workload.directory.relative_to(root)
            for position, state, allowed in _states(
                recorder, result, model, omits_syncs=omits is not None
            ):
                result.opened += 1
                build(state, scratch / "state")
                problem = check(open_on, directory, allowed)
                if problem is not None:
                    operation = f"{recorder.trace[position - 1]!r:.80}"
                    result.problems.append(
                        f"{scenario.__name__}, after {position} operations (last: {operation}), "
                        f"missing {state.missing}: {problem}"
                    )
                shutil.rmtree(scratch / "state")
                if stop and result.problems:
                    break
            if stop and result.problems:
                break
    result.seconds = time.monotonic() - started
    return result


def _states(
    recorder: Recorder, result: Survey, model: Model, *, omits_syncs: bool
) -> Iterator[tuple[int, CrashState, Sequence[Expected]]]:
    """Yield (trace position, state, allowed content); skip states that were already yielded."""
    allowed: Sequence[Expected] = ()
    # An omitted fsync has an effect until the same file is flushed by an fsync or removed.
    unsynced: set[int] = set()
    done = 0
    yielded: set[tuple[bytes, tuple[int, ...]]] = set()
    for point in model.crash_points(recorder.trace):
        for operation in recorder.trace[done : point.number]:
            if isinstance(operation, SyncOmitted):
                unsynced.add(operation.node)
            elif isinstance(operation, Synced | Removed):
                unsynced.discard(operation.node)
        done = point.number
        before, allowed = allowed, cast("Sequence[Expected]", point.expected)
        if isinstance(recorder.trace[point.number - 1], Expects) and set(before) <= set(allowed):
            continue  # all content that was allowed before is still allowed
        if omits_syncs and not unsynced:
            continue
        result.crash_points += 1
        result.exhaustive += point.exhaustive
        result.possible += point.possible
        for state in point.states:
            result.built += 1
            key = state.digest, tuple(map(id, allowed))
            if key not in yielded:
                yielded.add(key)
                yield point.number, state, allowed


def build(state: CrashState, directory: Path) -> None:
    """Write the files of a crash state to a new directory."""
    directory.mkdir()
    for path, data in state.tree.items():
        if data is None:
            (directory / path).mkdir()
        else:
            (directory / path).write_bytes(data)


@contextlib.contextmanager
def fast_directory() -> Iterator[Path]:
    """Yield a temporary directory, in memory if possible; a survey needs no real fsync."""
    memory = Path("/dev/shm")  # noqa: S108 - only a parent of the temporary directory
    parent = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="taskstore-power-", dir=parent) as directory:
        yield Path(directory)


def _number(number: int) -> str:
    return str(number) if number < 10**9 else f"{float(number):.1e}" if number < 10**300 else "…"
