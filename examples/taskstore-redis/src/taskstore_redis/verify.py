"""Checking a whole ledger: everything that is written twice has to agree.

Writers go on meanwhile.  A task that was changed while its rows were read is
left out of the comparison with them; the journal is checked for it all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from taskstore import CorruptStoreError, StoreBusyError, TaskRecord, VerifyReport

from taskstore_redis.layout import (
    ALL,
    INDEXED,
    Mark,
    RawEntry,
    State,
    damage_of,
    facts_of,
    id_at,
)
from taskstore_redis.reading import (
    EVERYTHING,
    JOURNAL_PAGE,
    PAGE_BYTES,
    PAGE_ROWS,
    MovedError,
    Pages,
    Reader,
    Row,
)

ATTEMPTS = 5
"""How often it begins again when compaction or a save takes the ledger away under it."""

_SHOWN = 3

Content = dict[str, tuple[int, bytes]]
"""Revision and image by task id."""


def verify(reader: Reader) -> VerifyReport:
    """Check everything; see :meth:`SupportsIntegrity.verify`."""
    for _ in range(ATTEMPTS):
        check = _Check(reader)
        try:
            return check.report()
        except MovedError:
            continue
        except CorruptStoreError as error:
            if (
                reader.state().life == check.start.life
                and reader.state().floor == check.start.floor
            ):
                check.problems.append(str(error))
                return check.result()
    raise StoreBusyError(
        f"{reader.location} is compacted faster than it can be verified",
        hint="try again when no compaction runs",
    )


class _Check:
    """One pass: the snapshot at floor - 1, brought forward over the journal, has to
    equal each later snapshot at its seq, and the rows at the end."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.start: State = reader.state()
        self.problems: list[str] = []
        self.seq = self.start.floor - 1
        self.entries = 0
        self._at = 0
        self._content: Content = {}
        self._last: dict[str, int] = {}
        """The seq of the last entry of each task."""
        self._deleted: dict[str, int] = {}

    def result(self) -> VerifyReport:
        """What was found so far."""
        return VerifyReport(self.seq, len(self._content), self.entries, tuple(self.problems))

    def report(self) -> VerifyReport:
        """Check everything; raises :class:`MovedError` if the ledger moved away."""
        marks = {mark.seq: mark for mark in self._reader.marks()}
        base = marks.get(self.seq)
        if base is not None:
            self._content = self._snapshot(base)
        elif self.start.floor > 1:
            self.problems.append(f"there is no snapshot at seq {self.seq}, before the floor")
        for entry in self._journal(self.seq):
            self._entry(entry)
            if entry.seq in marks:
                self._compare(marks[entry.seq])
        # Rows are read after the journal, and what was committed meanwhile after them.
        before = self.seq
        rows = {id_at(row.place): row for row in self._rows()}
        index = list(self._index())
        bookings = dict(self._hash("bookings"))
        deleted = dict(self._scores())
        sizes = [
            int(self._reader.link.call("HLEN", self._reader.keys[n])) for n in ("rows", "facts")
        ]
        touched = set()
        for entry in self._journal(before):
            self._entry(entry)
            touched.add(entry.task_id)
        if self._reader.state().life != self.start.life:
            raise MovedError
        self._check_rows(rows, touched)
        self._check_index(rows, index, touched)
        self._check_bookings(rows, bookings, touched)
        self._check_deleted(deleted, touched)
        if not touched and sizes != [len(rows)] * 2:
            self.problems.append(
                f"rows has {sizes[0]} fields, facts {sizes[1]}, and the index {len(rows)} tasks"
            )
        return self.result()

    # -- the journal and the snapshots ------------------------------------------------

    def _journal(self, after: int) -> Iterator[RawEntry]:
        while True:
            state, entries = self._reader.raw_journal(after, JOURNAL_PAGE)
            if entries is None or state.life != self.start.life:
                raise MovedError
            if not entries:
                return
            yield from entries
            after = entries[-1].seq

    def _entry(self, entry: RawEntry) -> None:
        where = f"seq {entry.seq}, task {entry.task_id!r}"
        known = self._content.get(entry.task_id)
        if entry.at < self._at:
            self.problems.append(f"{where}: the time goes back from {self._at} to {entry.at}")
        if entry.task_id in self._deleted:
            self.problems.append(f"{where}: a change after its deletion")
        elif known is not None and entry.revision != known[0] + 1:
            self.problems.append(f"{where}: revision {entry.revision} follows {known[0]}")
        elif known is None and entry.revision != 1:
            self.problems.append(f"{where}: revision {entry.revision} of a task that is not there")
        back = self._last.get(entry.task_id, 0)
        if entry.back != back and entry.back >= max(back, self.start.floor):
            self.problems.append(f"{where}: the entry before it is {back}, not {entry.back}")
        if entry.kind == b"u":
            damage = damage_of(entry.image)
            if damage is not None:
                self.problems.append(f"{where}: {damage}")
            self._content[entry.task_id] = (entry.revision, entry.image)
        else:
            self._content.pop(entry.task_id, None)
            self._deleted[entry.task_id] = entry.seq
        self._last[entry.task_id] = self.seq = entry.seq
        self._at = entry.at
        self.entries += 1

    def _snapshot(self, mark: Mark) -> Content:
        content: Content = {}
        for item in self._reader.snapshot_aside(mark):
            if item.occupies is not None:
                content[item.occupies] = (item.revision or 0, b"")
        for task_id, revision, image in self._reader.items(mark):
            damage = damage_of(image)
            if damage is not None:
                self.problems.append(f"the snapshot at seq {mark.seq}, task {task_id!r}: {damage}")
            content[task_id] = (revision, image)
        return content

    def _compare(self, mark: Mark) -> None:
        if mark not in self._reader.marks():
            return  # dropped meanwhile
        self._differ(f"the snapshot at seq {mark.seq}", self._snapshot(mark), self._content)

    def _differ(self, what: str, found: Content, right: Content) -> None:
        for trouble, ids in (
            ("lacks", right.keys() - found.keys()),
            ("has too much", found.keys() - right.keys()),
            (
                "disagrees with the journal on",
                {key for key in found.keys() & right.keys() if found[key] != right[key]},
            ),
        ):
            self._complain(f"{what} {trouble}", ids)

    def _complain(self, what: str, ids: Iterable[str]) -> None:
        named = sorted(ids)
        if named:
            shown = ", ".join(map(repr, named[:_SHOWN]))
            self.problems.append(f"{what} {len(named)} tasks: {shown}")

    # -- the rows and what is derived from them -----------------------------------------

    def _rows(self) -> Iterator[Row]:
        range_ = EVERYTHING
        while True:
            scan = self._reader.scan([range_], Pages(PAGE_ROWS, PAGE_BYTES))
            if scan.state.life != self.start.life:
                raise MovedError
            [(more, rows)] = scan.pages
            yield from rows
            if not more or not rows:
                return
            range_ = range_._replace(first=b"(" + ALL + rows[-1].place)

    def _check_rows(self, rows: dict[str, Row], touched: set[str]) -> None:
        found: Content = {}
        wrong = []
        for task_id, row in rows.items():
            if row.image is None or row.facts is None or task_id in touched:
                continue
            last, _, facts = row.facts.partition(b"\0")
            revision = facts.partition(b"\0")[0]
            found[task_id] = (int(revision) if revision.isdigit() else 0, row.image)
            known = self._last.get(task_id, 0)
            if not last.isdigit() or (known != int(last) and int(last) >= self.start.floor):
                wrong.append(task_id)
            record = self._reader.decoded(row)
            if isinstance(record, TaskRecord) and facts_of(record) != facts:
                wrong.append(task_id)
            damage = damage_of(row.image)
            if damage is not None:
                self.problems.append(f"rows, task {task_id!r}: {damage}")
        right = {
            task_id: content
            for task_id, content in self._content.items()
            if task_id not in touched and content[1]
        }
        self._differ("the hash of rows", found, right)
        self._complain("facts are wrong about", set(wrong))

    def _index(self) -> Iterator[bytes]:
        first = b"-"
        while True:
            page = self._reader.link.call(
                *("ZRANGE", self._reader.keys["index"], first, "+", "BYLEX", "LIMIT", 0, PAGE_ROWS)
            )
            yield from page
            if len(page) < PAGE_ROWS:
                return
            first = b"(" + page[-1]

    def _check_index(self, rows: dict[str, Row], index: list[bytes], touched: set[str]) -> None:
        right = {
            member
            for task_id, row in rows.items()
            if task_id not in touched
            for member in _members(row)
        }
        found = {member for member in index if _task_of(member) not in touched}
        for trouble, members in (("lacks", right - found), ("has too much for", found - right)):
            self._complain(f"the index {trouble}", {_task_of(member) for member in members})

    def _hash(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        cursor = b"0"
        while True:
            cursor, flat = self._reader.link.call(
                *("HSCAN", self._reader.keys[name], cursor, "COUNT", PAGE_ROWS)
            )
            yield from zip(flat[::2], flat[1::2], strict=True)
            if cursor == b"0":
                return

    def _check_bookings(
        self, rows: dict[str, Row], bookings: dict[bytes, bytes], touched: set[str]
    ) -> None:
        right: dict[bytes, str] = {}
        for task_id, row in rows.items():
            claim = _booking(row)
            if claim is not None:
                right[claim] = task_id
        found = {claim: holder.decode() for claim, holder in bookings.items()}
        wrong = {holder for _, holder in found.items() ^ right.items() if holder not in touched}
        self._complain("bookings are wrong about", wrong)

    def _scores(self) -> Iterator[tuple[str, int]]:
        offset = 0
        while True:
            page = self._reader.link.call(
                *("ZRANGE", self._reader.keys["deleted"], self.start.floor, "+inf", "BYSCORE"),
                *("LIMIT", offset, PAGE_ROWS, "WITHSCORES"),
            )
            for task_id, score in zip(page[::2], page[1::2], strict=True):
                yield task_id.decode(), int(float(score))
            if len(page) < 2 * PAGE_ROWS:
                return
            offset += PAGE_ROWS

    def _check_deleted(self, deleted: dict[str, int], touched: set[str]) -> None:
        differing = deleted.items() ^ self._deleted.items()
        wrong = {task_id for task_id, _ in differing if task_id not in touched}
        self._complain("deletions are wrong about", wrong)


def _facts(row: Row) -> list[bytes]:
    """The parts of a row's facts after its seq, none if they are damaged (see common.lua)."""
    parts = (row.facts or b"").split(b"\0")[1:]
    return parts if len(parts) == 3 + len(INDEXED) else []


def _members(row: Row) -> Iterator[bytes]:
    """The members of the index that a row should have."""
    yield ALL + row.place
    for letter, value in zip(INDEXED.values(), _facts(row)[3:], strict=False):
        if value:
            yield letter + b"\0" + value[1:] + b"\0" + row.place


def _task_of(member: bytes) -> str:
    return id_at(member.rpartition(b"\0")[2])


def _booking(row: Row) -> bytes | None:
    """What a row should hold in ``bookings``."""
    parts = _facts(row)
    if not parts or not parts[2] or not parts[3]:
        return None
    return parts[3][1:] + b"\0" + parts[2][1:]
