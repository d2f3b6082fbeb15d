"""The integrity check of the tables: engine, declarations, rows, columns, indexes.

The check runs in one read transaction and takes no write lock.  The engine's own check runs before
the read transaction, because on MariaDB the engine's check would end the read transaction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from msgspec.structs import replace

from taskstore.errors import CorruptStoreError
from taskstore.model.ids import is_seal_broken
from taskstore.model.journal import JournalEntry, Quarantined, Snapshot
from taskstore.model.records import TaskRecord
from taskstore.store.interface import VerifyReport
from taskstore.stores.common.integrity import IntegrityCheck, listed
from taskstore.stores.sql.compaction import TRIMMED_ENTRY, TRIMMED_REVISION
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import (
    Declarations,
    DriverSession,
    column_declaration,
    index_declaration,
)
from taskstore.stores.sql.errors import ErrorKind
from taskstore.stores.sql.rows import (
    QUARANTINED_CHECKSUM,
    HeadRow,
    TaskRow,
    entry_of,
    record_of,
)
from taskstore.stores.sql.snapshots import (
    next_key,
    read_head,
    read_published,
    read_quarantined,
    read_snapshot_rows,
)
from taskstore.stores.sql.statements import PAGE
from taskstore.stores.sql.tables import COPIED_COLUMNS, ONLY_ON, metadata, task_journal, tasks
from taskstore.stores.sql.transactions import Transactions

_DAMAGE = frozenset({ErrorKind.CORRUPT, ErrorKind.MISSING_SCHEMA})
"""The kinds of driver errors that the check reports as a problem and does not raise."""


def verify(transactions: Transactions) -> VerifyReport:
    """Verify the database; see ``SupportsIntegrity.verify``."""
    database = transactions.database
    problems: list[str] = []
    _run(
        lambda: problems.extend(transactions.read(database.maintenance.engine_problems)),
        problems,
        database,
    )
    return transactions.read(
        lambda session: _DatabaseCheck(session, database, problems).run(), in_transaction=True
    )


def _run(step: Callable[[], object], problems: list[str], database: Database) -> bool:
    """Run one step of the check, and return whether the next step can run.

    If damage stops the step, the damage is added to ``problems``.  After an error of the driver,
    the read transaction is possibly aborted, so no further step can run.
    """
    try:
        step()
    except CorruptStoreError as error:
        problems.append(str(error))
    except database.translator.errors as error:
        if database.translator.error_kind(error) not in _DAMAGE:
            raise
        problems.append(str(database.translator.translate(error)))
        return False
    return True


def _seal_problems(entry: JournalEntry) -> list[str]:
    """Return one problem if the commit id of an entry does not match the entry's time, or none."""
    where, commit_id = f"task_journal, seq {entry.seq}", entry.commit_id
    broken = is_seal_broken(commit_id, entry.at)
    problem = f"{where}: the commit id {commit_id!r} does not match the time {entry.at}"
    return [problem] if broken else []


def _expected_declarations(database: Database) -> Declarations:
    """Return the declarations of all columns and indexes that a ledger needs on a dialect."""
    dialect, names = database.sa_dialect, database.names
    expected: Declarations = {}
    for table in metadata.sorted_tables:
        key = ", ".join(column.name for column in table.primary_key)
        expected |= [index_declaration(table.name, "", key, unique=True)]
        for column in table.columns:
            kind = re.split(" CHARACTER SET | COLLATE ", column.type.compile(dialect))[0]
            collation = getattr(column.type.dialect_impl(dialect), "collation", None)
            nullable = bool(column.nullable)
            item = column_declaration(table.name, column.name, kind, collation, nullable=nullable)
            expected |= [item]
        for index in table.indexes:
            if names[0] in ONLY_ON.get(str(index.name), names):
                columns = ", ".join(column.name for column in index.columns)
                where = index.dialect_kwargs.get(f"{names[0]}_where")
                expected |= [
                    index_declaration(
                        table.name,
                        str(index.name),
                        columns,
                        unique=bool(index.unique),
                        condition=None if where is None else where.text,
                    )
                ]
    return expected


def _primary_key_index(table: sa.Table) -> sa.Index:
    """Return the index of the primary key of a copy of a table.

    An index object is added to the indexes of its table, so the table itself must not be used.
    """
    copy = table.to_metadata(sa.MetaData())
    return sa.Index(str(table.primary_key.name), *copy.primary_key)


class _DatabaseCheck:
    """Checks the declarations, the rows, the columns that copy payload fields, and the indexes.

    ``problems`` contains the problems that the engine's own check has found.
    """

    def __init__(self, session: DriverSession, database: Database, problems: list[str]) -> None:
        self._session = session
        self._database = database
        self._sql = database.sql
        self._location = database.location
        self._problems = [*problems]
        self._report = VerifyReport(0, 0, 0)

    def run(self) -> VerifyReport:
        """Return the report of all steps."""
        for step in (
            self._check_declarations,
            self._check_content,
            self._check_floor,
            self._check_indexes,
        ):
            if not _run(step, self._problems, self._database):
                break
        return replace(self._report, problems=listed(self._problems))

    # -- declarations -------------------------------------------------------

    def _check_declarations(self) -> None:
        """Compare the declarations in the database with the declarations that a ledger needs.

        Further columns and indexes are no problem: a newer version of taskstore or the host can
        have added them.
        """
        found = self._database.maintenance.declarations(self._session)
        if found is None:
            return
        for name, expected in _expected_declarations(self._database).items():
            if name not in found:
                self._problems.append(f"{name} is missing: it must be {expected}")
            elif found[name] != expected:
                self._problems.append(f"{name} is {found[name]}, but must be {expected}")

    # -- content ------------------------------------------------------------

    def _check_content(self) -> None:
        head = read_head(self._session, self._sql)
        rows = {row.seq: row for row in read_snapshot_rows(self._session)}
        labels = {seq: f"the snapshot at seq {seq}" for seq in rows}
        # Compaction raises the floor and drops older snapshots in one transaction.
        self._problems += [
            f"{labels[seq]} is below the floor {head.floor}" for seq in rows if seq < head.floor - 1
        ]

        def read(seq: int) -> Snapshot:
            return read_published(self._session, self._sql, rows[seq], self._location)

        check = IntegrityCheck(head.floor, labels, read)
        try:
            check.journal(self._entries(check, head.floor), head.head_seq)
            check.compare("the table tasks", self._current(check, head))
        finally:
            self._report = check.report()
            self._problems += check.problems

    def _rows(self, table: sa.Table, after: int | str) -> Iterator[Sequence[Any]]:
        """Yield the rows of a table in order of the primary key, which is the first column."""
        (key,) = table.primary_key
        while True:
            page = sa.select(table).where(key > after).order_by(key).limit(PAGE)
            rows = self._session.select(page)
            yield from rows
            if len(rows) < PAGE:
                return
            after = next_key(rows, after, table.name)

    def _entries(
        self, check: IntegrityCheck, floor: int
    ) -> Iterator[JournalEntry | CorruptStoreError]:
        for row in self._rows(task_journal, floor - 1):
            try:
                entry = entry_of(row, f"{self._location}: task_journal")
            except CorruptStoreError as error:
                yield error
                continue
            if entry.quarantined is not None:
                check.problems.append(f"{entry.quarantined.where}: {entry.quarantined.reason}")
            check.problems += _seal_problems(entry)
            yield entry

    def _current(self, check: IntegrityCheck, head: HeadRow) -> Snapshot:
        """Return the rows of ``tasks`` as a snapshot; compare each record with the columns of its
        row."""
        records: dict[str, TaskRecord] = {}
        quarantined = read_quarantined(self._session, self._sql)
        damaged = [item for item in quarantined if item.where.startswith("task_set_aside")]
        names = [column.key for column in tasks.columns]
        for row in self._rows(tasks, ""):
            columns = dict(zip(names, row, strict=True))
            found = record_of(TaskRow(*map(columns.__getitem__, TaskRow._fields)))
            if isinstance(found, Quarantined):
                quarantined.append(found)
                # If save_snapshot wrote a quarantined payload to the row, the row is not damaged.
                if columns["checksum"] != QUARANTINED_CHECKSUM:
                    damaged.append(found)
                continue
            records[found.task_id] = found
            for name in ("revision", *COPIED_COLUMNS):
                if columns[name] != getattr(found, name):
                    check.problems.append(
                        f"the column {name} of task {found.task_id!r} differs from the payload"
                    )
        check.problems += [f"{item.where}: {item.reason}" for item in damaged]
        return Snapshot(head.head_seq, records, head.last_at, tuple(quarantined))

    def _check_floor(self) -> None:
        """Check the row of the entry at floor - 1.  A trim keeps this row, because the commit id of
        this row is still needed."""
        seq = read_head(self._session, self._sql).floor - 1
        where = f"task_journal, seq {seq}"
        for row in self._session.select(sa.select(task_journal).where(task_journal.c.seq == seq)):
            entry = entry_of(row, f"{self._location}: {where}")
            self._problems += _seal_problems(entry)
            values = {column.key: row[n] for n, column in enumerate(task_journal.columns)}
            is_trimmed = {values[name] == value for name, value in TRIMMED_ENTRY.items()}
            # If the trim was interrupted, the row still contains the whole entry.
            whole = bool(entry.task_id) and entry.revision > TRIMMED_REVISION
            if not whole and is_trimmed != {True}:
                self._problems.append(f"{where}: the row of the trimmed entry is damaged")
            for snapshot in read_snapshot_rows(self._session):
                if snapshot.seq == seq and snapshot.at != entry.at:
                    self._problems.append(
                        f"the snapshot at seq {seq} has the time {snapshot.at}, but the entry at "
                        f"seq {seq} has the time {entry.at}"
                    )

    # -- indexes ------------------------------------------------------------

    def _check_indexes(self) -> None:
        maintenance = self._database.maintenance
        for table in metadata.sorted_tables:
            indexes = sorted(table.indexes, key=lambda index: str(index.name))
            if maintenance.has_primary_key_index:
                indexes.append(_primary_key_index(table))
            for index in indexes:
                digests = maintenance.index_digests(self._session, index)
                if digests is None or digests[0] == digests[1]:
                    continue
                (given, _), (stored, _) = digests
                difference = (
                    f"gives {given} of {stored} rows"
                    if given != stored
                    else f"gives other values than the {stored} rows"
                )
                self._problems.append(
                    f"the index {index.name} {difference} of the table {table.name}: rebuild it"
                )
