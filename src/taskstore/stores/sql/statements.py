"""The statements of the hot path, each compiled once per dialect.

A commit runs its SQL as text on the driver's cursor: building and executing
Core statements anew costs several times what the database itself does.
Every statement here is compiled with positional parameters, whose order is
declared beside it and checked when it is compiled.

Statements over several rows exist for a few row counts only (``SIZES``), so
that any batch takes few driver calls and the number of distinct statements,
which drivers and servers keep prepared, stays bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property, partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement, bindparam
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.expression import Executable, FromClause

from taskstore.stores.sql.tables import (
    PROJECTED,
    task_journal,
    task_set_aside,
    task_snapshot_chunks,
    task_snapshots,
    tasks,
    taskstore_head,
)

SIZES = (256, 64, 16, 4, 1)
"""How many rows one statement takes, greatest first."""

PAGE = 1000
"""How many rows a scan reads at a time."""

KEPT = tuple(name for name in PROJECTED if name != "status")
"""The projections that an update rarely changes."""

_WRITTEN = (tasks, task_journal, task_snapshots, task_snapshot_chunks, task_set_aside)
_ALWAYS = ("revision", "status", "payload", "checksum")
_BASE = sa.Column("base", sa.BigInteger)
_THE_HEAD = taskstore_head.c.id == sa.literal_column("1")

UPDATE_ORDER = (*_ALWAYS, "task_id", "base", *KEPT)
"""Parameters of one row of ``update_tasks``, narrow or wide."""


class Statements:
    """The compiled statements of one dialect (``str`` each)."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        # Statements over several rows, by their number: compiled when one is first asked for.
        self.insert_tasks = cache(self._insert_tasks)
        self.update_tasks = cache(self._update_tasks)
        self.update_tasks_wide = cache(self._update_tasks_wide)
        self.delete_tasks = cache(self._delete_tasks)
        self.insert = {table: cache(partial(self._insert, table)) for table in _WRITTEN}
        """Insert rows, in order of the table's columns, whatever is there; by table."""
        self.insert_journal = self.insert[task_journal]

    def _compile(self, statement: Executable, *order: str) -> str:
        # An Executable that does not compile is none of ours.
        compiled = statement.compile(dialect=self._dialect)  # type: ignore[attr-defined]
        found = tuple(compiled.positiontup or ())
        if found != order:
            raise AssertionError(f"parameters are {found}, not {order}: {compiled}")
        return str(compiled)

    # -- the head row -----------------------------------------------------

    @cached_property
    def claim(self) -> str:
        """Take ``count`` seqs, giving (head_seq, last_at, floor) as they are afterwards and
        the id of the commit at seq ``over``.

        Nothing is updated and given when the schema epoch is too high.
        """
        return self._claim_giving()

    def _claim_giving(self, *more: sa.ColumnElement[Any]) -> str:
        given = advance_head().returning(*CLAIMED, *more)
        return self._compile(given, "count", "now", "now", "epoch", "over")

    @cached_property
    def head(self) -> str:
        """Read the whole head row."""
        return self._compile(sa.select(taskstore_head).where(_THE_HEAD))

    @cached_property
    def lock_head(self) -> str:
        """Read the whole head row and keep other writers out until the transaction ends."""
        return self._compile(sa.select(taskstore_head).where(_THE_HEAD).with_for_update())

    # -- tasks ------------------------------------------------------------

    def _rows(self, columns: Sequence[sa.Column[Any]], count: int) -> FromClause:
        """``count`` rows of parameters as a table ``new``."""
        names = [sa.column(col.key, col.type) for col in columns]
        data = [tuple(parameters(columns, row).values()) for row in range(count)]
        return sa.values(*names, name="new").data(data).cte("new")

    def _insert_tasks(self, count: int) -> str:
        """Insert new tasks: those whose id and booking are free and were not deleted.

        Parameters: ``count`` rows in order of the columns of ``tasks``, then the
        floor.  The head row is locked, so what is free stays free.
        """
        new = self._rows(list(tasks.columns), count)
        gone = task_journal.alias("gone")
        same = tasks.alias("same")
        booked = tasks.alias("booked")
        statement = sa.insert(tasks).from_select(
            [col.key for col in tasks.columns],
            sa.select(new)
            .where(
                ~sa.exists().where(
                    gone.c.task_id == new.c.task_id,
                    gone.c.kind == sa.literal_column("'deleted'"),
                    gone.c.seq >= bindparam("floor", type_=sa.BigInteger),
                )
            )
            .where(~sa.exists().where(same.c.task_id == new.c.task_id))
            .where(
                ~sa.exists().where(
                    booked.c.run_id == new.c.run_id, booked.c.run_digest == new.c.run_digest
                )
            ),
        )
        return self._compile(statement, *_order(tasks.columns, count), "floor")

    def _update_tasks(self, count: int) -> str:
        """Bring tasks from revision ``base`` to a later one whose projections,
        but for the status, are as stored: no full index is touched.

        Parameters: ``count`` rows of :data:`UPDATE_ORDER`.
        """
        columns = _update_columns()
        # One is by far the most frequent: without the detour through a table of one row.
        new = parameters(columns, 0) if count == 1 else self._rows(columns, count).c
        unchanged = [tasks.c[name].is_not_distinct_from(new[name]) for name in KEPT]
        return self._compile(self._update(new, _ALWAYS).where(*unchanged), *_order(columns, count))

    def _update_tasks_wide(self, count: int) -> str:
        """Bring tasks from revision ``base`` to a later one, every projection with it.

        Parameters: ``count`` rows of :data:`UPDATE_ORDER`.
        """
        columns = _update_columns()
        statement = self._update(self._rows(columns, count).c, (*_ALWAYS, *KEPT))
        return self._compile(statement, *_order(columns, count))

    def _update(self, new: Any, names: Sequence[str]) -> sa.Update:
        return (
            sa.update(tasks)
            .values({name: new[name] for name in names})
            .where(self._same(tasks.c.task_id, new["task_id"]), tasks.c.revision == new["base"])
        )

    def _same(self, stored: ColumnElement[Any], new: Any) -> ColumnElement[bool]:
        """The condition that a stored key is that of a new row."""
        same: ColumnElement[bool] = stored == new
        return same

    def _delete_tasks(self, count: int) -> str:
        """Delete tasks; parameters: ``count`` times (task_id, revision)."""
        columns = (tasks.c.task_id, tasks.c.revision)
        terms = [
            sa.and_(*(tasks.c[name] == value for name, value in parameters(columns, row).items()))
            for row in range(count)
        ]
        return self._compile(sa.delete(tasks).where(sa.or_(*terms)), *_order(columns, count))

    @cached_property
    def scan_tasks(self) -> str:
        """Read (task_id, revision, payload, checksum) of :data:`PAGE` tasks after an id."""
        return self._compile(
            sa.select(
                tasks.c.task_id, tasks.c.revision, stored_bytes(tasks.c.payload), tasks.c.checksum
            )
            .where(tasks.c.task_id > bindparam("after", type_=tasks.c.task_id.type))
            .order_by(tasks.c.task_id)
            .limit(sa.literal_column(str(PAGE)))
            # SQLite's compiler makes a parameter of an offset that is not there.
            .offset(sa.literal_column("0")),
            "after",
        )

    # -- any table --------------------------------------------------------

    def _insert(self, table: sa.Table, count: int) -> str:
        rows = [parameters(table.columns, row) for row in range(count)]
        return self._compile(sa.insert(table).values(rows), *_order(table.columns, count))

    # -- journal ----------------------------------------------------------

    @cached_property
    def read_journal(self) -> str:
        """Read (floor, head, entry…) of the entries in a range of seqs, from one moment.

        There is one row without an entry when there is none in the range.
        Parameters: the seq before, the last seq.
        """
        head, entry = taskstore_head.c, task_journal.c
        joined = taskstore_head.outerjoin(
            task_journal,
            sa.and_(
                entry.seq > bindparam("after", type_=sa.BigInteger),
                entry.seq <= bindparam("last", type_=sa.BigInteger),
                entry.seq >= head.floor,
            ),
        )
        return self._compile(
            sa.select(head.floor, head.head_seq, *ENTRY)
            .select_from(joined)
            .where(_THE_HEAD)
            .order_by(entry.seq),
            "after",
            "last",
        )

    @cached_property
    def read_history(self) -> str:
        """Read the kept entries of one task, oldest first."""
        entry = task_journal.c
        floor = sa.select(taskstore_head.c.floor).scalar_subquery()
        return self._compile(
            sa.select(*ENTRY)
            .where(entry.task_id == bindparam("task_id", type_=entry.task_id.type))
            .where(entry.seq >= floor)
            .order_by(entry.seq),
            "task_id",
        )

    # -- snapshots and what was set aside ---------------------------------

    @cached_property
    def read_chunk(self) -> str:
        """Read (payload, checksum) of one chunk; parameters: seq, number."""
        chunks = task_snapshot_chunks.c
        return self._compile(
            sa.select(stored_bytes(chunks.payload), chunks.checksum).where(
                chunks.seq == bindparam("seq", type_=sa.BigInteger),
                chunks.chunk == bindparam("chunk", type_=sa.BigInteger),
            ),
            "seq",
            "chunk",
        )

    @cached_property
    def read_quarantined(self) -> str:
        """Read (id, payload, checksum) of everything set aside."""
        aside = task_set_aside.c
        return self._compile(
            sa.select(aside.id, stored_bytes(aside.payload), aside.checksum).order_by(aside.id)
        )


def advance_head() -> sa.Update:
    """Take ``count`` seqs, unless the schema epoch is above ``epoch``."""
    head = taskstore_head.c
    now = bindparam("now", type_=sa.BigInteger)
    return (
        sa.update(taskstore_head)
        .where(_THE_HEAD)
        .where(head.schema_epoch <= bindparam("epoch", type_=sa.BigInteger))
        .values(
            head_seq=head.head_seq + bindparam("count", type_=sa.BigInteger),
            last_at=sa.case((head.last_at < now, now), else_=head.last_at),
        )
    )


def stored_bytes(col: ColumnElement[Any]) -> ColumnElement[Any]:
    """A column of bytes, cast, because SQLite would hand out whatever type was put there."""
    return sa.cast(col, sa.LargeBinary).label(str(col.key))


CLAIMED: tuple[ColumnElement[Any], ...] = (
    taskstore_head.c.head_seq,
    taskstore_head.c.last_at,
    taskstore_head.c.floor,
    sa.select(task_journal.c.commit_id)
    .where(task_journal.c.seq == bindparam("over", type_=sa.BigInteger))
    .scalar_subquery(),
)
"""What a claim gives: the fields of ``Claimed``; the last is that of the parameter ``over``."""

ENTRY: tuple[ColumnElement[Any], ...] = tuple(
    stored_bytes(col) if col is task_journal.c.payload else col for col in task_journal.columns
)
"""What is read of an entry of the journal: all of its columns."""


def _update_columns() -> list[sa.Column[Any]]:
    return [_BASE if name == "base" else tasks.c[name] for name in UPDATE_ORDER]


def parameters(columns: Any, row: int) -> dict[str, ColumnElement[Any]]:
    """The parameters of one row, by their columns' names."""
    return {col.key: bindparam(f"{col.key}_{row}", type_=col.type) for col in columns}


def _order(columns: Any, count: int) -> list[str]:
    """The names of the parameters of ``count`` rows."""
    return [f"{col.key}_{row}" for row in range(count) for col in columns]
