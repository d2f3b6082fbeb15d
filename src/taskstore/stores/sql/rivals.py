"""The other writers, as one sees them who waits for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from taskstore.errors import StoreBusyError, TaskStoreError
from taskstore.stores.holders import named


class Rivals:
    """Whether others make progress, and who they are.

    ``head`` reads the head and ``holders`` names who holds the head row, each
    at one attempt: ``None`` when it cannot be told.
    """

    def __init__(
        self, head: Callable[[], int | None], holders: Callable[[], Sequence[str] | None]
    ) -> None:
        self._head = head
        self._holders = holders
        self._seen: int | None = None

    def go_on(self) -> bool:
        """Whether somebody has committed since this was asked last; at first, nobody knows:
        then they are given the same time again."""
        head = self._head()
        if head is None:
            return False
        moved, self._seen = head != self._seen, head
        return moved

    def explain(self, error: TaskStoreError) -> TaskStoreError:
        """Say in the error who holds what we waited for."""
        if not isinstance(error, StoreBusyError) or error.hint is not None:
            return error
        holders = tuple(self._holders() or ())
        return StoreBusyError(
            f"{error.message}; {named(holders)}",
            hint="try again, or see what that process is doing",
            holders=holders,
        )
