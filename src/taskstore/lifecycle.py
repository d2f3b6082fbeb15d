"""The life of a task as pure functions: record, facts and now make the next record.

Each function returns the record that should stand afterwards: the same
object when what is asked for already holds, otherwise a new one whose
revision is one more.  What the status does not allow raises
:class:`InvalidTransition`, a wrong argument :class:`ValidationError`: what
comes out of a valid record is valid, but for a revision beyond the last.

The rules of the end: once a task has ended, its status, times, error and
outcome stay.  Two exceptions: :func:`finish` may correct ``succeeded`` to
failed, timed_out or cancelled, and :func:`recover` alone corrects ``lost``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from taskstore.errors import InvalidTransition, ValidationError
from taskstore.records import (
    ERROR_BYTES,
    MAX_INT,
    DeliveryStatus,
    NotifyPolicy,
    TaskRecord,
    TaskStatus,
    TerminalOutcome,
)
from taskstore.validation import (
    check_enum,
    check_int,
    check_key,
    check_summary,
    check_text,
    encode_metadata,
    plain_metadata,
)

Mutation = Callable[[TaskRecord, int], TaskRecord]
"""From a record and now (Unix milliseconds) to what should stand: pure."""

RETENTION_MS = 7 * 24 * 60 * 60 * 1000
"""How long an ended task is kept unless told otherwise: 7 days."""

_REHEARSAL = TaskRecord(
    task_id="rehearsal",
    revision=1,
    runtime="rehearsal",
    task="",
    status=TaskStatus.QUEUED,
    created_at=0,
)
_CORRECTIONS = frozenset({TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED})


def start(record: TaskRecord, now: int, *, started_at: int | None = None) -> TaskRecord:
    """Queued → running.  A running task is returned as it is."""
    if record.status is TaskStatus.RUNNING:
        return record
    if record.status is not TaskStatus.QUEUED:
        raise InvalidTransition(record.task_id, record.status, "start it")
    return replace(
        record,
        revision=record.revision + 1,
        status=TaskStatus.RUNNING,
        started_at=_time_of(record, "started_at", started_at, now),
        last_event_at=_event_time(record, now),
    )


def progress(record: TaskRecord, now: int, summary: str) -> TaskRecord:
    """Note how far an active task has come.  The same summary again changes nothing."""
    folded = check_summary("progress_summary", summary)
    if folded is None:
        raise ValidationError("progress_summary", "must be text, not NoneType")
    if record.is_terminal:
        raise InvalidTransition(record.task_id, record.status, "record progress")
    if folded == record.progress_summary:
        return record
    return replace(
        record,
        revision=record.revision + 1,
        progress_summary=folded,
        last_event_at=_event_time(record, now),
    )


def finish(
    record: TaskRecord,
    now: int,
    status: str,
    *,
    error: str | None = None,
    summary: str | None = None,
    outcome: str | None = None,
    ended_at: int | None = None,
) -> TaskRecord:
    """End an active task, or correct ``succeeded`` to failed, timed_out or cancelled.

    Repeating the end that stands, with the same facts or none, returns the
    record as it is; other facts raise :class:`InvalidTransition`, because
    the end is final.
    """
    end = check_enum("status", status, TaskStatus)
    if not end.is_terminal:
        raise ValidationError("status", f"a task ends in a terminal status, not {end}")
    facts = _end_facts(record, error, summary, outcome, ended_at)
    if record.status is end:
        return _repeated(record, f"finish it as {end} with other facts", facts)
    corrects = record.status is TaskStatus.SUCCEEDED and end in _CORRECTIONS
    if record.is_terminal and not corrects:
        raise InvalidTransition(record.task_id, record.status, f"finish it as {end}")
    if corrects:
        facts = {"error": None, "terminal_outcome": None, **facts}
        facts.setdefault("ended_at", record.ended_at)
    return _ended(record, now, end, facts)


def lose(record: TaskRecord, now: int, *, error: str | None = None) -> TaskRecord:
    """Active → lost: nobody can tell any more what became of it.  A lost task stays as it is."""
    facts = _end_facts(record, error, None, None, None)
    if record.status is TaskStatus.LOST:
        return record
    if record.is_terminal:
        raise InvalidTransition(record.task_id, record.status, "mark it lost")
    return _ended(record, now, TaskStatus.LOST, facts)


def cancel(record: TaskRecord, now: int, *, reason: str | None = None) -> TaskRecord:
    """Active → cancelled, the reason kept as the error.  A cancelled task stays as it is."""
    facts = _end_facts(record, reason, None, None, None)
    if record.status is TaskStatus.CANCELLED:
        return record
    if record.is_terminal:
        raise InvalidTransition(record.task_id, record.status, "cancel it")
    return _ended(record, now, TaskStatus.CANCELLED, facts)


def recover(
    record: TaskRecord,
    now: int,
    status: str = TaskStatus.RUNNING,
    *,
    error: str | None = None,
    summary: str | None = None,
    outcome: str | None = None,
    ended_at: int | None = None,
) -> TaskRecord:
    """Lost → what the task really is: active again, or how it really ended."""
    state = check_enum("status", status, TaskStatus)
    if state is TaskStatus.LOST:
        raise ValidationError("status", "recover says what a lost task really is, not lost")
    facts = _end_facts(record, error, summary, outcome, ended_at)
    if not state.is_terminal and facts:
        raise ValidationError(next(iter(facts)), f"does not go with the status {state}")
    if record.status is state:
        return _repeated(record, f"recover it as {state} with other facts", facts)
    if record.status is not TaskStatus.LOST:
        raise InvalidTransition(record.task_id, record.status, f"recover it as {state}")
    automatic = record.ended_at is not None and (
        record.cleanup_after == record.ended_at + RETENTION_MS
    )
    # Of the same revision still: it is on the way to the next one.
    alive = replace(
        record,
        error=None,
        ended_at=None,
        cleanup_after=None if automatic else record.cleanup_after,
    )
    if state.is_terminal:
        return _ended(alive, now, state, facts)
    started_at = record.started_at
    if state is TaskStatus.RUNNING and started_at is None:
        started_at = max(now, record.created_at)
    return replace(
        alive,
        revision=record.revision + 1,
        status=state,
        started_at=started_at,
        last_event_at=_event_time(record, now),
    )


def deliver(
    record: TaskRecord, status: str, *, last_notified_event_at: int | None = None
) -> TaskRecord:
    """Note how far the answer got.

    ``delivered`` also notes which event the owner now knows of:
    ``last_notified_event_at``, by default the task's last event.
    """
    state = check_enum("delivery_status", status, DeliveryStatus)
    notified = record.last_notified_event_at
    if last_notified_event_at is not None:
        notified = _time_of(record, "last_notified_event_at", last_notified_event_at, 0)
    elif state is DeliveryStatus.DELIVERED:
        notified = record.last_event_at
    return _changed(record, delivery_status=state, last_notified_event_at=notified)


def notify(record: TaskRecord, policy: str) -> TaskRecord:
    """Set what the owner wants to hear of."""
    return _changed(record, notify_policy=check_enum("notify_policy", policy, NotifyPolicy))


def retain(record: TaskRecord, cleanup_after: int | None) -> TaskRecord:
    """Set when the record may be removed (Unix milliseconds), or ``None`` for never."""
    if cleanup_after is not None:
        cleanup_after = _time_of(record, "cleanup_after", cleanup_after, 0)
    return _changed(record, cleanup_after=cleanup_after)


def link_flow(record: TaskRecord, parent_flow_id: str | None) -> TaskRecord:
    """Set the flow that the task belongs to.  Its booking stays as it was at creation."""
    if parent_flow_id is not None:
        parent_flow_id = check_key("parent_flow_id", parent_flow_id)
    return _changed(record, parent_flow_id=parent_flow_id)


def merge_metadata(record: TaskRecord, changes: object) -> TaskRecord:
    """Merge a mapping into the metadata, key by key at the top level; ``None`` is a value."""
    merged = {**record.metadata, **plain_metadata(changes)}
    return _changed(record, metadata_json=encode_metadata(merged))


def rehearse(mutation: Mutation) -> None:
    """Let a mutation check its arguments, whatever task it is meant for.

    Wrong arguments raise :class:`ValidationError` here, also when the task
    turns out to be unknown, ended or already as asked.
    """
    with contextlib.suppress(InvalidTransition):
        mutation(_REHEARSAL, 0)


def _changed(record: TaskRecord, **fields: Any) -> TaskRecord:
    if all(getattr(record, name) == value for name, value in fields.items()):
        return record
    return replace(record, revision=record.revision + 1, **fields)


def _time_of(record: TaskRecord, field: str, given: int | None, default: int) -> int:
    """A time of this record: checked, and never before its creation."""
    return max(check_int(field, default if given is None else given), record.created_at)


def _event_time(record: TaskRecord, now: int) -> int:
    """``last_event_at`` never goes back, whatever the clock does."""
    return max(now, record.created_at, record.last_event_at or 0)


def _end_facts(
    record: TaskRecord,
    error: str | None,
    summary: str | None,
    outcome: str | None,
    ended_at: int | None,
) -> dict[str, Any]:
    """The facts of an end that were given, checked, by field name."""
    facts: dict[str, Any] = {}
    if error is not None:
        facts["error"] = check_text("error", error, ERROR_BYTES)
    if summary is not None:
        facts["terminal_summary"] = check_summary("terminal_summary", summary)
    if outcome is not None:
        facts["terminal_outcome"] = check_enum("terminal_outcome", outcome, TerminalOutcome)
    if ended_at is not None:
        facts["ended_at"] = _time_of(record, "ended_at", ended_at, 0)
    return facts


def _repeated(record: TaskRecord, attempted: str, facts: Mapping[str, Any]) -> TaskRecord:
    """The record, if the facts are the ones that stand."""
    if any(getattr(record, name) != value for name, value in facts.items()):
        raise InvalidTransition(record.task_id, record.status, attempted)
    return record


def _ended(
    record: TaskRecord, now: int, status: TaskStatus, facts: Mapping[str, Any]
) -> TaskRecord:
    ended_at = facts.get("ended_at")
    if ended_at is None:
        ended_at = max(now, record.created_at)
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
            "last_event_at": _event_time(record, now),
            "cleanup_after": cleanup_after,
        },
    )
