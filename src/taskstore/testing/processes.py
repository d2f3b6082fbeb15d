"""Real processes for the contract: forked, heard, and killed.

A child is forked rather than started anew, so that it can open the storage
with the very callable that ``make_store`` returned.  Nothing that is open may
be carried over a fork, so whoever forks closes every instance first.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

Report = Callable[[str], None]
"""Tells the parent one line; it has left the process when the call returns."""

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

_FAILED = 3


class Child:
    """A forked process that runs ``work`` and tells what it did."""

    def __init__(self, work: Callable[[Report], None]) -> None:
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

    @classmethod
    def all_of(cls, works: Sequence[Callable[[Report], None]]) -> list[Self]:
        """Start a child for each; they begin to work at the same moment."""
        gate, opening = os.pipe()

        def waiting(work: Callable[[Report], None]) -> Callable[[Report], None]:
            def begin(report: Report) -> None:
                os.close(opening)
                os.read(gate, 1)  # comes back when the parent has closed its end
                work(report)

            return begin

        children = [cls(waiting(work)) for work in works]
        os.close(opening)
        os.close(gate)
        return children

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


def _run(work: Callable[[Report], None], writing: int) -> None:
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


class KillAt:
    """Kills this process before or after the n-th step that may make something durable.

    With ``number=None`` it only counts; ``names`` then has the steps in order.
    """

    def __init__(self, number: int | None = None, *, after: bool = False) -> None:
        self._number = number
        self._after = after
        self.names: list[str] = []

    def __enter__(self) -> Self:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("c_call", "call"):
            name = argument.__name__ if event == "c_call" else frame.f_code.co_name
            if name in STEPS:
                self.names.append(name)
                if len(self.names) == self._number and not self._after:
                    os.kill(os.getpid(), signal.SIGKILL)
        elif event in ("c_return", "return") and self._after:
            name = argument.__name__ if event == "c_return" else frame.f_code.co_name
            if name in STEPS and self._number is not None and len(self.names) >= self._number:
                os.kill(os.getpid(), signal.SIGKILL)
