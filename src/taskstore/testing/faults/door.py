"""The door through which every step of a store goes while faults are injected.

A *step* is one call by which a store reaches its storage: a call of the
operating system, a statement on a driver's cursor, or, for stores that are
known by their methods only, a call of the seam.  Whoever intercepts such
calls (``files.py``, ``drivers.py``, ``seam.py``) hands them to
:meth:`Door.through`.  Open, the door counts; armed, it lets one fault strike
at the n-th step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from taskstore.testing.crash.processes import STEPS

DELAY_S = 0.002
"""How long a delayed step takes longer, in seconds."""

HOLD_S = 0.004
"""How long the first step is held when callers shall come together, in seconds."""


class Step(NamedTuple):
    """One call: its name, what it is about in words that repeat, and what it is done to.

    ``fresh`` tells that ``on`` did not exist before the present call of the
    store: if it fails to become durable, it can simply be thrown away.
    """

    name: str
    about: str
    on: Any = None
    fresh: bool = False

    @property
    def label(self) -> str:
        """The step as a line of the matrix."""
        return f"{self.name} {self.about}".strip()

    @property
    def durable(self) -> bool:
        """Whether something may become durable in it."""
        return self.name in STEPS


Call = Callable[..., Any]
Strike = Callable[[Step, Call, tuple[Any, ...]], Any]
"""Does the step, or not, or half of it, and returns or raises what the store shall see."""


def never(_: Step) -> bool:
    """No step."""
    return False


def always(_: Step) -> bool:
    """Every step."""
    return True


class Fault(NamedTuple):
    """One way in which a step can go wrong.

    ``fits`` says at which steps it can happen; with ``stays`` it goes on
    happening, at every later step that it fits, until the call is over.
    ``grave`` says at which steps it means that data may not be on disk: the
    call may not succeed then, and unless the data was of a new file the
    instance may write no more [4].
    """

    name: str
    side: str
    strike: Strike
    fits: Callable[[Step], bool] = always
    grave: Callable[[Step], bool] = never
    stays: bool = False


def delayed(_: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
    """Do the step, a little later."""
    time.sleep(DELAY_S)
    return call(*arguments)


DELAY = Fault("delay", "", delayed)


class Door:
    """Counts the steps that go through, and lets a fault strike at one of them."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.struck: Step | None = None
        self.life = 0
        """How often the door was opened: tells what is new since."""
        self.is_open = False
        self._lock = threading.Lock()
        self._aside = threading.local()
        self._number = 0
        self._fault: Fault | None = None
        self._hold_s = 0.0

    @contextmanager
    def opened(
        self, number: int = 0, fault: Fault | None = None, *, hold_s: float = 0.0
    ) -> Iterator[None]:
        """Count while the body runs; ``fault`` strikes at the ``number``-th step (from 1).

        ``hold_s`` is how long the very first step is held back (seconds).
        """
        self.life += 1
        self.steps, self.struck = [], None
        self._number, self._fault, self._hold_s = number, fault, hold_s
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What this thread does in the body goes past the door."""
        before = getattr(self._aside, "on", False)
        self._aside.on = True
        try:
            yield
        finally:
            self._aside.on = before

    def through(self, step: Step, call: Call, *arguments: Any) -> Any:
        """Do a step, unless a fault strikes."""
        if not self.is_open or getattr(self._aside, "on", False):
            return call(*arguments)
        with self._lock:
            self.steps.append(step)
            number, fault = len(self.steps), self._fault
            hit = fault is not None and (
                number == self._number or (fault.stays and self.struck is not None)
            )
            if fault is None or not hit or not fault.fits(step):
                fault = None
            elif self.struck is None:
                self.struck = step
        if number == 1 and self._hold_s:
            time.sleep(self._hold_s)
        if fault is None:
            return call(*arguments)
        with self.aside():  # what the step itself consists of is no other step
            return fault.strike(step, call, arguments)
