"""The cost of one durable change by a single caller.

Runs `create` and `record_progress` on an SQLite and on a JSON ledger in the
same directory, in interleaved slices with a baseline: append a line of the same
length to a file, and sync it.  Prints the median of each, and the median over
the rounds of its ratio to the bare line.

    python benchmarks/lone.py [--dir DIRECTORY] [--rounds N]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from taskstore import TaskRegistry

NUMBERS = itertools.count(1)
LINE = b"x" * 611 + b"\n"
"""About as long as the journal line of one `create` in the JSON ledger."""


@contextmanager
def bare_lines(path: Path) -> Iterator[Callable[[], object]]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def append() -> None:
        os.write(descriptor, LINE)
        os.fdatasync(descriptor)

    yield append
    os.close(descriptor)


def verbs(registry: TaskRegistry) -> dict[str, Callable[[], object]]:
    def create() -> str:
        number = next(NUMBERS)
        return registry.create(
            runtime="cli",
            task=f"Summarise the inbox of account {number}",
            owner_key=f"agent:{number % 50}",
            run_id=f"run-{number}",
            metadata={"mails": number, "folder": "inbox"},
            status="running",
        ).task_id

    ids = itertools.cycle([create() for _ in range(1000)])

    def progress() -> None:
        registry.record_progress(next(ids), f"{next(NUMBERS)} of 1,000,000 mails read")

    return {"create": create, "record_progress": progress}


def costs_of(work: Callable[[], object], times: int) -> list[float]:
    costs = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        costs.append(time.perf_counter() - started)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", help="directory of the ledgers (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--changes", type=int, default=400, help="changes of each kind, per round")
    options = parser.parse_args()
    slices = 8
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.dir))).resolve()
        ways = {"bare line": stack.enter_context(bare_lines(folder / "lines"))}
        for scheme, name in (("sqlite", "tasks.db"), ("json", "ledger")):
            registry = stack.enter_context(TaskRegistry.open(f"{scheme}:///{folder / name}"))
            ways |= {f"{scheme} {verb}": work for verb, work in verbs(registry).items()}
        round_medians: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            costs: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(slices):
                for way, work in ways.items():
                    costs[way] += costs_of(work, options.changes // slices)
            for way, all_costs in costs.items():
                round_medians[way].append(statistics.median(all_costs) * 1e6)
    for way, medians in round_medians.items():
        ratios = [
            cost / bare for cost, bare in zip(medians, round_medians["bare line"], strict=True)
        ]
        print(
            f"{way:>22}: {statistics.median(medians):7.1f} us"
            f" (rounds {min(medians):.1f} to {max(medians):.1f}),"
            f" {statistics.median(ratios):5.2f} bare lines"
            f" ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
