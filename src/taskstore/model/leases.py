"""Task leases, their tokens and fencing, as pure functions.

A worker takes a lease on a task and renews the lease.  With each change the worker passes
the lease's token (the *fence*).  If the worker does not renew the lease, the lease expires,
and another worker can take a lease with another token.  After another worker has taken a
lease, every change with the first worker's token is refused.  The clock decides only when
another worker can take a lease.  The token alone decides which worker can change the task,
so clock skew can delay the next lease but never causes a lost update.

Fencing is described in M. Kleppmann, "How to do distributed locking" (2016).
"""

from __future__ import annotations

from msgspec.structs import replace

from taskstore.errors import Conflict, ConflictError, InvalidTransition, LeaseConflict
from taskstore.model.lifecycle import Mutation
from taskstore.model.records import MAX_INT, TaskRecord
from taskstore.model.validation import check_int, check_key, check_seconds

DEFAULT_LEASE_S = 60.0
"""The default duration of a lease, in seconds."""

MIN_LEASE_S = 0.001
"""The minimum duration of a lease, in seconds."""

MAX_LEASE_S = 366 * 24 * 3600.0
"""The maximum duration of a lease, in seconds."""


def lease_duration_ms(lease_s: object) -> int:
    """Convert the duration of a lease to ms; raise :class:`ValidationError` if it is invalid."""
    seconds = check_seconds("lease_s", lease_s, MIN_LEASE_S, MAX_LEASE_S)
    return check_int("lease_s", round(seconds * 1000), 1)


def validate_fence(fence: object) -> None:
    """Raise :class:`ValidationError` unless ``fence`` is a token or ``None`` (no fence)."""
    if fence is not None:
        check_key("fence", fence)


def require_fence(record: TaskRecord, fence: str | None) -> None:
    """Raise :class:`ConflictError` unless ``fence`` is ``None`` or the token of the task's lease.

    The token of an expired lease stays valid until another worker takes a lease on the task.
    """
    if fence is not None and record.lease_token != fence:
        raise _conflict(record, fence)


def take(token: str, lease_s: object, *, fence: str | None = None) -> Mutation:
    """Take a lease on an active task that has no lease or an expired lease.

    ``token`` is the token of the new lease, which expires after ``lease_s`` seconds.  If
    ``fence`` is the token of the current lease, the new lease replaces the current lease
    even before the current lease expires.  Otherwise the mutation raises
    :class:`ConflictError` if the task has a lease that has not expired.
    """
    lease_ms = lease_duration_ms(lease_s)

    def taken(record: TaskRecord, now: int) -> TaskRecord:
        if record.is_terminal:
            raise InvalidTransition(record.task_id, record.status, "take a lease on it")
        is_held = record.lease_token is not None and now < (record.lease_until or 0)
        if is_held and record.lease_token not in (fence, token):
            raise _conflict(record, None)
        until = _expiry(now, lease_ms)
        return replace(record, revision=record.revision + 1, lease_token=token, lease_until=until)

    return taken


def renew(lease_s: object) -> Mutation:
    """Extend a lease if at most half of ``lease_s`` is left; otherwise change nothing."""
    lease_ms = lease_duration_ms(lease_s)

    def renewed(record: TaskRecord, now: int) -> TaskRecord:
        if record.is_terminal:
            raise InvalidTransition(record.task_id, record.status, "renew its lease")
        if (record.lease_until or 0) - now > lease_ms // 2:
            return record
        return replace(record, revision=record.revision + 1, lease_until=_expiry(now, lease_ms))

    return renewed


def release() -> Mutation:
    """Release the lease of a task, so that another worker can take a lease at once."""
    return _released


def _released(record: TaskRecord, _now: int) -> TaskRecord:
    if record.lease_token is None:
        return record
    return replace(record, revision=record.revision + 1, lease_token=None, lease_until=None)


def _expiry(now: int, lease_ms: int) -> int:
    return min(now + lease_ms, MAX_INT)


def _conflict(record: TaskRecord, fence: str | None) -> ConflictError:
    revision = record.revision
    leased = LeaseConflict(fence, record.lease_until)
    return ConflictError([Conflict(record.task_id, revision, revision, leased=leased)])
