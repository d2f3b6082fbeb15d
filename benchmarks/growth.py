"""The cost of a progress event in a small and in a large ledger.

Two ledgers of the same backend, one with few tasks and one with many, receive
the same progress events in interleaved rounds.  Prints the median cost of an
event on each ledger, and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from taskstore import TaskRegistry


def fill(url: str, tasks: int) -> tuple[TaskRegistry, list[str]]:
    registry = TaskRegistry.open(url)
    ids: list[str] = []
    while len(ids) < tasks:
        with registry.batch():
            for number in range(len(ids), min(len(ids) + 1000, tasks)):
                ids.append(
                    registry.create(
                        runtime="cli",
                        task=f"Summarise the inbox of account {number}",
                        owner_key=f"agent:{number % 50}",
                        run_id=f"run-{number}",
                        status="running",
                    ).task_id
                )
    return registry, ids


def event_costs(registry: TaskRegistry, ids: list[str], events: int, salt: int) -> list[float]:
    step = max(1, len(ids) // events)
    costs = []
    for number in range(events):
        started = time.perf_counter()
        registry.record_progress(ids[number * step % len(ids)], f"{salt} of {number} read")
        costs.append(time.perf_counter() - started)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="json")
    parser.add_argument("--few", type=int, default=1_000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=500, help="events in a round")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dir", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        ledgers = {
            count: fill(f"{options.scheme}:///{Path(folder).resolve()}/ledger-{count}", count)
            for count in (options.few, options.many)
        }
        medians: dict[int, list[float]] = {count: [] for count in ledgers}
        for salt in range(options.rounds):
            for count, (registry, ids) in ledgers.items():
                medians[count].append(
                    statistics.median(event_costs(registry, ids, options.events, salt)) * 1e6
                )
        for count, rounds in medians.items():
            print(
                f"{options.scheme} {count:>9,} tasks: {statistics.median(rounds):8.1f} us an event"
                f" (rounds {min(rounds):.1f} to {max(rounds):.1f})"
            )
        ratios = [many / few for few, many in zip(*medians.values(), strict=True)]
        print(
            f"ratio many / few: {statistics.median(ratios):.3f}"
            f" (rounds {min(ratios):.3f} to {max(ratios):.3f})"
        )
        for registry, _ in ledgers.values():
            registry.close()


if __name__ == "__main__":
    main()
