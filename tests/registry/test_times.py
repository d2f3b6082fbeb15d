"""Times in seconds are refused in every verb, and no clock changes the order of times."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from taskstore import Put, TaskQuery, TaskRegistry, ValidationError
from taskstore.aio import AsyncTaskRegistry
from taskstore.model.records import MAX_INT, MIN_UNIX_MS, OPTIONAL_TIMES
from taskstore.registry.verbs import RunScope, Verbs
from taskstore.testing import make_record
from taskstore.testing.factories import EPOCH_MS


@pytest.fixture
def registry():
    """A registry in memory: no store gets a refused time."""
    with TaskRegistry.open("memory:") as opened:
        yield opened


GOOD = {"runtime": "cli", "task": "x"}
REQUIRED = {"finish": ("failed",), "recover": ("failed",), "set_delivery_status": ("delivered",)}


def times_of(owner):
    """Return the verb and the name of each parameter that is a time."""
    return [
        (verb, name)
        for verb, function in inspect.getmembers(owner, inspect.isfunction)
        if not verb.startswith("_")
        for name in inspect.signature(function).parameters
        if name == "created_at" or name in OPTIONAL_TIMES
    ]


CREATION = ["created_at", "started_at", "last_event_at", "cleanup_after"]
SECONDS = [1_796_000_000, 1_700_000_000, MIN_UNIX_MS - 1, 10**8]
TOO_SMALL = [*SECONDS, 10**8 - 1, 86_400, 1, 0, -1, -1_700_000_000]
NOT_INTEGERS = [1_700_000_000_000.0, float("nan"), True, False, "1700000000000", b"1"]


def test_every_verb_with_a_time_is_found():
    assert (
        set(times_of(Verbs))
        == set(times_of(RunScope))
        == {
            ("mark_running", "started_at"),
            ("finish", "ended_at"),
            ("recover", "ended_at"),
            ("set_delivery_status", "last_notified_event_at"),
            ("set_cleanup_after", "cleanup_after"),
        }
    )


def check_refused(field, value, call):
    with pytest.raises(ValidationError, match="milliseconds") as raised:
        call()
    assert raised.value.field == field
    if value in SECONDS:
        assert f"pass {value * 1000}" in str(raised.value)
    else:
        assert "seconds, pass" not in str(raised.value)


@pytest.mark.parametrize("value", [*TOO_SMALL, *NOT_INTEGERS], ids=repr)
def test_a_time_in_seconds_is_refused(registry, value):
    task = registry.create(**GOOD, run_id="r")
    for verb, name in times_of(Verbs):
        arguments, given = REQUIRED.get(verb, ()), {name: value}
        check_refused(name, value, lambda: getattr(registry, verb)("nobody", *arguments, **given))  # noqa: B023
        check_refused(
            name,
            value,
            lambda: getattr(registry, verb)(task.task_id, *arguments, **given),  # noqa: B023
        )
        check_refused(
            name,
            value,
            lambda: getattr(registry.run("r"), verb)(*arguments, **given),  # noqa: B023
        )
    for name in CREATION:
        check_refused(name, value, lambda: registry.create(**GOOD, **{name: value}))  # noqa: B023
        check_refused(
            name,
            value,
            lambda: registry.create(**GOOD, run_id="r", **{name: value}),  # noqa: B023
        )
    with registry.batch():
        check_refused(
            "cleanup_after", value, lambda: registry.set_cleanup_after(task.task_id, value)
        )
    assert registry.seq == 1
    assert registry.get(task.task_id) == task


@pytest.mark.parametrize("value", [1_700_000_000, 0, 1.7e12], ids=repr)
def test_the_asyncio_registry_refuses_the_same_times(value):
    async def main():
        async with AsyncTaskRegistry.open("memory:") as registry:
            task = await registry.create(**GOOD, run_id="r")
            for verb, name in times_of(Verbs):
                arguments, given = REQUIRED.get(verb, ()), {name: value}
                with pytest.raises(ValidationError, match="milliseconds"):
                    await getattr(registry, verb)(task.task_id, *arguments, **given)
                with pytest.raises(ValidationError, match="milliseconds"):
                    await getattr(registry.run("r"), verb)(*arguments, **given)
            for name in CREATION:
                with pytest.raises(ValidationError, match="milliseconds"):
                    await registry.create(**GOOD, **{name: value})
            assert registry.seq == 1

    asyncio.run(main())


def test_the_smallest_and_the_largest_time_are_accepted(registry):
    for value in (MIN_UNIX_MS, EPOCH_MS, MAX_INT):
        task = registry.create(**GOOD, created_at=value, cleanup_after=value)
        assert (task.created_at, task.cleanup_after) == (value, value)
        assert registry.set_cleanup_after(task.task_id, None).cleanup_after is None


@pytest.mark.parametrize("value", [v for v in TOO_SMALL if v != 0], ids=repr)
def test_a_query_since_a_time_in_seconds_is_refused(registry, value):
    check_refused("since", value, lambda: registry.list(since=value))
    check_refused("since", value, lambda: TaskQuery(since=value))


def test_a_query_since_0_matches_everything(registry):
    registry.store.apply([Put(make_record(task_id="old", created_at=5))])
    registry.refresh()
    task = registry.create(**GOOD)
    assert [record.task_id for record in registry.list(since=0)] == [task.task_id, "old"]


def test_as_of_a_time_in_seconds_says_what_to_pass(registry):
    registry.create(**GOOD)
    with pytest.raises(ValidationError, match=r"beyond the head, 1.*milliseconds: 1700000000000"):
        registry.as_of(1_700_000_000)
    with pytest.raises(ValidationError, match=r"beyond the head, 1$"):
        registry.as_of(2)


def test_stored_times_in_seconds_are_read_and_changed(open_ledger):
    registry = open_ledger()
    seconds = 1_700_000_000
    old = make_record(
        task_id="old",
        run_id="r",
        created_at=seconds,
        started_at=seconds + 1,
        last_event_at=0,
        cleanup_after=seconds + 86_400,
        status="running",
    )
    registry.store.apply([Put(old)])
    registry.refresh()
    assert registry.get("old").created_at == seconds
    for field in ("created_at", "started_at", "last_event_at", "cleanup_after"):
        assert [r.task_id for r in registry.list(**{field: getattr(old, field)})] == ["old"]
    registry.record_progress("old", "half")
    token = registry.take_lease("old")
    registry.renew_lease("old", fence=token)
    registry.release_lease("old", fence=token)
    lost = registry.mark_lost("old")
    assert lost.ended_at >= EPOCH_MS
    registry.recover("old")
    registry.update_metadata("old", {"a": 1})
    done = registry.finish("old", "succeeded", ended_at=EPOCH_MS)
    assert (done.created_at, done.ended_at) == (seconds, EPOCH_MS)
    assert done.cleanup_after == seconds + 86_400
    registry.set_delivery_status("old", "delivered")
    registry.set_notify_policy("old", "state_changes")
    repaired = registry.set_cleanup_after("old", (seconds + 86_400) * 1000)
    assert repaired.cleanup_after == (seconds + 86_400) * 1000
    registry.close()
    reopened = open_ledger()
    assert reopened.get("old") == repaired
    assert reopened.history("old")[0].record == Put(old).record


HOUR_MS = 3_600_000


def check_order(record):
    times = (record.created_at, record.started_at, record.ended_at, record.last_event_at)
    known = [at for at in times if at is not None]
    assert known == sorted(known)


def test_a_clock_that_goes_back_by_an_hour_at_each_call(open_ledger):
    now = EPOCH_MS

    def clock():
        nonlocal now
        now -= HOUR_MS
        return now

    registry = open_ledger(clock=clock)
    for end in ("finish", "cancel", "mark_lost", "recover"):
        task = registry.create(**GOOD, run_id=end)
        check_order(registry.mark_running(task.task_id))
        registry.record_progress(task.task_id, "half")
        registry.take_lease(task.task_id)
        if end == "recover":
            check_order(registry.mark_lost(task.task_id))
            check_order(registry.recover(task.task_id))
            check_order(registry.mark_lost(task.task_id))
        arguments = ("succeeded",) if end in ("finish", "recover") else ()
        ended = getattr(registry, end)(task.task_id, *arguments)
        check_order(ended)
        assert ended.ended_at == ended.started_at == task.created_at
        registry.set_delivery_status(task.task_id, "delivered")
        check_order(registry.get(task.task_id))
    registry.close()
    for record in open_ledger().list():
        check_order(record)


def test_an_imported_task_of_the_future_ends_after_its_start(open_ledger):
    registry = open_ledger(clock=lambda: EPOCH_MS)
    later = EPOCH_MS + HOUR_MS
    task = registry.create(**GOOD, created_at=later, status="running", started_at=later + 5)
    check_order(task)
    done = registry.finish(task.task_id, "failed", ended_at=EPOCH_MS)
    check_order(done)
    assert (done.started_at, done.ended_at, done.last_event_at) == (later + 5,) * 3
    # A repeat of the same call, as from an event stream, writes nothing.
    assert registry.finish(task.task_id, "failed", ended_at=EPOCH_MS) == done


def test_an_end_before_the_start_is_raised_to_the_start(registry):
    registry.store.clock = lambda: EPOCH_MS + HOUR_MS
    task = registry.create(**GOOD, created_at=EPOCH_MS, run_id="r")
    registry.mark_running(task.task_id, started_at=EPOCH_MS + 500)
    (done,) = registry.run("r").finish("succeeded", ended_at=EPOCH_MS + 400)
    assert (done.started_at, done.ended_at) == (EPOCH_MS + 500, EPOCH_MS + 500)
    corrected = registry.finish(task.task_id, "failed", ended_at=EPOCH_MS + 300)
    assert corrected.ended_at == EPOCH_MS + 500
