"""Several operations that are committed as one."""

from __future__ import annotations

from typing import Any, TypeVar

from taskstore.groupcommit import Operation
from taskstore.mirror import Lookups, Staging

T = TypeVar("T")


class Batch:
    """The operations of one ``with registry.batch()``, and what they would make.

    ``closed`` is set when the body has ended: whoever still holds it, such as
    an asyncio task that was started in the body, is on its own from then on.
    """

    def __init__(self, under: Lookups) -> None:
        self.staging = Staging(under)
        self.operations: list[Operation[Any]] = []
        self.closed = False

    def add(self, operation: Operation[T]) -> T:
        """Run an operation provisionally; one that raises leaves no trace."""
        trial = Staging(self.staging)
        result = operation(trial)
        self.staging.absorb(trial)
        self.operations.append(operation)
        return result

    def within(self) -> Batch:
        """Begin a batch inside this one: it joins, or leaves no trace."""
        return Batch(self.staging)

    def join(self, inner: Batch) -> None:
        """Take over a batch that ended well inside this one."""
        self.staging.absorb(inner.staging)
        self.operations += inner.operations

    def replay(self, staging: Staging) -> None:
        """Run everything again over what is committed by now."""
        for operation in self.operations:
            operation(staging)
