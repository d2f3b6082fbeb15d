"""Concurrent jobs in threads; a failure of a job is raised in the caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from taskstore.errors import StoreBusyError

TIMEOUT_S = 60.0
"""The maximum time, in seconds, that a clause waits for the end of a thread."""


def run_together(*jobs: Callable[[], object]) -> None:
    """Run all jobs at once, each in its own thread; raise the first failure of a job."""
    barrier = threading.Barrier(len(jobs))
    failures: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            barrier.wait(TIMEOUT_S)
            job()
        except BaseException as failure:  # noqa: BLE001 - handed to the waiting thread
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    if failures:
        raise failures[0]
    hung = sum(thread.is_alive() for thread in threads)
    assert not hung, f"{hung} of {len(threads)} threads did not end within {TIMEOUT_S:g} s"


@contextmanager
def meanwhile(job: Callable[[], object]) -> Iterator[None]:
    """Run a job in a thread during the ``with`` block; then raise the failure of the job."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            job()
        except BaseException as failure:  # noqa: BLE001 - handed to the waiting thread
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(TIMEOUT_S)
    if failures:
        raise failures[0]
    assert not thread.is_alive(), f"the thread did not end within {TIMEOUT_S:g} s"


def until(condition: Callable[[], object], within_s: float = TIMEOUT_S) -> None:
    """Call ``condition`` repeatedly until the result is true; fail after ``within_s`` seconds.

    The pauses grow from 2 ms to 50 ms, so that a long wait leaves the processor to others.
    """
    deadline = time.monotonic() + within_s
    pause_s = 0.002
    while not condition():
        assert time.monotonic() < deadline, (
            f"the condition did not become true within {within_s:g} s"
        )
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.05)


def retry_while_busy(operation: Callable[[], object], attempts: int = 20) -> None:
    """Call an operation again while it raises StoreBusyError, at most ``attempts`` times."""
    for attempt in range(attempts):
        try:
            operation()
        except StoreBusyError:
            if attempt == attempts - 1:
                raise
        else:
            return
