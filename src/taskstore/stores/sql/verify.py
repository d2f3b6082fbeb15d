"""Checking a ledger against itself, in one read transaction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from taskstore.errors import CorruptStoreError
from taskstore.journal import EntryKind, JournalEntry, SetAside
from taskstore.records import TaskRecord
from taskstore.store import VerifyReport
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.rows import CARRIED, Head, Mark, TaskRow, entry_of, record_of
from taskstore.stores.sql.session import Session
from taskstore.stores.sql.snapshots import read_chunks, read_head, read_set_aside
from taskstore.stores.sql.statements import PAGE
from taskstore.stores.sql.tables import PROJECTED, task_journal, task_snapshots, tasks
from taskstore.stores.sql.transactions import Transactions

MOST = 100
"""How many problems are told one by one."""


def verify(transactions: Transactions) -> VerifyReport:
    """Check everything; see ``SupportsIntegrity.verify``."""
    return transactions.read(
        lambda session: _Check(session, transactions.database).run(), one_moment=True
    )


class _Check:
    def __init__(self, session: Session, database: Database) -> None:
        self._session = session
        self._sql = database.sql
        self._location = database.location
        self._problems: list[str] = []
        self._left_out = 0
        # The state that the journal leads to.  Comparing payloads would miss
        # nothing, but records are what callers get.
        self._expected: dict[str, TaskRecord | None] = {}

    def run(self) -> VerifyReport:
        head = read_head(self._session, self._sql)
        self._snapshots(head)
        entries = self._journal(head)
        records = self._tasks()
        aside = read_set_aside(self._session, self._sql)
        for item in aside:
            if item.where.startswith("task_set_aside"):
                self._tell(f"{item.where}: {item.reason}")
        if self._left_out:
            self._problems.append(f"and {self._left_out} more")
        return VerifyReport(head.head_seq, records, entries, tuple(self._problems))

    def _tell(self, problem: str) -> None:
        if len(self._problems) < MOST:
            self._problems.append(problem)
        else:
            self._left_out += 1

    def _snapshots(self, head: Head) -> None:
        """Read every published snapshot; the one at floor - 1 is where folding begins."""
        published = sa.select(task_snapshots).where(task_snapshots.c.state == "published")
        rows = self._session.ask(published.order_by(task_snapshots.c.seq))
        marks = [Mark(*row) for row in rows]
        base = head.floor - 1
        if base > 0 and base not in [mark.seq for mark in marks]:
            self._tell(f"there is no snapshot at seq {base}, where the journal begins")
        for mark in marks:
            if mark.seq > head.head_seq:
                self._tell(f"the snapshot at seq {mark.seq} is ahead of head {head.head_seq}")
            try:
                records = aside = 0
                for item in read_chunks(self._session, self._sql, mark, self._location):
                    if isinstance(item, TaskRecord):
                        records += 1
                        if mark.seq == base:
                            self._expected[item.task_id] = item
                    else:
                        aside += 1
                        if mark.seq == base and item.occupies is not None:
                            self._expected[item.occupies] = None
                if (records, aside) != (mark.records, mark.set_aside):
                    self._tell(
                        f"the snapshot at seq {mark.seq} holds {records} records and {aside} "
                        f"set aside, not {mark.records} and {mark.set_aside}"
                    )
            except CorruptStoreError as error:
                self._tell(str(error))

    def _journal(self, head: Head) -> int:
        """Fold the journal over the expected state, checking each step."""
        seq, at, count = head.floor - 1, 0, 0
        revisions = {
            task_id: record.revision
            for task_id, record in self._expected.items()
            if record is not None
        }
        for entry in self._entries(head.floor):
            count += 1
            if entry.seq != seq + 1:
                self._tell(f"the journal goes from seq {seq} to {entry.seq}")
            if entry.at < at:
                self._tell(f"the time of seq {entry.seq} is before that of the entry before it")
            before = revisions.get(entry.task_id)
            if before is None and entry.task_id in self._expected:
                pass  # what was set aside has a revision that only its bytes know
            elif entry.revision != (before or 0) + 1:
                self._tell(
                    f"seq {entry.seq} brings task {entry.task_id!r} from revision "
                    f"{before or 0} to {entry.revision}"
                )
            seq, at = entry.seq, entry.at
            revisions[entry.task_id] = entry.revision
            if entry.kind is EntryKind.DELETED:
                self._expected.pop(entry.task_id, None)
                revisions.pop(entry.task_id)
            else:
                self._expected[entry.task_id] = entry.record
            if entry.set_aside is not None:
                self._tell(f"{entry.set_aside.where}: {entry.set_aside.reason}")
        if seq != head.head_seq:
            self._tell(f"the journal ends at seq {seq}, the head is {head.head_seq}")
        return count

    def _entries(self, floor: int) -> Iterator[JournalEntry]:
        columns = task_journal.c
        after = floor - 1
        while True:
            page = sa.select(task_journal).where(columns.seq > after).order_by(columns.seq)
            rows = self._session.ask(page.limit(PAGE))
            for row in rows:
                try:
                    yield entry_of(row, f"{self._location}: task_journal")
                except CorruptStoreError as error:
                    self._tell(str(error))
            if len(rows) < PAGE:
                return
            after = rows[-1][0]

    def _tasks(self) -> int:
        """Compare the rows with what the journal leads to, and with their own columns."""
        count, after = 0, ""
        missing = set(self._expected)
        names = [column.name for column in tasks.columns]
        while True:
            page = sa.select(tasks).where(tasks.c.task_id > after).order_by(tasks.c.task_id)
            rows = self._session.ask(page.limit(PAGE))
            for row in rows:
                count += 1
                missing.discard(row[0])
                self._row(dict(zip(names, row, strict=True)))
            if len(rows) < PAGE:
                break
            after = rows[-1][0]
        for task_id in sorted(missing):
            if self._expected[task_id] is not None:
                self._tell(f"task {task_id!r} is in the journal, but has no row")
        return count

    def _row(self, row: dict[str, Any]) -> None:
        task_id = row["task_id"]
        found = record_of(TaskRow(task_id, row["revision"], row["payload"], row["checksum"]))
        if isinstance(found, SetAside):
            # What came in with a saved snapshot as it is, is as it should be.
            if row["checksum"] != CARRIED:
                self._tell(f"{found.where}: {found.reason}")
            return
        if task_id not in self._expected:
            self._tell(f"task {task_id!r} has a row, but is not in the journal")
        elif self._expected[task_id] != found:
            self._tell(f"task {task_id!r} is not what the journal leads to")
        for name in ("revision", *PROJECTED):
            if row[name] != getattr(found, name):
                self._tell(f"the column {name} of task {task_id!r} is not as its payload says")
