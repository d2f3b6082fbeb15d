"""Pages joined together are the whole answer, for any records and any query."""

from __future__ import annotations

import string
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskstore.errors import ValidationError
from taskstore.model.query import TaskQuery, decode_cursor, encode_cursor, evaluate
from taskstore.model.records import MAX_INT, MIN_UNIX_MS, TaskStatus
from taskstore.testing import make_record
from taskstore.testing.strategies import keys

RECORDS = st.lists(
    st.builds(
        lambda task_id, created_at, status, label: make_record(
            task_id=task_id, created_at=created_at, status=status, label=label
        ),
        keys(1),
        st.integers(MIN_UNIX_MS, MIN_UNIX_MS + 3),
        st.sampled_from(TaskStatus),
        st.sampled_from([None, "", "a"]),
    ),
    max_size=12,
    unique_by=lambda record: record.task_id,
)
QUERIES = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sets(st.sampled_from(TaskStatus)),
        "label": st.sampled_from([None, "", "a"]),
        "since": st.integers(MIN_UNIX_MS, MIN_UNIX_MS + 4) | st.just(0),
    },
)


@given(RECORDS, QUERIES, st.integers(1, 5))
def test_pages_concatenate(records, asked, limit):
    whole = list(evaluate(TaskQuery(**asked), records, 0))
    assert whole == sorted(
        (r for r in records if TaskQuery(**asked).matches(r)),
        key=lambda r: (-r.created_at, [-ord(c) for c in r.task_id] + [1]),
    )
    pages, after = [], None
    while True:
        page = evaluate(TaskQuery(**asked, limit=limit, after=after), records, 7)
        assert page.seq == 7
        pages += page
        after = page.next_cursor
        if after is None:
            break
        assert len(page) == limit
    assert pages == whole


@given(RECORDS, st.integers(MIN_UNIX_MS, MIN_UNIX_MS + 4), keys(1))
def test_a_cursor_is_a_position(records, created_at, task_id):
    page = evaluate(TaskQuery(after=encode_cursor((created_at, task_id))), records, 0)
    assert {r.task_id for r in page} == {
        r.task_id for r in records if r.sort_key < (created_at, task_id)
    }


@given(st.integers(0, MAX_INT), keys(1))
def test_cursor_round_trip(created_at, task_id):
    cursor = encode_cursor((created_at, task_id))
    assert decode_cursor(cursor) == (created_at, task_id)
    assert set(cursor) <= set(string.ascii_letters + string.digits + "-_")


@given(st.text() | st.text(string.ascii_letters + string.digits + "-_"))
def test_any_other_text_is_refused(text):
    with suppress(ValidationError):
        assert encode_cursor(decode_cursor(text)) == text


@given(st.integers(0, MAX_INT), keys(1), st.integers(0, 200), st.integers(0, 127))
def test_a_changed_cursor_is_refused_or_another_position(created_at, task_id, index, letter):
    cursor = encode_cursor((created_at, task_id))
    changed = list(cursor)
    changed[index % len(changed)] = chr(letter)
    text = "".join(changed)
    if text == cursor:
        return
    with suppress(ValidationError):
        assert decode_cursor(text) != (created_at, task_id)
    with pytest.raises(ValidationError):
        decode_cursor(cursor + "!")
