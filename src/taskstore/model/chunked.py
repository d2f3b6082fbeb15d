"""Work on very many items that lets other threads run in between.

CPython changes threads between bytecodes and in calls that wait.  One call
that sorts or frees a hundred thousand items holds all other threads up, the
event loop's among them, for as long as it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any, TypeVar

T = TypeVar("T", bound=Any)

RUN_ITEMS = 4096
"""How many items are sorted in one call."""


def chunked_sort(items: Iterable[T]) -> list[T]:
    """The items in ascending order; what compares equal stays in the order in which it came.

    Runs are sorted, then merged two by two: that is what ``sorted`` does with
    them, in a time that grows with their length and no faster.
    """
    items = list(items)
    runs = [sorted(items[start : start + RUN_ITEMS]) for start in range(0, len(items), RUN_ITEMS)]
    while len(runs) > 1:
        later: list[list[T]] = [*runs[1::2], []]
        runs = [sorted(first + second) for first, second in zip(runs[::2], later, strict=False)]
    return runs[0] if runs else []


def clear_in_chunks(mapping: MutableMapping[Any, Any]) -> None:
    """Remove everything from a mapping, one after the other."""
    while mapping:
        mapping.popitem()
