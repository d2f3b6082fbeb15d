"""The writer's index: revisions, dedup keys and deletions, without the records.

The function :func:`load_records` loads the records and can fill an index at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import msgspec
from msgspec import Raw, Struct

from taskstore.model import codec
from taskstore.model.journal import EntryKind, NetChange, Quarantined, Snapshot, dedup_key
from taskstore.model.records import FORMAT_VERSION, DedupKey, TaskRecord
from taskstore.stores.jsonfile.layout import JournalOffset, Layout, read_snapshot
from taskstore.stores.jsonfile.lines import Entry, Line, decode_entry
from taskstore.stores.jsonfile.segments import CommitReader


class RecordStub(Struct, frozen=True, gc=False):
    """The members of a payload that the index needs."""

    v: str
    task_id: str
    revision: int
    run_id: str | None = None
    run_digest: str | None = msgspec.field(default=None, name="booking")


_decoder = msgspec.json.Decoder(RecordStub)


def decode_stub(payload: bytes | Raw) -> RecordStub | None:
    """Return the keys of a payload, or ``None`` if the keys cannot be decoded."""
    payload = bytes(payload)
    try:
        codec.check_nesting(payload)
        keys = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if keys.v == FORMAT_VERSION:
        return keys
    item = codec.decode_or_quarantine(payload, "")
    if isinstance(item, Quarantined):
        return keys
    return RecordStub(keys.v, item.task_id, item.revision, item.run_id, item.run_digest)


class Index:
    """The stored revision of each task, the task of each dedup key, and the deletions.

    ``revisions`` maps each task id to the stored revision; a quarantined task with an unknown
    revision has 0.  ``deleted`` maps each deleted task id to a seq of the commit that deleted the
    task.
    """

    def __init__(self) -> None:
        self.revisions: dict[str, int] = {}
        self.deleted: dict[str, int] = {}
        self.by_dedup_key: dict[DedupKey, str] = {}
        self._dedup_keys: dict[str, DedupKey] = {}

    def _add(self, item: RecordStub | TaskRecord) -> None:
        self.revisions[item.task_id] = item.revision
        self._add_dedup_key(dedup_key(item), item.task_id)

    def add_snapshot(self, snapshot: Snapshot) -> None:
        """Add the keys of a snapshot's records, and the known keys of its quarantined records."""
        for record in snapshot.records.values():
            self._add(record)
        for item in snapshot.quarantined:
            if item.superseded:
                continue
            keys = decode_stub(item.raw)
            if keys is not None:
                self._add(keys)
            if item.task_id is not None:
                self.revisions[item.task_id] = item.revision or 0

    def replay(self, line: Line) -> None:
        """Add the changes of a commit that was read from the journal."""
        for entry in line.entries:
            if entry.kind is EntryKind.DELETED:
                self._remove(entry.task_id, line.seq)
                continue
            self.revisions[entry.task_id] = entry.revision
            if entry.revision == 1:
                keys = decode_stub(entry.record)
                if keys is not None:
                    self._add_dedup_key(dedup_key(keys), entry.task_id)

    def commit(self, net_changes: Sequence[NetChange], seq: int) -> None:
        """Add the changes of a commit of this writer; ``seq`` is the first seq of the commit."""
        for net in net_changes:
            if net.record is None:
                self._remove(net.task_id, seq)
        for net in net_changes:
            if net.record is not None:
                self.revisions[net.task_id] = net.revision
                key = net.new_dedup_key
                if key is not None:
                    self.by_dedup_key[key] = net.task_id
                    self._dedup_keys[net.task_id] = key

    def forget_deletions(self, floor: int) -> None:
        """Forget the deletions before seq ``floor``, because these are no longer in the journal."""
        for task_id in [task_id for task_id, seq in self.deleted.items() if seq < floor]:
            del self.deleted[task_id]

    def _add_dedup_key(self, key: DedupKey | None, task_id: str) -> None:
        if key is not None:
            self.by_dedup_key[key] = task_id
            self._dedup_keys[task_id] = key

    def _remove(self, task_id: str, seq: int) -> None:
        self.revisions.pop(task_id, None)
        self.deleted[task_id] = seq
        key = self._dedup_keys.pop(task_id, None)
        if key is not None and self.by_dedup_key.get(key) == task_id:
            del self.by_dedup_key[key]


def load_records(
    layout: Layout, *, strict: bool, index: Index | None = None
) -> tuple[Snapshot, JournalOffset]:
    """Return the current records (the newest snapshot folded with the journal), and the position of
    the journal's end.

    Only the newest entry of each task is decoded.  If ``index`` is given, it must be empty; the
    function adds the keys of all tasks to it.
    """
    records: dict[str, TaskRecord] = {}
    quarantined: list[Quarantined] = []
    if layout.newest_snapshot is not None:
        newest = read_snapshot(layout, layout.newest_snapshot.seq, strict=strict)
        records, quarantined = dict(newest.records), list(newest.quarantined)
        if index is not None:
            index.deleted.update(layout.newest_snapshot.deleted)
    last_entries: dict[str, tuple[Entry, str]] = {}
    reader = CommitReader(layout, layout.after_newest_snapshot())
    for location in reader:
        where = location.where
        for entry in location.line.entries:
            last_entries[entry.task_id] = (entry, where)
            if index is not None and entry.kind is EntryKind.DELETED:
                index.deleted[entry.task_id] = location.line.seq

    def is_obsolete(item: Quarantined) -> bool:
        last = last_entries.get(item.task_id or "")
        return last is not None and item.is_obsoleted_by(last[0].task_id, last[0].kind)

    quarantined = [item for item in quarantined if not is_obsolete(item)]
    for task_id, (entry, where) in last_entries.items():
        if entry.kind is EntryKind.DELETED:
            records.pop(task_id, None)
            continue
        item = decode_entry(entry, where, strict=strict)
        if isinstance(item, Quarantined):
            records.pop(task_id, None)
            quarantined.append(item)
        else:
            records[task_id] = item
    end = reader.position
    snapshot = Snapshot(end.seq, MappingProxyType(records), end.at, tuple(quarantined))
    if index is not None:
        index.add_snapshot(snapshot)
    return snapshot, end
