"""Every mutation of a valid record gives a valid record, for any arguments.

The registry relies on this property: it stores the result without a check.
"""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple

from taskstore.errors import ConflictError, InvalidTransition, ValidationError
from taskstore.model import leases, lifecycle
from taskstore.model.records import (
    ERROR_BYTES,
    MAX_INT,
    MIN_UNIX_MS,
    OPTIONAL_KEYS,
    SUMMARY_BYTES,
    DeliveryContext,
    DeliveryStatus,
    NotifyPolicy,
    ScopeKind,
    TaskRecord,
    TaskStatus,
    TerminalOutcome,
)
from taskstore.model.validation import validated
from taskstore.testing.factories import EPOCH_MS, make_record
from taskstore.testing.strategies import keys, metadata, records, texts, times

T = EPOCH_MS


class Text(str):
    """A subclass of text that encoders and drivers do not support."""

    __slots__ = ()


class Number(int):
    """A subclass of an integer."""


ENUMS = (TaskStatus, DeliveryStatus, NotifyPolicy, TerminalOutcome)
MEMBERS = [member for kind in ENUMS for member in kind]

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2) | st.integers(MAX_INT - 2, MAX_INT + 2) | st.integers(),
    st.integers(MIN_UNIX_MS - 1, MAX_INT),
    st.builds(Number, st.integers(0, 10)),
    st.floats(),
    st.text(st.characters()),
    st.builds(Text, st.text(max_size=5)),
    st.sampled_from([*MEMBERS, *map(str, MEMBERS), *(Text(member) for member in MEMBERS)]),
    st.sampled_from(["x" * SUMMARY_BYTES, "é" * SUMMARY_BYTES, "x" * (ERROR_BYTES + 1)]),
    st.sampled_from(["", " \n\t ", "a\0b", "\ud800", "k" * 255, "k" * 256]),
    st.binary(max_size=3),
    metadata(),
    st.dictionaries(st.text(max_size=3), st.floats() | st.binary(max_size=2), max_size=2),
    st.lists(st.integers(), max_size=2),
)
end_facts = {"error": anything, "summary": anything, "outcome": anything, "ended_at": anything}
durations = st.floats(leases.MIN_LEASE_S, leases.MAX_LEASE_S)
tokens = st.text(min_size=1, max_size=36).filter(lambda text: "\0" not in text)


def spellings(kind):
    return st.sampled_from([*kind, *map(str, kind), *map(Text, kind)])


VALID_FIELDS = {
    **dict.fromkeys(OPTIONAL_KEYS, keys(1) | st.builds(Text, keys(1))),
    **dict.fromkeys(
        ("created_at", "started_at", "last_event_at", "cleanup_after"),
        st.integers(MIN_UNIX_MS, MAX_INT),
    ),
    "scope_kind": spellings(ScopeKind),
    "delivery_status": spellings(DeliveryStatus),
    "notify_policy": spellings(NotifyPolicy),
    "requester_origin": st.builds(DeliveryContext, to=st.none() | texts(9) | st.builds(Text)),
    "progress_summary": texts(9),
    "metadata": metadata(),
}
del VALID_FIELDS["run_digest"], VALID_FIELDS["lease_token"]
REQUIRED = {"task_id": anything, "runtime": anything, "task": anything, "status": anything}
OTHER_FIELDS = sorted({*TaskRecord.__struct_fields__, "metadata", "colour"} - set(REQUIRED))

REAL_TIMES = st.integers(MIN_UNIX_MS, MAX_INT) | st.integers(T, T + 10)
CLOCKS = REAL_TIMES | times() | st.integers(0, 3)
"""The clock can go back by any time, even to 1970."""

VERBS = {
    "start": (lifecycle.start, [], {"started_at": anything}),
    "progress": (lifecycle.progress, [anything], {}),
    "finish": (lifecycle.finish, [anything], end_facts),
    "lose": (lifecycle.lose, [], {"error": anything}),
    "cancel": (lifecycle.cancel, [], {"reason": anything}),
    "recover": (lifecycle.recover, [anything], end_facts),
    "set_delivery_status": (
        lifecycle.set_delivery_status,
        [anything],
        {"last_notified_event_at": anything},
    ),
    "set_notify_policy": (lifecycle.set_notify_policy, [anything], {}),
    "set_cleanup_after": (lifecycle.set_cleanup_after, [anything], {}),
    "link_flow": (lifecycle.link_flow, [anything], {}),
    "merge_metadata": (lifecycle.merge_metadata, [anything | metadata()], {}),
    "take": (leases.take, [tokens, durations | anything], {"fence": anything}),
    "renew": (leases.renew, [durations | anything], {}),
    "release": (leases.release, [], {}),
}


@pytest.mark.parametrize("verb", VERBS)
@settings(max_examples=30)
@given(data=st.data())
def test_a_changed_record_is_valid(verb, data):
    function, positional, keyword = VERBS[verb]
    arguments = [data.draw(strategy) for strategy in positional]
    options = data.draw(st.fixed_dictionaries({}, optional=keyword))
    try:
        mutation = function(*arguments, **options)
    except ValidationError:
        return  # for any record
    check_mutation(lambda record: mutation(record, data.draw(times())), data)


@settings(max_examples=30)
@given(data=st.data())
def test_the_record_after_a_repeated_create_is_valid(data):
    asked = data.draw(records())
    check_mutation(lambda record: lifecycle.fill_missing(record, asked), data)


def check_mutation(mutation, data):
    before = data.draw(st.integers(1, MAX_INT - 1).flatmap(lambda n: records(revision=n)))
    after = before
    with suppress(ValidationError, InvalidTransition, ConflictError):
        after = mutation(before)
    assert isinstance(after, TaskRecord)
    if after is before:
        return
    # The record is valid, and no field needs a conversion.
    assert validated(after) is after
    assert list(map(type, astuple(validated(after)))) == list(map(type, astuple(after)))
    assert after.revision == before.revision + 1
    assert (after.task_id, after.created_at) == (before.task_id, before.created_at)


@settings(max_examples=300)
@given(data=st.data())
def test_a_new_record_is_valid(data):
    required = {"task_id": "t", "runtime": "cli", "task": "do it", "status": "queued"}
    fields = data.draw(st.fixed_dictionaries({}, optional=VALID_FIELDS))
    invalid_field = data.draw(st.sampled_from([None, *REQUIRED, *OTHER_FIELDS]))
    if invalid_field is not None:
        (required if invalid_field in REQUIRED else fields)[invalid_field] = data.draw(anything)
    refused = None
    try:
        record = lifecycle.new_record(now=data.draw(times()), fields=fields, **required)
    except ValidationError as error:
        refused = error.field
    if refused is not None:
        assert invalid_field is not None or refused == "owner_key"  # required for a session
        return
    assert validated(record) is record
    assert list(map(type, astuple(validated(record)))) == list(map(type, astuple(record)))
    assert record.revision == 1


# -- order of times ------------------------------------------------------------

maybe_time = st.none() | REAL_TIMES
ends = st.sampled_from([status for status in TaskStatus if status.is_terminal])
MUTATIONS = st.one_of(
    st.builds(lifecycle.start, started_at=maybe_time),
    st.builds(lifecycle.progress, texts(5)),
    st.builds(lifecycle.finish, ends, ended_at=maybe_time),
    st.builds(lifecycle.lose),
    st.builds(lifecycle.cancel),
    st.builds(
        lifecycle.recover, ends.filter(lambda end: end != TaskStatus.LOST), ended_at=maybe_time
    ),
    st.builds(lifecycle.recover, st.sampled_from(["queued", "running"])),
    st.builds(
        lifecycle.set_delivery_status,
        st.sampled_from(DeliveryStatus),
        last_notified_event_at=maybe_time,
    ),
    st.builds(lifecycle.set_cleanup_after, maybe_time),
    st.builds(leases.take, tokens, durations),
)


def check_order(record):
    """Times that are set are in the order of the events."""
    started_at = record.created_at if record.started_at is None else record.started_at
    ended_at = started_at if record.ended_at is None else record.ended_at
    assert record.created_at <= started_at <= ended_at <= record.last_event_at
    for name in ("cleanup_after", "last_notified_event_at"):
        at = getattr(record, name)
        assert at is None or record.created_at <= at


@settings(max_examples=300)
@given(
    CLOCKS,
    st.sampled_from(["queued", "running"]),
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("created_at", "started_at", "last_event_at", "cleanup_after"), REAL_TIMES
        ),
    ),
    st.lists(st.tuples(MUTATIONS, CLOCKS), max_size=8),
)
def test_no_clock_and_no_caller_changes_the_order_of_the_times(now, status, fields, steps):
    record = lifecycle.new_record(
        now=now, task_id="t", runtime="cli", task="x", status=status, fields=fields
    )
    check_order(record)
    for mutation, clock in steps:
        before = record
        with suppress(InvalidTransition, ConflictError):
            record = mutation(record, clock)
        check_order(record)
        assert record.last_event_at >= before.last_event_at
        assert record.is_terminal == (record.ended_at is not None)


@given(records(), ends, maybe_time, CLOCKS)
def test_an_end_is_not_before_the_start_whatever_was_stored(record, end, ended_at, now):
    with suppress(InvalidTransition):
        after = lifecycle.finish(end, ended_at=ended_at)(record, now)
        if after is not record:
            assert after.ended_at >= max(after.created_at, after.started_at or 0)
            assert after.last_event_at >= after.ended_at
            # The same call again changes nothing, whatever the clock shows.
            assert lifecycle.finish(end, ended_at=ended_at)(after, 0) is after


def test_the_end_of_a_stored_record_can_be_repeated_as_it_is():
    stored = make_record(status=TaskStatus.FAILED, created_at=T, started_at=T + 9, ended_at=T + 5)
    assert lifecycle.finish("failed", ended_at=T + 5)(stored, T) is stored
    with pytest.raises(InvalidTransition):
        lifecycle.finish("failed", ended_at=T + 9)(stored, T)
