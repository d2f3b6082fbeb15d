"""The errors that taskstore raises, all under one base class.

The message of an error says what happened and where.  The *hint* of an error says what to
do next.  A store translates each driver error into one of these errors and keeps the driver
error as ``__cause__``.  No message contains the password of a URL.

An error can be copied and pickled, for example by a process pool.  The copy has the same
message, attributes and notes, but no ``__cause__`` and no traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self, TypeVar

_Error = TypeVar("_Error", bound="TaskStoreError")


class TaskStoreError(Exception):
    """The base class of all errors that taskstore raises on purpose.

    ``hint`` says what to do next (``str`` or ``None``).  ``retryable`` says whether the
    same call can succeed later without a repair.
    """

    retryable: bool = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[Any, ...], dict[str, Any]]:
        # ``Exception.__reduce__`` calls the class with ``args``, but ``args`` has only the
        # message, and the constructors of subclasses have other parameters.  A copy therefore
        # gets its attributes without a call of the constructor.
        state: Any = self.__getstate__()
        if isinstance(state, tuple):  # a subclass has __slots__
            state = {**(state[0] or {}), **state[1]}
        return _without_init, (type(self), *self.args), state


def _without_init(kind: type[_Error], *args: object) -> _Error:
    """Return a new error without a call of its constructor; ``args`` are its ``args``."""
    return kind.__new__(kind, *args)


class ValidationError(TaskStoreError, ValueError):
    """An argument, or a field of a record, change or query, has an invalid value.

    ``field`` is the name of the argument or record field (``str``).  ``reason``
    says what is wrong with the value (``str``).  The call wrote nothing.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class TaskNotFound(TaskStoreError, LookupError):
    """No task has the id ``task_id`` (``str``)."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"there is no task {task_id!r}")
        self.task_id = task_id


class InvalidTransition(TaskStoreError):
    """The task's status does not allow the requested change; the task did not change.

    ``task_id`` is the id of the task, and ``status`` is the task's current status (``str``).
    """

    def __init__(self, task_id: str, status: str, attempted: str) -> None:
        super().__init__(f"task {task_id!r} is {status}: cannot {attempted}")
        self.task_id = task_id
        self.status = status
        self.attempted = attempted


class LeaseConflict(NamedTuple):
    """A change was refused because of the task's lease.

    ``fence`` is the token that the caller passed (``None``: no token).  ``until`` is
    the time when the task's lease expires (Unix ms; ``None``: the task has no lease).
    """

    fence: str | None
    until: int | None

    def __str__(self) -> str:
        if self.fence is None:
            return f"another worker has the task's lease until {self.until} (Unix milliseconds)"
        lease = "no lease" if self.until is None else "a lease with another token"
        return f"the fence {self.fence!r} is not valid: the task has {lease}"


class Conflict(NamedTuple):
    """One task whose stored state does not allow a commit.

    ``expected`` and ``found`` are revisions; 0 means that the task does not exist.
    ``found`` is also 0 if the task was deleted while a change of the task was in progress.
    ``existing_task_id`` is the id of another task that already has the same dedup key.
    ``deleted`` is true if the journal still contains the deletion of this task; no new task
    can then have the id.  ``leased`` is set if the task's lease does not allow the commit.
    """

    task_id: str
    expected: int
    found: int
    existing_task_id: str | None = None
    deleted: bool = False
    leased: LeaseConflict | None = None

    @property
    def is_final(self) -> bool:
        """True if every retry of the same call fails (``bool``)."""
        return self.deleted or (self.leased is not None and self.leased.fence is not None)

    def __str__(self) -> str:
        if self.leased is not None:
            return f"task {self.task_id!r}: {self.leased}"
        if self.existing_task_id is not None:
            return f"task {self.task_id!r}: task {self.existing_task_id!r} has the same dedup key"
        if self.deleted:
            return (
                f"task {self.task_id!r}: expected revision {self.expected}, but the task is deleted"
            )
        return f"task {self.task_id!r}: expected revision {self.expected}, found {self.found}"


class ConflictError(TaskStoreError):
    """Another writer changed the data first; this call wrote nothing.

    ``conflicts`` is a tuple of :class:`Conflict`.  The tuple is empty if the conflict is not about
    single tasks: for example, ``save_snapshot`` got a seq that does not exceed the head, or the
    changes are based on another history.  If a fence is not valid or a task was deleted, every
    retry fails, and ``retryable`` is false.
    """

    retryable = True

    def __init__(self, conflicts: Iterable[Conflict], message: str | None = None) -> None:
        self.conflicts = tuple(conflicts)
        self.retryable = not any(conflict.is_final for conflict in self.conflicts)
        super().__init__(message or "; ".join(str(conflict) for conflict in self.conflicts))


class CorruptStoreError(TaskStoreError):
    """Stored bytes are damaged; the store did not change the damaged bytes.

    ``where`` names the file, table or directory (``str``).  ``offset`` is the byte
    offset or row position of the damage, if known (``int | None``).
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
    """Another writer or compactor held a lock of the store for longer than the timeout.

    A waiting writer does not get this error while other writers commit.  The call wrote
    nothing.  The same call can succeed later.  ``owners`` describes the lock owners that
    the system reports (``tuple[str, ...]``).  The parameter ``holders`` is the earlier name of
    ``owners``, for backends that still use this name.
    """

    retryable = True

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        owners: Iterable[str] = (),
        holders: Iterable[str] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.owners = (*owners, *holders)


class StoreUnavailableError(TaskStoreError):
    """The storage cannot be reached, opened or written.

    Examples: the directory does not exist, the permission is missing, the disk is
    full, or the server does not answer.  The call wrote nothing.
    """

    retryable = True


class StoreReplacedError(StoreUnavailableError):
    """The open file of a store, or its log file, was removed, moved or replaced.

    The call wrote nothing.  The store refuses every further call.  Open the ledger again to
    use the file that now has the path of the store.
    """

    retryable = False


class OutcomeUnknownError(TaskStoreError):
    """The store cannot find out whether a commit was stored.

    The connection failed during the commit, or the disk did not confirm the commit.
    The commit is stored completely or not at all.  The registry reloads all records
    before its next write.
    """


class SchemaMismatchError(TaskStoreError):
    """This version of taskstore does not support the database's schema.

    ``found`` is the database's schema revision, and ``needed`` is the supported revision
    (``str | None``).  The hint contains the command to run.  The database did not change.
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
    """The store or registry was closed and must be opened again."""


class BackendNotFoundError(TaskStoreError):
    """No installed backend opens URLs of the requested scheme.

    ``scheme`` is the requested scheme; ``installed`` is the sorted tuple of the installed
    schemes.  ``scheme`` and ``installed`` do not include the colon.
    """

    def __init__(self, scheme: str, installed: Iterable[str], *, hint: str | None = None) -> None:
        self.scheme = scheme
        self.installed = tuple(sorted(installed))
        names = ", ".join(f"{name}:" for name in self.installed) or "none"
        super().__init__(
            f"no backend for the URL scheme {scheme!r} is installed; installed schemes: {names}",
            hint=hint,
        )


class CursorExpiredError(TaskStoreError):
    """The journal cannot be read from the requested position.

    ``after`` is the requested seq; ``floor`` is the first retained seq.  If the caller requested a
    seq (not a cursor) beyond the head, ``head`` is the newest seq; otherwise ``head`` is ``None``.
    If ``replaced`` is false, entries after ``after`` were trimmed.  If ``replaced`` is true, the
    requested position is beyond the head or belongs to another history: a backup was restored, or
    a standby took over without the newest commits.
    """

    def __init__(
        self, after: int, floor: int, *, replaced: bool = False, head: int | None = None
    ) -> None:
        self.replaced = replaced
        if head is not None:
            message = f"seq {after} is beyond the head of the journal: the newest seq is {head}"
        elif replaced:
            message = (
                f"the journal has no entry for the cursor at seq {after}: the cursor is not "
                "complete, a backup was restored, or a standby took over without the last commits"
            )
        else:
            message = (
                f"the journal begins at seq {floor}: not all entries after seq {after} are retained"
            )
        hint = "load the current snapshot and continue from the seq of the snapshot"
        super().__init__(message, hint=hint)
        self.after = after
        self.floor = floor
        self.head = head


class UnsupportedError(TaskStoreError):
    """The store does not implement the optional protocol that the call needs."""
