"""Real processes for the contract: forked, heard, and killed.

A child is forked rather than started anew, so that it can open the storage
with the very callable that ``make_store`` returned.  Nothing that is open may
be carried over a fork, so whoever forks closes every instance first.
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
"""Tells the parent one line; it has left the process when the call returns."""

Work = Callable[[Report], None]
"""What a child does; the child ends when it returns, and has failed if it raises."""

STEPS = frozenset(
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
"""Functions, by name, in which data may become durable, however a store is written."""

LOCKS = frozenset({"fcntl", "flock", "lockf"})
"""Functions, by name, that take a lock of a file or give it back."""

_PAUSES = STEPS | LOCKS
_FAILED = 3


class Child:
    """A forked process that runs ``work`` and tells what it did."""

    def __init__(self, work: Work) -> None:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            # Of threads in the parent; the child has none of their locks to wait for.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _run(work, writing)
        os.close(writing)
        self._reports = os.fdopen(reading)

    def line(self) -> str:
        """The next line that the child tells; empty when it has ended."""
        return self._reports.readline().rstrip("\n")

    def kill(self) -> None:
        """Kill the child, here and now."""
        os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> list[str]:
        """Wait for the end; what the child told that was not read yet.

        Fails with the child's own traceback if it raised.
        """
        with self._reports:
            lines = self._reports.read().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if status == _FAILED:
            raise AssertionError("a process failed:\n" + "\n".join(lines))
        assert status in (0, -signal.SIGKILL), f"a process ended with {status}"
        return lines


def together(works: Sequence[Work]) -> list[list[str]]:
    """Do each in a process of its own, all beginning at the same moment; what each told.

    They are waited for in this order; when one has failed, those after it are
    killed and its failure is raised.
    """
    gate, opening = os.pipe()

    def at_the_gate(work: Work) -> Work:
        def begin(report: Report) -> None:
            os.close(opening)
            os.read(gate, 1)  # comes back when the parent has closed its end
            work(report)

        return begin

    children = [Child(at_the_gate(work)) for work in works]
    os.close(opening)
    os.close(gate)
    waiting = children[::-1]
    try:
        return [waiting.pop().finish() for _ in works]
    except BaseException:
        for child in waiting:
            child.kill()
            with suppress(AssertionError):  # it may have failed as well
                child.finish()
        raise


def _run(work: Work, writing: int) -> None:
    """In the child: nothing of the parent's, least of all its clean-up, may run."""

    def report(line: str) -> None:
        os.write(writing, f"{line}\n".encode())

    status = _FAILED
    try:
        work(report)
        status = 0
    except BaseException:  # noqa: BLE001 - told to the parent
        report(traceback.format_exc())
    finally:
        os._exit(status)


class _AtCalls:
    """Looks at every call of this process, in Python or C, while it is entered."""

    def __enter__(self) -> Self:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: Any, event: str, argument: Any) -> None:
        if event != "c_exception":
            name = argument.__name__ if event.startswith("c_") else frame.f_code.co_name
            self._at(name, done=event.endswith("return"))

    def _at(self, name: str, *, done: bool) -> None:
        raise NotImplementedError


class KillAt(_AtCalls):
    """Kills this process before or after the n-th step that may make something durable.

    With ``number=None`` it only counts; ``names`` then has the steps in order.
    """

    def __init__(self, number: int | None = None, *, after: bool = False) -> None:
        self._number = number
        self._after = after
        self.names: list[str] = []

    def _at(self, name: str, *, done: bool) -> None:
        if name not in STEPS:
            return
        if not done:
            self.names.append(name)
        reached = self._number is not None and len(self.names) >= self._number
        if reached and done == self._after:
            os.kill(os.getpid(), signal.SIGKILL)


class Dawdle(_AtCalls):
    """Pauses now and then after a step, and after a lock is taken or given back.

    Between giving back a lock and taking it again lie microseconds: a process
    that never stops there may never be caught comparing under the one and
    writing under the other.
    """

    CHANCE = 1 / 8
    LONGEST_S = 0.003

    def __init__(self) -> None:
        self._random = random.Random(os.getpid())  # noqa: S311 (no secret)

    def _at(self, name: str, *, done: bool) -> None:
        if done and name in _PAUSES and self._random.random() < self.CHANCE:
            time.sleep(self._random.uniform(0, self.LONGEST_S))
