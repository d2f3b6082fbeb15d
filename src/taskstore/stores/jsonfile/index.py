"""What a writer remembers: revisions, bookings and deletions, never the records."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from msgspec import Raw, Struct

from taskstore import codec
from taskstore.errors import ConflictError
from taskstore.journal import EntryKind, SetAside, Step, find_conflicts
from taskstore.records import FORMAT_VERSION, TaskRecord
from taskstore.stores.jsonfile.lines import Line


class Keys(Struct, frozen=True, gc=False):
    """The members of a payload that a writer has to know."""

    v: str
    task_id: str
    revision: int
    run_id: str | None = None
    booking: str | None = None


_decoder = msgspec.json.Decoder(Keys)


def keys_of(payload: bytes | Raw) -> Keys | None:
    """The keys of a payload, ``None`` when they cannot be told."""
    try:
        keys = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if keys.v == FORMAT_VERSION:
        return keys
    item = codec.decode_or_set_aside(bytes(payload), "")
    if isinstance(item, SetAside):
        return keys
    return Keys(keys.v, item.task_id, item.revision, item.run_id, item.booking)


class Index:
    """Which revision of which task is stored, who holds which run, what was deleted.

    ``revisions`` counts tasks that are set aside, too; 0 where the revision
    of such a one cannot be told.  ``deleted`` maps ids to a seq of the commit that
    deleted them.
    """

    def __init__(self) -> None:
        self.revisions: dict[str, int] = {}
        self.deleted: dict[str, int] = {}
        self._holders: dict[tuple[str, str], str] = {}
        self._booked: dict[str, tuple[str, str]] = {}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Index):
            return NotImplemented
        return (self.revisions, self._holders) == (other.revisions, other._holders)

    __hash__ = None  # type: ignore[assignment]

    def add(self, item: Keys | TaskRecord) -> None:
        """Take in a live record."""
        self.revisions[item.task_id] = item.revision
        if item.booking is not None and item.run_id is not None:
            self._book((item.run_id, item.booking), item.task_id)

    def add_payload(self, payload: bytes) -> None:
        """Take in a live record as it is stored."""
        keys = keys_of(payload)
        if keys is not None:
            self.add(keys)
        else:
            self.add_set_aside(codec.set_aside(payload, "", ""))

    def add_set_aside(self, item: SetAside) -> None:
        """Take in what is known of a record that does not decode."""
        if item.superseded:
            return
        keys = keys_of(item.raw)
        if keys is not None:
            self.add(keys)
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
                if keys is not None and keys.booking is not None and keys.run_id is not None:
                    self._book((keys.run_id, keys.booking), entry.task_id)

    def commit(self, steps: Sequence[Step], seq: int) -> None:
        """Take in our own commit, whose first seq is ``seq``."""
        for step in steps:
            if step.record is None:
                self._remove(step.task_id, seq)
        for step in steps:
            if step.record is not None:
                self.revisions[step.task_id] = step.revision
                if step.dedup_key is not None:
                    self._book(step.dedup_key, step.task_id)

    def check(self, steps: Sequence[Step], floor: Callable[[], int]) -> None:
        """Raise :class:`ConflictError` unless the steps apply.

        ``floor`` is asked only when a deletion stands in the way: one that
        the journal no longer holds does not.
        """
        for step in steps:
            task_id = step.task_id
            if task_id in self.deleted and self.deleted[task_id] < floor():
                del self.deleted[task_id]
        conflicts = find_conflicts(steps, self.revisions, self.deleted, self._holders)
        if conflicts:
            raise ConflictError(conflicts)

    def _book(self, booking: tuple[str, str], task_id: str) -> None:
        self._holders[booking] = task_id
        self._booked[task_id] = booking

    def _remove(self, task_id: str, seq: int) -> None:
        self.revisions.pop(task_id, None)
        self.deleted[task_id] = seq
        booking = self._booked.pop(task_id, None)
        if booking is not None and self._holders.get(booking) == task_id:
            del self._holders[booking]
