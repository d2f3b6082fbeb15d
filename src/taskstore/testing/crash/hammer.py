"""Several processes hammering a few tasks of one ledger, and the account of what came of it.

::

    python -m taskstore.testing.crash.hammer URL [--processes 4 --tasks 5 --changes 500]

Each process has a registry of its own and changes the same tasks, progress
and metadata in turn, each change telling who made it and the how-manieth it
is.  Rounds of one process alone and of all at once take turns, so that both
are measured on the same machine in the same minutes.  Afterwards
:mod:`taskstore.testing.crash.account` compares what each caller was told with the
journal, with the records and with every process's mirror.

Prints what was measured, in milliseconds; exit status 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import IO, Any, cast

import msgspec
from msgspec import Struct

from taskstore.errors import TaskStoreError
from taskstore.registry.registry import TaskRegistry
from taskstore.store.opening import open_store
from taskstore.testing.crash.account import Change, problems_of
from taskstore.testing.crash.processes import Child, Report
from taskstore.testing.threads import run_together
from taskstore.testing.types import FullStore

RATIO = 50
"""How many medians of a lone writer the slowest hundredth may take at most."""

WAIT_S = 5.0
"""How long a caller waits at most, in seconds."""


class Order(Struct):
    """What a process is to do next: ``turns`` changes in each of its threads."""

    turns: int


class Told(Struct):
    """What a process says afterwards.

    ``latencies`` are seconds, one for each change, ``failures`` what callers
    got to see of exceptions, ``revisions`` the mirror after a refresh.
    """

    changes: list[Change] = []
    latencies: list[float] = []
    failures: list[str] = []
    revisions: dict[str, int] = {}


class Result(Struct):
    """What came of hammering; times are seconds."""

    alone: list[float]
    together: list[float]
    spent_s: float
    changes: int
    revisions: int
    problems: list[str]

    @property
    def lone_median(self) -> float:
        """What a change takes when nobody else writes."""
        return statistics.median(self.alone)

    @property
    def p99(self) -> float:
        """What the slowest hundredth of the changes takes when all write."""
        return percentile(self.together, 0.99)

    @property
    def ratio(self) -> float:
        """How many medians of a lone writer the slowest hundredth takes."""
        return self.p99 / self.lone_median

    @property
    def longest(self) -> float:
        """What the slowest change took."""
        return max(self.together)

    def broken(self) -> list[str]:
        """The promises that were not kept, as sentences."""
        broken = list(self.problems)
        if self.ratio > RATIO:
            broken.append(f"p99 is {self.ratio:.1f} medians of a lone writer, not {RATIO} at most")
        if self.longest > WAIT_S:
            broken.append(f"somebody waited {self.longest:.1f} s, not {WAIT_S:g} at most")
        return broken


def percentile(times: Sequence[float], share: float) -> float:
    """The time within which that share of them lies."""
    return sorted(times)[min(int(len(times) * share), len(times) - 1)]


class Process:
    """A forked process with a registry of its own, which does as it is told."""

    def __init__(
        self, work: Callable[[IO[bytes], Report], None], others: Sequence[Process]
    ) -> None:
        reading, self._orders = os.pipe()

        def begin(report: Report) -> None:
            # An end that a sibling keeps open would never be found closed.
            for end in (self._orders, *(other._orders for other in others)):  # noqa: SLF001 - its own
                os.close(end)
            with os.fdopen(reading, "rb") as orders:
                work(orders, report)

        self._child = Child(begin)
        os.close(reading)

    def tell(self, turns: int) -> None:
        """Let it begin."""
        os.write(self._orders, msgspec.json.encode(Order(turns)) + b"\n")

    def hear(self) -> Told:
        """Wait until it has done what it was told."""
        line = self._child.line()
        if not line:
            self._child.finish()
            raise AssertionError("a process ended before it was told to")
        return msgspec.json.decode(line, type=Told)

    def end(self) -> None:
        """Let it close its registry, and wait for that."""
        os.close(self._orders)
        self._child.finish()


def hammer(
    url: str,
    *,
    processes: int = 4,
    tasks: int = 5,
    changes: int = 500,
    threads: int = 1,
    rounds: int = 5,
    beside: Callable[[], Any] | None = None,
) -> Result:
    """Let ``processes`` make ``changes`` each on ``tasks`` new tasks of the ledger at ``url``.

    ``beside`` is called while they are at it, in each round, by this process.
    """
    with TaskRegistry.open(url) as registry:
        start = registry.refresh()
        task_ids = [
            registry.create(runtime="cli", task=f"hammered {number}", status="running").task_id
            for number in range(tasks)
        ]
    told: list[Told] = []
    result = Result([], [], 0.0, 0, 0, [])
    turns = max(1, changes // rounds // threads)
    with crew(url, processes, task_ids, threads) as workers:
        for number in range(rounds):
            alone = workers[number % processes]
            alone.tell(turns)
            told.append(alone.hear())
            result.alone += told[-1].latencies
            started = time.perf_counter()
            for worker in workers:
                worker.tell(turns)
            if beside is not None:
                beside()
            answers = [worker.hear() for worker in workers]
            result.spent_s += time.perf_counter() - started
            for answer in answers:
                result.together += answer.latencies
            told += answers
        for worker in workers:
            worker.tell(0)
        told += [worker.hear() for worker in workers]
    _account(url, start, task_ids, told, result)
    return result


@contextmanager
def crew(
    url: str, processes: int, task_ids: Sequence[str], threads: int
) -> Iterator[list[Process]]:
    """Processes that have opened the ledger and wait to be told."""
    with ExitStack() as stack:
        workers: list[Process] = []
        for number in range(processes):
            job = partial(work, url, f"p{number}", task_ids, threads)
            workers.append(Process(job, workers))
            stack.callback(workers[-1].end)
        for worker in workers:
            worker.hear()
        yield workers


def _account(
    url: str, start: int, task_ids: Sequence[str], told: Sequence[Told], result: Result
) -> None:
    """Compare what everybody was told with what is stored."""
    changes = [change for answer in told for change in answer.changes]
    mirrors = [answer.revisions for answer in told if answer.revisions]
    with closing(cast("FullStore", open_store(url, read_only=True))) as store:
        result.changes = len(changes)
        result.problems = [failure for answer in told for failure in answer.failures]
        result.problems += problems_of(store, start, task_ids, changes, mirrors)
        records = store.load_snapshot().records
        result.revisions = sum(records[task_id].revision for task_id in task_ids)
        result.problems += store.verify().problems


# -- in the processes -------------------------------------------------------


def work(
    url: str,
    name: str,
    task_ids: Sequence[str],
    threads: int,
    orders: IO[bytes],
    report: Report,
) -> None:
    """Open the ledger and do as told, until nothing more comes."""
    done = [0] * threads

    def say(told: Told) -> None:
        report(msgspec.json.encode(told).decode())

    with TaskRegistry.open(url) as registry:
        say(Told())
        for line in orders:
            order, told = msgspec.json.decode(line, type=Order), Told()
            jobs = [
                _job(registry, f"{name}t{number}", task_ids, order.turns, done, number, told)
                for number in range(threads)
            ]
            if threads == 1:
                jobs[0]()
            else:
                run_together(*jobs)
            if not order.turns:
                registry.refresh()
                told.revisions = {task_id: registry.get(task_id).revision for task_id in task_ids}
            say(told)


def _job(
    registry: TaskRegistry,
    writer: str,
    task_ids: Sequence[str],
    turns: int,
    done: list[int],
    number: int,
    told: Told,
) -> Callable[[], None]:
    """One thread's changes: progress and metadata in turn, over the tasks in turn."""

    def run() -> None:
        for _ in range(turns):
            done[number] += 1
            count, task_id = done[number], task_ids[done[number] % len(task_ids)]
            progress = count % 2 == 0
            started = time.perf_counter()
            try:
                if progress:
                    record = registry.record_progress(task_id, f"{writer} {count}")
                else:
                    record = registry.update_metadata(task_id, {writer: count})
            except TaskStoreError as error:
                told.failures.append(f"{writer} got {type(error).__name__}: {error}")
                continue
            finally:
                told.latencies.append(time.perf_counter() - started)
            told.changes.append(Change(task_id, record.revision, writer, count, progress))

    return run


# -- the command ------------------------------------------------------------


def describe(result: Result) -> list[str]:
    """The result in lines."""
    ms = 1000
    return [
        f"lone writer      median {result.lone_median * ms:9.2f} ms",
        f"all at once      median {statistics.median(result.together) * ms:9.2f} ms",
        f"                 p99    {result.p99 * ms:9.2f} ms",
        f"p99 / lone median       {result.ratio:9.1f} (at most {RATIO})",
        f"                 longest{result.longest * ms:9.2f} ms (at most {WAIT_S * ms:g})",
        f"changes a second        {len(result.together) / result.spent_s:9.0f}",
        f"changes acknowledged    {result.changes:9}",
        f"sum of revisions        {result.revisions:9}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m taskstore.testing.crash.hammer")
    parser.add_argument("url", metavar="URL", help="a ledger to work on; the new tasks stay in it")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--changes", type=int, default=500, help="of each process")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    result = hammer(
        options.url,
        processes=options.processes,
        tasks=options.tasks,
        changes=options.changes,
        threads=options.threads,
        rounds=options.rounds,
    )
    broken = result.broken()
    for line in [*describe(result), *(f"broken: {promise}" for promise in broken)]:
        print(line)  # noqa: T201 (a command reports by printing)
    if not broken:
        print("revisions, journal and mirrors add up")  # noqa: T201 (see above)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
