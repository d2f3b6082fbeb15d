"""What a writer remembers: revisions, bookings and deletions, never the records.

It learns them with the records, when these are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import msgspec
from msgspec import Raw, Struct

from taskstore.model import codec
from taskstore.model.journal import EntryKind, Quarantined, Snapshot, Step, dedup_key
from taskstore.model.records import FORMAT_VERSION, DedupKey, TaskRecord
from taskstore.stores.jsonfile.layout import JournalOffset, Layout, read_snapshot
from taskstore.stores.jsonfile.lines import Entry, Line, image
from taskstore.stores.jsonfile.segments import SegmentReader


class Keys(Struct, frozen=True, gc=False):
    """The members of a payload that a writer has to know."""

    v: str
    task_id: str
    revision: int
    run_id: str | None = None
    run_digest: str | None = msgspec.field(default=None, name="booking")


_decoder = msgspec.json.Decoder(Keys)


def keys_of(payload: bytes | Raw) -> Keys | None:
    """The keys of a payload, ``None`` when they cannot be told."""
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
    return Keys(keys.v, item.task_id, item.revision, item.run_id, item.run_digest)


class Index:
    """Which revision of which task is stored, who holds which run, what was deleted.

    ``revisions`` counts tasks that are set aside, too; 0 where the revision
    of such a one cannot be told.  ``deleted`` maps ids to a seq of the commit that
    deleted them.
    """

    def __init__(self) -> None:
        self.revisions: dict[str, int] = {}
        self.deleted: dict[str, int] = {}
        self.by_dedup_key: dict[DedupKey, str] = {}
        self._booked: dict[str, DedupKey] = {}

    def _add(self, item: Keys | TaskRecord) -> None:
        self.revisions[item.task_id] = item.revision
        self._book(dedup_key(item), item.task_id)

    def learn(self, snapshot: Snapshot) -> None:
        """Take in a whole content, and what is known of its records that do not decode."""
        for record in snapshot.records.values():
            self._add(record)
        for item in snapshot.quarantined:
            if item.superseded:
                continue
            keys = keys_of(item.raw)
            if keys is not None:
                self._add(keys)
            if item.task_id is not None:
                self.revisions[item.task_id] = item.revision or 0

    def replay(self, line: Line) -> None:
        """Take in a commit of the journal."""
        for entry in line.entries:
            if entry.kind is EntryKind.DELETED:
                self._remove(entry.task_id, line.seq)
                continue
            self.revisions[entry.task_id] = entry.revision
            if entry.revision == 1:
                keys = keys_of(entry.record)
                if keys is not None:
                    self._book(dedup_key(keys), entry.task_id)

    def commit(self, steps: Sequence[Step], seq: int) -> None:
        """Take in our own commit, whose first seq is ``seq``."""
        for step in steps:
            if step.record is None:
                self._remove(step.task_id, seq)
        for step in steps:
            if step.record is not None:
                self.revisions[step.task_id] = step.revision
                key = step.claims
                if key is not None:
                    self.by_dedup_key[key] = step.task_id
                    self._booked[step.task_id] = key

    def forget_deletions(self, floor: int) -> None:
        """Forget the deletions below ``floor``: the journal does not hold them any more."""
        for task_id in [task_id for task_id, seq in self.deleted.items() if seq < floor]:
            del self.deleted[task_id]

    def _book(self, key: DedupKey | None, task_id: str) -> None:
        if key is not None:
            self.by_dedup_key[key] = task_id
            self._booked[task_id] = key

    def _remove(self, task_id: str, seq: int) -> None:
        self.revisions.pop(task_id, None)
        self.deleted[task_id] = seq
        key = self._booked.pop(task_id, None)
        if key is not None and self.by_dedup_key.get(key) == task_id:
            del self.by_dedup_key[key]


def load(
    layout: Layout, *, strict: bool, index: Index | None = None
) -> tuple[Snapshot, JournalOffset]:
    """The newest snapshot brought forward to the end of the journal, and where that is.

    Only the last image of each task is decoded.  ``index``, when given, is
    empty and learns the keys of everything on the way.
    """
    records: dict[str, TaskRecord] = {}
    aside: list[Quarantined] = []
    if layout.newest is not None:
        newest = read_snapshot(layout, layout.newest.seq, strict=strict)
        records, aside = dict(newest.records), list(newest.quarantined)
        if index is not None:
            index.deleted.update(layout.newest.deleted)
    images: dict[str, tuple[Entry, str]] = {}
    walk = SegmentReader(layout, layout.after_newest())
    for found in walk:
        where = found.where
        for entry in found.line.entries:
            images[entry.task_id] = (entry, where)
            if index is not None and entry.kind is EntryKind.DELETED:
                index.deleted[entry.task_id] = found.line.seq

    def is_obsolete(item: Quarantined) -> bool:
        last = images.get(item.task_id or "")
        return last is not None and item.goes_with(last[0].task_id, last[0].kind)

    aside = [item for item in aside if not is_obsolete(item)]
    for task_id, (entry, where) in images.items():
        if entry.kind is EntryKind.DELETED:
            records.pop(task_id, None)
            continue
        item = image(entry, where, strict=strict)
        if isinstance(item, Quarantined):
            records.pop(task_id, None)
            aside.append(item)
        else:
            records[task_id] = item
    place = walk.place
    snapshot = Snapshot(place.seq, MappingProxyType(records), place.at, tuple(aside))
    if index is not None:
        index.learn(snapshot)
    return snapshot, place
