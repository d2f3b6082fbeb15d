"""Operations over one task: what is done to it, if it is as the caller expects."""

from __future__ import annotations

from typing import TypeVar

from taskstore import creation, leases, lifecycle
from taskstore.errors import Conflict, ConflictError, InvalidTransition, TaskNotFound
from taskstore.groupcommit import Operation
from taskstore.lifecycle import Mutation
from taskstore.mirror import Staging
from taskstore.records import TaskRecord
from taskstore.validation import check_int, check_key

T = TypeVar("T")


def creating(record: TaskRecord) -> Operation[TaskRecord]:
    """Store a new record, or attach it to the one that has its booking."""
    booking = record.dedup_key

    def operation(staging: Staging) -> TaskRecord:
        holder = None if booking is None else staging.booked(booking)
        if holder is None:
            return staging.create(record)
        standing = staging.require(holder)
        return staging.update(standing, creation.attach(standing, record))

    return operation


def changing(
    task_id: str, mutation: Mutation, now: int, if_revision: int | None, fence: str | None
) -> Operation[TaskRecord]:
    """Store what a pure function makes of one record at ``now`` (Unix milliseconds)."""
    if type(task_id) is not str or if_revision is not None or fence is not None:
        check_expected(task_id, if_revision, fence)

    def operation(staging: Staging) -> TaskRecord:
        record = staging.get(task_id)
        if record is None:
            check_key("task_id", task_id)
            lifecycle.rehearse(mutation)
            raise TaskNotFound(task_id)
        try:
            if if_revision is not None or fence is not None:
                _expect(record, if_revision, fence)
            changed = mutation(record, now)
        except (ConflictError, InvalidTransition):
            lifecycle.rehearse(mutation)
            raise
        if changed is record:
            lifecycle.rehearse(mutation)
            return record
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
