"""Upper bounds of the function calls that one public call makes.

As a script it prints the counts.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple

import taskstore
from taskstore import CompactionPolicy, TaskRegistry, compact

PACKAGE = str(Path(taskstore.__file__).parent)
FOLD = CompactionPolicy(history_s=0, history_entries=0).forced()


class Counts(NamedTuple):
    """The calls of package functions, their files, and the switches between files."""

    frames: int
    files: int
    switches: int


# Upper bounds of warm calls.  Python 3.12 and newer make fewer calls, because
# comprehensions are inlined.
BOUNDS = {
    "sqlite create": Counts(frames=70, files=18, switches=45),
    "sqlite record_progress": Counts(frames=55, files=18, switches=42),
    # While the directory is younger than 20 ms, each read checks its files.
    "sqlite open": Counts(frames=350, files=22, switches=175),
    "json create": Counts(frames=60, files=18, switches=35),
    "json record_progress": Counts(frames=45, files=18, switches=36),
}


def counts_of(call: Callable[[], object]) -> Counts:
    """Return the counts of this thread during a call."""
    entered: list[str] = []

    def record_call(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            entered.append(frame.f_code.co_filename)

    gc.collect()
    gc.disable()  # a garbage collection would count finalizers
    sys.setprofile(record_call)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    switches = sum(file != before for before, file in zip(["", *entered], entered, strict=False))
    return Counts(len(entered), len(set(entered)), switches)


def measure(scheme: str) -> dict[str, Counts]:
    """Return the counts of one backend on a small new ledger."""
    with TemporaryDirectory() as folder:
        url = f"{scheme}:///{folder}/ledger"

        def create(number: int, **fields: Any) -> str:
            return registry.create(
                runtime="cli", task="Count", owner_key="me", run_id=f"run-{number}", **fields
            ).task_id

        counts = {}
        with TaskRegistry.open(url) as registry:
            for number in range(20):
                registry.finish(create(number), "succeeded")
            counts[f"{scheme} create"] = counts_of(lambda: create(20, metadata={"n": 20}))
            task_id = create(21, metadata={"n": 21})
            counts[f"{scheme} record_progress"] = counts_of(
                lambda: registry.record_progress(task_id, "half")
            )
            registry.finish(task_id, "succeeded")
            compact(registry.store, FOLD)
        registries: list[TaskRegistry] = []
        counts[f"{scheme} open"] = counts_of(lambda: registries.append(TaskRegistry.open(url)))
        registries[0].close()
    return counts


def test_no_call_exceeds_its_bounds() -> None:
    # In a new process, in which no other test has used the package.
    output = subprocess.run([sys.executable, __file__], capture_output=True, check=True).stdout
    counts = {name: Counts(**found) for name, found in json.loads(output).items()}
    exceeded = {
        name: f"{counts[name]}, at most {bounds}"
        for name, bounds in BOUNDS.items()
        if any(found > most for found, most in zip(counts[name], bounds, strict=True))
    }
    assert not exceeded


if __name__ == "__main__":
    found = {**measure("sqlite"), **measure("json")}
    json.dump({name: counts._asdict() for name, counts in found.items()}, sys.stdout, indent=1)
