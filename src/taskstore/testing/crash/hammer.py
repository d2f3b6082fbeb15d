"""A stress test: several processes change the same few tasks of one ledger.

::

    python -m taskstore.testing.crash.hammer URL [--processes 4 --tasks 5 --changes 500]

Each process has its own registry.  All processes change the same tasks; a process changes the
progress and the metadata alternately.  Each change contains the name of the writer and a counter.
Rounds in which one process writes alternate with rounds in which all processes write.  Because the
rounds alternate, the latencies of both kinds of rounds are measured at about the same time.  After
the rounds, :mod:`taskstore.testing.crash.acknowledged` compares the acknowledged changes with the
journal, the records and the record cache of every process.

The command prints latencies in milliseconds.  The exit status is 1 if a latency exceeds a
limit or the comparison finds a problem.
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
from taskstore.testing.crash.acknowledged import AcknowledgedChange, check_ledger
from taskstore.testing.crash.processes import Child, Report
from taskstore.testing.threads import run_together
from taskstore.testing.types import FullStore

MAX_P99_RATIO = 50
"""The highest allowed p99 latency, as a multiple of a single writer's median latency."""

MAX_LATENCY_S = 5.0
"""The highest allowed latency of a change, in seconds."""


class Request(Struct):
    """A request to a worker: make ``count`` changes in each thread of the worker."""

    count: int


class WorkerReport(Struct):
    """The report of a worker about one request.

    ``latencies`` has the duration of each change in seconds.  ``failures`` has a text for
    each change that failed.  ``revisions`` maps task ids to revisions in the record cache.
    """

    changes: list[AcknowledgedChange] = []
    latencies: list[float] = []
    failures: list[str] = []
    revisions: dict[str, int] = {}


class Result(Struct):
    """The measurements and problems of a stress test; times are in seconds."""

    single: list[float]
    concurrent: list[float]
    elapsed_s: float
    changes: int
    revisions: int
    problems: list[str]

    @property
    def single_median(self) -> float:
        """The median latency of a single writer."""
        return statistics.median(self.single)

    @property
    def p99(self) -> float:
        """The 99th percentile of the latency when all processes write."""
        return percentile(self.concurrent, 0.99)

    @property
    def ratio(self) -> float:
        """The p99 latency, as a multiple of a single writer's median latency."""
        return self.p99 / self.single_median

    @property
    def longest(self) -> float:
        """The highest latency of a change when all processes write."""
        return max(self.concurrent)

    def violations(self) -> list[str]:
        """Return one sentence for each problem and each exceeded latency limit."""
        violations = list(self.problems)
        if self.ratio > MAX_P99_RATIO:
            limit = f"the limit is {MAX_P99_RATIO}"
            violations.append(f"p99 is {self.ratio:.1f} times the single-writer median, {limit}")
        if self.longest > MAX_LATENCY_S:
            limit = f"the limit is {MAX_LATENCY_S:g} s"
            violations.append(f"a change took {self.longest:.1f} s, {limit}")
        return violations


def percentile(times: Sequence[float], share: float) -> float:
    """Return a percentile of ``times``; ``share`` is 0.99 for the 99th percentile."""
    return sorted(times)[min(int(len(times) * share), len(times) - 1)]


class Worker:
    """A forked process that has its own registry and serves requests."""

    def __init__(self, work: Callable[[IO[bytes], Report], None], others: Sequence[Worker]) -> None:
        reading, self._requests = os.pipe()

        def begin(report: Report) -> None:
            # If another worker keeps the pipe open for writing, the reader gets no end of file.
            for end in (self._requests, *(other._requests for other in others)):  # noqa: SLF001 - own class
                os.close(end)
            with os.fdopen(reading, "rb") as requests:
                work(requests, report)

        self._child = Child(begin)
        os.close(reading)

    def send(self, count: int) -> None:
        """Send the worker a request for ``count`` changes per thread."""
        os.write(self._requests, msgspec.json.encode(Request(count)) + b"\n")

    def receive(self) -> WorkerReport:
        """Wait for the worker's report about the previous request, and return the report."""
        line = self._child.line()
        if not line:
            self._child.finish()
            raise AssertionError("a worker process ended before its last request")
        return msgspec.json.decode(line, type=WorkerReport)

    def close(self) -> None:
        """Close the request pipe and wait until the process has closed its registry."""
        os.close(self._requests)
        self._child.finish()


def run_stress_test(
    url: str,
    *,
    processes: int = 4,
    tasks: int = 5,
    changes: int = 500,
    threads: int = 1,
    rounds: int = 5,
    background: Callable[[], Any] | None = None,
) -> Result:
    """Create ``tasks`` tasks at ``url``; each process makes ``changes`` changes to these tasks.

    In each round, the calling process calls ``background`` while all workers write.
    """
    with TaskRegistry.open(url) as registry:
        start = registry.refresh()
        task_ids = [
            registry.create(runtime="cli", task=f"hammered {number}", status="running").task_id
            for number in range(tasks)
        ]
    reports: list[WorkerReport] = []
    result = Result([], [], 0.0, 0, 0, [])
    count = max(1, changes // rounds // threads)
    with start_workers(url, processes, task_ids, threads) as workers:
        for number in range(rounds):
            single = workers[number % processes]
            single.send(count)
            reports.append(single.receive())
            result.single += reports[-1].latencies
            started = time.perf_counter()
            for worker in workers:
                worker.send(count)
            if background is not None:
                background()
            concurrent = [worker.receive() for worker in workers]
            result.elapsed_s += time.perf_counter() - started
            for report in concurrent:
                result.concurrent += report.latencies
            reports += concurrent
        for worker in workers:
            worker.send(0)
        reports += [worker.receive() for worker in workers]
    _check(url, start, task_ids, reports, result)
    return result


@contextmanager
def start_workers(
    url: str, processes: int, task_ids: Sequence[str], threads: int
) -> Iterator[list[Worker]]:
    """Yield worker processes that have opened the ledger; close the workers on exit."""
    with ExitStack() as stack:
        workers: list[Worker] = []
        for number in range(processes):
            job = partial(serve_requests, url, f"p{number}", task_ids, threads)
            workers.append(Worker(job, workers))
            stack.callback(workers[-1].close)
        for worker in workers:
            worker.receive()
        yield workers


def _check(
    url: str, start: int, task_ids: Sequence[str], reports: Sequence[WorkerReport], result: Result
) -> None:
    """Compare all worker reports with the ledger, and add the problems to ``result``."""
    changes = [change for report in reports for change in report.changes]
    caches = [report.revisions for report in reports if report.revisions]
    with closing(cast("FullStore", open_store(url, read_only=True))) as store:
        result.changes = len(changes)
        result.problems = [failure for report in reports for failure in report.failures]
        result.problems += check_ledger(store, start, task_ids, changes, caches)
        records = store.load_snapshot().records
        result.revisions = sum(records[task_id].revision for task_id in task_ids)
        result.problems += store.verify().problems


# -- in the workers ---------------------------------------------------------


def serve_requests(
    url: str,
    name: str,
    task_ids: Sequence[str],
    threads: int,
    requests: IO[bytes],
    report: Report,
) -> None:
    """Open the ledger and serve requests until the request pipe is closed."""
    counters = [0] * threads

    def send(answer: WorkerReport) -> None:
        report(msgspec.json.encode(answer).decode())

    with TaskRegistry.open(url) as registry:
        send(WorkerReport())
        for line in requests:
            request, answer = msgspec.json.decode(line, type=Request), WorkerReport()
            jobs = [
                _job(
                    registry, f"{name}t{number}", task_ids, request.count, counters, number, answer
                )
                for number in range(threads)
            ]
            if threads == 1:
                jobs[0]()
            else:
                run_together(*jobs)
            if not request.count:
                registry.refresh()
                answer.revisions = {task_id: registry.get(task_id).revision for task_id in task_ids}
            send(answer)


def _job(
    registry: TaskRegistry,
    writer: str,
    task_ids: Sequence[str],
    changes: int,
    counters: list[int],
    number: int,
    answer: WorkerReport,
) -> Callable[[], None]:
    """Return the job of one thread; the job changes the progress or the metadata of tasks."""

    def run() -> None:
        for _ in range(changes):
            counters[number] += 1
            count, task_id = counters[number], task_ids[counters[number] % len(task_ids)]
            progress = count % 2 == 0
            started = time.perf_counter()
            try:
                if progress:
                    record = registry.record_progress(task_id, f"{writer} {count}")
                else:
                    record = registry.update_metadata(task_id, {writer: count})
            except TaskStoreError as error:
                answer.failures.append(f"{writer} got {type(error).__name__}: {error}")
                continue
            finally:
                answer.latencies.append(time.perf_counter() - started)
            answer.changes.append(
                AcknowledgedChange(task_id, record.revision, writer, count, progress)
            )

    return run


# -- the command ------------------------------------------------------------


def describe(result: Result) -> list[str]:
    """Return a stress test's result as lines of text."""
    ms = 1000
    return [
        f"single writer    median {result.single_median * ms:9.2f} ms",
        f"all writers      median {statistics.median(result.concurrent) * ms:9.2f} ms",
        f"                 p99    {result.p99 * ms:9.2f} ms",
        f"p99 / single median     {result.ratio:9.1f} (at most {MAX_P99_RATIO})",
        f"                 longest{result.longest * ms:9.2f} ms (at most {MAX_LATENCY_S * ms:g})",
        f"changes per second      {len(result.concurrent) / result.elapsed_s:9.0f}",
        f"changes acknowledged    {result.changes:9}",
        f"sum of revisions        {result.revisions:9}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stress test from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m taskstore.testing.crash.hammer")
    parser.add_argument(
        "url", metavar="URL", help="the URL of a ledger; the test's tasks are not deleted"
    )
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--changes", type=int, default=500, help="changes per process")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    result = run_stress_test(
        options.url,
        processes=options.processes,
        tasks=options.tasks,
        changes=options.changes,
        threads=options.threads,
        rounds=options.rounds,
    )
    violations = result.violations()
    for line in [*describe(result), *(f"failed: {violation}" for violation in violations)]:
        print(line)  # noqa: T201 (a command reports by printing)
    if not violations:
        print("revisions, journal and record caches are consistent")  # noqa: T201 (see above)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
