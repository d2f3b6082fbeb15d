"""Texts that a caller cannot know to be clean are cleaned and cut, never refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskstore.errors import ValidationError
from taskstore.model import lifecycle
from taskstore.model.records import ERROR_BYTES, SUMMARY_BYTES, TaskStatus
from taskstore.model.validation import check_text, clean_summary, clean_text, validated
from taskstore.testing import make_record

NOW = 1_700_000_000_000
MARK = re.compile(r"…\[([0-9,]+) bytes cut\]…")
BAD = re.compile("[\0\ud800-\udfff]")

dirty = st.text(st.characters() | st.sampled_from("\0\ud800\udfff\ufffd é🎉\n…[]"))


@st.composite
def long_texts(draw):
    """Dirty texts around and far above any limit, without a huge input for hypothesis."""
    piece = draw(dirty.filter(bool))
    count = draw(st.integers(0, 400))
    return draw(dirty) + piece * count + draw(dirty)


limits = st.integers(64, 600)


@settings(max_examples=400)
@given(long_texts(), limits)
def test_a_cleaned_text_is_valid_and_has_both_ends(text, limit):
    cleaned = clean_text("error", text, limit)
    assert check_text("error", cleaned, limit) == cleaned
    assert clean_text("error", cleaned, limit) == cleaned
    whole = BAD.sub("\ufffd", text)
    size = len(whole.encode())
    if size <= limit:
        assert cleaned == whole
        return
    marks = [
        match
        for match in MARK.finditer(cleaned)
        if whole.startswith(cleaned[: match.start()]) and whole.endswith(cleaned[match.end() :])
    ]
    # The number in the mark is exact: head, tail and the cut part are the whole text.
    (mark,) = [
        match
        for match in marks
        if size - int(match[1].replace(",", "")) + len(match[0].encode()) == len(cleaned.encode())
    ]
    head, tail = cleaned[: mark.start()].encode(), cleaned[mark.end() :].encode()
    # Both ends have half of the room, up to a code point.
    room = limit - len(mark[0].encode())
    assert len(head) >= room // 2 - 5
    assert len(tail) >= room // 2 - 5


@settings(max_examples=200)
@given(long_texts())
def test_a_cleaned_summary_is_one_valid_line(text):
    for summary in (text, text * 20):
        cleaned = clean_summary("summary", summary)
        assert check_text("summary", cleaned, SUMMARY_BYTES) == cleaned
        assert " ".join(cleaned.split()) == cleaned
        assert clean_summary("summary", cleaned) == cleaned


@pytest.mark.parametrize("character", ["x", "é", "€", "🎉", "\0", "\ud800", " x", "\n€"])
@pytest.mark.parametrize("limit", [SUMMARY_BYTES, ERROR_BYTES])
def test_every_size_around_a_limit(character, limit):
    size = len(BAD.sub("\ufffd", character).encode())
    for count in range(limit // size - 3, limit // size + 4):
        for padding in ("", "a", "ab", "abc"):
            text = padding + character * count
            cleaned = clean_text("error", text, limit)
            assert len(cleaned.encode()) <= limit
            assert clean_text("error", cleaned, limit) == cleaned
            is_cut = len(padding) + size * count > limit
            assert is_cut == bool(MARK.search(cleaned))
            assert not is_cut or len(cleaned.encode()) > limit - 16  # little room is left


def test_a_traceback_keeps_its_end():
    text = "Traceback (most recent call last):\n" + '  File "x.py"\n' * 9000 + "ValueError: no\0"
    error = lifecycle.finish("failed", error=text)(make_record(), NOW).error
    assert error.startswith("Traceback (most recent call last):\n  File")
    assert error.endswith('  File "x.py"\nValueError: no\ufffd')
    assert MARK.search(error)
    assert ERROR_BYTES - 16 < len(error.encode()) <= ERROR_BYTES


DIRTY = ["a\0b", b"caf\xe9".decode("utf-8", "surrogateescape"), "\ud83c\udf89", "é" * 70_000]
DIRTY += ["x" * (ERROR_BYTES + 1), "\0" * ERROR_BYTES, " \0 " * 5000, "\udfff\n" * 9]


@pytest.mark.parametrize("text", DIRTY, ids=lambda text: ascii(text[:4]) + str(len(text)))
def test_no_end_is_refused_for_its_text(text):
    running = make_record(status=TaskStatus.RUNNING)
    lost = make_record(status=TaskStatus.LOST)
    for end in (
        lifecycle.finish("failed", error=text, summary=text),
        lifecycle.finish("succeeded", summary=text),
        lifecycle.lose(error=text),
        lifecycle.cancel(text),
    ):
        check_end(end, running)
    check_end(lifecycle.recover("failed", error=text, summary=text), lost)
    noted = lifecycle.progress(text)(running, NOW)
    assert validated(noted) is noted
    assert lifecycle.progress(text)(noted, NOW + 1) is noted


def check_end(end, record):
    ended = end(record, NOW)
    assert ended.is_terminal
    assert validated(ended) is ended
    # The same end with the same text changes nothing.
    assert end(ended, NOW + 1) is ended


class Text(str):
    """A subclass of ``str`` that encoders do not support."""

    __slots__ = ()


def test_a_text_of_another_type_becomes_plain():
    for text in ("plain", "a\0", "é" * 70_000, ""):
        ended = lifecycle.finish("failed", error=Text(text), summary=Text(text))(make_record(), NOW)
        assert type(ended.error) is type(ended.terminal_summary) is str
        assert ended == lifecycle.finish("failed", error=text, summary=text)(ended, NOW)


@pytest.mark.parametrize("value", [b"bytes", 5, ValueError("no"), ["a"], True])
def test_a_value_that_is_no_text_is_refused(value):
    for call in (
        lambda: lifecycle.finish("failed", error=value),
        lambda: lifecycle.finish("failed", summary=value),
        lambda: lifecycle.lose(error=value),
        lambda: lifecycle.cancel(value),
        lambda: lifecycle.recover("failed", error=value),
        lambda: lifecycle.progress(value),
    ):
        with pytest.raises(ValidationError, match=f"must be text, not {type(value).__name__}"):
            call()


def test_the_texts_of_a_new_task_are_refused_as_they_are():
    for field, text in (
        ("progress_summary", "a\0"),
        ("progress_summary", "x" * 4097),
        ("label", "a\0"),
        ("task", "\ud800"),
    ):
        fields = {"runtime": "cli", "task": "x", field: text}
        required = {name: fields.pop(name) for name in ("runtime", "task")}
        with pytest.raises(ValidationError) as raised:
            lifecycle.new_record(now=NOW, task_id="t", status="queued", fields=fields, **required)
        assert raised.value.field == field
