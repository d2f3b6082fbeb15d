"""The one tree of errors that taskstore raises.

Every error says what happened, where, and (as its *hint*) what to do next.
Driver errors never escape: they are translated in one place per store and
kept as ``__cause__``.  No message carries the password of a URL.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class TaskStoreError(Exception):
    """Root of everything that taskstore raises on purpose.

    ``hint`` tells the reader what to do next (or is ``None``), and
    ``retryable`` whether the same call may succeed later without anybody
    mending anything.
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

    ``field`` is the name of the argument or record field (``str``) and
    ``reason`` what is wrong with it (``str``).  Nothing was written.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class TaskNotFound(TaskStoreError, LookupError):
    """No task has this id.  ``task_id`` (``str``) is what was asked for."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task {task_id!r}")
        self.task_id = task_id


class InvalidTransition(TaskStoreError):
    """The task's status does not allow this change; it stays as it was.

    ``task_id`` and ``status`` (the status that stands) are ``str``.
    """

    def __init__(self, task_id: str, status: str, attempted: str) -> None:
        super().__init__(f"task {task_id!r} is {status}: cannot {attempted}")
        self.task_id = task_id
        self.status = status
        self.attempted = attempted


class Leased(NamedTuple):
    """Whose lease stood in the way: ``fence`` is the token that was shown, if any,
    and ``until`` when the task's lease runs out (Unix ms), if it has one."""

    fence: str | None
    until: int | None

    def __str__(self) -> str:
        if self.fence is None:
            return f"somebody holds its lease until {self.until} (Unix milliseconds)"
        held = "it has no lease" if self.until is None else "its lease is somebody else's"
        return f"the fence {self.fence!r} does not hold: {held}"


class Conflict(NamedTuple):
    """One task that stood in the way of a commit.

    ``expected`` and ``found`` are revisions; 0 means absent.  ``found`` is
    also 0 when the task was deleted while a change of it was under way.
    ``existing_task_id`` is the id of the task that already holds the booking, when
    that was what collided.  ``deleted`` tells that the journal still holds a
    deletion of this id, so that it cannot be created again.  ``leased`` is
    set when a lease was in the way.
    """

    task_id: str
    expected: int
    found: int
    existing_task_id: str | None = None
    deleted: bool = False
    leased: Leased | None = None

    @property
    def is_final(self) -> bool:
        """Whether the same call cannot but meet it again (``bool``)."""
        return self.deleted or (self.leased is not None and self.leased.fence is not None)

    def __str__(self) -> str:
        if self.leased is not None:
            return f"task {self.task_id!r}: {self.leased}"
        if self.existing_task_id is not None:
            return f"task {self.task_id!r}: its run is already booked by {self.existing_task_id!r}"
        if self.deleted:
            return f"task {self.task_id!r}: expected revision {self.expected}, but it was deleted"
        return f"task {self.task_id!r}: expected revision {self.expected}, found {self.found}"


class ConflictError(TaskStoreError):
    """Somebody else changed the data first; nothing of this call was written.

    ``conflicts`` is a tuple of :class:`Conflict`, at least one, unless the
    conflict is about the whole ledger (``save_snapshot`` behind its head, or
    changes that were worked out over another history).  It is not
    ``retryable`` where a fence does not hold or an id was deleted: they never
    will again.
    """

    retryable = True

    def __init__(self, conflicts: Iterable[Conflict], message: str | None = None) -> None:
        self.conflicts = tuple(conflicts)
        self.retryable = not any(conflict.is_final for conflict in self.conflicts)
        super().__init__(message or "; ".join(str(conflict) for conflict in self.conflicts))


class CorruptStoreError(TaskStoreError):
    """Stored bytes are damaged; they were left exactly as found.

    ``where`` names the file, table or directory (``str``), ``offset`` the
    byte offset or row position in it where that is known (``int | None``).
    """

    def __init__(
        self, where: str, reason: str, *, offset: int | None = None, hint: str | None = None
    ) -> None:
        place = where if offset is None else f"{where} at offset {offset}"
        super().__init__(
            f"{place}: {reason}",
            hint=hint or "nothing was changed; copy it aside and restore a backup",
        )
        self.where = where
        self.offset = offset
        self.reason = reason


class StoreBusyError(TaskStoreError):
    """Another writer or compactor held the store for longer than we wait.

    As long as other writers make progress, one waits for them without it.
    Nothing was written.  The same call may succeed later.  ``owners`` names
    who held it, a text for each, as far as the system tells
    (``tuple[str, ...]``).
    """

    retryable = True

    def __init__(
        self, message: str, *, hint: str | None = None, owners: Iterable[str] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.owners = tuple(owners)


class StoreUnavailableError(TaskStoreError):
    """The storage cannot be reached, opened or written.

    No such directory, no permission, a full disk, a server that does not
    answer.  Nothing of this call was written.
    """

    retryable = True


class StoreReplacedError(StoreUnavailableError):
    """The file that a store has open, or a log beside it, was removed, moved or replaced.

    Nothing of this call was written.  The store refuses every further use: open
    the ledger again, which opens what lies there now.
    """

    retryable = False


class OutcomeUnknownError(TaskStoreError):
    """The connection died during a commit and its outcome cannot be read back,
    or the disk did not confirm it.

    The change is there as a whole or not at all.  The registry reloads
    before its next write.
    """


class SchemaMismatchError(TaskStoreError):
    """The database's schema is not the one that this version works with.

    ``found`` and ``needed`` name the revisions (``str | None``); the hint is
    the command to run.  The database was left untouched.
    """

    def __init__(
        self, message: str, *, found: str | None, needed: str | None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.found = found
        self.needed = needed


class ReadOnlyError(TaskStoreError):
    """A write was asked of a store or registry that was opened read-only."""


class StoreClosedError(TaskStoreError):
    """The store or registry was closed; open it again."""


class BackendNotFoundError(TaskStoreError):
    """No installed backend serves this URL scheme.

    ``scheme`` is what was asked for and ``installed`` a sorted tuple of the
    schemes that are there (both without the colon).
    """

    def __init__(self, scheme: str, installed: Iterable[str], *, hint: str | None = None) -> None:
        self.scheme = scheme
        self.installed = tuple(sorted(installed))
        names = ", ".join(f"{name}:" for name in self.installed) or "none"
        super().__init__(f"no backend for the URL scheme {scheme!r}; installed: {names}", hint=hint)


class CursorExpiredError(TaskStoreError):
    """The journal no longer reaches back to this position, or never held it.

    ``after`` is the seq that was asked for, ``floor`` the first seq kept.
    ``replaced`` tells that the journal does not hold the position at all: it
    is of another history (a backup was restored, or a standby took over
    without the last commits), or beyond the head.
    """

    def __init__(self, after: int, floor: int, *, replaced: bool = False) -> None:
        self.replaced = replaced
        super().__init__(
            f"the journal does not hold seq {after} as this cursor knows it: nothing has come so "
            "far yet, or a backup was restored, or a standby took over without the last commits"
            if replaced
            else f"the journal begins at seq {floor}: "
            f"what came after seq {after} is no longer complete",
            hint="load the current records and continue from their seq",
        )
        self.after = after
        self.floor = floor


class UnsupportedError(TaskStoreError):
    """This store does not have the ability that the call needs."""
