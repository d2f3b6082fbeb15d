"""Creation of records, run digests, and the fields that a repeated create sets."""

from __future__ import annotations

import pytest
from msgspec.structs import asdict

from taskstore.errors import ValidationError
from taskstore.model import lifecycle
from taskstore.model.records import (
    TERMINAL_STATUSES,
    DeliveryContext,
    DeliveryStatus,
    NotifyPolicy,
    ScopeKind,
    TaskStatus,
)
from taskstore.testing import make_record

T = 1_700_000_000_000
NOW = T + 5_000
S = TaskStatus


def new(**fields):
    known = {"task_id": "t", "runtime": "cli", "task": "do it", "status": "queued"}
    main = {name: fields.pop(name, value) for name, value in known.items()}
    return lifecycle.new_record(now=NOW, fields=fields, **main)


def test_a_new_system_task():
    record = new()
    assert (record.revision, record.status, record.scope_kind) == (1, S.QUEUED, ScopeKind.SYSTEM)
    assert record.delivery_status is DeliveryStatus.NOT_APPLICABLE
    assert (record.created_at, record.last_event_at, record.started_at) == (NOW, NOW, None)
    assert record.run_digest is None


@pytest.mark.parametrize("owner", ["owner_key", "requester_session_key"])
def test_a_new_session_task(owner):
    if owner == "requester_session_key":
        with pytest.raises(ValidationError) as caught:
            new(requester_session_key="s")
        assert caught.value.field == "owner_key"
        record = new(requester_session_key="s", owner_key="o")
    else:
        record = new(owner_key="o")
    assert record.scope_kind is ScopeKind.SESSION
    assert record.delivery_status is DeliveryStatus.PENDING


PENDING, NOT_APPLICABLE = DeliveryStatus.PENDING, DeliveryStatus.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("fields", "delivery"),
    [
        ({}, NOT_APPLICABLE),
        ({"owner_key": "o"}, PENDING),
        ({"owner_key": "o", "notify_policy": "done_only"}, PENDING),
        ({"owner_key": "o", "notify_policy": "state_changes"}, PENDING),
        ({"owner_key": "o", "notify_policy": "silent"}, NOT_APPLICABLE),
        ({"owner_key": "o", "notify_policy": NotifyPolicy.SILENT}, NOT_APPLICABLE),
        (
            {"owner_key": "o", "requester_session_key": "s", "notify_policy": "silent"},
            NOT_APPLICABLE,
        ),
        ({"requester_session_key": "s", "scope_kind": "system"}, PENDING),
        (
            {"requester_session_key": "s", "scope_kind": "system", "notify_policy": "silent"},
            NOT_APPLICABLE,
        ),
        ({"notify_policy": "state_changes"}, NOT_APPLICABLE),
        # A status that the caller gives is kept.
        ({"owner_key": "o", "notify_policy": "silent", "delivery_status": "pending"}, PENDING),
        ({"owner_key": "o", "delivery_status": "not_applicable"}, NOT_APPLICABLE),
        ({"delivery_status": "pending"}, PENDING),
    ],
)
def test_a_delivery_is_pending_only_if_somebody_is_to_be_told(fields, delivery):
    for status in ("queued", "running"):
        record = new(**fields, status=status)
        assert record.delivery_status is delivery
        assert (record.scope_kind is ScopeKind.SESSION) == ("owner_key" in fields)


def test_a_new_running_task_has_started():
    assert new(status="running").started_at == NOW
    assert new(status="running", started_at=T + 1).started_at == NOW
    assert new(status="running", created_at=T + 1, started_at=T + 3).started_at == T + 3


def test_times_before_creation_are_raised_to_it():
    record = new(created_at=T + 100, started_at=T + 1, last_event_at=T + 2, cleanup_after=T + 3)
    assert (record.started_at, record.last_event_at, record.cleanup_after) == (T + 100,) * 3


@pytest.mark.parametrize("status", sorted(TERMINAL_STATUSES))
def test_a_new_task_cannot_be_terminal(status):
    with pytest.raises(ValidationError):
        new(status=status)


@pytest.mark.parametrize(
    "fields",
    [
        {"colour": "red"},
        {"error": "x"},
        {"ended_at": 1},
        {"terminal_summary": "x"},
        {"terminal_outcome": "blocked"},
        {"revision": 2},
        {"run_digest": "x"},
        {"metadata_json": b"{}"},
        {"unknown_json": b"{}"},
        {"last_notified_event_at": 1},
        {"created_at": "now"},
        {"progress_summary": 5},
        {"metadata": []},
        {"requester_origin": {"colour": "red"}},
        {"label": "\0"},
        {"owner_key": ""},
    ],
)
def test_creation_refuses_invalid_fields(fields):
    with pytest.raises(ValidationError) as caught:
        new(**fields)
    assert caught.value.field == next(iter(fields))


def test_none_means_not_given():
    assert new(label=None, created_at=None, metadata=None, owner_key=None) == new()


SCOPE = {
    "run_id": "run-1",
    "owner_key": "o",
    "child_session_key": "c",
    "parent_flow_id": "f",
    "label": "l",
}


def test_the_run_digest_is_of_the_scope():
    record = new(**SCOPE)
    assert record.run_digest == lifecycle.run_digest(record)
    assert len(record.run_digest) == 32
    same = new(**SCOPE, task_id="other", source_id="x", agent_id="a", metadata={"a": 1})
    assert same.run_digest == record.run_digest


@pytest.mark.parametrize(
    "changed",
    [{name: f"{value} "} for name, value in SCOPE.items()]
    + [{name: None} for name in SCOPE if name not in ("run_id", "owner_key")]
    + [{"runtime": "cron"}, {"task": "do it!"}, {"scope_kind": "system"}, {"label": ""}],
)
def test_another_scope_has_another_run_digest(changed):
    assert new(**{**SCOPE, **changed}).run_digest != new(**SCOPE).run_digest


def test_scope_fields_are_not_concatenated():
    one = new(run_id="r", child_session_key="a", parent_flow_id="b")
    two = new(run_id="r", child_session_key="ab", parent_flow_id="")
    assert one.run_digest != two.run_digest


# -- attach -----------------------------------------------------------------


def test_attach_sets_empty_fields():
    existing = new(run_id="r", owner_key="o", agent_id="a")
    asked = new(
        run_id="r",
        owner_key="other",
        agent_id="b",
        source_id="s",
        cleanup_after=T + 99_000,
        progress_summary="x",
        requester_origin=DeliveryContext(to="Ann"),
        metadata={"a": 1},
    )
    filled = lifecycle.fill_missing(existing, asked)
    assert (filled.owner_key, filled.agent_id, filled.source_id) == ("o", "a", "s")
    assert (filled.cleanup_after, filled.progress_summary) == (T + 99_000, "x")
    assert filled.requester_origin == DeliveryContext(to="Ann")
    assert filled.metadata == {"a": 1}
    assert filled.revision == existing.revision + 1
    unchanged = {"task_id", "status", "created_at", "run_digest", "run_id", "task"}
    assert {k: v for k, v in asdict(filled).items() if k in unchanged} == {
        k: v for k, v in asdict(existing).items() if k in unchanged
    }
    assert lifecycle.fill_missing(filled, asked) is filled


def test_attach_does_not_merge_metadata():
    existing = new(run_id="r", metadata={"a": 1})
    assert lifecycle.fill_missing(existing, new(run_id="r", metadata={"b": 1})) is existing


@pytest.mark.parametrize("status", sorted(TERMINAL_STATUSES))
def test_attach_does_not_change_an_ended_task(status):
    ended = make_record(status=status, run_id="r")
    assert lifecycle.fill_missing(ended, new(source_id="s")) is ended


def test_attach_without_new_fields_changes_nothing():
    existing = new(run_id="r")
    assert lifecycle.fill_missing(existing, new(run_id="r", task_id="other")) is existing


def test_a_requester_that_is_filled_in_is_to_be_told():
    scope = {"run_id": "r", "scope_kind": "system"}
    asked = new(**scope, requester_session_key="s")
    filled = lifecycle.fill_missing(new(**scope), asked)
    assert (filled.requester_session_key, filled.delivery_status) == ("s", PENDING)
    assert lifecycle.fill_missing(filled, asked) is filled
    # The policy of the first call decides, and so does a delivery that has begun.
    silent = new(**scope, notify_policy="silent")
    assert lifecycle.fill_missing(silent, asked).delivery_status is NOT_APPLICABLE
    delivered = new(**scope, delivery_status="delivered")
    assert lifecycle.fill_missing(delivered, asked).delivery_status is DeliveryStatus.DELIVERED
    silent_asked = new(**scope, requester_session_key="s", notify_policy="silent")
    assert lifecycle.fill_missing(new(**scope), silent_asked).delivery_status is PENDING
    # A second addressee changes nothing.
    owned = new(run_id="r", owner_key="o", delivery_status="not_applicable")
    asked = new(run_id="r", owner_key="o", requester_session_key="s")
    assert lifecycle.fill_missing(owned, asked).delivery_status is NOT_APPLICABLE
