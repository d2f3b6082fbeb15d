"""Queries that use the indexes of the database.

A filter on a column becomes an SQL condition.  The records of a result page have the order of
an SQL index.  Every filter is also tested on the decoded records, because the payload of a row is
authoritative and the columns that copy payload fields are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement

from taskstore.errors import CorruptStoreError, ValidationError
from taskstore.model.journal import Quarantined
from taskstore.model.query import (
    SESSION_KEY,
    Cursor,
    Page,
    Summary,
    TaskQuery,
    page_of,
    split_page,
)
from taskstore.model.records import ACTIVE_STATUSES, TaskRecord
from taskstore.model.validation import check_key
from taskstore.store.interface import TaskRegistryStore
from taskstore.stores.sql.dialects.base import Database, DriverSession
from taskstore.stores.sql.rows import QUARANTINED_CHECKSUM, TaskRow, record_of
from taskstore.stores.sql.statements import PAGE
from taskstore.stores.sql.tables import ACTIVE, COPIED_COLUMNS, task_journal, tasks, taskstore_head
from taskstore.stores.sql.transactions import Transactions

MAX_FILTER_VALUES = 1000
"""The maximum number of values in a filter that becomes an SQL condition.  A filter with more
values does not become an SQL condition, because servers limit the number of parameters."""

_SQL_FILTERS = frozenset({*COPIED_COLUMNS, "task_id", SESSION_KEY})


class QueryStore(TaskRegistryStore):
    """An abstract base class of the SQL store, with the methods that answer queries."""

    _transactions: Transactions
    _query_quarantined: dict[str, Quarantined]
    """The rows that queries could not decode, by task id."""

    def query(self, query: TaskQuery) -> Page:
        """Implement :meth:`taskstore.SupportsQuery.query`."""
        self._check_open()
        return run_query(self._transactions, query, self._query_quarantined)

    def stream(self, query: TaskQuery, batch_size: int) -> Iterator[Page]:
        """Implement :meth:`taskstore.SupportsStreaming.stream`, in one read transaction."""
        self._check_open()
        return _stream(self._transactions, query, batch_size, self._query_quarantined)

    def summary(self) -> Summary:
        """Implement :meth:`taskstore.SupportsSummary.summary`, with one statement."""
        self._check_open()
        return self._transactions.read(_count)

    def find_ids(
        self, endings: Collection[str], limit: int, *, deleted: bool = False
    ) -> Sequence[str]:
        """Implement :meth:`taskstore.SupportsIdSearch.find_ids`, with one statement that reads
        only ids."""
        self._check_open()
        possible = [ending for ending in endings if _can_end_an_id(ending)]
        if not possible:
            return ()
        statement = _ids_with_ending(self._transactions.database, possible, limit, deleted=deleted)
        rows = self._transactions.read(lambda session: session.select(statement))
        return tuple(row[0] for row in rows)


def _is_sql_filter(field: str, wanted: frozenset[Any]) -> bool:
    """Return whether a filter becomes an SQL condition.

    The decoded records are tested with every filter, even if the filter became an SQL condition.
    """
    return field in _SQL_FILTERS and len(wanted) <= MAX_FILTER_VALUES


def run_query(
    transactions: Transactions, query: TaskQuery, quarantined: dict[str, Quarantined]
) -> Page:
    """Return the page that ``taskstore.model.query.evaluate`` returns for all records of a ledger.

    If a row cannot be decoded, the function adds its payload to ``quarantined``, by task id.
    """
    all_sql = all(_is_sql_filter(field, wanted) for field, wanted in query.where.items())
    if query.limit is not None and all_sql:
        page = transactions.read(lambda session: _select_page(session, query, quarantined))
        if page is not None:
            return page
    return transactions.read(
        lambda session: _scan_page(session, query, quarantined), in_transaction=True
    )


def _select_page(
    session: DriverSession, query: TaskQuery, quarantined: dict[str, Quarantined]
) -> Page | None:
    """Read one page with one statement.  Return ``None`` if a row cannot be decoded or does not
    match the query."""
    assert query.limit is not None
    seq, rows = _fetch(session, query, query.cursor, query.limit + 1)
    found = [record_of(row) for row in rows]
    records = [item for item in found if isinstance(item, TaskRecord) and query.matches(item)]
    if len(records) < len(found):
        _add_quarantined(found, quarantined)
        return None
    return page_of(iter(records), query, seq)


def _scan_page(
    session: DriverSession, query: TaskQuery, quarantined: dict[str, Quarantined]
) -> Page:
    """Return one page; read rows in the caller's transaction until enough records match."""
    seq, records = _matching(session, query, quarantined)
    return page_of(records, query, seq)


def _stream(
    transactions: Transactions,
    query: TaskQuery,
    batch_size: int,
    quarantined: dict[str, Quarantined],
) -> Iterator[Page]:
    """Yield the page of a query in parts of at most ``batch_size`` records.

    One transaction reads all parts.
    """
    with (
        transactions.database.translator,
        transactions.reading(in_transaction=True) as session,
    ):
        seq, records = _matching(session, query, quarantined)
        yield from split_page(records, query, batch_size, seq)


def _matching(
    session: DriverSession, query: TaskQuery, quarantined: dict[str, Quarantined]
) -> tuple[int, Iterator[TaskRecord]]:
    """Return the head seq, and an iterator over the matching records after the cursor.

    The iterator reads the rows in the caller's transaction, :data:`PAGE` rows per statement.
    """
    seq, rows = _fetch(session, query, query.cursor, PAGE)

    def matching(rows: list[TaskRow]) -> Iterator[TaskRecord]:
        while True:
            found = [record_of(row) for row in rows]
            _add_quarantined(found, quarantined)
            for item in found:
                if isinstance(item, TaskRecord) and query.matches(item):
                    yield item
            if len(rows) < PAGE:
                return
            _, rows = _fetch(session, query, _cursor_of(session, rows[-1]), PAGE)

    return seq, matching(rows)


def _count(session: DriverSession) -> Summary:
    """Count the rows of ``tasks`` by status and runtime, and read the head, with one statement."""
    counts = (
        sa.select(tasks.c.status, tasks.c.runtime, sa.func.count().label("number"))
        # A row with this checksum has no status and no runtime: its payload was quarantined.
        .where(tasks.c.checksum != QUARANTINED_CHECKSUM)
        .group_by(tasks.c.status, tasks.c.runtime)
        .subquery("counts")
    )
    statement = sa.select(taskstore_head.c.head_seq, *counts.c).select_from(
        taskstore_head.outerjoin(counts, sa.true())
    )
    rows = session.select(statement)
    if not rows:
        raise CorruptStoreError("taskstore_head", "the head row is missing")
    statuses, runtimes = Counter[str](), Counter[str]()
    for _, status, runtime, number in rows:
        if number is not None:
            statuses[status] += number
            runtimes[runtime] += number
    return Summary.from_counts(statuses, runtimes, rows[0][0])


def _can_end_an_id(ending: str) -> bool:
    """Return whether a task id can end with ``ending``.

    No task id contains certain characters, for example NUL.  Some drivers raise an error for a
    text with such a character, so the store does not send the text to the driver.
    """
    try:
        return bool(check_key("task_id", ending))
    except ValidationError:
        return False


def _ids_with_ending(
    database: Database, endings: Collection[str], limit: int, *, deleted: bool
) -> sa.Select[Any]:
    column = task_journal.c.task_id if deleted else tasks.c.task_id
    by_length: dict[int, set[str]] = {}
    for ending in endings:
        by_length.setdefault(len(ending), set()).add(ending)
    conditions = (
        database.suffix(column, length).in_(sorted(wanted)) for length, wanted in by_length.items()
    )
    statement = sa.select(column).where(sa.or_(*conditions)).order_by(column).limit(limit)
    if deleted:
        floor = sa.select(taskstore_head.c.floor).scalar_subquery()
        statement = statement.where(
            task_journal.c.kind == "deleted", task_journal.c.seq >= floor
        ).distinct()
    return statement


def _cursor_of(session: DriverSession, row: TaskRow) -> Cursor:
    """Return the cursor of a row.

    The function reads the cursor from the columns, because the payload can be damaged.
    """
    created_at = sa.select(tasks.c.created_at).where(tasks.c.task_id == row.task_id)
    return (session.scalar(created_at), row.task_id)


def _add_quarantined(
    found: list[TaskRecord | Quarantined], quarantined: dict[str, Quarantined]
) -> None:
    for item in found:
        if isinstance(item, Quarantined) and item.task_id is not None:
            quarantined[item.task_id] = item


def _fetch(
    session: DriverSession, query: TaskQuery, cursor: Cursor | None, limit: int
) -> tuple[int, list[TaskRow]]:
    """Read the head seq and the next rows that meet the SQL conditions, with one statement."""
    candidates = (
        sa.select(tasks)
        .where(*_conditions(query, cursor))
        .order_by(tasks.c.created_at.desc(), tasks.c.task_id.desc())
        .limit(limit)
        .subquery("candidates")
    )
    statement = (
        sa.select(
            taskstore_head.c.head_seq,
            candidates.c.task_id,
            candidates.c.revision,
            sa.cast(candidates.c.payload, sa.LargeBinary).label("payload"),
            candidates.c.checksum,
        )
        # If no row meets the conditions, the outer join still returns the head seq.
        .select_from(taskstore_head.outerjoin(candidates, sa.true()))
        .order_by(candidates.c.created_at.desc(), candidates.c.task_id.desc())
    )
    rows = session.select(statement)
    if not rows:
        raise CorruptStoreError("taskstore_head", "the head row is missing")
    return rows[0][0], [TaskRow(*row[1:]) for row in rows if row[1] is not None]


def _conditions(
    query: TaskQuery, cursor: Cursor | None
) -> Iterator[ColumnElement[bool] | sa.TextClause]:
    created_at, task_id = tasks.c.created_at, tasks.c.task_id
    if query.since is not None:
        yield created_at >= query.since
    if cursor is not None:
        # The first condition is redundant, but an index cannot serve the second condition.
        yield created_at <= cursor[0]
        yield sa.or_(created_at < cursor[0], sa.and_(created_at == cursor[0], task_id < cursor[1]))
    for field, wanted in query.where.items():
        if not _is_sql_filter(field, wanted):
            continue
        if field == SESSION_KEY:
            yield sa.or_(
                _any_of(tasks.c.child_session_key, wanted),
                _any_of(tasks.c.requester_session_key, wanted),
            )
        else:
            yield _any_of(tasks.c[field], wanted)
        if field == "status" and wanted <= ACTIVE_STATUSES:
            # SQLite uses a partial index only if the query contains the index's predicate.
            yield sa.text(ACTIVE)


def _any_of(column: ColumnElement[Any], wanted: frozenset[Any]) -> ColumnElement[bool]:
    values = sorted(str(value) if isinstance(value, str) else value for value in wanted - {None})
    terms: list[ColumnElement[bool]] = []
    if len(values) == 1:
        terms.append(column == values[0])
    elif values:
        terms.append(column.in_(values))
    if None in wanted:
        terms.append(column.is_(None))
    return sa.or_(*terms) if terms else sa.false()
