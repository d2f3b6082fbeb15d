"""Who works on a task, as pure functions: leases, their tokens, and the fence.

A worker takes a lease on a task, renews it while it is alive, and shows its
token with each change (the *fence*).  When it falls silent the lease runs
out, somebody else takes one with another token, and whatever the first still
tries is refused, however late it arrives.  The time decides only when a lease
may be taken over; the token alone decides whose change is let through, so
that clocks which disagree cost patience and never a lost update.

Fencing is described in M. Kleppmann, "How to do distributed locking" (2016).
"""

from __future__ import annotations

from msgspec.structs import replace

from taskstore.errors import Conflict, ConflictError, InvalidTransition, Leased
from taskstore.model.lifecycle import Mutation
from taskstore.model.records import MAX_INT, TaskRecord
from taskstore.model.validation import check_int, check_key, check_seconds

LEASE_S = 60.0
"""How long a lease runs unless told otherwise, in seconds."""

SHORTEST_S = 0.001
"""The shortest lease, in seconds."""

LONGEST_S = 366 * 24 * 3600.0
"""The longest lease, in seconds."""


def check_lease(lease_s: object) -> int:
    """Return the length of a lease in milliseconds; raises :class:`ValidationError`."""
    seconds = check_seconds("lease_s", lease_s, SHORTEST_S, LONGEST_S)
    return check_int("lease_s", round(seconds * 1000), 1)


def check_fence(fence: object) -> None:
    """Raise :class:`ValidationError` unless ``fence`` is a token, or ``None`` for no fence."""
    if fence is not None:
        check_key("fence", fence)


def guard(record: TaskRecord, fence: str | None) -> None:
    """Raise :class:`ConflictError` unless the task's lease bears the token ``fence``.

    A lease that has run out still counts while nobody else has taken one.
    """
    if fence is not None and record.lease_token != fence:
        raise _conflict(record, fence)


def take(token: str, lease_s: object, *, fence: str | None = None) -> Mutation:
    """Give a new lease on an active task that has none, or whose lease has run out.

    ``token`` becomes the token of the lease, which runs for ``lease_s``
    seconds.  With the token of the lease that stands as ``fence``, the new
    one takes its place at any time.  The mutation raises
    :class:`ConflictError` while somebody else holds a lease.
    """
    lease_ms = check_lease(lease_s)

    def taken(record: TaskRecord, now: int) -> TaskRecord:
        if record.is_terminal:
            raise InvalidTransition(record.task_id, record.status, "take a lease on it")
        held = record.lease_token is not None and now < (record.lease_until or 0)
        if held and record.lease_token not in (fence, token):
            raise _conflict(record, None)
        until = _until(now, lease_ms)
        return replace(record, revision=record.revision + 1, lease_token=token, lease_until=until)

    return taken


def renew(lease_s: object) -> Mutation:
    """Extend a lease that is in its last half; an earlier heartbeat changes nothing."""
    lease_ms = check_lease(lease_s)

    def renewed(record: TaskRecord, now: int) -> TaskRecord:
        if record.is_terminal:
            raise InvalidTransition(record.task_id, record.status, "renew its lease")
        if (record.lease_until or 0) - now > lease_ms // 2:
            return record
        return replace(record, revision=record.revision + 1, lease_until=_until(now, lease_ms))

    return renewed


def release() -> Mutation:
    """Give a lease back: somebody else may take one at once."""
    return _released


def _released(record: TaskRecord, _now: int) -> TaskRecord:
    if record.lease_token is None:
        return record
    return replace(record, revision=record.revision + 1, lease_token=None, lease_until=None)


def _until(now: int, lease_ms: int) -> int:
    return min(now + lease_ms, MAX_INT)


def _conflict(record: TaskRecord, fence: str | None) -> ConflictError:
    revision = record.revision
    leased = Leased(fence, record.lease_until)
    return ConflictError([Conflict(record.task_id, revision, revision, leased=leased)])
