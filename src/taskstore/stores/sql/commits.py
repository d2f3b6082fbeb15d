"""How a batch of changes is committed.

One transaction: claim seqs on the head row, which is also the lock that keeps
other writers out; then deletions (their bookings become free), updates,
insertions, journal entries.  Each statement says itself what has to hold, so
the number of rows that it touched tells whether it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from taskstore.clock import Clock, new_commit_id
from taskstore.codec import checksum, encode_record
from taskstore.errors import (
    Conflict,
    ConflictError,
    OutcomeUnknownError,
    SchemaMismatchError,
)
from taskstore.journal import Change, ChangeSet, Commit, Position, Put, Step, plan
from taskstore.journal import find_conflicts as conflicts_between
from taskstore.records import DedupKey, TaskRecord
from taskstore.store import other_history
from taskstore.stores.sql.connections import Connections
from taskstore.stores.sql.errors import Fault
from taskstore.stores.sql.rows import Claimed, Head
from taskstore.stores.sql.session import Session
from taskstore.stores.sql.statements import flat, pieces
from taskstore.stores.sql.tables import SCHEMA_EPOCH, task_journal, tasks, taskstore_head

_LOT = 500
_TRIES = 8


class _Moved(Exception):
    """Some row was not as the batch expects it: find out which, after rolling back."""


class Batch:
    """A batch of changes, encoded and sorted by what is to be done."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.steps = plan(changes)
        self.count = len(changes)
        self.commit_id = new_commit_id()
        last: dict[str, tuple[bytes, int]] = {}
        self._entries: list[tuple[str, str, int, bytes | None, int | None]] = []
        for change in changes:
            if isinstance(change, Put):
                record = change.record
                payload = encode_record(record)
                check = checksum(payload)
                last[record.task_id] = (payload, check)
                self._entries.append(("upserted", record.task_id, record.revision, payload, check))
            else:
                self._entries.append(("deleted", change.task_id, change.revision, None, None))
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
                self.updates.append(update_row(step, *last[step.task_id]))
            else:
                self.inserts.append(insert_row(step.record, *last[step.task_id]))

    def journal(self, first_seq: int, at: int) -> list[tuple[Any, ...]]:
        """The rows of the journal, once it is known where they go."""
        return [
            (seq, at, kind, task_id, revision, self.commit_id, payload, check)
            for seq, (kind, task_id, revision, payload, check) in enumerate(
                self._entries, first_seq
            )
        ]


def insert_row(record: TaskRecord, payload: bytes, check: int) -> tuple[Any, ...]:
    """A row of ``tasks``, in order of its columns."""
    return (
        record.task_id,
        record.revision,
        record.created_at,
        # Some drivers know str only, and not what is derived from it.
        str(record.status),
        record.runtime,
        record.owner_key,
        record.requester_session_key,
        record.child_session_key,
        record.run_id,
        record.booking,
        record.parent_task_id,
        record.parent_flow_id,
        payload,
        check,
    )


def update_row(step: Step, payload: bytes, check: int) -> tuple[Any, ...]:
    """The parameters of an update: ``UPDATE_ORDER`` of the statements."""
    record = step.record
    assert record is not None
    return (
        record.revision,
        str(record.status),
        payload,
        check,
        step.task_id,
        step.base,
        record.created_at,
        record.runtime,
        record.owner_key,
        record.requester_session_key,
        record.child_session_key,
        record.run_id,
        record.booking,
        record.parent_task_id,
        record.parent_flow_id,
    )


def commit(connections: Connections, changes: Sequence[Change], clock: Clock) -> Commit:
    """Commit a batch; see ``TaskRegistryStore.apply`` for what that promises."""
    batch = Batch(changes)
    over = changes.over if isinstance(changes, ChangeSet) else Position(0)
    database = connections.database
    claimed: list[Commit] = []

    def work(session: Session) -> Commit:
        claimed.clear()
        head, at, floor, found = claim(connections, session, batch.count, clock(), over.seq)
        done = Commit(head - batch.count + 1, head, at, batch.commit_id)
        claimed.append(done)
        if not _holds(over, floor, found):
            raise other_history(over)
        try:
            _write(connections, session, batch, floor)
        except database.translator.errors as error:
            # Only a booking that an update carries off can do this; which one,
            # the transaction can no longer tell.
            if database.translator.fault_of(error) is Fault.INTEGRITY:
                raise _Moved from error
            raise
        for lot in database.lots(batch.journal(done.first_seq, at)):
            session.execute(database.sql.insert_journal(len(lot)), flat(lot))
        return done

    def happened(session: Session) -> Commit | None:
        [done] = claimed
        head = Head(*session.row(database.sql.lock_head))
        row = session.row(database.sql.commit_at, (done.first_seq,))
        if row is None and done.first_seq < head.floor:
            raise OutcomeUnknownError(
                f"{database.location}: the connection broke during a commit, and the journal has "
                f"been trimmed past seq {done.first_seq}, where it would be found",
                hint="load the records again",
            )
        return done if row is not None and row[0] == batch.commit_id else None

    for _ in range(_TRIES):
        try:
            return connections.write(work, happened=happened)
        except _Moved as moved:
            conflicts = connections.write(lambda session: find_conflicts(session, batch.steps))
            if conflicts:
                raise ConflictError(conflicts) from moved.__cause__
    raise ConflictError([Conflict(step.task_id, step.base, step.base) for step in batch.steps])


def _holds(over: Position, floor: int, found: str | None) -> bool:
    """Whether the journal holds the position over which changes were made.

    Of one whose entry was trimmed, and nothing after it, that is believed.
    """
    if found is None:
        return over.seq in (0, floor - 1)
    return not over.commit_id or over.commit_id == found


def claim(
    connections: Connections, session: Session, count: int, now: int, over: int = 0
) -> Claimed:
    """Take ``count`` seqs and the head lock, and look which commit is at seq ``over``.

    Raises :class:`~taskstore.SchemaMismatchError` when a newer version of
    taskstore has made the schema one that we may not write any more.
    """
    claimed = connections.database.claim(session, count, now, over)
    if claimed is not None:
        return claimed
    row = session.row(connections.database.sql.head)
    epoch = None if row is None else Head(*row).schema_epoch
    raise SchemaMismatchError(
        f"{connections.database.location} has schema epoch {epoch}, "
        f"this version of taskstore works with {SCHEMA_EPOCH}",
        found=None if epoch is None else f"epoch {epoch}",
        needed=f"epoch {SCHEMA_EPOCH}",
        hint="upgrade taskstore",
    )


def _write(connections: Connections, session: Session, batch: Batch, floor: int) -> None:
    """Bring the rows of ``tasks`` to what the batch makes of them."""
    database = connections.database
    sql = database.sql
    for deletes in pieces(batch.deletes):
        _expect(session.touch(sql.delete_tasks(len(deletes)), flat(deletes)), deletes)
    for updates in database.lots(batch.updates):
        count, parameters = len(updates), flat(updates)
        done = session.touch(sql.update_tasks(count), parameters)
        if done < count:
            # Those whose projections change as well; the others no longer match.
            done += session.touch(sql.update_tasks_wide(count), parameters)
        _expect(done, updates)
    for inserts in database.lots(batch.inserts):
        _expect(database.insert(session, inserts, floor), inserts)
    if batch.passing and find_conflicts(session, batch.passing):
        raise _Moved


def _expect(done: int, rows: Sequence[Any]) -> None:
    if done != len(rows):
        raise _Moved


def find_conflicts(session: Session, steps: Sequence[Step]) -> list[Conflict]:
    """Compare what is stored with what the steps expect, under the head lock."""
    head = taskstore_head.c
    floor = session.scalar(sa.select(head.floor).where(head.id == 1).with_for_update())
    ids = [step.task_id for step in steps]
    revisions: dict[str, int] = {}
    deleted: set[str] = set()
    for lot in _lots(ids):
        found = sa.select(tasks.c.task_id, tasks.c.revision).where(tasks.c.task_id.in_(lot))
        revisions.update({row[0]: row[1] for row in session.ask(found)})
        gone = sa.select(task_journal.c.task_id).where(
            task_journal.c.task_id.in_(lot),
            task_journal.c.kind == "deleted",
            task_journal.c.seq >= floor,
        )
        deleted.update(row[0] for row in session.ask(gone))
    return conflicts_between(steps, revisions, deleted, _holders(session, steps))


def _holders(session: Session, steps: Sequence[Step]) -> dict[DedupKey, str]:
    """Which tasks hold the dedup keys that the steps claim or keep."""
    records = [step.record for step in steps if step.record is not None]
    claims = [key for record in records if (key := record.dedup_key) is not None]
    holders: dict[DedupKey, str] = {}
    for lot in _lots(claims):
        query = sa.select(tasks.c.run_id, tasks.c.booking, tasks.c.task_id).where(
            tasks.c.run_id.in_([run_id for run_id, _ in lot]),
            tasks.c.booking.in_([booking for _, booking in lot]),
        )
        holders.update({(row[0], row[1]): row[2] for row in session.ask(query)})
    return holders


def _lots(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + _LOT] for start in range(0, len(items), _LOT)]
