"""Checking the tables of a whole ledger against each other, in one read transaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from taskstore.errors import CorruptStoreError
from taskstore.journal import JournalEntry, SetAside, Snapshot
from taskstore.records import TaskRecord
from taskstore.store import VerifyReport
from taskstore.stores.integrity import IntegrityCheck
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import Session
from taskstore.stores.sql.rows import CARRIED, TaskRow, entry_of, record_of
from taskstore.stores.sql.snapshots import read_head, read_marked, read_marks, read_set_aside
from taskstore.stores.sql.statements import PAGE
from taskstore.stores.sql.tables import PROJECTED, task_journal, tasks
from taskstore.stores.sql.transactions import Transactions


def verify(transactions: Transactions) -> VerifyReport:
    """Check everything; see ``SupportsIntegrity.verify``."""
    return transactions.read(
        lambda session: _Tables(session, transactions.database).verify(), one_moment=True
    )


class _Tables:
    """Reads the tables, and checks what only they have: checksums, and columns beside payloads."""

    def __init__(self, session: Session, database: Database) -> None:
        self._session = session
        self._sql = database.sql
        self._location = database.location
        self._marks = {mark.seq: mark for mark in read_marks(session)}
        self._head = read_head(session, self._sql)
        places = {seq: f"the snapshot at seq {seq}" for seq in self._marks}
        self._check = IntegrityCheck(self._head.floor, places, self._snapshot)

    def verify(self) -> VerifyReport:
        self._check.journal(self._entries(), self._head.head_seq)
        self._check.compare("the table tasks", self._current())
        return self._check.report()

    def _snapshot(self, seq: int) -> Snapshot:
        return read_marked(self._session, self._sql, self._marks[seq], self._location)

    def _pages(self, table: sa.Table, after: int | str) -> Iterator[Sequence[Any]]:
        """The rows of a table in order of its key, which is its first column."""
        (key,) = table.primary_key
        while True:
            page = sa.select(table).where(key > after).order_by(key).limit(PAGE)
            rows = self._session.ask(page)
            yield from rows
            if len(rows) < PAGE:
                return
            after = rows[-1][0]

    def _entries(self) -> Iterator[JournalEntry | CorruptStoreError]:
        for row in self._pages(task_journal, self._head.floor - 1):
            try:
                entry = entry_of(row, f"{self._location}: task_journal")
            except CorruptStoreError as error:
                yield error
                continue
            if entry.set_aside is not None:
                self._check.problems.append(f"{entry.set_aside.where}: {entry.set_aside.reason}")
            yield entry

    def _current(self) -> Snapshot:
        """What the rows hold now; each is compared with its own columns."""
        records: dict[str, TaskRecord] = {}
        aside = read_set_aside(self._session, self._sql)
        damaged = [item for item in aside if item.where.startswith("task_set_aside")]
        names = [column.name for column in tasks.columns]
        for row in self._pages(tasks, ""):
            columns = dict(zip(names, row, strict=True))
            found = record_of(TaskRow(*map(columns.__getitem__, TaskRow._fields)))
            if isinstance(found, SetAside):
                aside.append(found)
                # What came in with a saved snapshot as it is, is as it should be.
                if columns["checksum"] != CARRIED:
                    damaged.append(found)
                continue
            records[found.task_id] = found
            for name in ("revision", *PROJECTED):
                if columns[name] != getattr(found, name):
                    self._check.problems.append(
                        f"the column {name} of task {found.task_id!r} is not as its payload says"
                    )
        for item in damaged:
            self._check.problems.append(f"{item.where}: {item.reason}")
        return Snapshot(self._head.head_seq, records, set_aside=tuple(aside))
