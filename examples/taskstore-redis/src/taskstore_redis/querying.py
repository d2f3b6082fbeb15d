"""Queries: read the smallest range of the index, filter, apply later entries."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import groupby

from taskstore import Page, TaskQuery, TaskRecord
from taskstore.store import SESSION_KEY, evaluate, page_of

from taskstore_redis.layout import ALL, INDEXED, Keys, sort_key_of, time_key
from taskstore_redis.link import Link
from taskstore_redis.reading import InconsistentPagesError, Pages, Range, Reader, Row, Scan

MAX_IDS = 500
"""The most ids that are looked up one by one."""
MAX_RANGES = 16
"""The most ranges of the index that one query reads."""

_SESSIONS = ("child_session_key", "requester_session_key")
_PREFERRED = (
    "run_id",
    "parent_task_id",
    "child_session_key",
    "requester_session_key",
    SESSION_KEY,
    "parent_flow_id",
    "owner_key",
    "status",
)
"""The filters that the index serves, the most selective ones first."""


def ranges_of(query: TaskQuery) -> list[Range]:
    """The ranges of the index that together contain all possible matches of a query."""
    if any(not wanted for wanted in query.where.values()):
        return []
    prefixes = [ALL]
    for field in _PREFERRED:
        wanted = query.where.get(field)
        if wanted is None or None in wanted:
            continue
        letters = [INDEXED[name] for name in (_SESSIONS if field == SESSION_KEY else (field,))]
        if len(wanted) * len(letters) <= MAX_RANGES:
            values = [str(value).encode() for value in wanted]
            prefixes = [letter + b"\0" + value + b"\0" for letter in letters for value in values]
            break
    first = b"" if query.since is None else time_key(query.since)
    last = b":"  # ":" follows "9" in the order of bytes
    if query.cursor is not None:
        last = time_key(query.cursor[0]) + query.cursor[1].encode()
    return [Range(prefix, b"[" + prefix + first, b"(" + prefix + last) for prefix in prefixes]


class Search:
    """One attempt at one query: reads the rows of several index ranges, merged, newest first."""

    def __init__(self, reader: Reader, query: TaskQuery, pages: Pages) -> None:
        self._reader = reader
        self._query = query
        self._pages = pages
        self.scans = 0

    def page(self) -> Page:
        """Return the page; raises :class:`InconsistentPagesError` if the rows are not of one
        seq."""
        query, wanted = self._query, None if self._query.limit is None else self._query.limit + 1
        ranges = ranges_of(query)
        scan = self._scan(ranges, wanted)
        matches: list[TaskRecord] = []
        lower_bound = b""
        for row in self._merged(ranges, scan):
            record = self._reader.decoded(row)
            if isinstance(record, TaskRecord) and query.matches(record):
                matches.append(record)
                if len(matches) == wanted:
                    lower_bound = row.sort_key
                    break
        if self.scans == 1:
            self._reader.known_commits.add(scan.state.head, scan.state.commit)
            return page_of(iter(matches), query, scan.state.head)
        return self._caught_up(scan, matches, lower_bound, wanted)

    def _caught_up(
        self, scan: Scan, matches: list[TaskRecord], lower_bound: bytes, wanted: int | None
    ) -> Page:
        """Apply later entries to the matches: the entries committed after the first page was read.

        Rows with a smaller sort key than ``lower_bound`` were not read.
        """
        entries = self._reader.since(scan.state)
        seq = entries[-1].seq if entries else scan.state.head
        last = {entry.task_id: entry.record for entry in entries}
        records = [record for record in matches if record.task_id not in last]
        records += [
            record
            for record in last.values()
            if record is not None and sort_key_of(record) >= lower_bound
        ]
        page = evaluate(self._query, records, seq)
        if lower_bound and wanted is not None and len(page) + bool(page.next_cursor) < wanted:
            raise InconsistentPagesError
        return page

    def _scan(self, ranges: list[Range], wanted: int | None = None) -> Scan:
        """Read a page of each range.

        If the query has at most one filter, each page has at most ``wanted`` rows.
        """
        self.scans += 1
        pages = self._pages
        if wanted is not None and pages.rows and len(self._query.where) <= 1:
            pages = pages._replace(rows=min(pages.rows, wanted))
        return self._reader.scan(ranges, pages, newest_first=True)

    def _merged(self, ranges: list[Range], scan: Scan) -> Iterator[Row]:
        rows = heapq.merge(
            *map(self._rows, ranges, scan.pages), key=lambda row: row.sort_key, reverse=True
        )
        # A task whose two session keys both match is in two ranges.
        for _, duplicates in groupby(rows, key=lambda row: row.sort_key):
            yield next(duplicates)

    def _rows(self, range_: Range, page: tuple[bool, list[Row]]) -> Iterator[Row]:
        """Yield the rows of one range; read one page at a time."""
        more, rows = page
        while True:
            yield from rows
            if not more or not rows:
                return
            remainder = range_._replace(last=b"(" + range_.prefix + rows[-1].sort_key)
            [(more, rows)] = self._scan([remainder]).pages


def run_query(reader: Reader, query: TaskQuery) -> Page:
    """Return the page that :func:`taskstore.store.evaluate` would return for all records."""
    ids = query.where.get("task_id")
    if ids is not None and len(ids) <= MAX_IDS:
        return _by_id(reader, query, sorted(ids - {None}))
    for pages in Pages.attempts():
        try:
            return Search(reader, query, pages).page()
        except InconsistentPagesError:
            continue
    raise AssertionError("unreachable: the last attempt reads one page")


def _by_id(reader: Reader, query: TaskQuery, ids: list[str]) -> Page:
    link: Link = reader.link
    keys: Keys = reader.keys
    reply = link.run("rows", keys.named("head", "rows", "facts"), *ids)
    state = reader.checked(reply[0])
    rows = [
        Row(time_key(0) + task_id.encode(), facts, image)
        for task_id, facts, image in zip(ids, reply[1::2], reply[2::2], strict=True)
    ]
    matches = [item for row in rows if isinstance(item := reader.decoded(row), TaskRecord)]
    return evaluate(query, matches, state.head)
