"""How a task begins: its first record, the booking of its run, and a create that comes again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from taskstore.errors import ValidationError
from taskstore.records import (
    NO_METADATA,
    OPTIONAL_KEYS,
    DeliveryStatus,
    ScopeKind,
    TaskRecord,
    TaskStatus,
)
from taskstore.validation import (
    check_enum,
    check_int,
    check_origin,
    check_summary,
    encode_metadata,
    validated,
)

_CREATABLE = frozenset(
    {
        *OPTIONAL_KEYS,
        "scope_kind",
        "delivery_status",
        "notify_policy",
        "requester_origin",
        "created_at",
        "started_at",
        "last_event_at",
        "cleanup_after",
        "progress_summary",
        "metadata",
    }
) - {"booking", "lease_token"}
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
    for name in fields:
        if name not in _CREATABLE:
            known = name in TaskRecord.__struct_fields__
            raise ValidationError(
                str(name), "is set by later changes" if known else "is not a field of a record"
            )
    state = check_enum("status", status, TaskStatus)
    if state.is_terminal:
        raise ValidationError("status", f"a task starts queued or running, not {state}")
    given = {name: value for name, value in fields.items() if value is not None}
    metadata = encode_metadata(given.pop("metadata", {}))
    created_at = check_int("created_at", given.pop("created_at", now))
    owned = "owner_key" in given or "requester_session_key" in given
    given.setdefault("scope_kind", ScopeKind.SESSION if owned else ScopeKind.SYSTEM)
    given.setdefault(
        "delivery_status", DeliveryStatus.PENDING if owned else DeliveryStatus.NOT_APPLICABLE
    )
    given.setdefault("last_event_at", max(now, created_at))
    if state is TaskStatus.RUNNING:
        given.setdefault("started_at", max(now, created_at))
    for name in ("started_at", "last_event_at", "cleanup_after"):
        if name in given:
            given[name] = max(check_int(name, given[name]), created_at)
    if "progress_summary" in given:
        given["progress_summary"] = check_summary("progress_summary", given["progress_summary"])
    if "requester_origin" in given:
        given["requester_origin"] = check_origin(given["requester_origin"])
    record = validated(
        TaskRecord(
            task_id=task_id,
            revision=1,
            runtime=runtime,
            task=task,
            status=state,
            created_at=created_at,
            metadata_json=metadata,
            **given,
        )
    )
    if record.run_id is None:
        return record
    return replace(record, booking=run_digest(record))


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
    return replace(existing, **filled) if filled else existing
