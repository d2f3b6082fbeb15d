"""Answering queries with the database's own indexes.

Filters on projected columns become SQL, in the order of the index that pages
walk along; whatever else is asked is tested on the decoded records, which
also has the last word on the projections: the payload is the truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement

from taskstore.errors import CorruptStoreError
from taskstore.model.journal import Quarantined
from taskstore.model.query import SESSION_KEY, Cursor, Page, TaskQuery, page_of
from taskstore.model.records import ACTIVE_STATUSES, TaskRecord
from taskstore.stores.sql.dialects.base import Session
from taskstore.stores.sql.rows import TaskRow, record_of
from taskstore.stores.sql.statements import PAGE
from taskstore.stores.sql.tables import ACTIVE, PROJECTED, tasks, taskstore_head
from taskstore.stores.sql.transactions import Transactions

MOST_VALUES = 1000
"""How many values of a filter become parameters: servers and drivers have limits."""

_COLUMNS = frozenset({*PROJECTED, "task_id", SESSION_KEY})


def _becomes_sql(field: str, wanted: frozenset[Any]) -> bool:
    """Whether the database can test a filter; the others are tested on the records."""
    return field in _COLUMNS and len(wanted) <= MOST_VALUES


def answer(transactions: Transactions, query: TaskQuery, met: dict[str, Quarantined]) -> Page:
    """Answer a query as ``taskstore.model.query.evaluate`` would over every record.

    Rows that do not decode are left out and noted in ``met`` by their id.
    """
    pushed = all(_becomes_sql(field, wanted) for field, wanted in query.where.items())
    if query.limit is not None and pushed:
        page = transactions.read(lambda session: _one_select(session, query, met))
        if page is not None:
            return page
    return transactions.read(lambda session: _pages(session, query, met), one_moment=True)


def _one_select(session: Session, query: TaskQuery, met: dict[str, Quarantined]) -> Page | None:
    """One page by one statement; ``None`` when rows had to be left out of it."""
    assert query.limit is not None
    seq, rows = _fetch(session, query, query.cursor, query.limit + 1)
    found = [record_of(row) for row in rows]
    records = [item for item in found if isinstance(item, TaskRecord) and query.matches(item)]
    if len(records) < len(found):
        _note(found, met)
        return None
    return page_of(iter(records), query, seq)


def _pages(session: Session, query: TaskQuery, met: dict[str, Quarantined]) -> Page:
    """Walk from page to page until enough records are found, all of one moment."""
    seq, rows = _fetch(session, query, query.cursor, PAGE)

    def matching(rows: list[TaskRow]) -> Iterator[TaskRecord]:
        while True:
            found = [record_of(row) for row in rows]
            _note(found, met)
            for item in found:
                if isinstance(item, TaskRecord) and query.matches(item):
                    yield item
            if len(rows) < PAGE:
                return
            _, rows = _fetch(session, query, _place(session, rows[-1]), PAGE)

    return page_of(matching(rows), query, seq)


def _place(session: Session, row: TaskRow) -> Cursor:
    """Where a row stands in the order, by its columns: its payload may be damaged."""
    found = sa.select(tasks.c.created_at).where(tasks.c.task_id == row.task_id)
    return (session.scalar(found), row.task_id)


def _note(found: list[TaskRecord | Quarantined], met: dict[str, Quarantined]) -> None:
    for item in found:
        if isinstance(item, Quarantined) and item.task_id is not None:
            met[item.task_id] = item


def _fetch(
    session: Session, query: TaskQuery, cursor: Cursor | None, limit: int
) -> tuple[int, list[TaskRow]]:
    """The head seq, and the next rows that may match, by one statement."""
    some = (
        sa.select(tasks)
        .where(*_conditions(query, cursor))
        .order_by(tasks.c.created_at.desc(), tasks.c.task_id.desc())
        .limit(limit)
        .subquery("some")
    )
    statement = (
        sa.select(
            taskstore_head.c.head_seq,
            some.c.task_id,
            some.c.revision,
            sa.cast(some.c.payload, sa.LargeBinary).label("payload"),
            some.c.checksum,
        )
        # Joined, so that an empty answer also says what it is true for.
        .select_from(taskstore_head.outerjoin(some, sa.true()))
        .order_by(some.c.created_at.desc(), some.c.task_id.desc())
    )
    rows = session.ask(statement)
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
        # The first term is implied by the second; indexes understand it better.
        yield created_at <= cursor[0]
        yield sa.or_(created_at < cursor[0], sa.and_(created_at == cursor[0], task_id < cursor[1]))
    for field, wanted in query.where.items():
        if not _becomes_sql(field, wanted):
            continue
        if field == SESSION_KEY:
            yield sa.or_(
                _any_of(tasks.c.child_session_key, wanted),
                _any_of(tasks.c.requester_session_key, wanted),
            )
        else:
            yield _any_of(tasks.c[field], wanted)
        if field == "status" and wanted <= ACTIVE_STATUSES:
            # As text: SQLite knows its partial index by these very words.
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
