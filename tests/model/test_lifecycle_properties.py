"""What the lifecycle makes of a valid record is valid, whatever else it is given.

The registry relies on it: it stores what comes out without looking again.
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
from taskstore.testing.strategies import keys, metadata, records, texts, times


class Text(str):
    """Text that encoders and drivers do not know."""

    __slots__ = ()


class Number(int):
    """The same for an integer."""


ENUMS = (TaskStatus, DeliveryStatus, NotifyPolicy, TerminalOutcome)
MEMBERS = [member for kind in ENUMS for member in kind]

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2) | st.integers(MAX_INT - 2, MAX_INT + 2) | st.integers(),
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
ends = {"error": anything, "summary": anything, "outcome": anything, "ended_at": anything}
lengths = st.floats(leases.SHORTEST_S, leases.LONGEST_S)
tokens = st.text(min_size=1, max_size=36).filter(lambda text: "\0" not in text)


def spelt(kind):
    return st.sampled_from([*kind, *map(str, kind), *map(Text, kind)])


FACTS = {
    **dict.fromkeys(OPTIONAL_KEYS, keys(1) | st.builds(Text, keys(1))),
    **dict.fromkeys(("created_at", "started_at", "last_event_at", "cleanup_after"), times()),
    "scope_kind": spelt(ScopeKind),
    "delivery_status": spelt(DeliveryStatus),
    "notify_policy": spelt(NotifyPolicy),
    "requester_origin": st.builds(DeliveryContext, to=st.none() | texts(9) | st.builds(Text)),
    "progress_summary": texts(9),
    "metadata": metadata(),
}
del FACTS["run_digest"], FACTS["lease_token"]
BIRTH = {"task_id": anything, "runtime": anything, "task": anything, "status": anything}
STRANGE = sorted({*TaskRecord.__struct_fields__, "metadata", "colour"} - set(BIRTH))

VERBS = {
    "start": (lifecycle.start, [], {"started_at": anything}),
    "progress": (lifecycle.progress, [anything], {}),
    "finish": (lifecycle.finish, [anything], ends),
    "lose": (lifecycle.lose, [], {"error": anything}),
    "cancel": (lifecycle.cancel, [], {"reason": anything}),
    "recover": (lifecycle.recover, [anything], ends),
    "deliver": (lifecycle.deliver, [anything], {"last_notified_event_at": anything}),
    "notify": (lifecycle.notify, [anything], {}),
    "retain": (lifecycle.retain, [anything], {}),
    "link_flow": (lifecycle.link_flow, [anything], {}),
    "merge_metadata": (lifecycle.merge_metadata, [anything | metadata()], {}),
    "take": (leases.take, [tokens, lengths | anything], {"fence": anything}),
    "renew": (leases.renew, [lengths | anything], {}),
    "release": (leases.release, [], {}),
}


@pytest.mark.parametrize("verb", VERBS)
@settings(max_examples=30)
@given(data=st.data())
def test_what_comes_of_a_valid_record_is_valid(verb, data):
    function, positional, keyword = VERBS[verb]
    arguments = [data.draw(strategy) for strategy in positional]
    options = data.draw(st.fixed_dictionaries({}, optional=keyword))
    try:
        mutation = function(*arguments, **options)
    except ValidationError:
        return  # whatever the task is
    check_mutation(lambda record: mutation(record, data.draw(times())), data)


@settings(max_examples=30)
@given(data=st.data())
def test_what_a_repeated_create_leaves_is_valid(data):
    asked = data.draw(records())
    check_mutation(lambda record: lifecycle.attach(record, asked), data)


def check_mutation(mutation, data):
    before = data.draw(st.integers(1, MAX_INT - 1).flatmap(lambda n: records(revision=n)))
    after = before
    with suppress(ValidationError, InvalidTransition, ConflictError):
        after = mutation(before)
    assert isinstance(after, TaskRecord)
    if after is before:
        return
    # Nothing is to be found in it, nor to be put right.
    assert validated(after) is after
    assert list(map(type, astuple(validated(after)))) == list(map(type, astuple(after)))
    assert after.revision == before.revision + 1
    assert (after.task_id, after.created_at) == (before.task_id, before.created_at)


@settings(max_examples=300)
@given(data=st.data())
def test_what_is_born_is_valid(data):
    born = {"task_id": "t", "runtime": "cli", "task": "do it", "status": "queued"}
    fields = data.draw(st.fixed_dictionaries({}, optional=FACTS))
    strange = data.draw(st.sampled_from([None, *BIRTH, *STRANGE]))
    if strange is not None:
        (born if strange in BIRTH else fields)[strange] = data.draw(anything)
    refused = None
    try:
        record = lifecycle.new_record(now=data.draw(times()), fields=fields, **born)
    except ValidationError as error:
        refused = error.field
    if refused is not None:
        assert strange is not None or refused == "owner_key"  # which a session needs
        return
    assert validated(record) is record
    assert list(map(type, astuple(validated(record)))) == list(map(type, astuple(record)))
    assert record.revision == 1
