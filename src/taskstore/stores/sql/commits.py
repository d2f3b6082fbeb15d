"""The commit of a batch of changes in one transaction.

The transaction first updates the head row: the update assigns the seqs of the new entries.  Until
the transaction ends, the lock of the head row keeps other writers out.  The transaction then
deletes tasks (which frees their dedup keys), updates tasks, inserts tasks and inserts journal
entries.  If a row of ``tasks`` does not meet the preconditions of a change, the statement skips
this row.  If the statements affect fewer rows than expected, the transaction is rolled back, and
:func:`commit` looks for conflicts.

If the answer to COMMIT is lost, the attempt ends with ``UnconfirmedCommitError``.  In this case,
:func:`commit` calls ``Transactions.read_back_commit``, which locks the head row and looks for the
commit id in the journal.  If the journal contains the commit id, :func:`commit` returns the commit.
If the journal does not contain the commit id, :func:`commit` retries the batch of changes.  If the
server stays unreachable, :func:`commit` raises :class:`~taskstore.OutcomeUnknownError`.
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
    NetChange,
    Position,
    Put,
    dedup_key,
    find_conflicts,
    plan,
)
from taskstore.model.records import DedupKey, TaskRecord
from taskstore.store.interface import base_not_found_error
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import DriverSession, flat_parameters, row_groups
from taskstore.stores.sql.errors import ErrorKind
from taskstore.stores.sql.rows import ClaimedSeqs, HeadRow, damaged_head_error
from taskstore.stores.sql.statements import RARELY_UPDATED
from taskstore.stores.sql.tables import (
    COPIED_COLUMNS,
    SCHEMA_EPOCH,
    task_journal,
    tasks,
    taskstore_head,
)
from taskstore.stores.sql.transactions import Transactions

_MAX_COLLISIONS = 8

# The status is read as str: some drivers do not accept TaskStatus, a subclass of str.
_copied_columns = attrgetter(
    *(f"{name}.value" if name == "status" else name for name in COPIED_COLUMNS)
)
_rarely_updated = attrgetter(*RARELY_UPDATED)


class _RowMismatch(Exception):
    """Raised if a stored row does not match a change of the batch.

    The transaction is then rolled back, and :func:`commit` looks for the conflicts.
    """


class EncodedBatch:
    """The encoded rows of a batch of changes, in one list for each kind of statement."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.net_changes = plan(changes)
        self.entries: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
        """The rows of ``task_journal`` for the batch.  Each row is a pair of tuples: the columns
        from ``kind`` to ``revision``, and the columns ``payload`` and ``checksum``.  :func:`commit`
        adds the columns ``seq``, ``at`` and ``commit_id``."""
        encoded: dict[str, tuple[bytes, int]] = {}
        for change in changes:
            if isinstance(change, Put):
                record = change.record
                task_id, revision = record.task_id, record.revision
                payload = encode_record(record)
                check = checksum(payload)
                encoded[task_id] = (payload, check)
                self.entries.append((("upserted", task_id, revision), (payload, check)))
            else:
                self.entries.append((("deleted", change.task_id, change.revision), (None, None)))
        self.deletes: list[tuple[str, int]] = []
        self.updates: list[tuple[Any, ...]] = []
        self.inserts: list[tuple[Any, ...]] = []
        self.transient: list[NetChange] = []
        """The tasks that the batch both creates and deletes."""
        for net in self.net_changes:
            if net.record is None:
                if net.expected_revision:
                    self.deletes.append((net.task_id, net.expected_revision))
                else:
                    self.transient.append(net)
            elif net.expected_revision:
                self.updates.append(update_parameters(net, net.record, *encoded[net.task_id]))
            else:
                self.inserts.append(insert_values(net.record, *encoded[net.task_id]))


def insert_values(record: TaskRecord, payload: bytes, check: int) -> tuple[Any, ...]:
    """Return the values of a new row of ``tasks``, in order of the columns."""
    return (record.task_id, record.revision, *_copied_columns(record), payload, check)


def update_parameters(
    net: NetChange, record: TaskRecord, payload: bytes, check: int
) -> tuple[Any, ...]:
    """Return the parameters of an update of one task, in the order of ``UPDATE_ORDER``."""
    status = record.status.value
    rare = _rarely_updated(record)
    return (record.revision, status, payload, check, net.task_id, net.expected_revision, *rare)


def commit(transactions: Transactions, changes: Sequence[Change], clock: Clock) -> Commit:
    """Commit a batch of changes with the guarantees of ``TaskRegistryStore.apply``."""
    batch = EncodedBatch(changes)
    base = changes.base if isinstance(changes, ChangeSet) else Position(0)
    database, count, collisions = transactions.database, len(changes), 0
    for attempt in transactions.attempts(reads_back=True):
        try:
            with attempt, transactions.write() as tx:
                claimed = database.claim_seqs(tx, count, clock(), base.seq)
                if claimed is None:
                    raise schema_epoch_error(database, tx)
                if {type(claimed.head_seq), type(claimed.last_at), type(claimed.floor)} != {int}:
                    raise damaged_head_error()
                first, at = claimed.head_seq - count + 1, claimed.last_at
                commit_id = new_commit_id(at)
                committed = Commit(first, claimed.head_seq, at, commit_id)
                if not _has_base(base, claimed):
                    raise base_not_found_error(base)
                _write(database, tx, batch, claimed.floor)
                rows = [
                    (seq, at, *entry, commit_id, *stored)
                    for seq, (entry, stored) in enumerate(batch.entries, first)
                ]
                for group in database.row_groups(rows):
                    tx.execute(database.sql.insert_journal(len(group)), flat_parameters(group))
                return committed
        except _RowMismatch as mismatch:
            collisions += 1
            conflicts = transactions.run(partial(conflicts_of, batch.net_changes))
            if not conflicts and collisions == _MAX_COLLISIONS:
                conflicts = [
                    Conflict(net.task_id, net.expected_revision, net.expected_revision)
                    for net in batch.net_changes
                ]
            if conflicts:
                raise ConflictError(conflicts) from mismatch.__cause__
        if attempt.unconfirmed and transactions.read_back_commit(
            partial(_is_committed, database, committed)
        ):
            return committed
    raise AssertionError("no attempt returned or raised an error")


def schema_epoch_error(database: Database, tx: DriverSession) -> SchemaMismatchError:
    """Return the error for a ledger whose schema epoch is too high for this version of taskstore.

    In such a ledger, a claim of seqs updates no row.
    """
    row = tx.row(database.sql.head)
    epoch = None if row is None else HeadRow(*row).schema_epoch
    return SchemaMismatchError(
        f"{database.location} has schema epoch {epoch}, but "
        f"this version of taskstore can write only up to schema epoch {SCHEMA_EPOCH}",
        found=None if epoch is None else f"epoch {epoch}",
        needed=f"epoch {SCHEMA_EPOCH}",
        hint="upgrade taskstore",
    )


def _has_base(base: Position, claimed: ClaimedSeqs) -> bool:
    """Return whether the journal contains the base position of the changes.

    If a compaction set the floor, the row at floor - 1 keeps the commit id of the trimmed entry.
    If a saved snapshot set the floor, there is no row at floor - 1 and no commit id to compare.
    The function then accepts every base position at floor - 1.
    """
    if claimed.base_commit_id is None:
        return base.seq in (0, claimed.floor - 1)
    return not base.commit_id or base.commit_id == claimed.base_commit_id


def _write(database: Database, tx: DriverSession, batch: EncodedBatch, floor: int) -> None:
    """Write the changes of the batch to the table ``tasks``.

    Raises :class:`_RowMismatch` if a stored row does not match a change of the batch.
    """
    sql = database.sql
    touched = 0
    try:
        for group in row_groups(batch.deletes) if batch.deletes else ():
            touched += tx.execute_dml(sql.delete_tasks(len(group)), flat_parameters(group))
        for group in database.row_groups(batch.updates) if batch.updates else ():
            count, parameters = len(group), flat_parameters(group)
            updated = tx.execute_dml(sql.update_tasks(count), parameters)
            if updated < count:
                # Update the tasks whose copied columns change.  The wide statement skips the tasks
                # that were just updated, because these tasks have a new revision.
                updated += tx.execute_dml(sql.update_tasks_wide(count), parameters)
            touched += updated
        for group in database.row_groups(batch.inserts) if batch.inserts else ():
            touched += database.insert(tx, group, floor)
    except database.translator.errors as error:
        # An update raises this error if another task already has the new dedup key.  The failed
        # transaction cannot run a query for the other task.
        if database.translator.error_kind(error) is ErrorKind.INTEGRITY:
            raise _RowMismatch from error
        raise
    if touched != len(batch.net_changes) - len(batch.transient):
        raise _RowMismatch
    if batch.transient and conflicts_of(batch.transient, tx):
        raise _RowMismatch


def _is_committed(database: Database, expected: Commit, tx: DriverSession) -> bool:
    """Return whether the journal contains the commit ``expected``.

    The answer to the COMMIT statement of this commit was lost.
    """
    entry = task_journal.c
    commit_id = tx.scalar(sa.select(entry.commit_id).where(entry.seq == expected.first_seq))
    if commit_id is None and expected.first_seq < HeadRow(*tx.row(database.sql.head)).floor:
        raise OutcomeUnknownError(
            f"{database.location}: the outcome of a commit is unknown: the connection broke, and "
            f"the journal was trimmed past seq {expected.first_seq}, the first seq of that commit",
            hint="load the records again, and check whether they contain the changes",
        )
    return bool(commit_id == expected.commit_id)


def conflicts_of(net_changes: Sequence[NetChange], tx: DriverSession) -> list[Conflict]:
    """Lock the head row, and return the conflicts between the net changes of a batch and stored
    rows."""
    head = taskstore_head.c
    floor = tx.scalar(sa.select(head.floor).where(head.id == 1).with_for_update())
    revisions: dict[str, int] = {}
    deleted: set[str] = set()
    for group in row_groups([net.task_id for net in net_changes]):
        existing = sa.select(tasks.c.task_id, tasks.c.revision).where(tasks.c.task_id.in_(group))
        revisions.update({row[0]: row[1] for row in tx.select(existing)})
        deletions = sa.select(task_journal.c.task_id).where(
            task_journal.c.task_id.in_(group),
            task_journal.c.kind == "deleted",
            task_journal.c.seq >= floor,
        )
        deleted.update(row[0] for row in tx.select(deletions))
    records = [net.record for net in net_changes if net.record is not None]
    owners: dict[DedupKey, str] = {}
    for keys in row_groups([key for record in records if (key := dedup_key(record)) is not None]):
        stored = sa.select(tasks.c.run_id, tasks.c.run_digest, tasks.c.task_id).where(
            tasks.c.run_id.in_([run_id for run_id, _ in keys]),
            tasks.c.run_digest.in_([run_digest for _, run_digest in keys]),
        )
        owners.update({(row[0], row[1]): row[2] for row in tx.select(stored)})
    return find_conflicts(net_changes, revisions, deleted, owners)
