"""The memory store, the reference implementation of the store contract.

The memory store gives every guarantee of the interface, with two exceptions: the ledger is lost
when the process ends, and other processes cannot use the ledger.  Several :class:`MemoryStore`
instances with the same :class:`MemoryStorage` use the same ledger.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType

from taskstore.errors import ConflictError, CursorExpiredError, ValidationError
from taskstore.model.compaction_policy import (
    CompactionPolicy,
    CompactionReport,
    JournalStats,
    SnapshotInfo,
    approximate_size,
)
from taskstore.model.ids import new_commit_id
from taskstore.model.journal import (
    Change,
    Commit,
    EntryKind,
    JournalEntry,
    NetChange,
    Quarantined,
    Snapshot,
    dedup_key,
    entries_of,
    find_conflicts,
    fold,
    plan,
    quarantined_revisions,
    validated_snapshot,
)
from taskstore.model.records import DedupKey, TaskRecord
from taskstore.store.interface import (
    LoadedRecordsStore,
    StoreReport,
    VerifyReport,
    check_base,
    clock_notices,
)
from taskstore.store.opening import redacted
from taskstore.stores.common.compaction import (
    CompactionPoint,
    CompactionSteps,
    EntryCommit,
    Retained,
    compact,
)
from taskstore.stores.common.integrity import IntegrityCheck


class MemoryStorage:
    """One ledger in memory, which several :class:`MemoryStore` instances can share."""

    def __init__(self) -> None:
        # Methods acquire the lock directly and not through the condition, because an interrupt
        # (Ctrl+C) cannot stop a direct acquisition half-way.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.current: dict[str, TaskRecord] = {}
        self.by_dedup_key: dict[DedupKey, str] = {}
        self.head = 0
        self.last_at = 0
        self.journal: list[JournalEntry] = []
        # The commit id of the newest trimmed entry; empty if unknown.
        self.floor_commit_id = ""
        self.deleted: set[str] = set()
        self.snapshots: dict[int, Snapshot] = {}
        self.quarantined: tuple[Quarantined, ...] = ()

    @property
    def floor(self) -> int:
        """The first retained seq."""
        return self.head - len(self.journal) + 1


class MemoryStore(LoadedRecordsStore):
    """A store in the memory of this process; the URL ``memory:`` opens an empty store."""

    durability = "none"
    unsupported_guarantees = MappingProxyType(
        {
            "processes": "the storage is the memory of one process",
            "crash-safe": "the storage is lost when the process ends",
        }
    )

    def __init__(self, storage: MemoryStorage | None = None, *, read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.location = "memory:"
        self.storage = storage if storage is not None else MemoryStorage()

    def load_snapshot(self) -> Snapshot:
        self._check_open()
        storage = self.storage
        with storage.lock:
            loaded = Snapshot(storage.head, storage.current, storage.last_at, storage.quarantined)
        return loaded  # noqa: RET504 - an interrupted return in the block can unlock the lock twice

    def save_snapshot(self, snapshot: Snapshot) -> None:
        self._check_writable()
        snapshot = validated_snapshot(snapshot)
        storage = self.storage
        with storage.lock:
            if storage.head and snapshot.seq <= storage.head:
                raise ConflictError(
                    [], f"the snapshot is at seq {snapshot.seq}, but the head is at {storage.head}"
                )
            storage.head = snapshot.seq
            storage.last_at = max(snapshot.at, storage.last_at)
            storage.current = dict(snapshot.records)
            storage.by_dedup_key = {
                key: task_id
                for task_id, record in snapshot.records.items()
                if (key := dedup_key(record)) is not None
            }
            storage.journal = []
            storage.floor_commit_id = ""
            storage.deleted = set()
            storage.snapshots = {snapshot.seq: snapshot}
            storage.quarantined = snapshot.quarantined
            storage.changed.notify_all()

    def apply(self, changes: Sequence[Change]) -> Commit:
        self._check_writable()
        net_changes = plan(changes)
        storage = self.storage
        with storage.lock:
            check_base(self, changes)
            self._check(net_changes)
            first = storage.head + 1
            at = max(self.clock(), storage.last_at)
            commit = Commit(first, storage.head + len(changes), at, new_commit_id())
            length = len(storage.journal)
            try:
                self._commit(changes, net_changes, commit)
            except BaseException:
                # An interrupt stopped the commit half-way.  A second call of _commit completes it.
                del storage.journal[length:]
                self._commit(changes, net_changes, commit)
                raise
        return commit

    def _commit(
        self, changes: Sequence[Change], net_changes: Sequence[NetChange], commit: Commit
    ) -> None:
        storage = self.storage
        # Removals come first, because they release dedup keys that the puts can need.
        for net in sorted(net_changes, key=lambda net: net.record is not None):
            self._write(net)
        entries = entries_of(changes, commit)
        if storage.quarantined:
            storage.quarantined = tuple(
                item
                for item in storage.quarantined
                if not any(item.is_obsoleted_by(entry.task_id, entry.kind) for entry in entries)
            )
        storage.journal += entries
        storage.deleted.update(
            entry.task_id for entry in entries if entry.kind is EntryKind.DELETED
        )
        storage.head, storage.last_at = commit.last_seq, commit.at
        storage.changed.notify_all()

    def _check(self, net_changes: Sequence[NetChange]) -> None:
        storage = self.storage
        revisions = quarantined_revisions(storage.quarantined)
        for net in net_changes:
            record = storage.current.get(net.task_id)
            if record is not None:
                revisions[net.task_id] = record.revision
        conflicts = find_conflicts(net_changes, revisions, storage.deleted, storage.by_dedup_key)
        if conflicts:
            raise ConflictError(conflicts)

    def _write(self, net: NetChange) -> None:
        storage = self.storage
        if net.record is None:
            removed = storage.current.pop(net.task_id, None)
            key = dedup_key(removed)
            if key is not None:
                storage.by_dedup_key.pop(key, None)
            return
        storage.current[net.task_id] = net.record
        key = net.new_dedup_key
        if key is not None:
            storage.by_dedup_key[key] = net.task_id

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        self._check_writable()
        with self.storage.lock:
            yield

    def report(self) -> StoreReport:
        notice = "the ledger is in memory and is lost when the process ends"
        notices = (notice, *clock_notices(self.storage.last_at, self.clock))
        return StoreReport(self.storage.quarantined, notices)

    # -- journal ----------------------------------------------------------

    def head(self) -> int:
        self._check_open()
        return self.storage.head

    def floor(self) -> int:
        self._check_open()
        return self.storage.floor

    def commit_id(self, seq: int) -> str:
        self._check_open()
        storage = self.storage
        with storage.lock:
            if storage.floor <= seq <= storage.head:
                return storage.journal[seq - storage.floor].commit_id
            return storage.floor_commit_id if seq == storage.floor - 1 else ""

    def read_journal(self, after: int, limit: int) -> Sequence[JournalEntry]:
        self._check_open()
        storage = self.storage
        with storage.lock:
            floor = storage.floor
            if after < floor - 1:
                raise CursorExpiredError(after, floor)
            start = after - (floor - 1)
            page = tuple(storage.journal[start : start + limit])
        return page  # noqa: RET504 - as in load_snapshot

    def read_history(self, task_id: str) -> Sequence[JournalEntry]:
        self._check_open()
        with self.storage.lock:
            return tuple(entry for entry in self.storage.journal if entry.task_id == task_id)

    def read_snapshot(self, at: int) -> Snapshot | None:
        self._check_open()
        with self.storage.lock:
            seqs = [seq for seq in self.storage.snapshots if seq <= at]
            return self.storage.snapshots[max(seqs)] if seqs else None

    def wait_for(self, after: int, timeout: float) -> bool:
        storage, timeout = self.storage, min(timeout, threading.TIMEOUT_MAX)
        with storage.lock:
            storage.changed.wait_for(lambda: self._closed or storage.head > after, timeout)
            self._check_open()
            return storage.head > after

    def close(self) -> None:
        super().close()
        with self.storage.lock:
            self.storage.changed.notify_all()

    # -- compaction, integrity -------------------------------------

    def compact(self, policy: CompactionPolicy) -> CompactionReport:
        self._check_writable()
        return compact(_Compaction(self.storage), policy, self.clock)

    def verify(self) -> VerifyReport:
        self._check_open()
        storage = self.storage
        with storage.lock:
            names = {seq: f"the snapshot at seq {seq}" for seq in storage.snapshots}
            check = IntegrityCheck(storage.floor, names, storage.snapshots.__getitem__)
            check.journal(storage.journal, storage.head)
            check.compare("the store", self.load_snapshot())
            return check.report()


class _Compaction(CompactionSteps):
    """The steps of one compaction of a :class:`MemoryStorage`."""

    def __init__(self, storage: MemoryStorage) -> None:
        self._storage = storage

    def stats(self, now: int, most_bytes: int) -> JournalStats:
        del most_bytes
        storage = self._storage
        newest = max(storage.snapshots, default=0)
        since = storage.journal[max(newest - (storage.floor - 1), 0) :]
        return JournalStats(
            now=now,
            newest_snapshot_seq=newest,
            floor=storage.floor,
            entries=storage.head - newest,
            records=len(storage.current),
            oldest_at=since[0].at if since else None,
            history_bytes=sum(approximate_size(entry.record) for entry in list(storage.journal)),
        )

    def lock(self) -> AbstractContextManager[object]:
        return self._storage.lock

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        with self._storage.lock:
            stored = self._storage.snapshots
            return tuple(SnapshotInfo(seq, stored[seq].at) for seq in sorted(stored))

    def begin(self) -> CompactionPoint:
        storage = self._storage
        return CompactionPoint(storage.head, storage.last_at, storage.floor, self.snapshots())

    def commit_of(self, seq: int) -> EntryCommit:
        entry = self._storage.journal[seq - self._storage.floor]
        return EntryCommit(entry.at, entry.commit_id)

    def seq_within(self, size: int, head: int) -> int:
        storage, left = self._storage, size
        for entry in reversed(storage.journal[: head - storage.floor + 1]):
            left -= approximate_size(entry.record)
            if left < 0:
                return entry.seq
        return storage.floor - 1

    def publish(self, point: CompactionPoint, retained: Retained) -> int:
        # The floor is computed from the journal, which trim() shortens.
        storage = self._storage
        base = retained.base_snapshot
        if base is not None:
            earlier = [seq for seq in storage.snapshots if seq < base.seq]
            start = storage.snapshots[max(earlier)] if earlier else Snapshot(0)
            entries = storage.journal[start.seq + 1 - point.floor : base.seq + 1 - point.floor]
            storage.snapshots[base.seq] = fold(start, entries)
        snapshot = Snapshot(storage.head, storage.current, storage.last_at, storage.quarantined)
        storage.snapshots[point.seq] = snapshot
        return len(snapshot.records) + len(snapshot.quarantined)

    def trim(self, point: CompactionPoint, retained: Retained) -> None:
        storage = self._storage
        trimmed = storage.journal[: retained.floor - point.floor]
        storage.journal = storage.journal[retained.floor - point.floor :]
        if trimmed:
            storage.floor_commit_id = trimmed[-1].commit_id
        storage.deleted -= {e.task_id for e in trimmed if e.kind is EntryKind.DELETED}
        storage.snapshots = {seq: storage.snapshots[seq] for seq in retained.seqs}


def open_memory(
    url: str, *, durability: str = "full", migrate: str = "auto", read_only: bool = False
) -> MemoryStore:
    """Open a memory store with an empty ledger.  Each call opens a separate ledger."""
    del durability, migrate  # the store flushes nothing to disk and has no schema
    if url.lower() not in ("memory:", "memory://"):
        raise ValidationError(
            "url", f"a memory store has no name: use 'memory:', not {redacted(url)!r}"
        )
    return MemoryStore(read_only=read_only)
