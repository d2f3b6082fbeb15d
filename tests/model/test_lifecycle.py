"""The result of every verb in every status [6]."""

from __future__ import annotations

import itertools

import pytest

from taskstore.errors import InvalidTransition, ValidationError
from taskstore.model import lifecycle
from taskstore.model.lifecycle import RETENTION_MS
from taskstore.model.records import (
    ACTIVE_STATUSES,
    TERMINAL_STATUSES,
    DeliveryStatus,
    NotifyPolicy,
    TaskStatus,
    TerminalOutcome,
)
from taskstore.testing import make_record

T = 1_700_000_000_000
NOW = T + 5_000
S = TaskStatus
FINAL = ("status", "started_at", "ended_at", "last_event_at", "error", "terminal_outcome")


def in_status(status, **fields):
    """A record as the verbs would have left it in this status."""
    times = {"created_at": T + 1000, "started_at": T + 2000, "last_event_at": T + 3000}
    if status in TERMINAL_STATUSES:
        times |= {"ended_at": T + 3000, "cleanup_after": T + 3000 + RETENTION_MS}
    return make_record(status=status, **{**times, **fields})


VERBS = {
    "start": lambda r: lifecycle.start()(r, NOW),
    "progress": lambda r: lifecycle.progress("3 of 10")(r, NOW),
    "finish_succeeded": lambda r: lifecycle.finish("succeeded")(r, NOW),
    "finish_failed": lambda r: lifecycle.finish("failed")(r, NOW),
    "finish_timed_out": lambda r: lifecycle.finish("timed_out")(r, NOW),
    "finish_cancelled": lambda r: lifecycle.finish("cancelled")(r, NOW),
    "finish_lost": lambda r: lifecycle.finish("lost")(r, NOW),
    "lose": lambda r: lifecycle.lose()(r, NOW),
    "cancel": lambda r: lifecycle.cancel()(r, NOW),
    "recover_queued": lambda r: lifecycle.recover("queued")(r, NOW),
    "recover": lambda r: lifecycle.recover()(r, NOW),
    "recover_succeeded": lambda r: lifecycle.recover("succeeded")(r, NOW),
    "recover_failed": lambda r: lifecycle.recover("failed")(r, NOW),
    "recover_timed_out": lambda r: lifecycle.recover("timed_out")(r, NOW),
    "recover_cancelled": lambda r: lifecycle.recover("cancelled")(r, NOW),
}

# For each verb: the result for a task that is queued, running, succeeded, failed, timed_out,
# cancelled, lost.  "=" the record itself; "!" InvalidTransition.
TABLE = {
    "start":             "running = ! ! ! ! !",
    "progress":          "queued running ! ! ! ! !",
    "finish_succeeded":  "succeeded succeeded = ! ! ! !",
    "finish_failed":     "failed failed failed = ! ! !",
    "finish_timed_out":  "timed_out timed_out timed_out ! = ! !",
    "finish_cancelled":  "cancelled cancelled cancelled ! ! = !",
    "finish_lost":       "lost lost ! ! ! ! =",
    "lose":              "lost lost ! ! ! ! =",
    "cancel":            "cancelled cancelled ! ! ! = !",
    "recover_queued":    "= ! ! ! ! ! queued",
    "recover":           "! = ! ! ! ! running",
    "recover_succeeded": "! ! = ! ! ! succeeded",
    "recover_failed":    "! ! ! = ! ! failed",
    "recover_timed_out": "! ! ! ! = ! timed_out",
    "recover_cancelled": "! ! ! ! ! = cancelled",
}  # fmt: skip


ROWS = [
    pytest.param(verb, status, outcome, id=f"{verb}-{status}")
    for verb, outcomes in TABLE.items()
    for status, outcome in zip(TaskStatus, outcomes.split(), strict=True)
]


@pytest.mark.parametrize(("verb", "status", "outcome"), ROWS)
def test_every_verb_in_every_status(verb, status, outcome):
    record = in_status(status)
    if outcome == "!":
        with pytest.raises(InvalidTransition) as caught:
            VERBS[verb](record)
        assert caught.value.task_id == record.task_id
        assert caught.value.status == status
    elif outcome == "=":
        assert VERBS[verb](record) is record
    else:
        changed = VERBS[verb](record)
        assert changed.status == outcome
        assert changed is not record
        assert changed.revision == record.revision + 1
        again = VERBS[verb](changed)
        assert again is changed


@pytest.mark.parametrize("status", TaskStatus)
def test_edits_do_not_change_final_fields(status):
    record = in_status(status)
    edits = [
        lifecycle.set_delivery_status("delivered")(record, NOW),
        lifecycle.set_delivery_status("failed", last_notified_event_at=T + 9000)(record, NOW),
        lifecycle.set_notify_policy("silent")(record, NOW),
        lifecycle.set_cleanup_after(T + 99_000)(record, NOW),
        lifecycle.set_cleanup_after(None)(record, NOW),
        lifecycle.link_flow("flow-1")(record, NOW),
        lifecycle.merge_metadata({"a": 1})(record, NOW),
    ]
    for edited in edits:
        assert [getattr(edited, field) for field in FINAL] == [
            getattr(record, field) for field in FINAL
        ]
    assert sum(edited is not record for edited in edits) >= 6


@pytest.mark.parametrize("status", TaskStatus)
def test_repeating_an_edit_changes_nothing(status):
    record = in_status(status, parent_flow_id="flow-1", metadata={"a": 1})
    for edit in (
        lambda r: lifecycle.set_delivery_status("session_queued")(r, NOW),
        lambda r: lifecycle.set_delivery_status("delivered")(r, NOW),
        lambda r: lifecycle.set_notify_policy(NotifyPolicy.STATE_CHANGES)(r, NOW),
        lambda r: lifecycle.set_cleanup_after(T + 99_000)(r, NOW),
        lambda r: lifecycle.link_flow("flow-2")(r, NOW),
        lambda r: lifecycle.merge_metadata({"a": 2})(r, NOW),
    ):
        once = edit(record)
        assert once is not record
        assert edit(once) is once
    assert lifecycle.merge_metadata({})(record, NOW) is record
    assert lifecycle.merge_metadata({"a": 1})(record, NOW) is record
    assert lifecycle.link_flow("flow-1")(record, NOW) is record


@pytest.mark.parametrize(
    ("end", "start"), list(itertools.product(sorted(TERMINAL_STATUSES), sorted(ACTIVE_STATUSES)))
)
def test_an_end_stores_its_facts(end, start):
    record = lifecycle.finish(end, error="why", summary="  10 \n mails  ", outcome="blocked")(
        in_status(start), NOW
    )
    assert (record.status, record.error, record.terminal_summary) == (end, "why", "10 mails")
    assert record.terminal_outcome is TerminalOutcome.BLOCKED
    assert (record.ended_at, record.last_event_at) == (NOW, NOW)
    assert record.cleanup_after == NOW + RETENTION_MS


@pytest.mark.parametrize("end", sorted(TERMINAL_STATUSES))
def test_the_same_end_with_other_facts_is_refused(end):
    record = lifecycle.finish(end, error="why", summary="s")(in_status(S.RUNNING), NOW)
    assert lifecycle.finish(end, error="why")(record, NOW + 9) is record
    assert lifecycle.finish(end, summary="s", ended_at=NOW)(record, NOW + 9) is record
    for facts in (
        {"error": "other"},
        {"summary": "t"},
        {"outcome": "blocked"},
        {"ended_at": T + 4000},
    ):
        with pytest.raises(InvalidTransition):
            lifecycle.finish(end, **facts)(record, NOW)


@pytest.mark.parametrize("end", ["failed", "timed_out", "cancelled"])
def test_a_correction_of_success(end):
    record = lifecycle.finish("succeeded", outcome="succeeded")(in_status(S.RUNNING), T + 4000)
    corrected = lifecycle.finish(end, error="it did not")(record, NOW)
    assert (corrected.status, corrected.error) == (end, "it did not")
    assert corrected.terminal_outcome is None
    assert corrected.ended_at == T + 4000
    with pytest.raises(InvalidTransition):
        lifecycle.finish("succeeded")(corrected, NOW)


def test_a_cancel_is_not_overwritten_by_a_late_success():
    record = lifecycle.cancel("enough")(in_status(S.RUNNING), NOW)
    assert record.error == "enough"
    for verb in ("finish_succeeded", "start", "progress", "lose", "recover"):
        with pytest.raises(InvalidTransition):
            VERBS[verb](record)


def test_recovery_makes_a_task_active():
    lost = lifecycle.lose(error="no heartbeat")(in_status(S.RUNNING), T + 4000)
    assert (lost.error, lost.ended_at, lost.cleanup_after) == (
        "no heartbeat",
        T + 4000,
        T + 4000 + RETENTION_MS,
    )
    active = lifecycle.recover()(lost, NOW)
    assert (active.status, active.error, active.ended_at) == (S.RUNNING, None, None)
    assert (active.cleanup_after, active.started_at) == (None, T + 2000)
    ended = lifecycle.recover("failed", error="it had", ended_at=T + 3500)(lost, NOW)
    assert (ended.status, ended.error, ended.ended_at) == (S.FAILED, "it had", T + 3500)
    assert ended.cleanup_after == T + 3500 + RETENTION_MS


def test_recovery_keeps_an_explicit_retention():
    lost = lifecycle.lose()(in_status(S.RUNNING, cleanup_after=T + 77_000), T + 4000)
    assert lost.cleanup_after == T + 77_000
    assert lifecycle.recover()(lost, NOW).cleanup_after == T + 77_000


def test_recovery_as_running_gives_a_start():
    lost = lifecycle.lose()(in_status(S.QUEUED, started_at=None), T + 4000)
    assert lifecycle.recover()(lost, NOW).started_at == NOW
    assert lifecycle.recover("queued")(lost, NOW).started_at is None


def test_recovery_refuses_invalid_arguments():
    lost = in_status(S.LOST)
    with pytest.raises(ValidationError):
        lifecycle.recover("lost")(lost, NOW)
    with pytest.raises(ValidationError):
        lifecycle.recover("running", error="x")(lost, NOW)


@pytest.mark.parametrize("status", sorted(ACTIVE_STATUSES))
def test_finish_needs_an_end(status):
    with pytest.raises(ValidationError):
        lifecycle.finish(status)(in_status(S.RUNNING), NOW)


def test_times_do_not_go_before_creation():
    record = in_status(S.QUEUED, created_at=T + 10, started_at=None, last_event_at=T + 10)
    assert lifecycle.start()(record, 5).started_at == T + 10
    assert lifecycle.start(started_at=T + 6)(record, 5).started_at == T + 10
    assert lifecycle.finish("failed", ended_at=T + 7)(record, 5).ended_at == T + 10
    assert lifecycle.finish("failed")(record, 5).ended_at == T + 10
    assert lifecycle.set_cleanup_after(T + 1)(record, NOW).cleanup_after == T + 10
    assert (
        lifecycle.set_delivery_status("failed", last_notified_event_at=T + 3)(
            record, NOW
        ).last_notified_event_at
        == T + 10
    )


def test_the_last_event_does_not_go_back():
    record = lifecycle.progress("x")(in_status(S.RUNNING, last_event_at=T + 9000), NOW)
    assert record.last_event_at == T + 9000


def test_progress_folds_white_space():
    record = lifecycle.progress("  3\n of\t10 ")(in_status(S.RUNNING), NOW)
    assert record.progress_summary == "3 of 10"
    assert lifecycle.progress("3 of   10")(record, NOW + 1) is record
    with pytest.raises(ValidationError):
        lifecycle.progress(5)(record, NOW)
    with pytest.raises(ValidationError):
        lifecycle.progress(None)(record, NOW)


def test_delivered_notes_the_event():
    record = in_status(S.SUCCEEDED)
    assert (
        lifecycle.set_delivery_status("delivered")(record, NOW).last_notified_event_at
        == record.last_event_at
    )
    assert lifecycle.set_delivery_status("failed")(record, NOW).last_notified_event_at is None


@pytest.mark.parametrize("status", TaskStatus)
@pytest.mark.parametrize("addressee", ["owner_key", "requester_session_key"])
def test_a_silent_task_has_no_pending_delivery(status, addressee):
    record = in_status(status, **{addressee: "o"}, delivery_status=DeliveryStatus.PENDING)
    silent = lifecycle.set_notify_policy("silent")(record, NOW)
    assert (silent.notify_policy, silent.delivery_status) == ("silent", "not_applicable")
    assert silent.revision == record.revision + 1
    assert lifecycle.set_notify_policy("silent")(silent, NOW) is silent
    for policy in ("done_only", "state_changes"):
        loud = lifecycle.set_notify_policy(policy)(silent, NOW)
        assert (loud.notify_policy, loud.delivery_status) == (policy, "pending")
        assert lifecycle.set_notify_policy(policy)(loud, NOW) is loud
    if not record.is_terminal:
        assert lifecycle.finish("failed")(silent, NOW).delivery_status == "not_applicable"


def test_the_policy_of_a_task_without_an_addressee_changes_no_delivery():
    record = in_status(S.RUNNING)
    for policy in ("silent", "done_only", "state_changes"):
        record = lifecycle.set_notify_policy(policy)(record, NOW)
        assert (record.notify_policy, record.delivery_status) == (policy, "not_applicable")


@pytest.mark.parametrize("delivery", DeliveryStatus)
def test_a_policy_changes_only_a_delivery_that_has_not_begun(delivery):
    loud = in_status(S.RUNNING, owner_key="o", delivery_status=delivery)
    silent = lifecycle.set_notify_policy("silent")(loud, NOW)
    expected = "not_applicable" if delivery is DeliveryStatus.PENDING else delivery
    assert silent.delivery_status == expected
    # Another policy that tells somebody is no reason for a delivery.
    assert lifecycle.set_notify_policy("state_changes")(loud, NOW).delivery_status == delivery


def test_a_stored_silent_task_with_a_pending_delivery_is_read_as_it_is():
    stored = in_status(
        S.RUNNING,
        owner_key="o",
        notify_policy=NotifyPolicy.SILENT,
        delivery_status=DeliveryStatus.PENDING,
    )
    assert lifecycle.set_notify_policy("silent")(stored, NOW) is stored
    for verb in ("progress", "finish_failed", "cancel"):
        assert VERBS[verb](stored).delivery_status is DeliveryStatus.PENDING
    assert lifecycle.set_notify_policy("done_only")(stored, NOW).delivery_status == "pending"


def test_metadata_merges_at_the_top():
    record = in_status(S.RUNNING, metadata={"a": {"x": 1}, "b": 2})
    assert lifecycle.merge_metadata({"a": {"y": 1}, "c": None})(record, NOW).metadata == {
        "a": {"y": 1},
        "b": 2,
        "c": None,
    }
    for wrong in (None, [("a", 1)], "a"):
        with pytest.raises(ValidationError):
            lifecycle.merge_metadata(wrong)(record, NOW)
