"""Running things at the same time, and hearing of it when one of them fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from taskstore.errors import StoreBusyError

PATIENCE_S = 60.0
"""How long a clause waits for its threads before it gives them up for hung."""


def run_together(*jobs: Callable[[], object]) -> None:
    """Run each job in a thread of its own, all starting at once; raise the first failure."""
    barrier = threading.Barrier(len(jobs))
    failures: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            barrier.wait(PATIENCE_S)
            job()
        except BaseException as failure:  # noqa: BLE001 - handed to the waiting thread
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    if failures:
        raise failures[0]
    hung = sum(thread.is_alive() for thread in threads)
    assert not hung, f"{hung} of {len(threads)} threads did not come back in {PATIENCE_S:g} s"


@contextmanager
def meanwhile(job: Callable[[], object]) -> Iterator[None]:
    """Run a job in a thread beside the body, and wait for it at the end."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            job()
        except BaseException as failure:  # noqa: BLE001 - handed to the waiting thread
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(PATIENCE_S)
    if failures:
        raise failures[0]
    assert not thread.is_alive(), f"a thread did not come back in {PATIENCE_S:g} s"


def until(condition: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    """Return once ``condition()`` holds: for what nobody tells of when it happens."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {within_s:g} s"
        time.sleep(0.002)


def patiently(action: Callable[[], object], attempts: int = 20) -> None:
    """Do something again while the store is busy: it promises no more than that."""
    for attempt in range(attempts):
        try:
            action()
        except StoreBusyError:
            if attempt == attempts - 1:
                raise
        else:
            return
