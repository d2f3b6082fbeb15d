"""The frequent SQL statements, each compiled once per dialect.

To commit a batch of changes, the store runs SQL text on the driver's cursor.  If each commit built
and compiled SQLAlchemy Core statements, the compilation would take several times as long as the
work of the database.  Every statement has positional parameters.  The order of the parameters is
declared next to the statement, and checked when the statement is compiled.

A statement for several rows exists only for a few row counts (``BATCH_SIZES``).  Statements for
several rows keep the number of driver calls for a batch of changes low.  With only a few row
counts, drivers and servers keep few prepared statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property, partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement, bindparam
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import Executable, FromClause

from taskstore.stores.sql.tables import (
    COPIED_COLUMNS,
    task_journal,
    task_set_aside,
    task_snapshot_chunks,
    task_snapshots,
    tasks,
    taskstore_head,
)

BATCH_SIZES = (256, 64, 16, 4, 1)
"""The row counts for which a statement for several rows exists, greatest first."""

PAGE = 1000
"""The number of rows that a scan reads per statement."""

RARELY_UPDATED = tuple(name for name in COPIED_COLUMNS if name != "status")
"""The columns that copy a payload field and that an update rarely changes."""

_INSERTABLE = (tasks, task_journal, task_snapshots, task_snapshot_chunks, task_set_aside)
_ALWAYS_UPDATED = ("revision", "status", "payload", "checksum")
_BASE_COLUMN = sa.Column("base", sa.BigInteger)
_IS_HEAD_ROW = taskstore_head.c.id == sa.literal_column("1")

UPDATE_ORDER = (*_ALWAYS_UPDATED, "task_id", "base", *RARELY_UPDATED)
"""The order of the parameters of one row in ``update_tasks`` and ``update_tasks_wide``."""


def compile_for(
    dialect: Dialect, schema: str | None, statement: Executable, **options: Any
) -> SQLCompiler:
    """Compile a Core statement; qualify the tables of the ledger with ``schema`` if it is given."""
    if schema is not None:
        options.update(schema_translate_map={None: schema}, render_schema_translate=True)
    # The type Executable has no method compile, but every statement of taskstore has one.
    compiled: SQLCompiler = statement.compile(dialect=dialect, **options)  # type: ignore[attr-defined]
    return compiled


class Statements:
    """The compiled statements of one dialect; each statement is a ``str``.

    The statements qualify the tables with ``schema`` if it is given.
    """

    def __init__(self, dialect: Dialect, schema: str | None = None) -> None:
        self._dialect = dialect
        self._schema = schema
        # Each of these functions returns the statement for a row count, compiled at the first call.
        self.insert_tasks = cache(self._insert_tasks)
        self.update_tasks = cache(self._update_tasks)
        self.update_tasks_wide = cache(self._update_tasks_wide)
        self.delete_tasks = cache(self._delete_tasks)
        self.insert = {table: cache(partial(self._insert, table)) for table in _INSERTABLE}
        """Maps each table to the function that returns an INSERT without preconditions for a row
        count.  The parameters are in the order of the columns."""
        self.insert_journal = self.insert[task_journal]

    def _compile(self, statement: Executable, *order: str) -> str:
        compiled = compile_for(self._dialect, self._schema, statement)
        actual = tuple(compiled.positiontup or ())
        if actual != order:
            raise AssertionError(f"the parameters are {actual}, but must be {order}: {compiled}")
        return str(compiled)

    # -- the head row -----------------------------------------------------

    @cached_property
    def claim(self) -> str:
        """Claim ``count`` seqs; read the head row, and the commit id of the entry at seq ``base``.

        The result row is (head_seq, last_at, floor, commit id), with the values after the claim.

        If the schema epoch is too high, the statement updates nothing and returns no row.
        """
        return self._claim_returning()

    def _claim_returning(self, *more: sa.ColumnElement[Any]) -> str:
        claim = advance_head().returning(*CLAIM_COLUMNS, *more)
        return self._compile(claim, "count", "now", "now", "epoch", "base")

    @cached_property
    def head(self) -> str:
        """Read the whole head row."""
        return self._compile(sa.select(taskstore_head).where(_IS_HEAD_ROW))

    @cached_property
    def lock_head(self) -> str:
        """Read the whole head row and lock it until the transaction ends."""
        return self._compile(sa.select(taskstore_head).where(_IS_HEAD_ROW).with_for_update())

    # -- tasks ------------------------------------------------------------

    def _parameter_table(self, columns: Sequence[sa.Column[Any]], count: int) -> FromClause:
        """Return a table named ``new`` with ``count`` rows; each value in the table is a
        parameter."""
        names = [sa.column(col.key, col.type) for col in columns]
        data = [tuple(parameters(columns, row).values()) for row in range(count)]
        return sa.values(*names, name="new").data(data).cte("new")

    def _insert_tasks(self, count: int) -> str:
        """Insert the tasks whose dedup key is free and whose task id is neither used nor deleted.

        The parameters are ``count`` rows in the order of the columns of ``tasks``, then the
        floor.  The head row is locked, so no other writer can take a free task id or dedup key.
        """
        new = self._parameter_table(list(tasks.columns), count)
        deletion = task_journal.alias("deletion")
        same_id = tasks.alias("same_id")
        same_key = tasks.alias("same_key")
        statement = sa.insert(tasks).from_select(
            [col.key for col in tasks.columns],
            sa.select(new)
            .where(
                ~sa.exists().where(
                    deletion.c.task_id == new.c.task_id,
                    deletion.c.kind == sa.literal_column("'deleted'"),
                    deletion.c.seq >= bindparam("floor", type_=sa.BigInteger),
                )
            )
            .where(~sa.exists().where(same_id.c.task_id == new.c.task_id))
            .where(
                ~sa.exists().where(
                    same_key.c.run_id == new.c.run_id, same_key.c.run_digest == new.c.run_digest
                )
            ),
        )
        return self._compile(statement, *_names(tasks.columns, count), "floor")

    def _update_tasks(self, count: int) -> str:
        """Update each task at the revision ``base`` if no rarely updated column would change.

        If the new value of a column in :data:`RARELY_UPDATED` differs from the stored value, the
        statement skips the task.  The statement does not set these columns, so the database does
        not need to update a full index (an index that is not partial).

        The parameters are ``count`` rows, each in the order of :data:`UPDATE_ORDER`.
        """
        columns = _update_columns()
        # The most frequent update changes one row, and does not need a table of parameters.
        new = parameters(columns, 0) if count == 1 else self._parameter_table(columns, count).c
        unchanged = [tasks.c[name].is_not_distinct_from(new[name]) for name in RARELY_UPDATED]
        return self._compile(
            self._update(new, _ALWAYS_UPDATED).where(*unchanged), *_names(columns, count)
        )

    def _update_tasks_wide(self, count: int) -> str:
        """Update each task at the revision ``base``, including the rarely updated columns.

        The parameters are ``count`` rows, each in the order of :data:`UPDATE_ORDER`.
        """
        columns = _update_columns()
        statement = self._update(
            self._parameter_table(columns, count).c, (*_ALWAYS_UPDATED, *RARELY_UPDATED)
        )
        return self._compile(statement, *_names(columns, count))

    def _update(self, new: Any, names: Sequence[str]) -> sa.Update:
        return (
            sa.update(tasks)
            .values({name: new[name] for name in names})
            .where(self._same_key(tasks.c.task_id, new["task_id"]), tasks.c.revision == new["base"])
        )

    def _same_key(self, stored: ColumnElement[Any], new: Any) -> ColumnElement[bool]:
        """Return the condition that a stored key is equal to the key of a new row."""
        same: ColumnElement[bool] = stored == new
        return same

    def _delete_tasks(self, count: int) -> str:
        """Delete each given task if the stored revision is the given revision.

        The parameters are the task id and the revision of each of ``count`` tasks.
        """
        columns = (tasks.c.task_id, tasks.c.revision)
        terms = [
            sa.and_(*(tasks.c[name] == value for name, value in parameters(columns, row).items()))
            for row in range(count)
        ]
        return self._compile(sa.delete(tasks).where(sa.or_(*terms)), *_names(columns, count))

    @cached_property
    def scan_tasks(self) -> str:
        """Read (task_id, revision, payload, checksum) of :data:`PAGE` tasks after a task id."""
        return self._compile(
            sa.select(
                tasks.c.task_id, tasks.c.revision, stored_bytes(tasks.c.payload), tasks.c.checksum
            )
            .where(tasks.c.task_id > bindparam("after", type_=tasks.c.task_id.type))
            .order_by(tasks.c.task_id)
            .limit(sa.literal_column(str(PAGE)))
            # Without an explicit offset, SQLAlchemy adds a parameter for the offset on SQLite.
            .offset(sa.literal_column("0")),
            "after",
        )

    # -- any table --------------------------------------------------------

    def _insert(self, table: sa.Table, count: int) -> str:
        rows = [parameters(table.columns, row) for row in range(count)]
        return self._compile(sa.insert(table).values(rows), *_names(table.columns, count))

    # -- journal ----------------------------------------------------------

    @cached_property
    def read_journal(self) -> str:
        """Read the entries in a range of seqs; each row also contains the floor and the head.

        If the range has no entry, the result is one row with the floor, the head and nulls.  The
        parameters are the seq before the range, and the highest seq of the range.
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
            sa.select(head.floor, head.head_seq, *ENTRY_COLUMNS)
            .select_from(joined)
            .where(_IS_HEAD_ROW)
            .order_by(entry.seq),
            "after",
            "last",
        )

    @cached_property
    def commit_id(self) -> str:
        """Read the commit id of the entry at a seq.

        The result has no row if the seq is below floor - 1, or if the journal has no entry at this
        seq.
        """
        entry = task_journal.c
        floor = sa.select(taskstore_head.c.floor).scalar_subquery()
        return self._compile(
            sa.select(entry.commit_id)
            .where(entry.seq == bindparam("seq", type_=sa.BigInteger))
            .where(entry.seq + sa.literal_column("1") >= floor),
            "seq",
        )

    @cached_property
    def read_history(self) -> str:
        """Read the entries of one task that are not trimmed, oldest first."""
        entry = task_journal.c
        floor = sa.select(taskstore_head.c.floor).scalar_subquery()
        return self._compile(
            sa.select(*ENTRY_COLUMNS)
            .where(entry.task_id == bindparam("task_id", type_=entry.task_id.type))
            .where(entry.seq >= floor)
            .order_by(entry.seq),
            "task_id",
        )

    # -- snapshots and quarantined payloads -------------------------------

    @cached_property
    def read_chunk(self) -> str:
        """Read (payload, checksum) of one chunk.

        The parameters are the seq of the snapshot and the number of the chunk.
        """
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
        """Read (id, payload, checksum) of every row of ``task_set_aside``."""
        row = task_set_aside.c
        return self._compile(
            sa.select(row.id, stored_bytes(row.payload), row.checksum).order_by(row.id)
        )


def advance_head() -> sa.Update:
    """Return the update that claims ``count`` seqs, unless the schema epoch is above ``epoch``."""
    head = taskstore_head.c
    now = bindparam("now", type_=sa.BigInteger)
    return (
        sa.update(taskstore_head)
        .where(_IS_HEAD_ROW)
        .where(head.schema_epoch <= bindparam("epoch", type_=sa.BigInteger))
        .values(
            head_seq=head.head_seq + bindparam("count", type_=sa.BigInteger),
            last_at=sa.case((head.last_at < now, now), else_=head.last_at),
        )
    )


def stored_bytes(col: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return a binary column cast to bytes: SQLite columns can contain values of any type."""
    return sa.cast(col, sa.LargeBinary).label(str(col.key))


CLAIM_COLUMNS: tuple[ColumnElement[Any], ...] = (
    taskstore_head.c.head_seq,
    taskstore_head.c.last_at,
    taskstore_head.c.floor,
    sa.select(task_journal.c.commit_id)
    .where(task_journal.c.seq == bindparam("base", type_=sa.BigInteger))
    .scalar_subquery(),
)
"""The columns that a claim returns, in the order of the fields of ``ClaimedSeqs``."""

ENTRY_COLUMNS: tuple[ColumnElement[Any], ...] = tuple(
    stored_bytes(col) if col is task_journal.c.payload else col for col in task_journal.columns
)
"""The columns of a journal entry, in the order of the columns of ``task_journal``."""


def _update_columns() -> list[sa.Column[Any]]:
    return [_BASE_COLUMN if name == "base" else tasks.c[name] for name in UPDATE_ORDER]


def parameters(columns: Any, row: int) -> dict[str, ColumnElement[Any]]:
    """Return the parameters of one row of a statement, by column name."""
    return {col.key: bindparam(f"{col.key}_{row}", type_=col.type) for col in columns}


def _names(columns: Any, count: int) -> list[str]:
    """Return the names of the parameters of ``count`` rows."""
    return [f"{col.key}_{row}" for row in range(count) for col in columns]
