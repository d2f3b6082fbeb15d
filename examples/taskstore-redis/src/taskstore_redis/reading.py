"""The reader: all records as of one seq, the journal, snapshots.

A large ledger is read in pages, so that no call blocks the server for long.  Writers continue
during the read, and their commits are in the journal.  The journal entries after the first page,
folded over the records of all pages, give the records as of the last entry.  The fold is correct
even if a page already contains some of these commits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from taskstore import (
    CorruptStoreError,
    CursorExpiredError,
    JournalEntry,
    Quarantined,
    SchemaMismatchError,
    Snapshot,
    TaskRecord,
    fold,
)
from taskstore.store import check_nesting

from taskstore_redis.layout import (
    ALL,
    FORMAT,
    Keys,
    PublishedSnapshot,
    RawEntry,
    State,
    entry_of,
    id_in_sort_key,
    items_of,
    published_snapshots,
    raw_entry,
    record_of,
    revision_in,
    state_of,
)
from taskstore_redis.link import Link

PAGE_ROWS = 256
PAGE_BYTES = 1024 * 1024
"""The limits of a page in records and bytes; the last record of a page may exceed the byte
limit."""
JOURNAL_PAGE = 200
HISTORY_PAGE = 100
PAGE_GROWTH = 16
PAGE_ATTEMPTS = 4
"""If the journal is trimmed between two pages, the next attempt reads larger pages; the last
attempt reads one page."""

_MAX_KNOWN_COMMITS = 256
_MAX_NOTICES = 3


class InconsistentPagesError(Exception):
    """The pages are of different seqs, and the journal between them is trimmed or replaced."""


class Row(NamedTuple):
    """A record as stored in Redis; ``sort_key`` (created_at and task id) orders the index."""

    sort_key: bytes
    facts: bytes | None
    image: bytes | None


class Range(NamedTuple):
    """The members of the index between two bounds; all begin with ``prefix``."""

    prefix: bytes
    first: bytes
    last: bytes


EVERYTHING = Range(ALL, b"[" + ALL, b"(" + ALL + b":")


class Pages(NamedTuple):
    """The limits of a page in rows and bytes; 0 means that there is no limit."""

    rows: int
    size: int

    @classmethod
    def attempts(cls) -> Iterator[Pages]:
        """Yield growing page limits; the last item has no limit."""
        rows, size = PAGE_ROWS, PAGE_BYTES
        for _ in range(PAGE_ATTEMPTS - 1):
            yield cls(rows, size)
            rows, size = rows * PAGE_GROWTH, size * PAGE_GROWTH
        yield cls(0, 0)


class Scan(NamedTuple):
    """The reply of ``scan.lua``: the state, and a page of each range."""

    state: State
    quarantined: list[bytes]
    pages: list[tuple[bool, list[Row]]]
    """For each range: whether more rows may follow, and the rows of the page."""


class KnownCommits:
    """The ids of commits that this store instance has seen, by seq.

    If a server restarts without its last writes, the server gives their seqs to new commits.  A
    reader that continues from such a seq detects the loss by the commit id.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commits: OrderedDict[int, str] = OrderedDict()
        self.newest_seq = 0
        self.notices: list[str] = []

    def add(self, seq: int, commit_id: str) -> None:
        """Remember that the entry at ``seq`` belongs to this commit."""
        with self._lock:
            self.newest_seq = max(self.newest_seq, seq)
            self._commits[seq] = commit_id
            self._commits.move_to_end(seq)
            if len(self._commits) > _MAX_KNOWN_COMMITS:
                self._commits.popitem(last=False)

    def commit_at(self, seq: int) -> str:
        """The known commit id at ``seq``, or ``""`` if no commit id is known."""
        with self._lock:
            return self._commits.get(seq, "")

    def mark_lost(self, seq: int, head: int) -> None:
        """Add a notice: the server has lost the known commit at ``seq``.  ``head`` is the
        server's head.

        The commit id is kept, because other readers may continue from ``seq`` too.
        """
        text = f"the server has lost commits that it had acknowledged, including that of seq {seq}"
        with self._lock:
            self.newest_seq = head
            if text not in self.notices:
                self.notices.append(text)
                del self.notices[:-_MAX_NOTICES]


class Reader:
    """The reader of one ledger."""

    def __init__(self, link: Link, keys: Keys, location: str) -> None:
        self.link = link
        self.keys = keys
        self.location = location
        self.known_commits = KnownCommits()
        self.last_at = 0
        """The time of the last known commit."""

    def state(self) -> State:
        """The current state of the ledger."""
        fields = ("ledger", "timeline", "head", "floor", "at", "commit", "format", "base")
        return self.checked(self.link.call("HMGET", self.keys["head"], *fields))

    def checked(self, reply: Sequence[Any]) -> State:
        """The state in a reply; raises :class:`~taskstore.SchemaMismatchError` for another
        layout."""
        if reply[2] is not None and reply[6] != FORMAT:
            raise wrong_format(self.location, reply[6])
        state = state_of(reply)
        self.last_at = state.at
        return state

    # -- records ------------------------------------------------------------------

    def scan(
        self,
        ranges: Sequence[Range],
        pages: Pages,
        *,
        newest_first: bool = False,
        with_quarantined: bool = False,
    ) -> Scan:
        """Read one page of each range, all as of one seq."""
        bounds: list[Any] = []
        for range_ in ranges:
            ends = (range_.last, range_.first) if newest_first else (range_.first, range_.last)
            bounds += (len(range_.prefix), *ends)
        reply = self.link.run(
            "scan",
            self.keys.named("head", "index", "rows", "facts", "aside"),
            pages.rows,
            pages.size,
            int(with_quarantined),
            "REV" if newest_first else "",
            *bounds,
        )
        result = [
            (bool(page[0]), [Row(*page[n : n + 3]) for n in range(1, len(page), 3)])
            for page in reply[2:]
        ]
        return Scan(self.checked(reply[0]), reply[1], result)

    def decoded(self, row: Row) -> TaskRecord | Quarantined | None:
        """The record of a row, or a ``Quarantined`` if the row is damaged.

        Returns ``None`` if the index contains the task and the key ``rows`` does not.
        """
        if row.image is None:
            return None
        task_id = id_in_sort_key(row.sort_key)
        where = f"{self.location}: rows, field {task_id!r}"
        return record_of(row.image, where, task_id, revision_in(row.facts))

    def load(self) -> Snapshot:
        """Every live record as of one seq."""
        for pages in Pages.attempts():
            try:
                return self._load(pages)
            except InconsistentPagesError:
                continue
        raise AssertionError("unreachable: the last attempt reads one page")

    def _load(self, pages: Pages) -> Snapshot:
        scan = self.scan([EVERYTHING], pages, with_quarantined=True)
        start, scans = scan.state, 1
        quarantined = [self._decode_quarantined(value) for value in sorted(scan.quarantined)]
        records: dict[str, TaskRecord] = {}
        while True:
            [(more, rows)] = scan.pages
            for row in rows:
                item = self.decoded(row)
                if isinstance(item, TaskRecord):
                    records[item.task_id] = item
                elif item is not None:
                    quarantined.append(item)
            if not more or not rows:
                break
            scan = self.scan([EVERYTHING._replace(first=b"(" + ALL + rows[-1].sort_key)], pages)
            scans += 1
        snapshot = Snapshot(start.head, records, start.at, tuple(quarantined))
        if scans == 1:
            self.known_commits.add(start.head, start.commit)
            return snapshot
        return fold(snapshot, self.since(start))

    def since(self, start: State) -> list[JournalEntry]:
        """The entries after a state.

        Raises :class:`InconsistentPagesError` if one of these entries was trimmed, or the ledger
        was replaced.
        """
        entries: list[JournalEntry] = []
        after = start.head
        while True:
            state, raw = self.raw_journal(after, JOURNAL_PAGE)
            if raw is None or state.identity != start.identity:
                raise InconsistentPagesError
            if not raw:
                return entries
            entries += (entry_of(item, self.location) for item in raw)
            after = entries[-1].seq
            self.known_commits.add(after, entries[-1].commit_id)

    def _decode_quarantined(self, value: bytes) -> Quarantined:
        try:
            check_nesting(value)
            return msgspec.json.decode(value, type=Quarantined)
        except msgspec.DecodeError as error:
            return Quarantined(value, f"{self.location}: aside", f"does not decode: {error}")

    # -- the journal ------------------------------------------------------------------

    def journal(self, after: int, limit: int) -> tuple[JournalEntry, ...]:
        """The entries after a seq, at most ``limit``."""
        entries: list[JournalEntry] = []
        start = after
        while len(entries) < limit:
            state, raw = self.raw_journal(start, min(limit - len(entries), JOURNAL_PAGE))
            if raw is None:
                if entries:
                    break  # trimmed between two pages: the next call raises
                raise CursorExpiredError(after, state.floor)
            if not raw:
                break
            entries += (entry_of(item, self.location) for item in raw)
            for entry in entries[-len(raw) :]:
                if self.known_commits.commit_at(entry.seq) not in ("", entry.commit_id):
                    self.known_commits.mark_lost(entry.seq, state.head)
            start = entries[-1].seq
        if entries:
            self.known_commits.add(start, entries[-1].commit_id)
        return tuple(entries)

    def raw_journal(self, after: int, limit: int) -> tuple[State, list[RawEntry] | None]:
        """A page of the journal; ``None`` if the entries after ``after`` are trimmed or lost."""
        known = self.known_commits.commit_at(after)
        reply = self.link.run("journal", self.keys.named("head", "journal"), after, limit, known)
        state = self.checked(reply[0])
        if reply[1] != b"ok":
            if reply[1] == b"lost":
                self.known_commits.mark_lost(after, state.head)
            return state, None
        entries = [raw_entry(item, self.location) for item in reply[2]]
        for seq, entry in enumerate(entries, after + 1):
            if entry.seq != seq:
                raise CorruptStoreError(
                    f"{self.location}: journal", f"seq {seq} is missing", offset=seq
                )
        if not entries and after < state.head:
            raise CorruptStoreError(
                f"{self.location}: journal", f"seq {after + 1} is missing", offset=after + 1
            )
        return state, entries

    def history(self, task_id: str) -> tuple[JournalEntry, ...]:
        """The entries of one task, oldest first."""
        keys = self.keys.named("head", "facts", "deleted", "journal")
        newest_first: list[JournalEntry] = []
        start = b""
        while True:
            page, start, missing = self.link.run("history", keys, task_id, start, HISTORY_PAGE)
            newest_first += (
                entry_of(raw_entry(item, self.location), self.location) for item in page
            )
            if missing and int(start) >= self.state().floor:
                raise CorruptStoreError(
                    f"{self.location}: journal", f"seq {int(start)} is missing", offset=int(start)
                )
            if missing or not start:
                return tuple(reversed(newest_first))

    # -- snapshots --------------------------------------------------------------------

    def snapshots(self) -> list[PublishedSnapshot]:
        """The kept snapshots, in order of seq."""
        return published_snapshots(self.link.call("HGETALL", self.keys["snapshots"]))

    def snapshot(self, at: int) -> Snapshot | None:
        """The newest kept snapshot at or before a seq."""
        while True:
            candidates = [published for published in self.snapshots() if published.seq <= at]
            if not candidates:
                return None
            try:
                return self._snapshot(candidates[-1])
            except CorruptStoreError:
                if candidates[-1] in self.snapshots():
                    raise
                # It was dropped while it was read.

    def _snapshot(self, published: PublishedSnapshot) -> Snapshot:
        records: dict[str, TaskRecord] = {}
        where = f"{self.location}: the snapshot at seq {published.seq}"
        quarantined = self.snapshot_quarantined(published)
        count = len(quarantined)
        for task_id, revision, image in self.items(published):
            count += 1
            item = record_of(image, where, task_id, revision)
            if isinstance(item, TaskRecord):
                records[task_id] = item
            else:
                quarantined.append(item)
        if count != published.records:
            raise CorruptStoreError(where, f"has {count} records, not {published.records}")
        return Snapshot(published.seq, records, published.at, tuple(quarantined))

    def snapshot_quarantined(self, published: PublishedSnapshot) -> list[Quarantined]:
        """The values of a snapshot that were quarantined when the snapshot was made."""
        lines = self.link.call("HGET", self.keys.snapshot(published.token), "aside")
        return [
            self._decode_quarantined(line) for line in sorted((lines or b"").split(b"\n")) if line
        ]

    def items(self, published: PublishedSnapshot) -> Iterator[tuple[str, int, bytes]]:
        """Yield task id, revision and image of each record of a snapshot; read one chunk at a
        time."""
        key = self.keys.snapshot(published.token)
        for number in range(published.chunks):
            where = f"{self.location}: the snapshot at seq {published.seq}, chunk {number}"
            chunk = self.link.call("HGET", key, number)
            if chunk is None:
                raise CorruptStoreError(where, "is missing")
            yield from items_of(chunk, where)


def wrong_format(location: str, stored: bytes | None) -> SchemaMismatchError:
    """The error for an unknown layout of keys."""
    shown = (stored or b"none").decode("utf-8", "replace")
    return SchemaMismatchError(
        f"{location} has its keys in format {shown}, this version needs format {FORMAT.decode()}",
        found=shown,
        needed=FORMAT.decode(),
        hint="upgrade taskstore-redis",
    )
