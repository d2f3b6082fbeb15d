"""Changes, commits, journal entries, snapshots, and pure functions for these values.

A store commits a batch of changes as journal entries with contiguous seqs.  :func:`fold`
applies entries to a snapshot and returns a newer snapshot.  Some stores call the functions of
this module.  For all other stores, a test compares the results of the store with the results
of these functions.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Protocol, Self

from msgspec import Struct
from msgspec.structs import force_setattr

from taskstore.errors import Conflict, ConflictError, CorruptStoreError, ValidationError
from taskstore.model.records import KEY_BYTES, MAX_INT, DedupKey, TaskRecord, TaskStatus
from taskstore.model.validation import check_int, check_key, check_text, validated


class EntryKind(StrEnum):
    """The effect of a journal entry on its task."""

    UPSERTED = "upserted"
    DELETED = "deleted"


# Module constants avoid the member lookup that an enum does at each access.
_UPSERTED, _DELETED = EntryKind.UPSERTED, EntryKind.DELETED


class Put(Struct, frozen=True, gc=False):
    """A change that stores a record.  The record's revision is the task's stored revision + 1.

    A record with revision 1 creates the task.  The constructor validates the record, so a
    store never gets an invalid record.
    """

    record: TaskRecord

    def __post_init__(self) -> None:
        force_setattr(self, "record", validated(self.record))

    @property
    def task_id(self) -> str:
        """The id of the task (``str``)."""
        return self.record.task_id

    @property
    def revision(self) -> int:
        """The revision of the task after the change (``int`` ≥ 1)."""
        return self.record.revision


_PUT_TEMPLATE = Put(
    TaskRecord(
        task_id="any", revision=1, runtime="any", task="", status=TaskStatus.QUEUED, created_at=0
    )
)


def unchecked_put(record: TaskRecord) -> Put:
    """Return a :class:`Put` of ``record`` without validation: ``record`` must be valid.

    Records from :mod:`~taskstore.model.lifecycle` and :mod:`~taskstore.model.leases` are
    valid, because these modules check their arguments.
    """
    put: Put = _PUT_TEMPLATE.__copy__()  # type: ignore[attr-defined]  # missing in msgspec's stubs
    force_setattr(put, "record", record)
    return put


class Remove(Struct, frozen=True, gc=False):
    """A change that deletes a task; ``revision`` (``int`` ≥ 2) is the stored revision + 1."""

    task_id: str
    revision: int

    def __post_init__(self) -> None:
        force_setattr(self, "task_id", check_key("task_id", self.task_id))
        check_int("revision", self.revision, 2)


Change = Put | Remove
"""A change that a caller passes to a store."""


class HasDedupKey(Protocol):
    """An object with the two fields of a dedup key."""

    @property
    def run_id(self) -> str | None:
        """The id of the run that the task was created for; ``None`` if the task has no run."""

    @property
    def run_digest(self) -> str | None:
        """The digest of the task's run scope; ``None`` if the task has no run."""


def dedup_key(record: HasDedupKey | None) -> DedupKey | None:
    """Return ``(run_id, run_digest)``, or ``None`` if the record is ``None`` or has no run.

    At most one task of a ledger has a given dedup key.  A ``create`` with the dedup key of
    an existing task returns the existing task and only fills its empty fields.
    ``lifecycle.run_digest`` computes the digest, and ``lifecycle.fill_missing`` fills the
    empty fields.
    """
    if record is None or record.run_id is None or record.run_digest is None:
        return None
    return (record.run_id, record.run_digest)


class Position(Struct, frozen=True, gc=False):
    """The journal position directly after the entry ``seq`` of the commit ``commit_id``.

    If a backup is restored, or a standby takes over without the newest commits, a new
    history uses the same seqs again.  The commit id distinguishes the new history from the
    old history.  The commit id is empty if unknown.
    """

    seq: int
    commit_id: str = ""

    def __str__(self) -> str:
        return f"{self.seq}:{self.commit_id}" if self.commit_id else str(self.seq)

    @classmethod
    def of(cls, cursor: object) -> Self:
        """Return ``cursor`` as a position; ``cursor`` is a seq, a text or a :class:`Position`.

        Raises :class:`ValidationError` for any other value of ``cursor``.
        """
        if isinstance(cursor, cls):
            return cursor
        if not isinstance(cursor, str):
            return cls(check_int("after", cursor))
        seq, colon, commit_id = check_text("after", cursor, KEY_BYTES).partition(":")
        # A cursor that was cut at its colon has lost its commit id: it is no seq.
        is_cut = bool(colon) and not commit_id
        if is_cut or not (seq.isascii() and seq.isdecimal()):
            raise ValidationError(
                "after",
                "must be a seq such as 42, or the whole cursor of a journal entry such as "
                f"42:0f1e2d…, not {cursor!r}",
            )
        return cls(check_int("after", int(seq)), commit_id)


class ChangeSet(list[Change]):
    """Changes that were computed from the records at the position ``base``.

    :meth:`~taskstore.TaskRegistryStore.apply` accepts a change set like any sequence of
    changes.  A store that keeps commit ids refuses a change set whose base position is not
    in the store's journal: in another history, the same revision of a task can be a
    different record.
    """

    __slots__ = ("base",)

    def __init__(self, changes: Iterable[Change], base: Position) -> None:
        self[:] = changes
        self.base = base


class Commit(Struct, frozen=True, gc=False):
    """The seqs of the first and the last change of a commit, the commit time and the commit id.

    ``at`` is the commit time in Unix milliseconds UTC and never less than the time of the previous
    commit.  ``commit_id`` is unique, or empty if the store keeps no commit ids.
    """

    first_seq: int
    last_seq: int
    at: int
    commit_id: str = ""


class Quarantined(Struct, frozen=True, gc=False):
    """A stored record that cannot be decoded, kept as its raw bytes.

    ``where`` is the location of the record.  ``reason`` says why the record cannot be decoded
    (``str``).  ``task_id`` and ``revision`` are ``None`` if unknown.  ``superseded`` is true if a
    later change of the task has replaced this record.  A superseded record does not occupy the
    task's id, and is dropped when the task is deleted.
    """

    raw: bytes
    where: str
    reason: str
    task_id: str | None = None
    revision: int | None = None
    superseded: bool = False

    @property
    def occupied_task_id(self) -> str | None:
        """The id of the task whose current record is this quarantined record; ``None`` if the id
        is unknown or the record is superseded."""
        return None if self.superseded else self.task_id

    def is_obsoleted_by(self, task_id: str, kind: EntryKind) -> bool:
        """Return whether a later entry with the given task id and kind makes this record obsolete.

        Only a deletion of the same task makes a superseded record obsolete.
        """
        return self.task_id == task_id and (not self.superseded or kind is EntryKind.DELETED)


class JournalEntry(Struct, frozen=True, gc=False):
    """One committed change.

    ``seq`` is the entry's number in the journal (``int`` ≥ 1).  ``at`` is the time of the
    commit (Unix milliseconds).  ``revision`` is the task's revision after the change.
    ``record`` is ``None`` for a deletion, and for an upsert whose record cannot be decoded.
    If the record cannot be decoded, ``quarantined`` contains the bytes of the record.
    """

    seq: int
    at: int
    kind: EntryKind
    task_id: str
    revision: int
    record: TaskRecord | None
    commit_id: str = ""
    quarantined: Quarantined | None = None

    @property
    def cursor(self) -> str:
        """The position after this entry as text, for ``changes(after=…)``."""
        return str(Position(self.seq, self.commit_id))


_EMPTY: Mapping[str, TaskRecord] = MappingProxyType({})


class Snapshot(Struct, frozen=True):
    """All records as of one seq.

    ``records`` maps task_id to record and is immutable: the constructor copies the given
    mapping.  ``at`` is the time of the commit at ``seq`` (Unix milliseconds, 0 before the
    first commit).  ``quarantined`` contains the records that cannot be decoded, so that a
    store that rewrites its data does not drop these records.
    """

    seq: int
    records: Mapping[str, TaskRecord] = _EMPTY
    at: int = 0
    quarantined: tuple[Quarantined, ...] = ()

    def __post_init__(self) -> None:
        if type(self.seq) is not int or not 0 <= self.seq <= MAX_INT:
            check_int("seq", self.seq)
        # A ``MappingProxyType`` is copied too, because the mapping behind the proxy can be mutable.
        # For a proxied dict, copy() is one fast call, but dict() looks up each item.
        given = self.records
        copied = given.copy() if isinstance(given, MappingProxyType) else given
        if copied is given or type(copied) is not dict:
            copied = dict(copied)
        force_setattr(self, "records", MappingProxyType(copied))


def snapshot_of(seq: int, at: int, items: Iterable[TaskRecord | Quarantined]) -> Snapshot:
    """Return a snapshot at ``seq`` that contains the given records and quarantined records."""
    records: dict[str, TaskRecord] = {}
    quarantined: list[Quarantined] = []
    for item in items:
        if isinstance(item, TaskRecord):
            records[item.task_id] = item
        else:
            quarantined.append(item)
    return Snapshot(seq, MappingProxyType(records), at, tuple(quarantined))


def validated_snapshot(snapshot: Snapshot) -> Snapshot:
    """Return a copy of ``snapshot`` with validated records.

    Raises :class:`ValidationError` for an invalid record, for a record whose id is
    not its key in ``records``, and for two records with the same dedup key.
    """
    records: dict[str, TaskRecord] = {}
    ids_by_key: dict[DedupKey, str] = {}
    for task_id, given in snapshot.records.items():
        record = validated(given)
        if record.task_id != task_id:
            raise ValidationError("records", f"has task {record.task_id!r} under id {task_id!r}")
        key = dedup_key(record)
        if key is not None:
            existing = ids_by_key.setdefault(key, task_id)
            if existing != task_id:
                reason = f"tasks {task_id!r} and {existing!r} have the same dedup key"
                raise ValidationError("records", reason)
        records[record.task_id] = record
    return Snapshot(snapshot.seq, MappingProxyType(records), snapshot.at, snapshot.quarantined)


class NetChange(Struct, frozen=True, gc=False):
    """The net effect of all changes of a batch on one task.

    ``expected_revision`` is the required stored revision (0: the task must not exist).  ``record``
    is the task's record after the batch (``None``: the task is removed).  ``revision`` is the
    task's revision after the batch.
    """

    task_id: str
    expected_revision: int
    revision: int
    record: TaskRecord | None

    @property
    def new_dedup_key(self) -> DedupKey | None:
        """The dedup key if this net change creates a task with a dedup key, otherwise ``None``."""
        return None if self.expected_revision else dedup_key(self.record)


def plan(changes: Sequence[Change]) -> list[NetChange]:
    """Return one :class:`NetChange` per task of a batch, in the order of each task's first change.

    Raises :class:`ValidationError` for an empty batch or a value that is not a change,
    and :class:`ConflictError` if changes of the batch contradict each other.
    """
    if not changes:
        raise ValidationError("changes", "must not be empty")
    net_changes: dict[str, NetChange] = {}
    for change in changes:
        if isinstance(change, Put):
            record: TaskRecord | None = change.record
            task_id, revision = change.record.task_id, change.record.revision
        elif isinstance(change, Remove):
            record, task_id, revision = None, change.task_id, change.revision
        else:
            raise ValidationError("changes", f"must be Put or Remove, not {type(change).__name__}")
        before = net_changes.get(task_id)
        if before is None:
            net_changes[task_id] = NetChange(task_id, revision - 1, revision, record)
            continue
        if before.record is None:
            raise ConflictError([Conflict(task_id, revision - 1, 0, deleted=True)])
        if revision != before.revision + 1:
            raise ConflictError([Conflict(task_id, revision - 1, before.revision)])
        net_changes[task_id] = NetChange(task_id, before.expected_revision, revision, record)
    ids_by_key: dict[DedupKey, str] = {}
    for net in net_changes.values() if len(net_changes) > 1 else ():
        key = net.new_dedup_key
        if key is not None:
            existing = ids_by_key.setdefault(key, net.task_id)
            if existing != net.task_id:
                raise ConflictError([Conflict(net.task_id, 0, 0, existing_task_id=existing)])
    return list(net_changes.values())


def find_conflicts(
    net_changes: Sequence[NetChange],
    revisions: Mapping[str, int],
    deleted: Container[str],
    ids_by_key: Mapping[DedupKey, str],
) -> list[Conflict]:
    """Return the conflicts between the net changes and the stored tasks; empty if all net changes
    apply.

    ``revisions`` maps the id of each stored task to its revision (0 if the record
    cannot be decoded and its revision is unknown).  ``deleted`` contains the ids of
    the tasks whose deletion is still in the journal.  ``ids_by_key`` maps a dedup key
    to the id of its task.  A net change that removes a task frees the task's dedup key.
    """
    conflicts = []
    for net in net_changes:
        task_id = net.task_id
        found = revisions.get(task_id)
        if found != (net.expected_revision or None) or task_id in deleted:
            is_deleted = task_id in deleted
            conflicts.append(
                Conflict(task_id, net.expected_revision, found or 0, deleted=is_deleted)
            )
            continue
        key = dedup_key(net.record)
        existing = None if key is None else ids_by_key.get(key)
        if existing in (None, task_id):
            continue
        if existing not in {net.task_id for net in net_changes if net.record is None}:
            conflicts.append(
                Conflict(task_id, net.expected_revision, found or 0, existing_task_id=existing)
            )
    return conflicts


def entries_of(changes: Sequence[Change], commit: Commit) -> list[JournalEntry]:
    """Return the journal entries for the changes of a commit, in the order of the changes."""
    at, commit_id = commit.at, commit.commit_id
    entries = []
    for seq, change in enumerate(changes, commit.first_seq):
        if isinstance(change, Put):
            record = change.record
            task_id, revision = record.task_id, record.revision
            entry = JournalEntry(seq, at, _UPSERTED, task_id, revision, record, commit_id)
        else:
            task_id, revision = change.task_id, change.revision
            entry = JournalEntry(seq, at, _DELETED, task_id, revision, None, commit_id)
        entries.append(entry)
    return entries


def fold(snapshot: Snapshot, entries: Iterable[JournalEntry]) -> Snapshot:
    """Return the newer snapshot that results from applying ``entries`` to ``snapshot``.

    Raises :class:`CorruptStoreError` if there is a gap between the snapshot and the
    entries, or between two entries.
    """
    records = dict(snapshot.records)
    quarantined = list(snapshot.quarantined)
    seq, at = snapshot.seq, snapshot.at
    for entry in entries:
        if entry.seq != seq + 1:
            raise CorruptStoreError(
                "journal", f"seq {entry.seq} follows seq {seq}; the expected seq is {seq + 1}"
            )
        seq, at = entry.seq, entry.at
        if quarantined:
            task_id, kind = entry.task_id, entry.kind
            quarantined = [item for item in quarantined if not item.is_obsoleted_by(task_id, kind)]
        if entry.record is not None:
            records[entry.task_id] = entry.record
        else:
            records.pop(entry.task_id, None)
            if entry.quarantined is not None:
                quarantined.append(entry.quarantined)
    return Snapshot(seq, MappingProxyType(records), at, tuple(quarantined))


def quarantined_revisions(quarantined: Iterable[Quarantined]) -> dict[str, int]:
    """Return the revision of each quarantined record that is the current record of a task, by task
    id.

    The revision is 0 if it is unknown.
    """
    return {
        item.occupied_task_id: item.revision or 0
        for item in quarantined
        if item.occupied_task_id is not None
    }
