"""Queries: the smallest range of the index, filtered, and brought to one moment."""

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
"""Up to so many ids are looked up one by one."""
MAX_RANGES = 16
"""Up to so many values of a field are looked up one by one."""

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
"""Filters that the index serves, those with the fewest records each first."""


def ranges_of(query: TaskQuery) -> list[Range]:
    """The ranges of the index in which everything is that may match."""
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
    last = b":"  # what follows all digits
    if query.cursor is not None:
        last = time_key(query.cursor[0]) + query.cursor[1].encode()
    return [Range(prefix, b"[" + prefix + first, b"(" + prefix + last) for prefix in prefixes]


class Search:
    """One attempt at one query: rows newest first, from several ranges merged."""

    def __init__(self, reader: Reader, query: TaskQuery, pages: Pages) -> None:
        self._reader = reader
        self._query = query
        self._pages = pages
        self.scans = 0

    def page(self) -> Page:
        """The answer; raises :class:`InconsistentPagesError` if it cannot be brought to one moment."""
        query, wanted = self._query, None if self._query.limit is None else self._query.limit + 1
        ranges = ranges_of(query)
        scan = self._scan(ranges, wanted)
        found: list[TaskRecord] = []
        lower_bound = b""
        for row in self._merged(ranges, scan):
            record = self._reader.decoded(row)
            if isinstance(record, TaskRecord) and query.matches(record):
                found.append(record)
                if len(found) == wanted:
                    lower_bound = row.sort_key
                    break
        if self.scans == 1:
            self._reader.known_commits.add(scan.state.head, scan.state.commit)
            return page_of(iter(found), query, scan.state.head)
        return self._caught_up(scan, found, lower_bound, wanted)

    def _caught_up(
        self, scan: Scan, found: list[TaskRecord], lower_bound: bytes, wanted: int | None
    ) -> Page:
        """Put what was committed since the first page over what was found.

        The rows were read down to ``lower_bound``: what lies before it is not known.
        """
        entries = self._reader.since(scan.state)
        seq = entries[-1].seq if entries else scan.state.head
        last = {entry.task_id: entry.record for entry in entries}
        records = [record for record in found if record.task_id not in last]
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
        """Read a page of each range; of the first, no more than are ``wanted``."""
        self.scans += 1
        pages = self._pages
        if wanted is not None and pages.rows and len(self._query.where) <= 1:
            pages = pages._replace(rows=min(pages.rows, wanted))
        return self._reader.scan(ranges, pages, newest_first=True)

    def _merged(self, ranges: list[Range], scan: Scan) -> Iterator[Row]:
        rows = heapq.merge(
            *map(self._rows, ranges, scan.pages), key=lambda row: row.sort_key, reverse=True
        )
        # A task of both sessions is in two ranges.
        for _, alike in groupby(rows, key=lambda row: row.sort_key):
            yield next(alike)

    def _rows(self, range_: Range, page: tuple[bool, list[Row]]) -> Iterator[Row]:
        """The rows of one range, a page at a time."""
        more, rows = page
        while True:
            yield from rows
            if not more or not rows:
                return
            rest = range_._replace(last=b"(" + range_.prefix + rows[-1].sort_key)
            [(more, rows)] = self._scan([rest]).pages


def run(reader: Reader, query: TaskQuery) -> Page:
    """Answer a query as :func:`taskstore.store.evaluate` would over all records."""
    ids = query.where.get("task_id")
    if ids is not None and len(ids) <= MAX_IDS:
        return _by_id(reader, query, sorted(ids - {None}))
    for pages in Pages.attempts():
        try:
            return Search(reader, query, pages).page()
        except InconsistentPagesError:
            continue
    raise AssertionError("unreachable: the last attempt is one moment")


def _by_id(reader: Reader, query: TaskQuery, ids: list[str]) -> Page:
    link: Link = reader.link
    keys: Keys = reader.keys
    reply = link.run("rows", keys.named("head", "rows", "facts"), *ids)
    state = reader.checked(reply[0])
    rows = [
        Row(time_key(0) + task_id.encode(), facts, image)
        for task_id, facts, image in zip(ids, reply[1::2], reply[2::2], strict=True)
    ]
    found = [item for row in rows if isinstance(item := reader.decoded(row), TaskRecord)]
    return evaluate(query, found, state.head)
