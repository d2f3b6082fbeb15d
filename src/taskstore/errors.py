"""The errors that taskstore raises, all under one base class.

Every error says what happened, where, and (as its *hint*) what to do next.
Driver errors never escape: each store translates them in one place and keeps
them as ``__cause__``.  No message contains the password of a URL.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class TaskStoreError(Exception):
    """The base class of all errors that taskstore raises on purpose.

    ``hint`` says what to do next (``str`` or ``None``).  ``retryable`` says
    whether the same call may succeed later without a repair.
    """

    retryable: bool = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ValidationError(TaskStoreError, ValueError):
    """A value cannot be part of a record, a change or a query.

    ``field`` is the name of the argument or record field (``str``);
    ``reason`` is what is wrong with its value (``str``).  Nothing was written.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class TaskNotFound(TaskStoreError, LookupError):
    """No task has the id ``task_id`` (``str``)."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task {task_id!r}")
        self.task_id = task_id


class InvalidTransition(TaskStoreError):
    """The task's status does not allow this change; the task is unchanged.

    ``task_id`` and ``status`` (the current status) are ``str``.
    """

    def __init__(self, task_id: str, status: str, attempted: str) -> None:
        super().__init__(f"task {task_id!r} is {status}: cannot {attempted}")
        self.task_id = task_id
        self.status = status
        self.attempted = attempted


class LeaseConflict(NamedTuple):
    """A lease that refused a change: ``fence`` is the token that the caller passed, if any;
    ``until`` is when the task's lease expires (Unix ms), if it has one."""

    fence: str | None
    until: int | None

    def __str__(self) -> str:
        if self.fence is None:
            return f"another worker holds its lease until {self.until} (Unix milliseconds)"
        reason = "it has no lease" if self.until is None else "its lease has another token"
        return f"the fence {self.fence!r} is not valid: {reason}"


class Conflict(NamedTuple):
    """One task that conflicts with a commit.

    ``expected`` and ``found`` are revisions; 0 means absent.  ``found`` is
    also 0 when the task was deleted while a change to it was in progress.
    ``existing_task_id`` is the task that already has the dedup key, when the
    key conflicts.  ``deleted`` is true when the journal still holds a deletion
    of this id, so that the id cannot be created again.  ``leased`` is set when
    a lease conflicts.
    """

    task_id: str
    expected: int
    found: int
    existing_task_id: str | None = None
    deleted: bool = False
    leased: LeaseConflict | None = None

    @property
    def is_final(self) -> bool:
        """Whether a retry of the same call always fails (``bool``)."""
        return self.deleted or (self.leased is not None and self.leased.fence is not None)

    def __str__(self) -> str:
        if self.leased is not None:
            return f"task {self.task_id!r}: {self.leased}"
        if self.existing_task_id is not None:
            return f"task {self.task_id!r}: its run already has task {self.existing_task_id!r}"
        if self.deleted:
            return f"task {self.task_id!r}: expected revision {self.expected}, but it was deleted"
        return f"task {self.task_id!r}: expected revision {self.expected}, found {self.found}"


class ConflictError(TaskStoreError):
    """Another writer changed the data first; nothing of this call was written.

    ``conflicts`` is a tuple of :class:`Conflict`.  It is empty only if the
    conflict concerns the whole ledger: ``save_snapshot`` at or below its head, or
    changes based on another history.  The error is not ``retryable`` if a fence
    is not valid or an id was deleted, because a retry fails again.
    """

    retryable = True

    def __init__(self, conflicts: Iterable[Conflict], message: str | None = None) -> None:
        self.conflicts = tuple(conflicts)
        self.retryable = not any(conflict.is_final for conflict in self.conflicts)
        super().__init__(message or "; ".join(str(conflict) for conflict in self.conflicts))


class CorruptStoreError(TaskStoreError):
    """Stored bytes are damaged; they were not changed.

    ``where`` names the file, table or directory (``str``); ``offset`` is the
    byte offset or row position in it, if known (``int | None``).
    """

    def __init__(
        self, where: str, reason: str, *, offset: int | None = None, hint: str | None = None
    ) -> None:
        location = where if offset is None else f"{where} at offset {offset}"
        super().__init__(
            f"{location}: {reason}",
            hint=hint or "nothing was changed; copy the damaged data and restore a backup",
        )
        self.where = where
        self.offset = offset
        self.reason = reason


class StoreBusyError(TaskStoreError):
    """Another writer or compactor held the store for longer than the timeout.

    While other writers commit, a waiting writer does not get this error.
    Nothing was written.  The same call may succeed later.  ``owners`` describes
    each lock owner that the system reports (``tuple[str, ...]``).
    """

    retryable = True

    def __init__(
        self, message: str, *, hint: str | None = None, owners: Iterable[str] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.owners = tuple(owners)


class StoreUnavailableError(TaskStoreError):
    """The storage cannot be reached, opened or written.

    Examples: no such directory, no permission, a full disk, a server that does
    not answer.  Nothing of this call was written.
    """

    retryable = True


class StoreReplacedError(StoreUnavailableError):
    """The open file of a store, or a log beside it, was removed, moved or replaced.

    Nothing of this call was written.  The store refuses every further call.  Open
    the ledger again to use the file that is there now.
    """

    retryable = False


class OutcomeUnknownError(TaskStoreError):
    """The connection died during a commit and the outcome cannot be read back,
    or the disk did not confirm the commit.

    The commit is stored completely or not at all.  The registry reloads
    before its next write.
    """


class SchemaMismatchError(TaskStoreError):
    """This version does not support the database's schema.

    ``found`` and ``needed`` are the schema revisions (``str | None``); the hint
    is the command to run.  The database was not changed.
    """

    def __init__(
        self, message: str, *, found: str | None, needed: str | None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.found = found
        self.needed = needed


class ReadOnlyError(TaskStoreError):
    """The store or registry was opened read-only and refuses to write."""


class StoreClosedError(TaskStoreError):
    """The store or registry was closed; open it again."""


class BackendNotFoundError(TaskStoreError):
    """No installed backend serves this URL scheme.

    ``scheme`` is the requested scheme; ``installed`` is a sorted tuple of the
    installed ones (both without the colon).
    """

    def __init__(self, scheme: str, installed: Iterable[str], *, hint: str | None = None) -> None:
        self.scheme = scheme
        self.installed = tuple(sorted(installed))
        names = ", ".join(f"{name}:" for name in self.installed) or "none"
        super().__init__(f"no backend for the URL scheme {scheme!r}; installed: {names}", hint=hint)


class CursorExpiredError(TaskStoreError):
    """The journal no longer reaches back to this position, or never held it.

    ``after`` is the requested seq; ``floor`` is the first retained seq.
    ``replaced`` is true when the position is not in this journal: it belongs to
    another history (a backup was restored, or a standby took over without the
    last commits), or it is beyond the head.
    """

    def __init__(self, after: int, floor: int, *, replaced: bool = False) -> None:
        self.replaced = replaced
        super().__init__(
            f"the journal does not hold this cursor's entry at seq {after}: the seq is beyond the "
            "head, a backup was restored, or a standby took over without the last commits"
            if replaced
            else f"the journal begins at seq {floor}: "
            f"the entries after seq {after} are no longer complete",
            hint="load the current records and continue from their seq",
        )
        self.after = after
        self.floor = floor


class UnsupportedError(TaskStoreError):
    """The store does not implement the optional ability that the call needs."""
