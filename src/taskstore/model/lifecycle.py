"""The task lifecycle as pure functions that create and change records.

:func:`new_record` creates revision 1 of a task.  Two functions make ``create``
idempotent: :func:`run_digest` returns the same digest for the same run scope, and
:func:`fill_missing` returns the result of a repeated ``create``.

Every public function except ``new_record``, ``run_digest`` and ``fill_missing`` checks its
arguments and returns a :data:`Mutation`.  Invalid arguments raise :class:`ValidationError`,
whatever the status of the task is.  A mutation takes a record and the current time and returns the
record to store: the same object if nothing changes, otherwise a new record with the next revision.
If the task's status does not allow the change, the mutation raises :class:`InvalidTransition`.  A
mutation of a valid record returns a valid record, except that the new revision can exceed
``MAX_INT``.

Errors, reasons and summaries are never refused for their content: a mutation cleans and cuts these
texts, so that a task can always end.

A time that is too early is replaced by the earliest possible time: no task starts before its
creation or ends before its start.  The rule applies if the clock went back, and if a caller gave
the time.  If the creation, start and end of the old record are in this order, they are in this
order in the new record.

The status, times, error and outcome of an ended task are final, with two exceptions:
:func:`finish` can correct ``succeeded`` to failed, timed_out or cancelled, and only
:func:`recover` can correct ``lost`` to another status.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec.structs import force_setattr, replace

from taskstore.errors import InvalidTransition, ValidationError
from taskstore.model.records import (
    ACTIVE_STATUSES,
    ERROR_BYTES,
    MAX_INT,
    NO_METADATA,
    OPTIONAL_KEYS,
    TASK_BYTES,
    DeliveryStatus,
    NotifyPolicy,
    ScopeKind,
    TaskRecord,
    TaskStatus,
    TerminalOutcome,
)
from taskstore.model.validation import (
    CHECKS,
    check_enum,
    check_key,
    check_summary,
    check_text,
    check_time,
    clean_summary,
    clean_text,
    did_you_mean,
    encode_metadata,
    plain_metadata,
)

Mutation = Callable[[TaskRecord, int], TaskRecord]
"""A pure function that takes a record and the current time (Unix ms) and returns the new record."""

RETENTION_MS = 7 * 24 * 60 * 60 * 1000
"""How long the record of an ended task is retained by default: 7 days."""

_MAY_REPLACE_SUCCESS = frozenset({TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED})

# Module constants avoid the member lookup that an enum does at each access.
_RUNNING, _SESSION, _SILENT = TaskStatus.RUNNING, ScopeKind.SESSION, NotifyPolicy.SILENT
_PENDING, _NOT_APPLICABLE = DeliveryStatus.PENDING, DeliveryStatus.NOT_APPLICABLE

_INITIAL_STATUSES = {str(status): status for status in TaskStatus if not status.is_terminal}
"""The allowed statuses of a new task, by name."""

_CREATION_CHECKS = {
    name: CHECKS[name]
    for name in (
        *(key for key in OPTIONAL_KEYS if key not in ("run_digest", "lease_token")),
        *("scope_kind", "delivery_status", "notify_policy", "requester_origin"),
    )
} | {
    **dict.fromkeys(("created_at", "started_at", "last_event_at", "cleanup_after"), check_time),
    "progress_summary": check_summary,
}
"""The checks of the fields that a caller can set on a new task, by field name."""

_FILLABLE = frozenset(OPTIONAL_KEYS) - {"run_id", "run_digest", "lease_token"} | {
    "requester_origin",
    "cleanup_after",
    "progress_summary",
}


def new_record(
    *, now: int, task_id: str, runtime: str, task: str, status: str, fields: Mapping[str, Any]
) -> TaskRecord:
    """Return the record of a new task, at revision 1.

    ``fields`` maps the names of further record fields to their values; ``now`` is in Unix
    milliseconds.  Raises :class:`ValidationError` for an invalid value and for a field that
    only a later change can set.
    """
    given: dict[str, Any] = {}
    for name, value in fields.items():
        check = _CREATION_CHECKS.get(name)
        if name == "metadata":
            given["metadata_json"] = NO_METADATA if value is None else encode_metadata(value)
            continue
        if check is None:
            raise _refused_field(name)
        if value is not None:
            given[name] = check(name, value)
    state = _INITIAL_STATUSES.get(status) if isinstance(status, str) else None
    if state is None:
        state = check_enum("status", status, TaskStatus)
        raise ValidationError(
            "status", f"must be 'queued' or 'running' for a new task, not '{state}'"
        )
    created_at = given.setdefault("created_at", now)
    event_at = max(now, created_at)
    if "owner_key" in given or "requester_session_key" in given:
        given.setdefault("scope_kind", _SESSION)
        if given.get("notify_policy") is not _SILENT:
            given.setdefault("delivery_status", _PENDING)
    if state is _RUNNING:
        given.setdefault("started_at", event_at)
    for name in ("started_at", "cleanup_after"):
        if name in given and given[name] < created_at:
            given[name] = created_at
    given["last_event_at"] = max(
        given.get("last_event_at", event_at), given.get("started_at", created_at)
    )
    record = TaskRecord(
        task_id=check_key("task_id", task_id),
        revision=1,
        runtime=check_key("runtime", runtime),
        task=check_text("task", task, TASK_BYTES),
        status=state,
        **given,
    )
    if record.scope_kind is _SESSION and record.owner_key is None:
        raise ValidationError("owner_key", "is required unless scope_kind is 'system'")
    if record.run_id is not None:
        # This code can change the frozen record, because no other code refers to the record yet.
        force_setattr(record, "run_digest", run_digest(record))
    return record


def _refused_field(name: object) -> ValidationError:
    """Return the error for a field that a caller cannot set on a new task."""
    if name in TaskRecord.__struct_fields__:
        return ValidationError(str(name), "cannot be set on a new task")
    known = (*_CREATION_CHECKS, "metadata", "runtime", "task", "status", "task_id")
    return ValidationError(str(name), f"is not a field of a record{did_you_mean(name, known)}")


def run_digest(record: TaskRecord) -> str:
    """Return the digest of a record's run scope: 32 hexadecimal digits.

    The run scope is (run_id, runtime, scope kind, owner, child session, flow, label, task)
    at creation.  Two ``create`` calls with the same run scope get the same task.
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


def fill_missing(existing: TaskRecord, asked: TaskRecord) -> TaskRecord:
    """Return the result of a repeated ``create``: ``existing`` with its empty fields filled in.

    The new values come from ``asked``, the record of the repeated ``create``.  Fields of
    ``existing`` that are not empty do not change.  An ended task does not change at all.
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
    is_first_addressee = not _has_addressee(existing) and (
        "owner_key" in filled or "requester_session_key" in filled
    )
    if is_first_addressee and existing.notify_policy is not _SILENT:
        filled["delivery_status"] = _pending_if_none(existing.delivery_status)
    if existing.metadata_json == NO_METADATA and asked.metadata_json != NO_METADATA:
        filled["metadata_json"] = asked.metadata_json
    return replace(existing, revision=existing.revision + 1, **filled) if filled else existing


def start(*, started_at: int | None = None) -> Mutation:
    """Change a queued task to running.  A running task does not change."""
    if started_at is not None:
        check_time("started_at", started_at)

    def started(record: TaskRecord, now: int) -> TaskRecord:
        if record.status is TaskStatus.RUNNING:
            return record
        if record.status is not TaskStatus.QUEUED:
            raise InvalidTransition(record.task_id, record.status, "start it")
        at = max(now if started_at is None else started_at, record.created_at)
        return replace(
            record,
            revision=record.revision + 1,
            status=TaskStatus.RUNNING,
            started_at=at,
            last_event_at=max(at, _event_time(record, now)),
        )

    return started


def progress(summary: str) -> Mutation:
    """Set the progress summary of an active task.  A repeat of the same summary changes nothing."""
    folded = clean_summary("progress_summary", summary)

    def noted(record: TaskRecord, now: int) -> TaskRecord:
        if record.status not in ACTIVE_STATUSES:
            raise InvalidTransition(record.task_id, record.status, "record progress")
        if folded == record.progress_summary:
            return record
        return replace(
            record,
            revision=record.revision + 1,
            progress_summary=folded,
            last_event_at=max(now, record.created_at, record.last_event_at or 0),
        )

    return noted


def finish(
    status: str,
    *,
    error: str | None = None,
    summary: str | None = None,
    outcome: str | None = None,
    ended_at: int | None = None,
) -> Mutation:
    """End an active task, or correct ``succeeded`` to failed, timed_out or cancelled.

    If the task already has ``status`` and the given facts (error, summary, outcome, end time), the
    mutation returns the record unchanged.  If the task already has ``status`` but a given fact
    differs from the record, the mutation raises :class:`InvalidTransition`, because the facts in
    the record are final.
    """
    end = check_enum("status", status, TaskStatus)
    if not end.is_terminal:
        raise ValidationError("status", f"must be a final status, not {end}")
    given = _end_facts(error, summary, outcome, ended_at)

    def finished(record: TaskRecord, now: int) -> TaskRecord:
        if record.status is end:
            return _check_repeat(record, f"finish it as {end} with different facts", given)
        corrects = record.status is TaskStatus.SUCCEEDED and end in _MAY_REPLACE_SUCCESS
        if record.is_terminal and not corrects:
            raise InvalidTransition(record.task_id, record.status, f"finish it as {end}")
        if not corrects:
            return _with_end(record, now, end, given)
        replaced = {"error": None, "terminal_outcome": None, "ended_at": record.ended_at}
        return _with_end(record, now, end, {**replaced, **given})

    return finished


def lose(*, error: str | None = None) -> Mutation:
    """Record that the outcome of an active task is unknown.  If the task is already lost, the
    mutation returns the record unchanged."""
    return _end_active(TaskStatus.LOST, _end_facts(error, None, None, None), "mark it lost")


def cancel(reason: str | None = None) -> Mutation:
    """Cancel an active task; ``reason`` becomes the error.  A cancelled task does not change."""
    return _end_active(TaskStatus.CANCELLED, _end_facts(reason, None, None, None), "cancel it")


def _end_active(end: TaskStatus, facts: Mapping[str, Any], attempted: str) -> Mutation:
    def ended(record: TaskRecord, now: int) -> TaskRecord:
        if record.status is end:
            return record
        if record.is_terminal:
            raise InvalidTransition(record.task_id, record.status, attempted)
        return _with_end(record, now, end, facts)

    return ended


def recover(
    status: str = TaskStatus.RUNNING,
    *,
    error: str | None = None,
    summary: str | None = None,
    outcome: str | None = None,
    ended_at: int | None = None,
) -> Mutation:
    """Change a lost task to its actual status: any active or final status except ``lost``."""
    state = check_enum("status", status, TaskStatus)
    if state is TaskStatus.LOST:
        raise ValidationError(
            "status", "must not be 'lost': set the actual status of the lost task"
        )
    given = _end_facts(error, summary, outcome, ended_at)
    if not state.is_terminal and given:
        raise ValidationError(next(iter(given)), f"cannot be set if the status is {state}")

    def recovered(record: TaskRecord, now: int) -> TaskRecord:
        if record.status is state:
            return _check_repeat(record, f"recover it as {state} with different facts", given)
        if record.status is not TaskStatus.LOST:
            raise InvalidTransition(record.task_id, record.status, f"recover it as {state}")
        active = _without_end(record)
        if state.is_terminal:
            return _with_end(active, now, state, given)
        started_at = record.started_at
        if state is TaskStatus.RUNNING and started_at is None:
            started_at = max(now, record.created_at)
        return replace(
            active,
            revision=record.revision + 1,
            status=state,
            started_at=started_at,
            last_event_at=_event_time(record, now),
        )

    return recovered


def set_delivery_status(status: str, *, last_notified_event_at: int | None = None) -> Mutation:
    """Set the delivery status of the task's result.

    ``last_notified_event_at`` is the time of the newest event that the owner was notified of.  If
    the new status is ``delivered``, the default is the time of the task's newest event.
    """
    state = check_enum("delivery_status", status, DeliveryStatus)
    if last_notified_event_at is not None:
        check_time("last_notified_event_at", last_notified_event_at)

    def delivered(record: TaskRecord, _now: int) -> TaskRecord:
        notified = record.last_notified_event_at
        if last_notified_event_at is not None:
            notified = max(last_notified_event_at, record.created_at)
        elif state is DeliveryStatus.DELIVERED:
            notified = record.last_event_at
        return _with_fields(record, delivery_status=state, last_notified_event_at=notified)

    return delivered


def set_notify_policy(policy: str) -> Mutation:
    """Set the policy that selects the events that the owner is notified of.

    If the task has an owner or a requester and becomes silent, the delivery status changes from
    ``pending`` to ``not_applicable``.  If such a task is no longer silent, the delivery status
    changes from ``not_applicable`` to ``pending``.
    """
    chosen = check_enum("notify_policy", policy, NotifyPolicy)

    def chose(record: TaskRecord, _now: int) -> TaskRecord:
        delivery = record.delivery_status
        if _has_addressee(record) and (chosen is _SILENT) != (record.notify_policy is _SILENT):
            if chosen is not _SILENT:
                delivery = _pending_if_none(delivery)
            elif delivery is _PENDING:
                delivery = _NOT_APPLICABLE
        return _with_fields(record, notify_policy=chosen, delivery_status=delivery)

    return chose


def _has_addressee(record: TaskRecord) -> bool:
    return record.owner_key is not None or record.requester_session_key is not None


def _pending_if_none(delivery: DeliveryStatus) -> DeliveryStatus:
    return _PENDING if delivery is _NOT_APPLICABLE else delivery


def set_cleanup_after(cleanup_after: int | None) -> Mutation:
    """Set the time after which the record can be removed (Unix ms); ``None`` means never."""
    if cleanup_after is not None:
        check_time("cleanup_after", cleanup_after)

    def retained(record: TaskRecord, _now: int) -> TaskRecord:
        until = cleanup_after
        return _with_fields(
            record, cleanup_after=None if until is None else max(until, record.created_at)
        )

    return retained


def link_flow(parent_flow_id: str | None) -> Mutation:
    """Set the flow to which the task belongs.  The task's dedup key does not change."""
    flow = None if parent_flow_id is None else check_key("parent_flow_id", parent_flow_id)
    return lambda record, _now: _with_fields(record, parent_flow_id=flow)


def merge_metadata(changes: object) -> Mutation:
    """Merge a mapping into the metadata, key by key at the top level.

    A value of ``None`` is stored and does not remove the key.  The mutation raises
    :class:`ValidationError` if the merged metadata exceeds the limits of metadata.
    """
    copied = plain_metadata(changes)
    encode_metadata(copied)

    def merged(record: TaskRecord, _now: int) -> TaskRecord:
        return _with_fields(record, metadata_json=encode_metadata({**record.metadata, **copied}))

    return merged


def _with_fields(record: TaskRecord, **fields: Any) -> TaskRecord:
    if all(getattr(record, name) == value for name, value in fields.items()):
        return record
    return replace(record, revision=record.revision + 1, **fields)


def _event_time(record: TaskRecord, now: int) -> int:
    """Return the next ``last_event_at``, which never decreases, even if the clock goes back."""
    return max(now, record.created_at, record.last_event_at or 0)


def _end_facts(
    error: str | None, summary: str | None, outcome: str | None, ended_at: int | None
) -> dict[str, Any]:
    """Return the checked facts of a task's end that are not ``None``, by field name."""
    facts: dict[str, Any] = {}
    if error is not None:
        facts["error"] = clean_text("error", error, ERROR_BYTES)
    if summary is not None:
        facts["terminal_summary"] = clean_summary("terminal_summary", summary)
    if outcome is not None:
        facts["terminal_outcome"] = check_enum("terminal_outcome", outcome, TerminalOutcome)
    if ended_at is not None:
        facts["ended_at"] = check_time("ended_at", ended_at)
    return facts


def _end_time(record: TaskRecord, at: int) -> int:
    """Return ``at``, or the earliest possible end of the task if ``at`` is earlier."""
    return max(at, record.created_at, record.started_at or 0)


def _without_end(record: TaskRecord) -> TaskRecord:
    """Return a lost record without the fields that ``lose`` set; the revision does not change."""
    is_default = record.ended_at is not None and (
        record.cleanup_after == record.ended_at + RETENTION_MS
    )
    return replace(
        record,
        error=None,
        ended_at=None,
        cleanup_after=None if is_default else record.cleanup_after,
    )


def _check_repeat(record: TaskRecord, attempted: str, facts: Mapping[str, Any]) -> TaskRecord:
    """Return the record if its fields equal the given facts; otherwise raise
    :class:`InvalidTransition`."""
    for name, value in facts.items():
        stored = getattr(record, name)
        if stored != value and not (name == "ended_at" and stored == _end_time(record, value)):
            raise InvalidTransition(record.task_id, record.status, attempted)
    return record


def _with_end(
    record: TaskRecord, now: int, status: TaskStatus, facts: Mapping[str, Any]
) -> TaskRecord:
    given = facts.get("ended_at")
    ended_at = _end_time(record, now if given is None else given)
    cleanup_after = record.cleanup_after
    if cleanup_after is None:
        cleanup_after = min(ended_at + RETENTION_MS, MAX_INT)
    return replace(
        record,
        **{
            **facts,
            "revision": record.revision + 1,
            "status": status,
            "ended_at": ended_at,
            "last_event_at": max(ended_at, _event_time(record, now)),
            "cleanup_after": cleanup_after,
        },
    )
