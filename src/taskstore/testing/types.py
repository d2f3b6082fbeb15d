"""The types of the kit: what opens a store, and a store with every ability."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from taskstore.store.interface import (
    SupportsCompaction,
    SupportsExclusive,
    SupportsHistory,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    TaskRegistryStore,
)


@runtime_checkable
class OpenStore(Protocol):
    """What the fixture ``make_store`` returns.

    Each call opens one more instance on the same storage.  It takes one
    keyword, ``read_only`` (``bool``, default ``False``).
    """

    def __call__(self, *, read_only: bool = False) -> TaskRegistryStore:
        """Open the storage under test once more."""
        ...


class FullStore(
    TaskRegistryStore,
    SupportsJournal,
    SupportsExclusive,
    SupportsHistory,
    SupportsCompaction,
    SupportsQuery,
    SupportsIntegrity,
):
    """A store with every ability, for type checkers only.

    A clause sees the store as one of these and uses the abilities that it
    (or its class) says that it needs.
    """
