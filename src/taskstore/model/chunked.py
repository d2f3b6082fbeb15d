"""Functions that sort and clear large collections in small chunks.

CPython switches threads only between bytecodes and in blocking calls.  A call that sorts
or frees 100,000 items blocks all other threads, including the thread of an event loop,
until the call returns.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any, TypeVar

T = TypeVar("T", bound=Any)

CHUNK_ITEMS = 4096
"""The maximum number of items in a chunk that :func:`chunked_sort` sorts at once."""


def chunked_sort(items: Iterable[T]) -> list[T]:
    """Return a list of the items in ascending order; the sort is stable.

    The function sorts each chunk, then merges the chunks in pairs.  ``sorted`` merges
    two sorted chunks in linear time.
    """
    items, size = list(items), CHUNK_ITEMS
    chunks = [sorted(items[start : start + size]) for start in range(0, len(items), size)]
    while len(chunks) > 1:
        right: list[list[T]] = [*chunks[1::2], []]
        chunks = [sorted(first + second) for first, second in zip(chunks[::2], right, strict=False)]
    return chunks[0] if chunks else []


def clear_in_chunks(mapping: MutableMapping[Any, Any]) -> None:
    """Remove all items from a mapping, one at a time."""
    while mapping:
        mapping.popitem()
