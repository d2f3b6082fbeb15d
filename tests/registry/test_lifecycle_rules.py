"""[6] The end is final, on every backend, and a repeat writes nothing."""

from __future__ import annotations

import itertools

import pytest

from taskstore import InvalidTransition, TaskNotFound, TaskStatus, ValidationError
from taskstore.testing.factories import EPOCH_MS

ENDED = ["succeeded", "failed", "timed_out", "cancelled", "lost"]
CORRECTIONS = {("succeeded", "failed"), ("succeeded", "timed_out"), ("succeeded", "cancelled")}


def ended(registry, status):
    task = registry.create(runtime="cli", task="x", status="running")
    return registry.finish(task.task_id, status, error="because" if status == "failed" else None)


def test_only_success_can_be_corrected(registry):
    for before, after in itertools.product(ENDED, ENDED):
        task, seq = ended(registry, before), registry.seq
        if before == after:
            assert registry.finish(task.task_id, after) == task
            continue
        if (before, after) in CORRECTIONS:
            corrected = registry.finish(task.task_id, after, error="it was not so")
            assert (corrected.status, corrected.error) == (after, "it was not so")
            assert corrected.ended_at == task.ended_at
            continue
        with pytest.raises(InvalidTransition) as raised:
            registry.finish(task.task_id, after)
        assert (raised.value.task_id, raised.value.status) == (task.task_id, before)
        assert registry.get(task.task_id) == task
        assert registry.seq == seq


@pytest.mark.parametrize("status", ENDED)
def test_an_ended_task_cannot_start_progress_or_be_lost(registry, status):
    task = ended(registry, status)
    with pytest.raises(InvalidTransition):
        registry.mark_running(task.task_id)
    with pytest.raises(InvalidTransition):
        registry.record_progress(task.task_id, "more")
    if status == "lost":
        assert registry.mark_lost(task.task_id) == task
    else:
        with pytest.raises(InvalidTransition):
            registry.mark_lost(task.task_id)
    if status == "cancelled":
        assert registry.cancel(task.task_id, "again") == task
    else:
        with pytest.raises(InvalidTransition):
            registry.cancel(task.task_id)
    assert registry.get(task.task_id) == task


@pytest.mark.parametrize("status", ENDED)
def test_everything_but_the_end_stays_editable(registry, status):
    task = ended(registry, status)
    registry.set_delivery_status(task.task_id, "delivered")
    registry.set_notify_policy(task.task_id, "silent")
    registry.set_cleanup_after(task.task_id, None)
    registry.link_flow(task.task_id, "flow-1")
    edited = registry.update_metadata(task.task_id, {"seen": True})
    assert edited.revision == task.revision + 5
    assert edited.metadata == {"seen": True}
    assert edited.last_notified_event_at == task.last_event_at
    for field in ("status", "started_at", "ended_at", "error", "terminal_outcome"):
        assert getattr(edited, field) == getattr(task, field)


def test_a_repeat_writes_nothing(registry):
    task = registry.create(runtime="cli", task="x")
    registry.mark_running(task.task_id)
    registry.record_progress(task.task_id, "half")
    registry.set_delivery_status(task.task_id, "pending")
    registry.set_notify_policy(task.task_id, "silent")
    registry.set_cleanup_after(task.task_id, task.created_at)
    registry.link_flow(task.task_id, "flow")
    registry.update_metadata(task.task_id, {"a": 1})
    done = registry.finish(task.task_id, "succeeded", summary="all", outcome="blocked")
    seq = registry.seq
    assert registry.set_delivery_status(task.task_id, "pending") == done
    assert registry.set_notify_policy(task.task_id, "silent") == done
    assert registry.set_cleanup_after(task.task_id, task.created_at) == done
    assert registry.link_flow(task.task_id, "flow") == done
    assert registry.update_metadata(task.task_id, {"a": 1}) == done
    assert registry.finish(task.task_id, "succeeded", summary="all") == done
    assert registry.seq == seq


def test_a_lost_task_is_corrected_by_recover_alone(registry):
    task = ended(registry, "lost")
    alive = registry.recover(task.task_id)
    assert (alive.status, alive.ended_at, alive.error) == ("running", None, None)
    assert alive.cleanup_after is None
    lost = registry.mark_lost(task.task_id, error="no sign of life")
    found = registry.recover(lost.task_id, "succeeded", summary="it had ended well")
    assert (found.status, found.error) == ("succeeded", None)
    with pytest.raises(InvalidTransition):
        registry.recover(task.task_id, "failed")


def test_only_a_delivery_to_somebody_is_pending(open_ledger):
    registry = open_ledger()
    loud = registry.create(runtime="cli", task="x", owner_key="o", run_id="loud")
    silent = registry.create(runtime="cli", task="x", owner_key="o", notify_policy="silent")
    nobody = registry.create(runtime="cli", task="x")
    registry.finish(silent.task_id, "succeeded")
    assert [r.task_id for r in registry.list(delivery_status="pending")] == [loud.task_id]
    (silenced,) = registry.run("loud").set_notify_policy("silent")
    assert silenced.delivery_status == "not_applicable"
    registry.set_notify_policy(silent.task_id, "state_changes")
    registry.set_notify_policy(nobody.task_id, "state_changes")
    registry.close()
    pending = open_ledger().list(delivery_status="pending")
    assert [record.task_id for record in pending] == [silent.task_id]


def test_times_before_creation_are_raised_to_it(registry):
    task = registry.create(runtime="cli", task="x", created_at=EPOCH_MS + 5_000)
    task = registry.mark_running(task.task_id, started_at=EPOCH_MS + 1_000)
    task = registry.finish(task.task_id, "succeeded", ended_at=EPOCH_MS + 2_000)
    task = registry.set_cleanup_after(task.task_id, EPOCH_MS + 1)
    assert (task.started_at, task.ended_at, task.cleanup_after) == (EPOCH_MS + 5_000,) * 3


DIRTY = {
    "NUL": "the parser stopped at '\0'",
    "broken UTF-8": b"caf\xe9".decode("utf-8", "surrogateescape"),
    "long": "Traceback\n" + "\U0001f389" * 20_000 + "\nValueError: \ud800",
}


@pytest.mark.parametrize("text", DIRTY.values(), ids=DIRTY)
def test_an_end_is_recorded_whatever_its_text_is(open_ledger, text):
    registry = open_ledger()
    ended = []
    for verb, arguments, texts in (
        ("finish", ("failed",), {"error": text, "summary": text}),
        ("cancel", (text,), {}),
        ("mark_lost", (), {"error": text}),
    ):
        task = registry.create(runtime="cli", task="x", status="running", run_id=verb)
        registry.record_progress(task.task_id, text)
        with registry.batch():
            getattr(registry.run(verb), verb)(*arguments, **texts)
        seq = registry.seq
        record = getattr(registry, verb)(task.task_id, *arguments, **texts)
        assert (record.is_terminal, registry.seq) == (True, seq)  # a repeat writes nothing
        ended.append(record)
    task_id = ended[-1].task_id
    ended[-1] = registry.recover(task_id, "timed_out", error=text, summary=text)
    assert registry.recover(task_id, "timed_out", error=text) == ended[-1]
    registry.close()
    reopened = open_ledger()
    for record in ended:
        found = reopened.get(record.task_id)
        assert found == record
        assert found.error[:8] == text[:8].replace("\0", "\ufffd").replace("\udce9", "\ufffd")
        assert found.error.endswith(text[-2].replace("\0", "\ufffd") + found.error[-1])
        assert "\ufffd" in found.error
        assert "\ufffd" in found.progress_summary


def test_an_unknown_task_is_not_found(registry):
    with pytest.raises(TaskNotFound):
        registry.get("nobody")
    for verb in ("mark_running", "mark_lost", "recover", "cancel"):
        with pytest.raises(TaskNotFound):
            getattr(registry, verb)("nobody")
    assert registry.delete("nobody") is False
    assert registry.find("nobody") is None


def test_a_task_does_not_end_in_an_active_status_nor_begin_in_an_ended_one(registry):
    task = registry.create(runtime="cli", task="x")
    for status in ("queued", "running", "done", None, 3):
        with pytest.raises(ValidationError, match="status"):
            registry.finish(task.task_id, status)
    for status in ENDED:
        with pytest.raises(ValidationError, match="status"):
            registry.create(runtime="cli", task="x", status=status)
    assert registry.seq == 1


def test_a_corrected_success_keeps_its_time_and_loses_its_outcome(open_ledger, ticker):
    registry = open_ledger(clock=ticker)
    task = registry.create(runtime="cli", task="x")
    done = registry.finish(task.task_id, "succeeded", outcome="succeeded", summary="fine")
    fixed = registry.finish(task.task_id, "failed", error="it was not")
    assert fixed.status is TaskStatus.FAILED
    assert fixed.terminal_outcome is None
    assert fixed.ended_at == done.ended_at
    assert fixed.last_event_at > done.last_event_at
