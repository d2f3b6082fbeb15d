"""Operations over one task: what is done to it, if it is as the caller expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from taskstore import creation, leases
from taskstore.errors import Conflict, ConflictError, InvalidTransition, TaskNotFound
from taskstore.groupcommit import Operation
from taskstore.indexes import booking_of
from taskstore.mirror import Staging
from taskstore.records import TaskRecord
from taskstore.validation import check_int, check_key

T = TypeVar("T")


def creating(record: TaskRecord) -> Operation[TaskRecord]:
    """Store a new record, or attach it to the one that has its booking."""
    booking = booking_of(record)

    def operation(staging: Staging) -> TaskRecord:
        holder = None if booking is None else staging.booked(booking)
        if holder is None:
            return staging.create(record)
        standing = staging.require(holder)
        return staging.update(standing, creation.attach(standing, record))

    return operation


def changing(
    task_id: str,
    mutation: Callable[[TaskRecord], TaskRecord],
    if_revision: int | None,
    fence: str | None,
    rehearse: Callable[[], object] = lambda: None,
) -> Operation[TaskRecord]:
    """Store what a pure function makes of one record.

    ``rehearse`` lets the function check its arguments where the record gives
    it no occasion to: it is unknown, another than expected or already as asked.
    """

    def operation(staging: Staging) -> TaskRecord:
        try:
            record = staging.require(task_id)
            _expect(record, if_revision, fence)
            changed = mutation(record)
        except (TaskNotFound, ConflictError, InvalidTransition):
            rehearse()
            raise
        if changed is record:
            rehearse()
        return staging.update(record, changed)

    return operation


def deleting(task_id: str, if_revision: int | None, fence: str | None) -> Operation[bool]:
    """Delete one record; gives whether there was one."""

    def operation(staging: Staging) -> bool:
        record = staging.get(task_id)
        if record is None:
            return False
        _expect(record, if_revision, fence)
        staging.delete(record)
        return True

    return operation


def giving(value: T, operation: Operation[object]) -> Operation[T]:
    """The same operation, with another result."""

    def given(staging: Staging) -> T:
        operation(staging)
        return value

    return given


def check_expected(task_id: str, if_revision: int | None, fence: str | None) -> None:
    """Raise :class:`ValidationError` for what cannot be an id, a revision or a token."""
    check_key("task_id", task_id)
    if if_revision is not None:
        check_int("if_revision", if_revision, 1)
    leases.check_fence(fence)


def _expect(record: TaskRecord, if_revision: int | None, fence: str | None) -> None:
    if if_revision is not None and record.revision != if_revision:
        raise ConflictError([Conflict(record.task_id, if_revision, record.revision)])
    leases.guard(record, fence)
