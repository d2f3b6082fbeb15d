"""The task record: the immutable state of one task at one revision.

:mod:`taskstore.model.validation` checks the fields of a record against the limits in this module.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Raw, Struct

KEY_BYTES = 255
"""Maximum length of a key (ids, session keys, labels) in bytes of UTF-8."""
SUMMARY_BYTES = 4096
"""Maximum length of a progress or terminal summary in bytes of UTF-8."""
ERROR_BYTES = 64 * 1024
"""Maximum length of an error text in bytes of UTF-8."""
TASK_BYTES = 1024 * 1024
"""Maximum length of a task text in bytes of UTF-8."""
METADATA_BYTES = 64 * 1024
"""Maximum length of metadata in bytes of canonical JSON."""
METADATA_DEPTH = 64
"""Maximum nesting of objects and arrays in metadata."""
PAYLOAD_DEPTH = 2 * METADATA_DEPTH
"""Maximum nesting of a stored or decoded payload, including unknown members.

The nesting limit of the JSON decoder is far higher and depends on the interpreter.
"""
MAX_INT = 2**53 - 1
"""The maximum time or revision.  Every JSON reader represents integers up to 2**53 - 1 exactly."""
MIN_UNIX_MS = 10**11
"""The minimum time that a caller can give (March 1973).  A smaller number is probably a time in
seconds, or a seq.  Stored records can contain earlier times."""


class TaskStatus(StrEnum):
    """The lifecycle status of a task."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    LOST = "lost"

    @property
    def is_terminal(self) -> bool:
        """True if the task has ended (``bool``): the status is neither queued nor running."""
        return self not in ACTIVE_STATUSES


ACTIVE_STATUSES = frozenset({TaskStatus.QUEUED, TaskStatus.RUNNING})
"""The statuses of a task that has not ended."""
TERMINAL_STATUSES = frozenset(TaskStatus) - ACTIVE_STATUSES
"""The statuses of a task that has ended."""


class DeliveryStatus(StrEnum):
    """The status of the delivery of a task's result to the requester."""

    PENDING = "pending"
    DELIVERED = "delivered"
    SESSION_QUEUED = "session_queued"
    FAILED = "failed"
    PARENT_MISSING = "parent_missing"
    NOT_APPLICABLE = "not_applicable"


class NotifyPolicy(StrEnum):
    """The events that the owner is notified of: the final status, every new status, or no event."""

    DONE_ONLY = "done_only"
    STATE_CHANGES = "state_changes"
    SILENT = "silent"


class ScopeKind(StrEnum):
    """The kind of a task's scope: the task belongs to a session or to the system."""

    SESSION = "session"
    SYSTEM = "system"


class TerminalOutcome(StrEnum):
    """The result of a finished run: the run succeeded, or the run was blocked."""

    SUCCEEDED = "succeeded"
    BLOCKED = "blocked"


class DeliveryContext(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The address to which a task's result is delivered.  Each field is a key (at most
    255 bytes) or ``None``."""

    channel: str | None = None
    to: str | None = None
    account_id: str | None = None
    thread_id: str | None = None


Key = Annotated[str, "key"]
"""An identifier or a name: text of at most ``KEY_BYTES`` bytes."""
Time = Annotated[int, "time"]
"""A time in Unix milliseconds, UTC."""

NO_METADATA = Raw(b"{}")

DedupKey = tuple[str, str]
"""``(run_id, run_digest)``: the id of a task's run and the digest of the task's run scope.
At most one task of a ledger has a given dedup key, so ``create`` is idempotent."""

FORMAT_VERSION = "1.1"
"""Version of the encoded record: ``major.minor``, the first member of each payload."""


class TaskRecord(
    Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
    gc=False,
    tag_field="v",
    tag=FORMAT_VERSION,
):
    """The immutable state of one task at one revision.

    Times are Unix milliseconds UTC (``int``), keys are ``str`` of at most 255 bytes of
    UTF-8.  Callers can share a record, because a record never changes.  To change a task,
    the registry creates a record with the next revision.  The constructor does not validate
    the fields: ``Put`` validates the fields, and the registry creates only valid records.
    """

    task_id: Key
    revision: int
    runtime: Key
    task: str
    status: TaskStatus
    created_at: Time
    task_kind: Key | None = None
    source_id: Key | None = None
    label: Key | None = None
    requester_session_key: Key | None = None
    owner_key: Key | None = None
    scope_kind: ScopeKind = ScopeKind.SYSTEM
    child_session_key: Key | None = None
    parent_flow_id: Key | None = None
    parent_task_id: Key | None = None
    agent_id: Key | None = None
    requester_agent_id: Key | None = None
    run_id: Key | None = None
    run_digest: Key | None = msgspec.field(default=None, name="booking")
    delivery_status: DeliveryStatus = DeliveryStatus.NOT_APPLICABLE
    notify_policy: NotifyPolicy = NotifyPolicy.DONE_ONLY
    requester_origin: DeliveryContext | None = None
    started_at: Time | None = None
    ended_at: Time | None = None
    last_event_at: Time | None = None
    last_notified_event_at: Time | None = None
    cleanup_after: Time | None = None
    error: str | None = None
    progress_summary: str | None = None
    terminal_summary: str | None = None
    terminal_outcome: TerminalOutcome | None = None
    lease_until: Time | None = None
    lease_token: Key | None = None
    metadata_json: Raw = msgspec.field(default=NO_METADATA, name="metadata")
    unknown_json: Raw | None = msgspec.field(default=None, name="_unknown")

    @property
    def metadata(self) -> dict[str, Any]:
        """The task's metadata, decoded into a fresh ``dict`` at each access."""
        decoded: dict[str, Any] = msgspec.json.decode(self.metadata_json)
        return decoded

    @property
    def is_terminal(self) -> bool:
        """True if the task has ended (``bool``)."""
        return self.status not in ACTIVE_STATUSES

    @property
    def sort_key(self) -> tuple[int, str]:
        """The key ``(created_at, task_id)``; lists of tasks are in descending order of this key."""
        return (self.created_at, self.task_id)

    def __hash__(self) -> int:
        return hash((self.task_id, self.revision))

    def __repr__(self) -> str:
        """Return a text with all fields; metadata is shown as a decoded value if it can be
        decoded."""
        shown = (
            f"{name.removesuffix('_json')}={_readable(getattr(self, name))!r}"
            for name in self.__struct_fields__
        )
        return f"{type(self).__name__}({', '.join(shown)})"


def _readable(value: object) -> object:
    """Return the decoded value if ``value`` is encoded JSON; return any other ``value`` unchanged.

    If the encoded JSON is damaged, the function returns its bytes.
    """
    if not isinstance(value, Raw):
        return value
    try:
        return msgspec.json.decode(value)
    except (ValueError, RecursionError):
        return bytes(value)


def _fields_of(annotation: object) -> tuple[str, ...]:
    """Return the names of the record fields that are declared with ``annotation``, in order."""
    declared = get_type_hints(TaskRecord, include_extras=True)
    return tuple(name for name, hint in declared.items() if hint == annotation)


REQUIRED_KEYS = _fields_of(Key)
OPTIONAL_KEYS = _fields_of(Key | None)
OPTIONAL_TIMES = _fields_of(Time | None)
NEVER_EMPTY = frozenset(
    {"task_id", "runtime", "owner_key", "run_id", "run_digest", "lease_token", "fence"}
)
TEXT_LIMITS = {
    "task": TASK_BYTES,
    "error": ERROR_BYTES,
    "progress_summary": SUMMARY_BYTES,
    "terminal_summary": SUMMARY_BYTES,
}
ENUM_FIELDS: dict[str, type[StrEnum]] = {
    "status": TaskStatus,
    "scope_kind": ScopeKind,
    "delivery_status": DeliveryStatus,
    "notify_policy": NotifyPolicy,
}
