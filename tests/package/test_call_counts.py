"""How much of the package one call passes through: counts, which no clock can blur.

Run as a script it prints the counts.
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

HOME = str(Path(taskstore.__file__).parent)
FOLD = CompactionPolicy(history_s=0, history_entries=0).forced()


class Counts(NamedTuple):
    """The package's own functions entered, the files they are in, and changes of file."""

    frames: int
    files: int
    switches: int


# Upper bounds of warm calls.  Python 3.12 and newer enter fewer frames: comprehensions
# have none of their own.
BOUNDS = {
    "sqlite create": Counts(frames=70, files=18, switches=45),
    "sqlite record_progress": Counts(frames=55, files=18, switches=42),
    # While the directory is younger than 20 ms, each read looks at the files in it.
    "sqlite open": Counts(frames=350, files=22, switches=175),
    "json create": Counts(frames=60, files=18, switches=35),
    "json record_progress": Counts(frames=45, files=18, switches=36),
}


def counts_of(call: Callable[[], object]) -> Counts:
    """What of the package this thread enters during a call."""
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            entered.append(frame.f_code.co_filename)

    gc.collect()
    gc.disable()  # what a collection finalizes belongs to no call
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    switches = sum(file != before for before, file in zip(["", *entered], entered, strict=False))
    return Counts(len(entered), len(set(entered)), switches)


def measure(scheme: str) -> dict[str, Counts]:
    """The counts of one backend, on a small ledger of its own."""
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
        opened: list[TaskRegistry] = []
        counts[f"{scheme} open"] = counts_of(lambda: opened.append(TaskRegistry.open(url)))
        opened[0].close()
    return counts


def test_no_call_passes_through_more_than_it_should() -> None:
    # In a process of its own, in which nothing else of the package was used before.
    printed = subprocess.run([sys.executable, __file__], capture_output=True, check=True).stdout
    counts = {name: Counts(**found) for name, found in json.loads(printed).items()}
    grown = {
        name: f"{counts[name]}, at most {bounds}"
        for name, bounds in BOUNDS.items()
        if any(found > most for found, most in zip(counts[name], bounds, strict=True))
    }
    assert not grown


if __name__ == "__main__":
    found = {**measure("sqlite"), **measure("json")}
    json.dump({name: counts._asdict() for name, counts in found.items()}, sys.stdout, indent=1)
