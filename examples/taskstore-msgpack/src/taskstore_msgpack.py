"""A taskstore backend that keeps a whole ledger in one msgpack file, for one process."""

import os
from pathlib import Path

import taskstore
from msgspec import MsgspecError, msgpack
from taskstore.store import Quarantined, Snapshot, checksum, decode_or_quarantine, encode_record
from taskstore.store import validated_snapshot as validated

Ledger = tuple[int, int, list[bytes], tuple[Quarantined, ...]]  # seq, at, records, quarantined


class MsgpackStore(taskstore.TaskRegistryStore):
    """A ledger in the file at ``path``; each commit replaces the whole file."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.path, self.new, self.location = path, Path(f"{path}.new"), str(path)
        self.quarantined: tuple[Quarantined, ...] = ()

    def load_snapshot(self) -> Snapshot:
        self._check_open()
        try:
            stored, data = msgpack.decode(self.path.read_bytes(), type=tuple[int, bytes])
            if checksum(data) != stored:
                raise taskstore.CorruptStoreError(self.location, "the checksum does not match")
            seq, at, payloads, old = msgpack.decode(data, type=Ledger)
        except FileNotFoundError:
            return Snapshot(0)
        except OSError as error:
            raise taskstore.StoreUnavailableError(f"cannot read {self.path}: {error}") from error
        except MsgspecError as error:
            raise taskstore.CorruptStoreError(self.location, f"is not a ledger: {error}") from error
        items = [decode_or_quarantine(payload, self.location) for payload in payloads]
        records = {item.task_id: item for item in items if not isinstance(item, Quarantined)}
        self.quarantined = (*old, *(item for item in items if isinstance(item, Quarantined)))
        return Snapshot(seq, records, at, self.quarantined)

    def save_snapshot(self, snapshot: Snapshot) -> None:
        self._check_writable()
        snapshot, old = validated(snapshot), self.load_snapshot()
        if old.seq and snapshot.seq <= old.seq:
            raise taskstore.ConflictError([], f"seq {snapshot.seq} is not ahead of {old.seq}")
        records = [encode_record(record) for record in snapshot.records.values()]
        at = max(snapshot.at, old.at)
        data = msgpack.encode((snapshot.seq, at, records, snapshot.quarantined))
        failure: type[taskstore.TaskStoreError] = taskstore.StoreUnavailableError
        try:
            self.new.touch(0o600)
            self.new.write_bytes(msgpack.encode((checksum(data), data)))
            _sync(self.new)  # the bytes are on disk before the rename,
            failure = taskstore.OutcomeUnknownError
            self.new.replace(self.path)
            _sync(self.path.parent)  # and the rename is on disk before the method returns
        except OSError as error:
            raise failure(f"cannot write {self.path}: {error}") from error

    def report(self) -> taskstore.StoreReport:
        return taskstore.StoreReport(quarantined=self.quarantined)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_msgpack(url: str, *, durability: str, migrate: str, read_only: bool) -> MsgpackStore:
    """Open ``msgpack:///relative/path`` or ``msgpack:////absolute/path``."""
    return MsgpackStore(taskstore.store.path_of(url), read_only=read_only)
