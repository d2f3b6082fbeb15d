"""Forked child processes that report lines and that a test can kill.

A forked process can call the callable that ``make_store`` returned; a new interpreter cannot.  A
store must not be open during a fork, so a test closes every store before it starts a child.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

Report = Callable[[str], None]
"""Sends one line to the parent process; the function returns when the line is in the pipe."""

Work = Callable[[Report], None]
"""The function that a child runs; the child fails if the function raises an exception."""

DURABLE_CALLS = frozenset(
    {
        "commit",
        "execute",
        "executemany",
        "fdatasync",
        "fsync",
        "ftruncate",
        "link",
        "pwrite",
        "remove",
        "rename",
        "replace",
        "send",
        "sendall",
        "truncate",
        "unlink",
        "write",
        "writev",
    }
)
"""The names of the functions that can make data durable, for any kind of store."""

LOCK_CALLS = frozenset({"fcntl", "flock", "lockf"})
"""The names of the functions that acquire or release a file lock."""

_PAUSE_CALLS = DURABLE_CALLS | LOCK_CALLS
_FAILED_STATUS = 3


class Child:
    """A forked process that runs ``work`` and reports lines to its parent."""

    def __init__(self, work: Work) -> None:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            # Python warns about a fork in a process with threads, because another thread can hold
            # a lock during the fork.  The child uses no such lock.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _run(work, writing)
        os.close(writing)
        self._reports = os.fdopen(reading)

    def line(self) -> str:
        """Return the next line that the child reported, or an empty string at the end."""
        return self._reports.readline().rstrip("\n")

    def kill(self) -> None:
        """Kill the child with SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> list[str]:
        """Wait until the child ends; return the reported lines that :meth:`line` did not return.

        If the child raised an exception, this method raises :class:`AssertionError` with the
        traceback of the child.
        """
        with self._reports:
            lines = self._reports.read().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if status == _FAILED_STATUS:
            raise AssertionError("a child process failed:\n" + "\n".join(lines))
        assert status in (0, -signal.SIGKILL), f"a child process ended with status {status}"
        return lines


def run_processes(works: Sequence[Work]) -> list[list[str]]:
    """Run ``works`` at the same time, each in its own process; return the lines of each process.

    The call waits for the processes in the order of ``works``.  If a process fails, the
    remaining processes are killed and the call raises the error of the failed process.
    """
    start_reader, start_writer = os.pipe()

    def wait_for_start(work: Work) -> Work:
        def begin(report: Report) -> None:
            os.close(start_writer)
            os.read(start_reader, 1)  # returns when the parent closes the pipe
            work(report)

        return begin

    children = [Child(wait_for_start(work)) for work in works]
    os.close(start_writer)
    os.close(start_reader)
    unfinished = children[::-1]
    try:
        return [unfinished.pop().finish() for _ in works]
    except BaseException:
        for child in unfinished:
            child.kill()
            with suppress(AssertionError):  # only the first failure is raised
                child.finish()
        raise


def _run(work: Work, writing: int) -> None:
    """Run ``work`` in the child; end the child without running the parent's exit handlers."""

    def report(line: str) -> None:
        os.write(writing, f"{line}\n".encode())

    status = _FAILED_STATUS
    try:
        work(report)
        status = 0
    except BaseException:  # noqa: BLE001 - reported to the parent
        report(traceback.format_exc())
    finally:
        os._exit(status)


class _CallProfiler:
    """Calls :meth:`_on_call` at the start and end of each function call in this process."""

    def __enter__(self) -> Self:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        if event != "c_exception":
            name = argument.__name__ if event.startswith("c_") else frame.f_code.co_name
            self._on_call(name, done=event.endswith("return"))

    def _on_call(self, name: str, *, done: bool) -> None:
        raise NotImplementedError


class KillAt(_CallProfiler):
    """Kills this process before or after the n-th call that can make data durable.

    With ``number=None`` the process is not killed.  ``calls`` has the names of the calls
    that can make data durable.
    """

    def __init__(self, number: int | None = None, *, after: bool = False) -> None:
        self._number = number
        self._after = after
        self.calls: list[str] = []

    def _on_call(self, name: str, *, done: bool) -> None:
        if name not in DURABLE_CALLS:
            return
        if not done:
            self.calls.append(name)
        reached = self._number is not None and len(self.calls) >= self._number
        if reached and done == self._after:
            os.kill(os.getpid(), signal.SIGKILL)


class RandomPauses(_CallProfiler):
    """Pauses this process, at random, after calls that make data durable or use a file lock.

    Without pauses, a process releases a lock and acquires it again within microseconds.  Without
    pauses, the tests would therefore pass a defective store that releases the lock between the
    comparison of the revisions and the write of the change.
    """

    PROBABILITY = 1 / 8
    MAX_PAUSE_S = 0.003

    def __init__(self) -> None:
        self._random = random.Random(os.getpid())  # noqa: S311 (no secret)

    def _on_call(self, name: str, *, done: bool) -> None:
        if done and name in _PAUSE_CALLS and self._random.random() < self.PROBABILITY:
            time.sleep(self._random.uniform(0, self.MAX_PAUSE_S))
