"""Changes, commits, entries, snapshots, and how one becomes the other: all pure.

A caller hands a batch of changes to a store; the store commits it as journal
entries with contiguous seqs; folding entries over a snapshot gives the newer
snapshot.  Every store is built from these functions or proved against them.
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
    """What a journal entry did to its task."""

    UPSERTED = "upserted"
    DELETED = "deleted"


# An enum looks its members up at each access.
_UPSERTED, _DELETED = EntryKind.UPSERTED, EntryKind.DELETED


class Put(Struct, frozen=True, gc=False):
    """Store this record, whose revision is one more than the stored one.

    Revision 1 creates the task.  The record is validated here, so that no
    store ever sees one that may not be stored.
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
        """The revision that the task has afterwards (``int`` ≥ 1)."""
        return self.record.revision


_A_PUT = Put(
    TaskRecord(
        task_id="any", revision=1, runtime="any", task="", status=TaskStatus.QUEUED, created_at=0
    )
)


def unchecked_put(record: TaskRecord) -> Put:
    """The :class:`Put` of a record that is known to be valid, without looking at it again.

    That is so for what :mod:`~taskstore.model.lifecycle`
    and :mod:`~taskstore.model.leases` make: they check what they are given.
    """
    put: Put = _A_PUT.__copy__()  # type: ignore[attr-defined]  # msgspec's stubs leave it out
    force_setattr(put, "record", record)
    return put


class Remove(Struct, frozen=True, gc=False):
    """Delete this task; ``revision`` is one more than the stored one (``int`` ≥ 2)."""

    task_id: str
    revision: int

    def __post_init__(self) -> None:
        force_setattr(self, "task_id", check_key("task_id", self.task_id))
        check_int("revision", self.revision, 2)


Change = Put | Remove
"""What a caller asks a store for."""


class HasDedupKey(Protocol):
    """Anything that says for which run it was created."""

    @property
    def run_id(self) -> str | None:
        """The id of the run, if it was created for one."""

    @property
    def run_digest(self) -> str | None:
        """The digest of the run scope."""


def dedup_key(record: HasDedupKey | None) -> DedupKey | None:
    """``(run_id, run_digest)``, which at most one task of a ledger has: it makes ``create``
    idempotent.  ``None`` for a task without a run, and for none."""
    if record is None or record.run_id is None or record.run_digest is None:
        return None
    return (record.run_id, record.run_digest)


class Position(Struct, frozen=True, gc=False):
    """A place in one history: right after the entry ``seq``, which is of ``commit_id``.

    The id tells this history from another that has the same seqs: that of a
    backup which was restored, or of a standby which took over without the
    last commits.  It is empty where it is not known.
    """

    seq: int
    commit_id: str = ""

    def __str__(self) -> str:
        return f"{self.seq}:{self.commit_id}"

    @classmethod
    def of(cls, cursor: object) -> Self:
        """The position that a seq or the text of a position (a cursor) names.

        Raises :class:`ValidationError` for anything else.
        """
        if isinstance(cursor, cls):
            return cursor
        if not isinstance(cursor, str):
            return cls(check_int("after", cursor))
        seq, _, commit_id = check_text("after", cursor, KEY_BYTES).partition(":")
        if not (seq.isascii() and seq.isdecimal()):
            raise ValidationError("after", f"must be a seq or a cursor, not {cursor!r}")
        return cls(check_int("after", int(seq)), commit_id)


class ChangeSet(list[Change]):
    """Changes that were worked out from what stood at a position, ``base``.

    :meth:`~taskstore.TaskRegistryStore.apply` takes it as any sequence of
    changes.  A store that knows its commits refuses it when its history does
    not hold that position: the same revision may be another record there.
    """

    __slots__ = ("base",)

    def __init__(self, changes: Iterable[Change], base: Position) -> None:
        self[:] = changes
        self.base = base


class Commit(Struct, frozen=True, gc=False):
    """What a store committed: the seqs of the first and last change, and when.

    ``at`` is in Unix milliseconds UTC and never less than that of the commit
    before; ``commit_id`` is unique to this commit (empty where a store keeps none).
    """

    first_seq: int
    last_seq: int
    at: int
    commit_id: str = ""


class Quarantined(Struct, frozen=True, gc=False):
    """A stored record that could not be decoded, kept as the bytes that it is.

    ``where`` says where it lies and ``reason`` why it does not decode
    (``str``).  ``task_id`` and ``revision`` are given as far as they can be told.
    ``superseded`` marks an older image of a task that has later changes: it
    does not occupy the id of the task, and goes when the task is deleted.
    """

    raw: bytes
    where: str
    reason: str
    task_id: str | None = None
    revision: int | None = None
    superseded: bool = False

    @property
    def occupies(self) -> str | None:
        """The id of the task that this is the current image of, if that can be told."""
        return None if self.superseded else self.task_id

    def goes_with(self, task_id: str, kind: EntryKind) -> bool:
        """Whether a later entry makes this obsolete: it is the next image of the same task,
        or deletes the task, which removes its superseded images too."""
        return self.task_id == task_id and (not self.superseded or kind is EntryKind.DELETED)


class JournalEntry(Struct, frozen=True, gc=False):
    """One committed change.

    ``seq`` is its place in the journal (``int`` ≥ 1), ``at`` the time of the
    commit (Unix milliseconds), ``revision`` the task's afterwards.
    ``record`` is ``None`` for a deletion, and for an upsert that could not be
    decoded: then ``quarantined`` has its bytes.
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
        """Where this entry ends, for ``changes(after=…)``: unlike a seq it knows its history."""
        return str(Position(self.seq, self.commit_id))


_EMPTY: Mapping[str, TaskRecord] = MappingProxyType({})


class Snapshot(Struct, frozen=True):
    """Every live record as of one seq.

    ``records`` maps task_id to record and cannot be changed: a mapping given
    to the constructor is copied.  ``at`` is the time of the commit at
    ``seq`` (Unix milliseconds, 0 before the first).  ``quarantined`` holds what
    could not be decoded; it travels with the snapshot, so that nothing that
    rewrites a store drops it.
    """

    seq: int
    records: Mapping[str, TaskRecord] = _EMPTY
    at: int = 0
    quarantined: tuple[Quarantined, ...] = ()

    def __post_init__(self) -> None:
        if type(self.seq) is not int or not 0 <= self.seq <= MAX_INT:
            check_int("seq", self.seq)
        # Copied even if it is a proxy: of whose mapping, nobody knows.  A dict behind
        # one copies itself at once, where dict() would ask for each item.
        given = self.records
        copied = given.copy() if isinstance(given, MappingProxyType) else given
        if copied is given or type(copied) is not dict:
            copied = dict(copied)
        force_setattr(self, "records", MappingProxyType(copied))


def snapshot_of(seq: int, at: int, items: Iterable[TaskRecord | Quarantined]) -> Snapshot:
    """The snapshot that holds these records, and what is set aside among them."""
    records: dict[str, TaskRecord] = {}
    aside: list[Quarantined] = []
    for item in items:
        if isinstance(item, TaskRecord):
            records[item.task_id] = item
        else:
            aside.append(item)
    return Snapshot(seq, MappingProxyType(records), at, tuple(aside))


def validated_snapshot(snapshot: Snapshot) -> Snapshot:
    """Return ``snapshot`` as it may become the content of a store, its mapping copied.

    Raises :class:`ValidationError` for a record that may not be stored, for
    one under another id than its own, and for two that hold the same booking.
    """
    records: dict[str, TaskRecord] = {}
    booked: dict[DedupKey, str] = {}
    for task_id, given in snapshot.records.items():
        record = validated(given)
        if record.task_id != task_id:
            raise ValidationError("records", f"has task {record.task_id!r} under {task_id!r}")
        key = dedup_key(record)
        if key is not None:
            holder = booked.setdefault(key, task_id)
            if holder != task_id:
                raise ValidationError("records", f"{task_id!r} and {holder!r} book the same run")
        records[record.task_id] = record
    return Snapshot(snapshot.seq, MappingProxyType(records), snapshot.at, snapshot.quarantined)


class Step(Struct, frozen=True, gc=False):
    """What a batch does to one task, all its changes taken together.

    ``base`` is the revision that has to be stored beforehand (0: absent),
    ``record`` the last image (``None``: removed) and ``revision`` the last revision.
    """

    task_id: str
    base: int
    revision: int
    record: TaskRecord | None

    @property
    def claims(self) -> DedupKey | None:
        """The dedup key that a task created here claims, if any."""
        return None if self.base else dedup_key(self.record)


def plan(changes: Sequence[Change]) -> list[Step]:
    """Reduce a batch to one step per task, in order of first appearance.

    Raises :class:`ValidationError` for an empty batch or something that is
    not a change, :class:`ConflictError` where the batch contradicts itself.
    """
    if not changes:
        raise ValidationError("changes", "must not be empty")
    steps: dict[str, Step] = {}
    for change in changes:
        if isinstance(change, Put):
            record: TaskRecord | None = change.record
            task_id, revision = change.record.task_id, change.record.revision
        elif isinstance(change, Remove):
            record, task_id, revision = None, change.task_id, change.revision
        else:
            raise ValidationError("changes", f"must be Put or Remove, not {type(change).__name__}")
        before = steps.get(task_id)
        if before is None:
            steps[task_id] = Step(task_id, revision - 1, revision, record)
            continue
        if before.record is None:
            raise ConflictError([Conflict(task_id, revision - 1, 0, deleted=True)])
        if revision != before.revision + 1:
            raise ConflictError([Conflict(task_id, revision - 1, before.revision)])
        steps[task_id] = Step(task_id, before.base, revision, record)
    claimed: dict[DedupKey, str] = {}
    for step in steps.values() if len(steps) > 1 else ():
        key = step.claims
        if key is not None:
            holder = claimed.setdefault(key, step.task_id)
            if holder != step.task_id:
                raise ConflictError([Conflict(step.task_id, 0, 0, existing_task_id=holder)])
    return list(steps.values())


def find_conflicts(
    steps: Sequence[Step],
    revisions: Mapping[str, int],
    deleted: Container[str],
    holders: Mapping[DedupKey, str],
) -> list[Conflict]:
    """Compare what the steps expect with what is stored; empty when all of them apply.

    ``revisions`` gives the stored revision of a task: none for a task that is
    not stored, 0 for one that does not decode and whose revision cannot be
    told.  ``deleted`` holds the ids whose deletion the journal still has, and
    ``holders`` the id of the task that has a dedup key.  A task that the
    steps remove gives its dedup key free for the others.
    """
    conflicts = []
    for step in steps:
        task_id = step.task_id
        found = revisions.get(task_id)
        if found != (step.base or None) or task_id in deleted:
            gone = task_id in deleted
            conflicts.append(Conflict(task_id, step.base, found or 0, deleted=gone))
            continue
        key = dedup_key(step.record)
        holder = None if key is None else holders.get(key)
        if holder in (None, task_id):
            continue
        if holder not in {step.task_id for step in steps if step.record is None}:
            conflicts.append(Conflict(task_id, step.base, found or 0, existing_task_id=holder))
    return conflicts


def entries_of(changes: Sequence[Change], commit: Commit) -> list[JournalEntry]:
    """The journal entries that a commit made of its changes, in order."""
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
    """Bring a snapshot forward over the entries that follow it.

    Raises :class:`CorruptStoreError` if the entries do not continue the
    snapshot without a gap.
    """
    records = dict(snapshot.records)
    aside = list(snapshot.quarantined)
    seq, at = snapshot.seq, snapshot.at
    for entry in entries:
        if entry.seq != seq + 1:
            raise CorruptStoreError("journal", f"seq {entry.seq} follows seq {seq}")
        seq, at = entry.seq, entry.at
        if aside:
            aside = [item for item in aside if not item.goes_with(entry.task_id, entry.kind)]
        if entry.record is not None:
            records[entry.task_id] = entry.record
        else:
            records.pop(entry.task_id, None)
            if entry.quarantined is not None:
                aside.append(entry.quarantined)
    return Snapshot(seq, MappingProxyType(records), at, tuple(aside))


def quarantined_revisions(quarantined: Iterable[Quarantined]) -> dict[str, int]:
    """The ids that are occupied by images which do not decode, with the revision of each
    (0 where it cannot be told)."""
    return {item.occupies: item.revision or 0 for item in quarantined if item.occupies is not None}
