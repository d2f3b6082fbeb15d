"""Types of the contract suite: a store's opener, a store with all abilities."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from taskstore.store.interface import (
    SupportsCommitIds,
    SupportsCompaction,
    SupportsExclusive,
    SupportsHistory,
    SupportsIdSearch,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    SupportsStreaming,
    SupportsSummary,
    TaskRegistryStore,
)


@runtime_checkable
class OpenStore(Protocol):
    """The callable that the fixture ``make_store`` returns.

    Each call opens another store instance on the same storage.  The only parameter is
    the keyword ``read_only`` (``bool``, default ``False``).
    """

    def __call__(self, *, read_only: bool = False) -> TaskRegistryStore:
        """Open the storage under test again, and return the new store instance."""
        ...


class FullStore(
    TaskRegistryStore,
    SupportsJournal,
    SupportsCommitIds,
    SupportsExclusive,
    SupportsHistory,
    SupportsCompaction,
    SupportsStreaming,
    SupportsQuery,
    SupportsSummary,
    SupportsIdSearch,
    SupportsIntegrity,
):
    """The type of a store with every ability, for type checkers only.

    At run time, a clause uses only the abilities that the clause or its class declares.
    """
