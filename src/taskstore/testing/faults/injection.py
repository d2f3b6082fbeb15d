"""The injection point, which records storage calls and injects faults.

A *step* is one call of a store to its storage: a system call, a statement on a driver's cursor, or
a call of a store method.  The interceptors (``files.py``, ``drivers.py``, ``faulty_store.py``) pass
each step to :meth:`InjectionPoint.run_step`.  An active injection point records the steps, and can
inject one fault at a step that the test selects by its number.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from taskstore.testing.crash.processes import DURABLE_CALLS

DELAY_S = 0.002
"""How long the delay fault delays a step, in seconds."""

HOLD_S = 0.004
"""The delay of the first step, in seconds; during this delay, the other callers form a queue."""


class Step(NamedTuple):
    """One storage call: the name of the call, a detail, and the path or connection.

    ``detail`` is the same in every run.  ``is_new`` is true if the file ``resource`` was created by
    the store method that is running.  If an fsync of a new file fails, the store is allowed to
    discard the file.
    """

    name: str
    detail: str
    resource: Any = None
    is_new: bool = False

    @property
    def label(self) -> str:
        """The name of the step in the table of results."""
        return f"{self.name} {self.detail}".strip()

    @property
    def durable(self) -> bool:
        """Return whether the step can make data durable."""
        return self.name in DURABLE_CALLS


Call = Callable[..., Any]
Inject = Callable[[Step, Call, tuple[Any, ...]], Any]
"""Performs a step completely, partly or not at all; the store gets the result or exception."""


def never(_: Step) -> bool:
    """Return False for every step."""
    return False


def always(_: Step) -> bool:
    """Return True for every step."""
    return True


class Fault(NamedTuple):
    """One way in which a step can fail.

    ``applies_to`` selects the steps at which the fault can happen.  If ``persistent`` is true, the
    fault repeats at every later step that ``applies_to`` selects, until the call of the store ends.
    ``fails_sync`` selects the steps that flush data to disk.  If one of these steps fails, the call
    of the store must fail [4].  The store instance must also refuse further writes, except if the
    failed step flushes a new file.
    """

    name: str
    timing: str
    inject: Inject
    applies_to: Callable[[Step], bool] = always
    fails_sync: Callable[[Step], bool] = never
    persistent: bool = False


def delayed(_: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
    """Perform the step after a delay."""
    time.sleep(DELAY_S)
    return call(*arguments)


DELAY = Fault("delay", "", delayed)


class InjectionPoint:
    """Records the steps of a store, and injects a fault at one of the steps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.faulted: Step | None = None
        self.activation = 0
        """How often :meth:`arm` was called; a file created since the latest call is new."""
        self.is_active = False
        self._lock = threading.Lock()
        self._bypass = threading.local()
        self._number = 0
        self._fault: Fault | None = None
        self._hold_s = 0.0

    @contextmanager
    def arm(
        self, number: int = 0, fault: Fault | None = None, *, hold_s: float = 0.0
    ) -> Iterator[None]:
        """Record steps while the ``with`` body runs; inject ``fault`` at step ``number`` (from 1).

        The first step is delayed by ``hold_s`` seconds.
        """
        self.activation += 1
        self.steps, self.faulted = [], None
        self._number, self._fault, self._hold_s = number, fault, hold_s
        self.is_active = True
        try:
            yield
        finally:
            self.is_active = False

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """While the ``with`` body runs, calls of this thread are not recorded and get no fault.

        Other threads are not affected.
        """
        before = getattr(self._bypass, "on", False)
        self._bypass.on = True
        try:
            yield
        finally:
            self._bypass.on = before

    def run_step(self, step: Step, call: Call, *arguments: Any) -> Any:
        """Perform a step, or inject the fault if this step is the selected step."""
        if not self.is_active or getattr(self._bypass, "on", False):
            return call(*arguments)
        with self._lock:
            self.steps.append(step)
            number, fault = len(self.steps), self._fault
            due = fault is not None and (
                number == self._number or (fault.persistent and self.faulted is not None)
            )
            if fault is None or not due or not fault.applies_to(step):
                fault = None
            elif self.faulted is None:
                self.faulted = step
        if number == 1 and self._hold_s:
            time.sleep(self._hold_s)
        if fault is None:
            return call(*arguments)
        with self.bypass():  # calls within a step are not recorded as steps
            return fault.inject(step, call, arguments)
