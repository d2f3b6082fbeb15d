"""How a task begins: its first record, the booking of its run, and a create that comes again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import force_setattr, replace

from taskstore.errors import ValidationError
from taskstore.records import (
    NO_METADATA,
    OPTIONAL_KEYS,
    TASK_BYTES,
    DeliveryStatus,
    ScopeKind,
    TaskRecord,
    TaskStatus,
)
from taskstore.validation import (
    CHECKS,
    check_enum,
    check_key,
    check_summary,
    check_text,
    encode_metadata,
)

# An enum looks its members up at each access.
_RUNNING, _SESSION, _PENDING = TaskStatus.RUNNING, ScopeKind.SESSION, DeliveryStatus.PENDING

_BEGINNINGS = {str(status): status for status in TaskStatus if not status.is_terminal}
"""What a task may be when it is created, by its name."""

_CHECKS = {
    name: CHECKS[name]
    for name in (
        *(key for key in OPTIONAL_KEYS if key not in ("booking", "lease_token")),
        *("created_at", "started_at", "last_event_at", "cleanup_after"),
        *("scope_kind", "delivery_status", "notify_policy", "requester_origin"),
    )
} | {"progress_summary": check_summary}
"""What may be given when a task is created, and what it is checked with."""

_FILLABLE = frozenset(OPTIONAL_KEYS) - {"run_id", "booking", "lease_token"} | {
    "requester_origin",
    "cleanup_after",
    "progress_summary",
}


def new_record(
    *, now: int, task_id: str, runtime: str, task: str, status: str, fields: Mapping[str, Any]
) -> TaskRecord:
    """Make revision 1 of a task.

    ``fields`` are further record fields by name; ``now`` is in Unix
    milliseconds.  Raises :class:`ValidationError` for anything that may not
    be stored or that only a later change can set.
    """
    given: dict[str, Any] = {}
    for name, value in fields.items():
        check = _CHECKS.get(name)
        if name == "metadata":
            given["metadata_json"] = NO_METADATA if value is None else encode_metadata(value)
            continue
        if check is None:
            known = name in TaskRecord.__struct_fields__
            raise ValidationError(
                str(name), "is not given to a new task" if known else "is not a field of a record"
            )
        if value is not None:
            given[name] = check(name, value)
    state = _BEGINNINGS.get(status) if isinstance(status, str) else None
    if state is None:
        state = check_enum("status", status, TaskStatus)
        raise ValidationError("status", f"a task starts queued or running, not {state}")
    created_at = given.setdefault("created_at", now)
    event_at = max(now, created_at)
    if "owner_key" in given or "requester_session_key" in given:
        given.setdefault("scope_kind", _SESSION)
        given.setdefault("delivery_status", _PENDING)
    given.setdefault("last_event_at", event_at)
    if state is _RUNNING:
        given.setdefault("started_at", event_at)
    for name in ("started_at", "last_event_at", "cleanup_after"):
        if name in given and given[name] < created_at:
            given[name] = created_at
    record = TaskRecord(
        task_id=check_key("task_id", task_id),
        revision=1,
        runtime=check_key("runtime", runtime),
        task=check_text("task", task, TASK_BYTES),
        status=state,
        **given,
    )
    if record.scope_kind is _SESSION and record.owner_key is None:
        raise ValidationError("owner_key", "is required unless scope_kind is system")
    if record.run_id is not None:
        # It is nobody else's yet.
        force_setattr(record, "booking", run_digest(record))
    return record


def run_digest(record: TaskRecord) -> str:
    """Digest the run scope of a record: 32 hexadecimal digits.

    The scope is (run_id, runtime, scope kind, owner, child session, flow,
    label, task) as they are at creation; two creates with the same scope are
    the same task.
    """
    scope = (
        record.run_id,
        record.runtime,
        record.scope_kind,
        record.owner_key,
        record.child_session_key,
        record.parent_flow_id,
        record.label,
        record.task,
    )
    return hashlib.blake2b(msgspec.json.encode(scope), digest_size=16).hexdigest()


def attach(existing: TaskRecord, asked: TaskRecord) -> TaskRecord:
    """Answer a repeated create: fill what ``existing`` lacked, touch nothing else.

    An ended task is returned unchanged.
    """
    if existing.is_terminal:
        return existing
    filled: dict[str, Any] = {
        name: getattr(asked, name)
        for name in sorted(_FILLABLE)
        if getattr(existing, name) is None and getattr(asked, name) is not None
    }
    if "cleanup_after" in filled:
        filled["cleanup_after"] = max(filled["cleanup_after"], existing.created_at)
    if existing.metadata_json == NO_METADATA and asked.metadata_json != NO_METADATA:
        filled["metadata_json"] = asked.metadata_json
    return replace(existing, revision=existing.revision + 1, **filled) if filled else existing
