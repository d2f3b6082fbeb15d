"""Work on very many items that lets other threads run in between.

CPython changes threads between bytecodes and in calls that wait.  One call
that sorts or frees a hundred thousand items holds all other threads up, the
event loop's among them, for as long as it takes.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T", bound=Any)

RUN = 4096
"""How many items are sorted in one call."""


def in_order(items: Iterable[T]) -> list[T]:
    """The items in ascending order; what compares equal stays in the order in which it came.

    Runs are sorted, then merged two by two: that is what ``sorted`` does with
    them, in a time that grows with their length and no faster.
    """
    items = list(items)
    runs = [sorted(items[start : start + RUN]) for start in range(0, len(items), RUN)]
    while len(runs) > 1:
        later: list[list[T]] = [*runs[1::2], []]
        runs = [sorted(first + second) for first, second in zip(runs[::2], later, strict=False)]
    return runs[0] if runs else []


def empty(mapping: MutableMapping[Any, Any]) -> None:
    """Remove everything from a mapping, one after the other."""
    while mapping:
        mapping.popitem()


_pausing = threading.RLock()
_pauses: set[object] = set()
_was_on = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """Leave Python's garbage collector off in the body of a ``with``: many records are made there.

    It would look again and again for cycles among objects that cannot have
    any, and each of its great looks holds up every other thread.  Pauses may
    overlap; after the last one it is as it was.
    """
    global _was_on  # noqa: PLW0603 - the collector is one for the whole process
    pause = object()
    try:
        with _pausing:
            if not _pauses:
                _was_on = gc.isenabled()
            _pauses.add(pause)
            gc.disable()
        yield
    finally:
        with _pausing:
            try:
                if _was_on and _pauses <= {pause}:
                    gc.enable()
            finally:
                _pauses.discard(pause)


def end_pauses() -> None:
    """End every pause: in a forked child, the threads that made them are not there."""
    global _pausing  # noqa: PLW0603 - held by a thread that is not there
    _pausing = threading.RLock()
    if _pauses and _was_on:
        gc.enable()
    _pauses.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=end_pauses)
