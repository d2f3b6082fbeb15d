"""Work on very many items that lets other threads run in between.

CPython changes threads between bytecodes and in calls that wait.  One call
that sorts or frees a hundred thousand items holds all other threads up, the
event loop's among them, for as long as it takes.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterable, MutableMapping
from typing import Any, ClassVar, TypeVar

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


class CollectorPaused:
    """Leaves Python's garbage collector off in the body of a ``with``: many records are made there.

    It would look again and again for cycles among objects that cannot have
    any, and each of its great looks holds up every other thread.  Pauses may
    overlap; after the last one it is as it was.  An interrupt on the way in or
    out leaves none behind: a pause ends when nobody refers to it any more.
    """

    _lock: ClassVar = threading.RLock()
    _pauses: ClassVar[set[int]] = set()
    _was_on: ClassVar = False

    # Counted first and forgotten last: what is interrupted in between is done once more.

    def __enter__(self) -> None:
        cls = CollectorPaused
        with cls._lock:
            cls._pauses.add(id(self))
            if len(cls._pauses) == 1:
                cls._was_on = gc.isenabled()
                gc.disable()

    def __exit__(self, *_: object) -> None:
        self._end()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        cls = CollectorPaused
        with cls._lock:
            if cls._pauses == {id(self)}:
                if cls._was_on:
                    gc.enable()
                cls._was_on = False
            cls._pauses.discard(id(self))

    @classmethod
    def end_all(cls) -> None:
        """End every pause: in a forked child, the threads that made them are not there."""
        cls._lock = threading.RLock()
        cls._pauses.clear()
        if cls._was_on:
            gc.enable()
        cls._was_on = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CollectorPaused.end_all)
