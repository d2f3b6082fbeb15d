"""Several operations that are committed as one."""

from __future__ import annotations

from typing import Any, TypeVar

from taskstore.committer import Operation
from taskstore.errors import Conflict, ConflictError, TaskNotFound
from taskstore.journal import Put
from taskstore.mirror import Lookups, Staging
from taskstore.records import TaskRecord

T = TypeVar("T")


class Batch:
    """The operations of one ``with registry.batch()``, and what they would make.

    ``closed`` is set when the body has ended: whoever still holds it, such as
    an asyncio task that was started in the body, is on its own from then on.
    """

    def __init__(self, under: Lookups) -> None:
        self.staging = Staging(under)
        # Each with what it gave in the body.
        self.operations: list[tuple[Operation[Any], Any]] = []
        self.closed = False

    def add(self, operation: Operation[T]) -> T:
        """Run an operation provisionally; one that raises leaves no trace."""
        mark = len(self.staging.changes)
        try:
            result = operation(self.staging)
        except BaseException:
            self.staging.undo(mark)
            raise
        self.operations.append((operation, result))
        return result

    def join(self, inner: Batch) -> None:
        """Take over a batch that ended well inside this one."""
        self.staging.absorb(inner.staging)
        self.operations += inner.operations

    def replay(self, staging: Staging) -> None:
        """Run everything again over what is committed by now.

        Raises :class:`ConflictError` where the body went on with a task that
        another writer has booked first, under another id.
        """
        elsewhere: dict[str, Conflict] = {}
        for operation, result in self.operations:
            try:
                again = operation(staging)
            except TaskNotFound as error:
                if error.task_id in elsewhere:
                    raise ConflictError([elsewhere[error.task_id]]) from error
                raise
            if isinstance(result, TaskRecord) and again.task_id != result.task_id:
                if not staging.creates(again.task_id):
                    taken = Conflict(result.task_id, 0, 0, booked_by=again.task_id)
                    elsewhere[result.task_id] = taken
            elif elsewhere and result is True and again is False:
                raise ConflictError(elsewhere.values())  # deleted in the body, and not here
        for change in staging.changes if elsewhere else ():
            if isinstance(change, Put) and change.record.parent_task_id in elsewhere:
                raise ConflictError([elsewhere[change.record.parent_task_id]])
