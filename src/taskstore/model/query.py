"""Queries over records: filters, newest-first order, keyset pagination.

:func:`evaluate` defines the correct result of every query.  An index or an SQL query must
return the same result, but faster.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Self, TypeVar, overload

import msgspec
from msgspec import Struct

from taskstore.errors import ValidationError
from taskstore.model.records import (
    ACTIVE_STATUSES,
    ENUM_FIELDS,
    OPTIONAL_KEYS,
    OPTIONAL_TIMES,
    REQUIRED_KEYS,
    TEXT_LIMITS,
    TaskRecord,
    TerminalOutcome,
)
from taskstore.model.validation import (
    check_enum,
    check_int,
    check_key,
    check_text,
    check_time,
    did_you_mean,
)

SESSION_KEY = "session_key"
"""The filter that matches a record's child session or requester session; not a record field."""

_TEXT_FIELDS = frozenset({*REQUIRED_KEYS, *OPTIONAL_KEYS, *TEXT_LIMITS, SESSION_KEY})
_INT_FIELDS = frozenset({"revision", "created_at", *OPTIONAL_TIMES})
_ENUMS: dict[str, type[StrEnum]] = {**ENUM_FIELDS, "terminal_outcome": TerminalOutcome}
_FILTERS = _TEXT_FIELDS | _INT_FIELDS | _ENUMS.keys()
_MAX_TEXT_BYTES = max(TEXT_LIMITS.values())

_JOURNAL_POSITION = re.compile(r"[0-9]+(:[0-9a-f]*)?\Z")

_T = TypeVar("_T", bound=Any)

CHUNK_ITEMS = 4096
"""The maximum number of items in a chunk that :func:`chunked_sort` sorts at once."""

Cursor = tuple[int, str]
"""The sort key (created_at, task_id) of the last record of a page."""


class TaskQuery:
    """A query: filters, a limit and the cursor of a page.  Results are newest first by
    (created_at, task_id).

    ``filters`` maps record field names (except ``metadata`` and ``requester_origin``) to
    values.  The filter ``session_key`` matches the child session or the requester session.
    The value of a filter can be a collection of alternatives; the value ``None`` matches a
    field that is not set.  A filter by a time matches exactly this time, and accepts every
    time that a stored record can contain.  ``since`` is the earliest ``created_at`` that
    matches (Unix milliseconds from 10**11 on, or 0).  ``limit`` is the maximum number of
    records (``None``: all records).  ``after`` is the ``next_cursor`` of the previous page.

    Raises :class:`ValidationError` for an unknown field or a value that the field cannot have.
    """

    __slots__ = ("_predicates", "after", "cursor", "limit", "since", "where")

    def __init__(
        self,
        *,
        since: int | None = None,
        limit: int | None = None,
        after: str | None = None,
        **filters: Any,
    ) -> None:
        # 0 is the same time in seconds and in milliseconds: the query matches all records.
        is_zero = type(since) is int and since == 0
        self.since = since if since is None or is_zero else check_time("since", since)
        self.limit = None if limit is None else check_int("limit", limit, 1)
        self.after = after
        self.cursor = None if after is None else decode_cursor(after)
        self.where: dict[str, frozenset[Any]] = {
            field: _accepted_values(field, value) for field, value in filters.items()
        }
        self._predicates: list[Callable[[TaskRecord], bool]] = [
            _predicate(field, accepted) for field, accepted in self.where.items()
        ]

    def matches(self, record: TaskRecord) -> bool:
        """Return whether a record matches the filters and ``since``; ``after`` is ignored."""
        if self.since is not None and record.created_at < self.since:
            return False
        return all(predicate(record) for predicate in self._predicates)

    def __repr__(self) -> str:
        parts = [f"{field}={sorted(map(repr, values))}" for field, values in self.where.items()]
        parts += [
            f"{name}={getattr(self, name)!r}"
            for name in ("since", "limit", "after")
            if getattr(self, name) is not None
        ]
        return f"TaskQuery({', '.join(parts)})"


class Page(Sequence[TaskRecord]):
    """One page of the result of a query: records, newest first.

    ``next_cursor`` (``str``) is the argument ``after`` of the query for the next page, or
    ``None`` on the last page.  The page shows the records as of ``seq``.
    """

    __slots__ = ("next_cursor", "records", "seq")

    def __init__(
        self, records: Iterable[TaskRecord], *, next_cursor: str | None = None, seq: int = 0
    ) -> None:
        self.records = tuple(records)
        self.next_cursor = next_cursor
        self.seq = seq

    @overload
    def __getitem__(self, index: int) -> TaskRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TaskRecord]: ...
    def __getitem__(self, index: int | slice) -> TaskRecord | Sequence[TaskRecord]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Page):
            return self.records == other.records and self.next_cursor == other.next_cursor
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as for a list

    def __repr__(self) -> str:
        return f"Page({list(self.records)!r}, next_cursor={self.next_cursor!r}, seq={self.seq})"


class Summary(Struct, frozen=True, kw_only=True):
    """The number of tasks in total, by status and by runtime.

    ``total`` counts all records.  ``by_status`` and ``by_runtime`` map each status or runtime
    that occurs to the number of its tasks.  The counts are as of ``seq``.
    """

    total: int
    by_status: dict[str, int]
    by_runtime: dict[str, int]
    seq: int = 0

    @property
    def active(self) -> int:
        """The number of tasks that have not ended (``int``)."""
        return sum(self.by_status.get(status, 0) for status in ACTIVE_STATUSES)

    @classmethod
    def from_counts(cls, by_status: Counter[str], by_runtime: Counter[str], seq: int) -> Self:
        """Return a summary with the given counts, as of ``seq``."""
        return cls(
            total=by_status.total(),
            by_status=dict(by_status),
            by_runtime=dict(by_runtime),
            seq=seq,
        )

    @classmethod
    def from_records(cls, records: Iterable[TaskRecord], seq: int) -> Self:
        """Return the summary that a store must return for these records."""
        statuses, runtimes = Counter[str](), Counter[str]()
        for record in records:
            statuses[str(record.status)] += 1
            runtimes[record.runtime] += 1
        return cls.from_counts(statuses, runtimes, seq)


def page_of(newest_first: Iterator[TaskRecord], query: TaskQuery, seq: int) -> Page:
    """Return one result page; ``newest_first`` yields the matching records after ``query.after``.

    ``query.after`` is the cursor of the previous page.
    """
    if query.limit is None:
        return Page(newest_first, seq=seq)
    records: list[TaskRecord] = []
    for record in newest_first:
        if len(records) == query.limit:
            return Page(records, next_cursor=encode_cursor(records[-1].sort_key), seq=seq)
        records.append(record)
    return Page(records, seq=seq)


def evaluate(query: TaskQuery, records: Iterable[TaskRecord], seq: int) -> Page:
    """Return the page that a backend must return for a query; ``records`` can be in any order."""
    return page_of(newest_first(query, records), query, seq)


def newest_first(query: TaskQuery, records: Iterable[TaskRecord]) -> Iterator[TaskRecord]:
    """Yield the records that match a query after its cursor, newest first, without a limit."""
    matching = sorted(
        (record for record in records if query.matches(record)),
        key=lambda record: record.sort_key,
        reverse=True,
    )
    cursor = query.cursor
    return (record for record in matching if cursor is None or record.sort_key < cursor)


def chunked_sort(items: Iterable[_T]) -> list[_T]:
    """Return a list of the items in ascending order, sorted in chunks; the sort is stable.

    CPython switches threads only between bytecodes and in blocking calls.  One ``sorted`` of
    100,000 items blocks all other threads, including the thread of an event loop.  This function
    sorts each chunk, then merges the chunks in pairs.  ``sorted`` merges two sorted chunks in
    linear time.
    """
    items, size = list(items), CHUNK_ITEMS
    chunks = [sorted(items[start : start + size]) for start in range(0, len(items), size)]
    while len(chunks) > 1:
        right: list[list[_T]] = [*chunks[1::2], []]
        chunks = [sorted(first + second) for first, second in zip(chunks[::2], right, strict=False)]
    return chunks[0] if chunks else []


def split_page(
    matching: Iterator[TaskRecord], query: TaskQuery, batch_size: int, seq: int
) -> Iterator[Page]:
    """Yield the page of a query in parts of at most ``batch_size`` records.

    The function yields at least one part, even if no record matches.

    ``matching`` yields the matching records after the query's cursor.  The function keeps
    only one part and one more record in memory.
    """
    left = query.limit
    following = next(matching, None)
    while True:
        size = batch_size if left is None else min(batch_size, left)
        records: list[TaskRecord] = []
        while following is not None and len(records) < size:
            records.append(following)
            following = next(matching, None)
        left = None if left is None else left - len(records)
        cursor = None if following is None else encode_cursor(records[-1].sort_key)
        yield Page(records, next_cursor=cursor, seq=seq)
        if following is None or left == 0:
            return


def ids_with_ending(ids: Iterable[str], endings: Collection[str], limit: int) -> list[str]:
    """Return, in ascending order, the first ``limit`` ids that end with one of ``endings``.

    An empty text in ``endings`` matches no id.
    """
    wanted = tuple(ending for ending in endings if ending)
    return sorted(task_id for task_id in ids if task_id.endswith(wanted))[:limit]


def encode_cursor(key: Cursor) -> str:
    """Return an opaque, URL-safe text that encodes the sort key of a record."""
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).rstrip(b"=").decode()


def decode_cursor(cursor: str) -> Cursor:
    """Return the sort key that :func:`encode_cursor` encoded.

    Raises :class:`ValidationError` for a text that :func:`encode_cursor` did not return.
    """
    text = check_text("after", cursor, _MAX_TEXT_BYTES)
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        created_at, task_id = msgspec.json.decode(raw, type=tuple[int, str])
        key = (check_int("after", created_at), check_key("task_id", task_id))
        if encode_cursor(key) == text:
            return key
    except (binascii.Error, ValueError):
        pass
    reason = f"{cursor!r} is not the next_cursor of a page"
    if _JOURNAL_POSITION.match(text):
        reason += ", but a seq or a cursor of the journal, which only 'changes' takes"
    raise ValidationError("after", reason)


def _accepted_values(field: str, value: Any) -> frozenset[Any]:
    """Return the set of values that a filter accepts; check each value for the filter's field."""
    if field not in _FILTERS:
        known = sorted(_FILTERS | {"since", "limit", "after"})
        question = did_you_mean(field, known)
        raise ValidationError(field, f"is not a field that a query can filter by{question}")
    is_many = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    return frozenset(_check_value(field, item) for item in (value if is_many else (value,)))


def _check_value(field: str, value: Any) -> Any:
    if field in _ENUMS:
        return None if value is None else check_enum(field, value, _ENUMS[field])
    if field in _TEXT_FIELDS:
        return None if value is None else check_text(field, value, _MAX_TEXT_BYTES)
    return None if value is None else check_int(field, value)


def _predicate(field: str, accepted: frozenset[Any]) -> Callable[[TaskRecord], bool]:
    if field == SESSION_KEY:
        return lambda record: (
            record.child_session_key in accepted or record.requester_session_key in accepted
        )
    return lambda record: getattr(record, field) in accepted
