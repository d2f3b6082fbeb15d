"""How a batch of changes is committed.

One transaction: claim seqs on the head row, which is also the lock that keeps
other writers out; then deletions (their bookings become free), updates,
insertions, journal entries.  Each statement says itself what has to hold, so
the number of rows that it touched tells whether it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import sqlalchemy as sa

from taskstore.errors import (
    Conflict,
    ConflictError,
    OutcomeUnknownError,
    SchemaMismatchError,
)
from taskstore.model.codec import checksum, encode_record
from taskstore.model.ids import Clock, new_commit_id
from taskstore.model.journal import (
    Change,
    ChangeSet,
    Commit,
    Position,
    Put,
    Step,
    dedup_key,
    find_conflicts,
    plan,
)
from taskstore.model.records import DedupKey, TaskRecord
from taskstore.store.interface import base_not_found
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import Session, flat, pieces
from taskstore.stores.sql.errors import Fault
from taskstore.stores.sql.rows import Claimed, Head
from taskstore.stores.sql.statements import KEPT
from taskstore.stores.sql.tables import (
    PROJECTED,
    SCHEMA_EPOCH,
    task_journal,
    tasks,
    taskstore_head,
)
from taskstore.stores.sql.transactions import Transactions

_TRIES = 8

# Some drivers know str only, and not the enumeration of statuses that is derived from it.
_projections = attrgetter(*(f"{name}.value" if name == "status" else name for name in PROJECTED))
_kept = attrgetter(*KEPT)


class _Moved(Exception):
    """Some row was not as the batch expects it: find out which, after rolling back."""


class Batch:
    """A batch of changes, encoded and sorted by what is to be done."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.steps = plan(changes)
        self.commit_id = commit_id = new_commit_id()
        self.entries: list[tuple[Any, ...]] = []
        """The rows of the journal, but for their seq and time."""
        encoded: dict[str, tuple[bytes, int]] = {}
        for change in changes:
            entry: tuple[Any, ...]
            if isinstance(change, Put):
                record = change.record
                task_id, revision = record.task_id, record.revision
                payload = encode_record(record)
                check = checksum(payload)
                encoded[task_id] = (payload, check)
                entry = ("upserted", task_id, revision, commit_id, payload, check)
            else:
                entry = ("deleted", change.task_id, change.revision, commit_id, None, None)
            self.entries.append(entry)
        self.deletes: list[tuple[str, int]] = []
        self.updates: list[tuple[Any, ...]] = []
        self.inserts: list[tuple[Any, ...]] = []
        self.passing: list[Step] = []
        """Tasks that are created and removed in the batch itself."""
        for step in self.steps:
            if step.record is None:
                if step.base:
                    self.deletes.append((step.task_id, step.base))
                else:
                    self.passing.append(step)
            elif step.base:
                self.updates.append(update_row(step, step.record, *encoded[step.task_id]))
            else:
                self.inserts.append(insert_row(step.record, *encoded[step.task_id]))


def insert_row(record: TaskRecord, payload: bytes, check: int) -> tuple[Any, ...]:
    """A row of ``tasks``, in order of its columns."""
    return (record.task_id, record.revision, *_projections(record), payload, check)


def update_row(step: Step, record: TaskRecord, payload: bytes, check: int) -> tuple[Any, ...]:
    """The parameters of an update: ``UPDATE_ORDER`` of the statements."""
    status = record.status.value
    return (record.revision, status, payload, check, step.task_id, step.base, *_kept(record))


def commit(transactions: Transactions, changes: Sequence[Change], clock: Clock) -> Commit:
    """Commit a batch; see ``TaskRegistryStore.apply`` for what that promises."""
    batch = Batch(changes)
    over = changes.base if isinstance(changes, ChangeSet) else Position(0)
    database, count, collisions = transactions.database, len(changes), 0
    for attempt in transactions.attempts(reads_back=True):
        try:
            with attempt, transactions.write() as tx:
                claimed = database.claim(tx, count, clock(), over.seq)
                if claimed is None:
                    raise too_new(database, tx)
                first, at = claimed.head_seq - count + 1, claimed.last_at
                done = Commit(first, claimed.head_seq, at, batch.commit_id)
                if not _holds(over, claimed):
                    raise base_not_found(over)
                _write(database, tx, batch, claimed.floor)
                rows = [(seq, at, *entry) for seq, entry in enumerate(batch.entries, first)]
                for lot in database.lots(rows):
                    tx.execute(database.sql.insert_journal(len(lot)), flat(lot))
                return done
        except _Moved as moved:
            collisions += 1
            conflicts = transactions.run(partial(conflicts_of, batch.steps))
            if not conflicts and collisions == _TRIES:
                conflicts = [Conflict(step.task_id, step.base, step.base) for step in batch.steps]
            if conflicts:
                raise ConflictError(conflicts) from moved.__cause__
        if attempt.unanswered and transactions.read_back(partial(_is_there, database, done)):
            return done
    raise AssertionError("attempts end by raising")


def too_new(database: Database, tx: Session) -> SchemaMismatchError:
    """The error of a writer whose claim was refused: a newer version of taskstore has made
    the schema one that we may not write any more."""
    row = tx.row(database.sql.head)
    epoch = None if row is None else Head(*row).schema_epoch
    return SchemaMismatchError(
        f"{database.location} has schema epoch {epoch}, "
        f"this version of taskstore works with {SCHEMA_EPOCH}",
        found=None if epoch is None else f"epoch {epoch}",
        needed=f"epoch {SCHEMA_EPOCH}",
        hint="upgrade taskstore",
    )


def _holds(over: Position, claimed: Claimed) -> bool:
    """Whether the journal holds the position over which changes were made.

    Of one whose entry was trimmed, and nothing after it, that is believed.
    """
    if claimed.over is None:
        return over.seq in (0, claimed.floor - 1)
    return not over.commit_id or over.commit_id == claimed.over


def _write(database: Database, tx: Session, batch: Batch, floor: int) -> None:
    """Bring the rows of ``tasks`` to what the batch makes of them.

    Raises :class:`_Moved` where a row is not as the batch expects it.
    """
    sql = database.sql
    done = 0
    try:
        for lot in pieces(batch.deletes) if batch.deletes else ():
            done += tx.touch(sql.delete_tasks(len(lot)), flat(lot))
        for lot in database.lots(batch.updates) if batch.updates else ():
            count, parameters = len(lot), flat(lot)
            updated = tx.touch(sql.update_tasks(count), parameters)
            if updated < count:
                # Those whose projections change as well; the others no longer match.
                updated += tx.touch(sql.update_tasks_wide(count), parameters)
            done += updated
        for lot in database.lots(batch.inserts) if batch.inserts else ():
            done += database.insert(tx, lot, floor)
    except database.translator.errors as error:
        # Only a booking that an update carries off can do this; which one,
        # the transaction can no longer tell.
        if database.translator.fault_of(error) is Fault.INTEGRITY:
            raise _Moved from error
        raise
    if done != len(batch.steps) - len(batch.passing):
        raise _Moved
    if batch.passing and conflicts_of(batch.passing, tx):
        raise _Moved


def _is_there(database: Database, done: Commit, tx: Session) -> bool:
    """Whether a commit happened that was not answered."""
    entry = task_journal.c
    commit_id = tx.scalar(sa.select(entry.commit_id).where(entry.seq == done.first_seq))
    if commit_id is None and done.first_seq < Head(*tx.row(database.sql.head)).floor:
        raise OutcomeUnknownError(
            f"{database.location}: the connection broke during a commit, and the journal has "
            f"been trimmed past seq {done.first_seq}, where it would be found",
            hint="load the records again",
        )
    return bool(commit_id == done.commit_id)


def conflicts_of(steps: Sequence[Step], tx: Session) -> list[Conflict]:
    """Compare what is stored with what the steps expect, under the head lock."""
    head = taskstore_head.c
    floor = tx.scalar(sa.select(head.floor).where(head.id == 1).with_for_update())
    revisions: dict[str, int] = {}
    deleted: set[str] = set()
    for lot in pieces([step.task_id for step in steps]):
        found = sa.select(tasks.c.task_id, tasks.c.revision).where(tasks.c.task_id.in_(lot))
        revisions.update({row[0]: row[1] for row in tx.ask(found)})
        gone = sa.select(task_journal.c.task_id).where(
            task_journal.c.task_id.in_(lot),
            task_journal.c.kind == "deleted",
            task_journal.c.seq >= floor,
        )
        deleted.update(row[0] for row in tx.ask(gone))
    records = [step.record for step in steps if step.record is not None]
    holders: dict[DedupKey, str] = {}
    for keys in pieces([key for record in records if (key := dedup_key(record)) is not None]):
        held = sa.select(tasks.c.run_id, tasks.c.run_digest, tasks.c.task_id).where(
            tasks.c.run_id.in_([run_id for run_id, _ in keys]),
            tasks.c.run_digest.in_([run_digest for _, run_digest in keys]),
        )
        holders.update({(row[0], row[1]): row[2] for row in tx.ask(held)})
    return find_conflicts(steps, revisions, deleted, holders)
