"""The results of queries, and the arguments that they refuse."""

from __future__ import annotations

import pytest

from taskstore.errors import ValidationError
from taskstore.model.query import Page, TaskQuery, decode_cursor, encode_cursor, evaluate
from taskstore.model.records import TaskStatus
from taskstore.testing import make_record
from taskstore.testing.factories import EPOCH_MS


def ids(page):
    return [record.task_id for record in page]


def test_newest_first_with_ties_by_id():
    records = [make_record(task_id=i, created_at=at) for i, at in [("b", 1), ("a", 1), ("c", 0)]]
    assert ids(evaluate(TaskQuery(), records, 5)) == ["b", "a", "c"]


def test_pages():
    records = [make_record(task_id=f"{n}", created_at=n // 2) for n in range(5)]
    first = evaluate(TaskQuery(limit=2), records, 9)
    second = evaluate(TaskQuery(limit=2, after=first.next_cursor), records, 9)
    third = evaluate(TaskQuery(limit=2, after=second.next_cursor), records, 9)
    assert [*ids(first), *ids(second), *ids(third)] == ["4", "3", "2", "1", "0"]
    assert third.next_cursor is None
    assert first.seq == 9


def test_a_full_last_page_has_no_cursor():
    assert evaluate(TaskQuery(limit=1), [make_record()], 0).next_cursor is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "abc"),
        ({"label": "x"}, "a"),
        ({"label": None}, "c"),
        ({"label": ["x", None]}, "ac"),
        ({"label": {"x", "X"}}, "ab"),
        ({"label": []}, ""),
        ({"label": ""}, ""),
        ({"status": "running"}, "b"),
        ({"status": [TaskStatus.RUNNING, "queued"]}, "abc"),
        ({"session_key": "s"}, "ab"),
        ({"session_key": None}, "abc"),
        ({"session_key": "other"}, ""),
        ({"created_at": EPOCH_MS + 2}, "b"),
        ({"created_at": (EPOCH_MS + 1, EPOCH_MS + 3)}, "ac"),
        ({"since": EPOCH_MS + 2}, "bc"),
        ({"since": 0}, "abc"),
        ({"since": EPOCH_MS + 2, "label": ["x", "X"]}, "b"),
        ({"revision": 1}, "abc"),
        ({"ended_at": None}, "abc"),
        ({"terminal_outcome": None, "task_id": ["a", "c"]}, "ac"),
    ],
)
def test_filters(arguments, expected):
    records = [
        make_record(task_id="a", created_at=EPOCH_MS + 1, label="x", child_session_key="s"),
        make_record(
            task_id="b",
            created_at=EPOCH_MS + 2,
            label="X",
            requester_session_key="s",
            status=TaskStatus.RUNNING,
        ),
        make_record(task_id="c", created_at=EPOCH_MS + 3),
    ]
    assert sorted(ids(evaluate(TaskQuery(**arguments), records, 0))) == list(expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"colour": "red"},
        {"metadata": {}},
        {"metadata_json": "{}"},
        {"unknown_json": None},
        {"requester_origin": None},
        {"status": "paused"},
        {"status": ["queued", "paused"]},
        {"status": 5},
        {"label": 5},
        {"label": b"x"},
        {"label": "nul \0"},
        {"label": "\ud800"},
        {"label": [["x"]]},
        {"created_at": "1"},
        {"created_at": -1},
        {"created_at": True},
        {"created_at": 2**53},
        {"limit": 0},
        {"limit": -1},
        {"limit": "5"},
        {"limit": True},
        {"since": "yesterday"},
        {"since": -1},
        {"since": 1_700_000_000},
        {"since": False},
        {"since": 0.0},
        {"since": 2**53},
        {"after": 5},
        {"after": ""},
        {"after": "not a cursor"},
    ],
)
def test_invalid_arguments_are_refused(arguments):
    with pytest.raises(ValidationError) as caught:
        TaskQuery(**arguments)
    assert caught.value.field in arguments


@pytest.mark.parametrize(
    "cursor",
    [
        encode_cursor((-1, "x")),
        encode_cursor((2**53, "x")),
        encode_cursor((2**80, "x")),
        encode_cursor((1, "nul \0")),
        encode_cursor((1, "")),
        encode_cursor((1, "x" * 256)),
        encode_cursor((1, "x")) + "!",
        encode_cursor((1, "x")) + "\n",
        encode_cursor((1, "x"))[:-1],
        "é",
        "WzEsMV0",
        "W10",
        "e30",
    ],
)
def test_a_forged_cursor_is_refused(cursor):
    with pytest.raises(ValidationError) as caught:
        TaskQuery(after=cursor)
    assert caught.value.field == "after"


def test_cursor_round_trip():
    for key in [(0, "a"), (2**53 - 1, "🎉" * 63), (5, "a\nb \\ \"'")]:
        cursor = encode_cursor(key)
        assert decode_cursor(cursor) == key
        assert cursor.isascii()
        assert not set(cursor) & set("=+/ ")


def test_page_is_a_sequence():
    records = [make_record(task_id=f"{n}") for n in range(3)]
    page = Page(records, next_cursor="x", seq=4)
    assert list(page) == records
    assert len(page) == 3
    assert page[0] is records[0]
    assert list(page[1:]) == records[1:]
    assert records[2] in page
    assert page == Page(records, next_cursor="x", seq=5)
    assert page != Page(records)
    assert page != records
    with pytest.raises(TypeError):
        hash(page)
    assert "next_cursor='x'" in repr(page)


def test_repr_names_the_arguments():
    text = repr(TaskQuery(status=["queued", "running"], limit=5, label=None))
    assert "status" in text
    assert "limit=5" in text
    assert "None" in text


def test_matches_ignores_the_cursor():
    record = make_record(created_at=EPOCH_MS + 5)
    assert TaskQuery(after=encode_cursor((1, "a")), since=EPOCH_MS + 5).matches(record)
    assert not TaskQuery(since=EPOCH_MS + 6).matches(record)
