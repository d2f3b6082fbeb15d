"""Leases and fences on every backend: a worker that lost its lease cannot change the task."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from taskstore import ConflictError, InvalidTransition, RunScope, TaskNotFound, ValidationError
from taskstore.aio import AsyncTaskRegistry
from taskstore.registry.verbs import Verbs

FENCED = {
    "mark_running": (),
    "record_progress": ("half done",),
    "finish": ("succeeded",),
    "mark_lost": (),
    "cancel": (),
    "set_delivery_status": ("delivered",),
    "set_notify_policy": ("silent",),
    "set_cleanup_after": (None,),
    "link_flow": ("flow-2",),
    "update_metadata": ({"a": 1},),
    "delete": (),
    "take_lease": (),
    "renew_lease": (),
    "release_lease": (),
}


@pytest.fixture
def task(registry):
    return registry.create(runtime="cli", task="x", run_id="r", cleanup_after=2**50)


def test_every_verb_that_changes_a_task_takes_a_fence():
    verbs = {name for name in dir(Verbs) if not name.startswith("_")} - {"create"}
    assert verbs == {*FENCED, "recover"}
    for name in verbs:
        assert "fence" in inspect.signature(getattr(Verbs, name)).parameters
        assert "fence" in inspect.signature(getattr(AsyncTaskRegistry, name)).parameters
    for name in vars(RunScope):
        if not name.startswith("_"):
            assert "fence" in inspect.signature(getattr(RunScope, name)).parameters


@pytest.mark.parametrize("verb", FENCED)
def test_another_fence_is_a_conflict(registry, task, verb):
    before = registry.seq
    with pytest.raises(ConflictError, match="no lease"):
        getattr(registry, verb)(task.task_id, *FENCED[verb], fence="somebody's")
    registry.take_lease(task.task_id, 60)
    with pytest.raises(ConflictError, match="another token") as raised:
        getattr(registry, verb)(task.task_id, *FENCED[verb], fence="somebody's")
    [conflict] = raised.value.conflicts
    assert conflict.task_id == task.task_id
    assert conflict.leased.fence == "somebody's"
    assert registry.seq == before + 1


@pytest.mark.parametrize("verb", FENCED)
def test_the_fence_of_the_lease_is_accepted(registry, task, verb):
    token = registry.take_lease(task.task_id, 60)
    assert registry.get(task.task_id).lease_token == token
    getattr(registry, verb)(task.task_id, *FENCED[verb], fence=token)


def test_a_fence_is_checked_after_the_end_too(registry, task):
    token = registry.take_lease(task.task_id)
    done = registry.finish(task.task_id, "succeeded", fence=token)
    assert registry.finish(task.task_id, "succeeded", fence=token) == done
    registry.set_delivery_status(task.task_id, "delivered", fence=token)
    with pytest.raises(InvalidTransition):
        registry.renew_lease(task.task_id, fence=token)
    with pytest.raises(InvalidTransition):
        registry.take_lease(task.task_id)


def test_one_lease_at_a_time(open_ledger, ticker):
    ticker.step = 0
    one, two = open_ledger(clock=ticker), open_ledger(clock=ticker)
    task = one.create(runtime="cli", task="x")
    first = one.take_lease(task.task_id, 10)
    with pytest.raises(ConflictError, match="until") as raised:
        two.take_lease(task.task_id, 10)
    assert raised.value.conflicts[0].leased.until == ticker.now + 10_000
    ticker.now += 10_000
    second = two.take_lease(task.task_id, 10)
    assert second != first
    # The first is late by far, and its memory does not know of the second.
    with pytest.raises(ConflictError):
        one.finish(task.task_id, "succeeded", fence=first)
    with pytest.raises(ConflictError):
        one.renew_lease(task.task_id, fence=first)
    assert two.finish(task.task_id, "failed", fence=second).status == "failed"


def test_an_expired_lease_is_valid_until_the_next_is_taken(open_ledger, ticker):
    registry = open_ledger(clock=ticker)
    task = registry.create(runtime="cli", task="x")
    token = registry.take_lease(task.task_id, 0.001)
    ticker.now += 60_000
    assert registry.record_progress(task.task_id, "late but alone", fence=token)
    assert registry.renew_lease(task.task_id, fence=token) == token


def test_a_heartbeat_is_written_in_the_last_half_only(open_ledger, ticker):
    ticker.step = 0
    registry = open_ledger(clock=ticker)
    task = registry.create(runtime="cli", task="x")
    token = registry.take_lease(task.task_id, 10)
    seq, until = registry.seq, registry.get(task.task_id).lease_until
    for _ in range(49):
        ticker.now += 100
        assert registry.renew_lease(task.task_id, 10, fence=token) == token
    assert registry.seq == seq
    assert registry.get(task.task_id).lease_until == until
    ticker.now += 100
    registry.renew_lease(task.task_id, 10, fence=token)
    assert registry.seq == seq + 1
    assert registry.get(task.task_id).lease_until == ticker.now + 10_000
    assert registry.get(task.task_id).last_event_at == task.last_event_at


def test_a_lease_is_released_and_handed_over(registry, task):
    first = registry.take_lease(task.task_id, 60)
    second = registry.take_lease(task.task_id, 60, fence=first)
    with pytest.raises(ConflictError):
        registry.record_progress(task.task_id, "no", fence=first)
    given = registry.release_lease(task.task_id, fence=second)
    assert (given.lease_token, given.lease_until) == (None, None)
    assert registry.take_lease(task.task_id) not in (first, second)


def test_a_fence_is_checked_on_the_fresh_record(open_ledger):
    one, two = open_ledger(), open_ledger()
    task = one.create(runtime="cli", task="x")
    token = one.take_lease(task.task_id, 60)
    two.refresh()
    # Another change under the same lease: the fence still holds on the fresh record.
    two.record_progress(task.task_id, "by a helper")
    assert one.record_progress(task.task_id, "by the holder", fence=token).revision == 4
    # Another lease: it does not, though the change itself would fit.
    two.take_lease(task.task_id, 60, fence=token)
    with pytest.raises(ConflictError):
        one.record_progress(task.task_id, "by the holder of old", fence=token)
    assert one.get(task.task_id).progress_summary == "by the holder"


def test_a_run_is_fenced_as_a_whole(registry, task):
    other = registry.create(runtime="cli", task="y", run_id="r")
    token = registry.take_lease(task.task_id)
    seq = registry.seq
    with pytest.raises(ConflictError):
        registry.run("r").record_progress("both", fence=token)
    with pytest.raises(ConflictError):
        registry.run("r").delete(fence=token)
    assert registry.seq == seq
    registry.finish(other.task_id, "succeeded")
    assert [r.task_id for r in registry.run("r").cancel(fence=token)] == [task.task_id]


def test_a_batch_returns_the_stored_token(registry):
    with registry.batch():
        task = registry.create(runtime="cli", task="x", status="running")
        token = registry.take_lease(task.task_id)
        registry.record_progress(task.task_id, "begun", fence=token)
    assert registry.get(task.task_id).lease_token == token


@pytest.mark.parametrize("lease_s", [0, -1, True, "60", None, float("nan"), float("inf"), 10**9])
def test_an_invalid_lease_length_is_refused(registry, task, lease_s):
    with pytest.raises(ValidationError, match="lease_s"):
        registry.take_lease(task.task_id, lease_s)
    with pytest.raises(ValidationError, match="lease_s"):
        registry.renew_lease(task.task_id, lease_s, fence="t")


@pytest.mark.parametrize("fence", ["", 5, "a\0b", "x" * 256, b"t"])
def test_an_invalid_fence_is_refused(registry, task, fence):
    with pytest.raises(ValidationError, match="fence"):
        registry.cancel(task.task_id, fence=fence)
    with pytest.raises(ValidationError, match="fence"):
        registry.run("nobody's").cancel(fence=fence)


def test_leases_of_unknown_tasks_and_by_hand(registry):
    with pytest.raises(TaskNotFound):
        registry.take_lease("nobody")
    with pytest.raises(ValidationError, match="lease_token"):
        registry.create(runtime="cli", task="x", lease_token="mine")
    with pytest.raises(ValidationError, match="lease_until"):
        registry.create(runtime="cli", task="x", lease_until=5)


def test_tasks_are_found_by_their_lease(registry, task):
    token = registry.take_lease(task.task_id)
    registry.create(runtime="cli", task="free")
    assert [r.task_id for r in registry.list(lease_token=token)] == [task.task_id]
    assert len(registry.list(lease_token=None)) == 1


def test_leases_in_asyncio(ledger_url):
    async def main():
        async with await AsyncTaskRegistry.open(ledger_url) as registry:
            task = await registry.create(runtime="cli", task="x")
            token = await registry.take_lease(task.task_id, 60)
            assert await registry.renew_lease(task.task_id, fence=token) == token
            assert registry.get(task.task_id).lease_token == token
            with pytest.raises(ConflictError):
                await registry.cancel(task.task_id, fence="another")
            given = await registry.release_lease(task.task_id, fence=token)
            assert given.lease_token is None

    asyncio.run(main())


def test_renew_and_release_need_the_token(registry, task):
    mine = registry.take_lease(task.task_id, 60)
    for verb in (registry.renew_lease, registry.release_lease):
        with pytest.raises(ValidationError, match="fence"):
            verb(task.task_id, fence=None)
    assert registry.get(task.task_id).lease_token == mine
