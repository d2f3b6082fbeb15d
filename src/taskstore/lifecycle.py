"""The life of a task as pure functions: a verb's arguments make a mutation of its record.

Each function here checks its arguments, once, and returns a
:data:`Mutation`.  Wrong arguments raise :class:`ValidationError` whatever
the task is.  The mutation takes a record and now and returns the record that
should stand afterwards: the same object when what is asked for already
holds, otherwise a new one whose revision is one more.  What the status does
not allow raises :class:`InvalidTransition`.  What comes out of a valid
record is valid, but for a revision beyond the last.

The rules of the end: once a task has ended, its status, times, error and
outcome stay.  Two exceptions: :func:`finish` may correct ``succeeded`` to
failed, timed_out or cancelled, and :func:`recover` alone corrects ``lost``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from taskstore.errors import InvalidTransition, ValidationError
from taskstore.records import (
    ACTIVE_STATUSES,
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

_CORRECTIONS = frozenset({TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED})


def start(*, started_at: int | None = None) -> Mutation:
    """Queued → running.  A running task is returned as it is."""
    _check_time("started_at", started_at)

    def started(record: TaskRecord, now: int) -> TaskRecord:
        if record.status is TaskStatus.RUNNING:
            return record
        if record.status is not TaskStatus.QUEUED:
            raise InvalidTransition(record.task_id, record.status, "start it")
        return replace(
            record,
            revision=record.revision + 1,
            status=TaskStatus.RUNNING,
            started_at=max(now if started_at is None else started_at, record.created_at),
            last_event_at=_event_time(record, now),
        )

    return started


def progress(summary: str) -> Mutation:
    """Note how far an active task has come.  The same summary again changes nothing."""
    folded = check_summary("progress_summary", summary)
    if folded is None:
        raise ValidationError("progress_summary", "must be text, not NoneType")

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

    Repeating the end that stands, with the same facts or none, returns the
    record as it is; other facts raise :class:`InvalidTransition`, because
    the end is final.
    """
    end = check_enum("status", status, TaskStatus)
    if not end.is_terminal:
        raise ValidationError("status", f"a task ends in a terminal status, not {end}")
    given = _end_facts(error, summary, outcome, ended_at)

    def finished(record: TaskRecord, now: int) -> TaskRecord:
        facts = _facts_of(record, given)
        if record.status is end:
            return _repeated(record, f"finish it as {end} with other facts", facts)
        corrects = record.status is TaskStatus.SUCCEEDED and end in _CORRECTIONS
        if record.is_terminal and not corrects:
            raise InvalidTransition(record.task_id, record.status, f"finish it as {end}")
        if corrects:
            facts = {"error": None, "terminal_outcome": None, **facts}
            facts.setdefault("ended_at", record.ended_at)
        return _ended(record, now, end, facts)

    return finished


def lose(*, error: str | None = None) -> Mutation:
    """Active → lost: what became of it cannot be told any more.  A lost task stays as it is."""
    return _end_active(TaskStatus.LOST, _end_facts(error, None, None, None), "mark it lost")


def cancel(reason: str | None = None) -> Mutation:
    """Active → cancelled, the reason kept as the error.  A cancelled task stays as it is."""
    return _end_active(TaskStatus.CANCELLED, _end_facts(reason, None, None, None), "cancel it")


def _end_active(end: TaskStatus, facts: Mapping[str, Any], attempted: str) -> Mutation:
    def ended(record: TaskRecord, now: int) -> TaskRecord:
        if record.status is end:
            return record
        if record.is_terminal:
            raise InvalidTransition(record.task_id, record.status, attempted)
        return _ended(record, now, end, facts)

    return ended


def recover(
    status: str = TaskStatus.RUNNING,
    *,
    error: str | None = None,
    summary: str | None = None,
    outcome: str | None = None,
    ended_at: int | None = None,
) -> Mutation:
    """Lost → what the task really is: active again, or how it really ended."""
    state = check_enum("status", status, TaskStatus)
    if state is TaskStatus.LOST:
        raise ValidationError("status", "recover says what a lost task really is, not lost")
    given = _end_facts(error, summary, outcome, ended_at)
    if not state.is_terminal and given:
        raise ValidationError(next(iter(given)), f"does not go with the status {state}")

    def recovered(record: TaskRecord, now: int) -> TaskRecord:
        facts = _facts_of(record, given)
        if record.status is state:
            return _repeated(record, f"recover it as {state} with other facts", facts)
        if record.status is not TaskStatus.LOST:
            raise InvalidTransition(record.task_id, record.status, f"recover it as {state}")
        alive = _without_end(record)
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

    return recovered


def deliver(status: str, *, last_notified_event_at: int | None = None) -> Mutation:
    """Note how far the answer got.

    ``delivered`` also notes which event the owner now knows of:
    ``last_notified_event_at``, by default the task's last event.
    """
    state = check_enum("delivery_status", status, DeliveryStatus)
    _check_time("last_notified_event_at", last_notified_event_at)

    def delivered(record: TaskRecord, _now: int) -> TaskRecord:
        notified = record.last_notified_event_at
        if last_notified_event_at is not None:
            notified = max(last_notified_event_at, record.created_at)
        elif state is DeliveryStatus.DELIVERED:
            notified = record.last_event_at
        return _changed(record, delivery_status=state, last_notified_event_at=notified)

    return delivered


def notify(policy: str) -> Mutation:
    """Set what the owner wants to hear of."""
    chosen = check_enum("notify_policy", policy, NotifyPolicy)
    return lambda record, _now: _changed(record, notify_policy=chosen)


def retain(cleanup_after: int | None) -> Mutation:
    """Set when the record may be removed (Unix milliseconds), or ``None`` for never."""
    _check_time("cleanup_after", cleanup_after)

    def retained(record: TaskRecord, _now: int) -> TaskRecord:
        until = cleanup_after
        return _changed(
            record, cleanup_after=None if until is None else max(until, record.created_at)
        )

    return retained


def link_flow(parent_flow_id: str | None) -> Mutation:
    """Set the flow that the task belongs to.  Its dedup key stays as it was at creation."""
    flow = None if parent_flow_id is None else check_key("parent_flow_id", parent_flow_id)
    return lambda record, _now: _changed(record, parent_flow_id=flow)


def merge_metadata(changes: object) -> Mutation:
    """Merge a mapping into the metadata, key by key at the top level; ``None`` is a value.

    The result has to be within the limits of metadata: else the mutation
    raises :class:`ValidationError`.
    """
    copied = plain_metadata(changes)
    encode_metadata(copied)

    def merged(record: TaskRecord, _now: int) -> TaskRecord:
        return _changed(record, metadata_json=encode_metadata({**record.metadata, **copied}))

    return merged


def _changed(record: TaskRecord, **fields: Any) -> TaskRecord:
    if all(getattr(record, name) == value for name, value in fields.items()):
        return record
    return replace(record, revision=record.revision + 1, **fields)


def _check_time(field: str, given: int | None) -> None:
    if given is not None:
        check_int(field, given)


def _event_time(record: TaskRecord, now: int) -> int:
    """``last_event_at`` never goes back, whatever the clock does."""
    return max(now, record.created_at, record.last_event_at or 0)


def _end_facts(
    error: str | None, summary: str | None, outcome: str | None, ended_at: int | None
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
        facts["ended_at"] = check_int("ended_at", ended_at)
    return facts


def _facts_of(record: TaskRecord, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given facts as they hold for this task: it does not end before its creation."""
    facts = dict(given)
    if "ended_at" in facts:
        facts["ended_at"] = max(facts["ended_at"], record.created_at)
    return facts


def _without_end(record: TaskRecord) -> TaskRecord:
    """A lost task without what its end has set, at the same revision: on the way to the next."""
    automatic = record.ended_at is not None and (
        record.cleanup_after == record.ended_at + RETENTION_MS
    )
    return replace(
        record,
        error=None,
        ended_at=None,
        cleanup_after=None if automatic else record.cleanup_after,
    )


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
