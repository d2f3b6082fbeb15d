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

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import ColumnElement, bindparam, column, values
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.expression import CTE, Executable

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

_Row = TypeVar("_Row")
_WRITTEN = (tasks, task_journal, task_snapshots, task_snapshot_chunks, task_set_aside)
_ALWAYS = ("revision", "status", "payload", "checksum")
_KEPT = tuple(name for name in PROJECTED if name != "status")

INSERT_ORDER = tuple(col.name for col in tasks.columns)
"""Parameters of one row of ``insert_tasks``."""
UPDATE_ORDER = (*_ALWAYS, "task_id", "base", *_KEPT)
"""Parameters of one row of ``update_tasks``, narrow or wide."""
JOURNAL_ORDER = tuple(col.name for col in task_journal.columns)
"""Parameters of one row of ``insert_journal``."""


def pieces(rows: Sequence[_Row]) -> Sequence[Sequence[_Row]]:
    """Cut rows into lots of the sizes that statements exist for."""
    if len(rows) == 1:
        return (rows,)
    lots: list[Sequence[_Row]] = []
    start, left = 0, len(rows)
    for size in SIZES:
        while left >= size:
            lots.append(rows[start : start + size])
            start += size
            left -= size
    return lots


def flat(rows: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The parameters of a statement over several rows."""
    return rows[0] if len(rows) == 1 else tuple(chain.from_iterable(rows))


class ByCount(dict[int, str]):
    """A statement over several rows, by their number: compiled when one is first asked for."""

    def __init__(self, compiled: Callable[[int], str]) -> None:
        super().__init__()
        self._compiled = compiled

    def __missing__(self, count: int) -> str:
        sql = self[count] = self._compiled(count)
        return sql


class Statements:
    """The compiled statements of one dialect (``str`` each)."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self.insert_tasks = ByCount(self._insert_tasks)
        self.update_tasks = ByCount(self._update_tasks)
        self.update_tasks_wide = ByCount(self._update_tasks_wide)
        self.delete_tasks = ByCount(self._delete_tasks)
        self.insert = {table: ByCount(partial(self._insert, table)) for table in _WRITTEN}
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

    def _claim(self) -> sa.Update:
        head = taskstore_head.c
        now = bindparam("now", type_=sa.BigInteger)
        return (
            sa.update(taskstore_head)
            .where(head.id == sa.literal_column("1"))
            .where(head.schema_epoch <= bindparam("epoch", type_=sa.BigInteger))
            .values(
                head_seq=head.head_seq + bindparam("count", type_=sa.BigInteger),
                last_at=sa.case((head.last_at < now, now), else_=head.last_at),
            )
        )

    @cached_property
    def claim(self) -> str:
        """Take ``count`` seqs, giving (head_seq, last_at, floor) as they are afterwards and
        the id of the commit at seq ``over``.

        Nothing is updated and given when the schema epoch is too high.
        """
        return self._claim_giving()

    def _claim_giving(self, *more: sa.ColumnElement[Any]) -> str:
        head = taskstore_head.c
        over = _commit_id_at("over").scalar_subquery()
        given = self._claim().returning(head.head_seq, head.last_at, head.floor, over, *more)
        return self._compile(given, "count", "now", "now", "epoch", "over")

    @cached_property
    def head(self) -> str:
        """Read the whole head row."""
        return self._compile(
            sa.select(taskstore_head).where(taskstore_head.c.id == sa.literal_column("1"))
        )

    @cached_property
    def lock_head_over(self) -> str:
        """:attr:`lock_head`, and the id of the commit at seq ``over``."""
        return self._compile(
            sa.select(taskstore_head, _commit_id_at("over").scalar_subquery())
            .where(taskstore_head.c.id == sa.literal_column("1"))
            .with_for_update(),
            "over",
        )

    @cached_property
    def lock_head(self) -> str:
        """Read the whole head row and keep other writers out until the transaction ends."""
        return self._compile(
            sa.select(taskstore_head)
            .where(taskstore_head.c.id == sa.literal_column("1"))
            .with_for_update()
        )

    # -- tasks ------------------------------------------------------------

    def _insert_tasks(self, count: int) -> str:
        """Insert new tasks: those whose id and booking are free and were not deleted.

        Parameters: ``count`` rows of :data:`INSERT_ORDER`, then the floor.  The
        head row is locked, so what is free stays free.
        """
        new, order = _rows(tasks.columns, count)
        gone = task_journal.alias("gone")
        same = tasks.alias("same")
        booked = tasks.alias("booked")
        statement = sa.insert(tasks).from_select(
            list(INSERT_ORDER),
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
                    booked.c.run_id == new.c.run_id, booked.c.booking == new.c.booking
                )
            ),
        )
        return self._compile(statement, *order, "floor")

    def _update_tasks(self, count: int) -> str:
        """Bring tasks from revision ``base`` to a later one whose projections,
        but for the status, are as stored: no full index is touched.

        Parameters: ``count`` rows of :data:`UPDATE_ORDER`.
        """
        if count == 1:
            # By far the most frequent: without the detour through a table of one row.
            order = [f"{name}_0" for name in UPDATE_ORDER]
            new = {
                column.name: bindparam(f"{column.name}_0", type_=column.type)
                for column in _update_columns()
            }
            return self._compile(_narrow_update(new), *order)
        rows, order = _rows(_update_columns(), count)
        return self._compile(_narrow_update(rows.c), *order)

    def _update_tasks_wide(self, count: int) -> str:
        """Bring tasks from revision ``base`` to a later one, every projection with it.

        Parameters: ``count`` rows of :data:`UPDATE_ORDER`.
        """
        rows, order = _rows(_update_columns(), count)
        return self._compile(_update(rows.c, (*_ALWAYS, *_KEPT)), *order)

    def _delete_tasks(self, count: int) -> str:
        """Delete tasks; parameters: ``count`` times (task_id, revision)."""
        terms: list[ColumnElement[bool]] = []
        order: list[str] = []
        for row in range(count):
            key, revision = f"task_id_{row}", f"revision_{row}"
            terms.append(
                sa.and_(
                    tasks.c.task_id == bindparam(key, type_=tasks.c.task_id.type),
                    tasks.c.revision == bindparam(revision, type_=sa.BigInteger),
                )
            )
            order += (key, revision)
        return self._compile(sa.delete(tasks).where(sa.or_(*terms)), *order)

    @cached_property
    def scan_tasks(self) -> str:
        """Read (task_id, revision, payload, checksum) of :data:`PAGE` tasks after an id.

        The payload is cast, because SQLite would hand out whatever type was put there.
        """
        return self._compile(
            sa.select(
                tasks.c.task_id,
                tasks.c.revision,
                _as_bytes(tasks.c.payload),
                tasks.c.checksum,
            )
            .where(tasks.c.task_id > bindparam("after", type_=tasks.c.task_id.type))
            .order_by(tasks.c.task_id)
            .limit(sa.literal_column(str(PAGE)))
            # SQLite's compiler makes a parameter of an offset that is not there.
            .offset(sa.literal_column("0")),
            "after",
        )

    # -- journal ----------------------------------------------------------

    def _insert(self, table: sa.Table, count: int) -> str:
        order = [f"{col.name}_{row}" for row in range(count) for col in table.columns]
        rows = [
            {col.name: bindparam(f"{col.name}_{row}", type_=col.type) for col in table.columns}
            for row in range(count)
        ]
        return self._compile(sa.insert(table).values(rows), *order)

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
            sa.select(head.floor, head.head_seq, *_entry())
            .select_from(joined)
            .where(head.id == sa.literal_column("1"))
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
            sa.select(*_entry())
            .where(entry.task_id == bindparam("task_id", type_=entry.task_id.type))
            .where(entry.seq >= floor)
            .order_by(entry.seq),
            "task_id",
        )

    @cached_property
    def commit_at(self) -> str:
        """Read the commit id of the entry at a seq."""
        return self._compile(_commit_id_at("seq"), "seq")

    # -- snapshots and what was set aside ---------------------------------

    @cached_property
    def snapshot_at(self) -> str:
        """Read the newest published snapshot at or before a seq."""
        return self._compile(
            sa.select(task_snapshots)
            .where(task_snapshots.c.state == sa.literal_column("'published'"))
            .where(task_snapshots.c.seq <= bindparam("at", type_=sa.BigInteger))
            .order_by(task_snapshots.c.seq.desc())
            .limit(sa.literal_column("1"))
            .offset(sa.literal_column("0")),
            "at",
        )

    @cached_property
    def read_chunk(self) -> str:
        """Read (payload, checksum) of one chunk; parameters: seq, number."""
        chunks = task_snapshot_chunks.c
        return self._compile(
            sa.select(_as_bytes(chunks.payload), chunks.checksum).where(
                chunks.seq == bindparam("seq", type_=sa.BigInteger),
                chunks.chunk == bindparam("chunk", type_=sa.BigInteger),
            ),
            "seq",
            "chunk",
        )

    @cached_property
    def read_set_aside(self) -> str:
        """Read (id, payload, checksum) of everything set aside."""
        aside = task_set_aside.c
        return self._compile(
            sa.select(aside.id, _as_bytes(aside.payload), aside.checksum).order_by(aside.id)
        )


def _commit_id_at(seq: str) -> sa.Select[tuple[str]]:
    """The commit id of the entry at the seq that the parameter of this name gives."""
    return sa.select(task_journal.c.commit_id).where(
        task_journal.c.seq == bindparam(seq, type_=sa.BigInteger)
    )


def _update_columns() -> list[sa.Column[Any]]:
    base = sa.Column("base", sa.BigInteger)
    return [base if name == "base" else tasks.c[name] for name in UPDATE_ORDER]


def _update(new: Any, names: Sequence[str]) -> sa.Update:
    return (
        sa.update(tasks)
        .values({name: new[name] for name in names})
        .where(tasks.c.task_id == new["task_id"], tasks.c.revision == new["base"])
    )


def _narrow_update(new: Any) -> sa.Update:
    unchanged = [tasks.c[name].is_not_distinct_from(new[name]) for name in _KEPT]
    return _update(new, _ALWAYS).where(*unchanged)


def _entry() -> list[ColumnElement[Any]]:
    entry = task_journal.c
    return [_as_bytes(col) if col is entry.payload else col for col in task_journal.columns]


def _as_bytes(col: ColumnElement[Any]) -> ColumnElement[Any]:
    return sa.cast(col, sa.LargeBinary).label(str(col.key))


def _rows(columns: Any, count: int) -> tuple[CTE, list[str]]:
    """``count`` rows of parameters as a table, and the names of these in order."""
    names = [(col.name, col.type) for col in columns]
    data = [
        tuple(bindparam(f"{name}_{row}", type_=kind) for name, kind in names)
        for row in range(count)
    ]
    order = [f"{name}_{row}" for row in range(count) for name, _ in names]
    return values(*(column(name, kind) for name, kind in names), name="new").data(data).cte(
        "new"
    ), order
