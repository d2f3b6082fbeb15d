"""Verification: a ledger's journal, snapshots, rows, index and dedup keys must agree.

Writers continue during the verification.  If a task changes while the rows are read, the
verification does not compare the row of the task, but checks the task's journal entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from taskstore import CorruptStoreError, StoreBusyError, TaskRecord, VerifyReport

from taskstore_redis.layout import (
    ALL,
    INDEXED,
    PublishedSnapshot,
    RawEntry,
    State,
    damage_of,
    facts_of,
    id_in_sort_key,
)
from taskstore_redis.reading import (
    EVERYTHING,
    JOURNAL_PAGE,
    PAGE_BYTES,
    PAGE_ROWS,
    InconsistentPagesError,
    Pages,
    Reader,
    Row,
)

ATTEMPTS = 5
"""The maximum number of attempts.  An attempt fails if a compaction or a saved snapshot removes
data that the attempt reads."""

_MAX_NAMED_TASKS = 3

Content = dict[str, tuple[int, bytes]]
"""Maps a task id to the revision and the image of the record."""


def verify(reader: Reader) -> VerifyReport:
    """Verify the ledger; see :meth:`SupportsIntegrity.verify`."""
    for _ in range(ATTEMPTS):
        check = _Verification(reader)
        try:
            return check.run()
        except InconsistentPagesError:
            continue
        except CorruptStoreError as error:
            if (
                reader.state().identity == check.initial.identity
                and reader.state().floor == check.initial.floor
            ):
                check.problems.append(str(error))
                return check.result()
    raise StoreBusyError(
        f"{reader.location} is compacted faster than it can be verified",
        hint="try again when no compaction runs",
    )


class _Verification:
    """One attempt to verify a ledger.

    The attempt applies the journal to the snapshot at floor - 1.  The result must equal each later
    snapshot at the seq of that snapshot.  The final result must equal the rows.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.initial: State = reader.state()
        self.problems: list[str] = []
        self.seq = self.initial.floor - 1
        self.entries = 0
        self._last_at = 0
        self._content: Content = {}
        self._last: dict[str, int] = {}
        """The seq of the last entry of each task."""
        self._deleted: dict[str, int] = {}

    def result(self) -> VerifyReport:
        """The report with the problems found so far."""
        return VerifyReport(self.seq, len(self._content), self.entries, tuple(self.problems))

    def run(self) -> VerifyReport:
        """Verify; raises :class:`InconsistentPagesError` if entries were trimmed or replaced."""
        snapshots = {snapshot.seq: snapshot for snapshot in self._reader.snapshots()}
        base = snapshots.get(self.seq)
        if base is not None:
            self._content = self._snapshot(base)
        elif self.initial.floor > 1:
            self.problems.append(f"there is no snapshot at seq {self.seq}, before the floor")
        for entry in self._journal(self.seq):
            self._entry(entry)
            if entry.seq in snapshots:
                self._compare_snapshot(snapshots[entry.seq])
        # The rows are read after the journal; then the journal that was written meanwhile.
        before = self.seq
        rows = {id_in_sort_key(row.sort_key): row for row in self._rows()}
        index = list(self._index())
        dedup_keys = dict(self._hash("bookings"))
        deleted = dict(self._scores())
        sizes = [
            int(self._reader.link.call("HLEN", self._reader.keys[n])) for n in ("rows", "facts")
        ]
        changed = set()
        for entry in self._journal(before):
            self._entry(entry)
            changed.add(entry.task_id)
        if self._reader.state().identity != self.initial.identity:
            raise InconsistentPagesError
        self._check_rows(rows, changed)
        self._check_index(rows, index, changed)
        self._check_dedup_keys(rows, dedup_keys, changed)
        self._check_deleted(deleted, changed)
        if not changed and sizes != [len(rows)] * 2:
            self.problems.append(
                f"rows has {sizes[0]} fields, facts {sizes[1]}, and the index {len(rows)} tasks"
            )
        return self.result()

    # -- the journal and the snapshots ------------------------------------------------

    def _journal(self, after: int) -> Iterator[RawEntry]:
        while True:
            state, entries = self._reader.raw_journal(after, JOURNAL_PAGE)
            if entries is None or state.identity != self.initial.identity:
                raise InconsistentPagesError
            if not entries:
                return
            yield from entries
            after = entries[-1].seq

    def _entry(self, entry: RawEntry) -> None:
        where = f"seq {entry.seq}, task {entry.task_id!r}"
        known = self._content.get(entry.task_id)
        if entry.at < self._last_at:
            self.problems.append(f"{where}: the time decreases from {self._last_at} to {entry.at}")
        if entry.task_id in self._deleted:
            self.problems.append(f"{where}: a change after its deletion")
        elif known is not None and entry.revision != known[0] + 1:
            self.problems.append(f"{where}: revision {entry.revision} follows {known[0]}")
        elif known is None and entry.revision != 1:
            self.problems.append(
                f"{where}: revision {entry.revision} of a task that does not exist"
            )
        previous_seq = self._last.get(entry.task_id, 0)
        if entry.previous_seq != previous_seq and entry.previous_seq >= max(
            previous_seq, self.initial.floor
        ):
            self.problems.append(
                f"{where}: the previous entry is {previous_seq}, not {entry.previous_seq}"
            )
        if entry.kind == b"u":
            damage = damage_of(entry.image)
            if damage is not None:
                self.problems.append(f"{where}: {damage}")
            self._content[entry.task_id] = (entry.revision, entry.image)
        else:
            self._content.pop(entry.task_id, None)
            self._deleted[entry.task_id] = entry.seq
        self._last[entry.task_id] = self.seq = entry.seq
        self._last_at = entry.at
        self.entries += 1

    def _snapshot(self, snapshot: PublishedSnapshot) -> Content:
        content: Content = {}
        for item in self._reader.snapshot_quarantined(snapshot):
            if item.occupied_task_id is not None:
                content[item.occupied_task_id] = (item.revision or 0, b"")
        for task_id, revision, image in self._reader.items(snapshot):
            damage = damage_of(image)
            if damage is not None:
                self.problems.append(
                    f"the snapshot at seq {snapshot.seq}, task {task_id!r}: {damage}"
                )
            content[task_id] = (revision, image)
        return content

    def _compare_snapshot(self, snapshot: PublishedSnapshot) -> None:
        if snapshot not in self._reader.snapshots():
            return  # the snapshot was dropped meanwhile
        self._compare_content(
            f"the snapshot at seq {snapshot.seq}", self._snapshot(snapshot), self._content
        )

    def _compare_content(self, subject: str, actual: Content, expected: Content) -> None:
        for problem, ids in (
            ("lacks", expected.keys() - actual.keys()),
            ("has extra", actual.keys() - expected.keys()),
            (
                "disagrees with the journal on",
                {key for key in actual.keys() & expected.keys() if actual[key] != expected[key]},
            ),
        ):
            self._report(f"{subject} {problem}", ids)

    def _report(self, problem: str, ids: Iterable[str]) -> None:
        task_ids = sorted(ids)
        if task_ids:
            names = ", ".join(map(repr, task_ids[:_MAX_NAMED_TASKS]))
            self.problems.append(f"{problem} {len(task_ids)} tasks: {names}")

    # -- the rows and what is derived from them -----------------------------------------

    def _rows(self) -> Iterator[Row]:
        range_ = EVERYTHING
        while True:
            scan = self._reader.scan([range_], Pages(PAGE_ROWS, PAGE_BYTES))
            if scan.state.identity != self.initial.identity:
                raise InconsistentPagesError
            [(more, rows)] = scan.pages
            yield from rows
            if not more or not rows:
                return
            range_ = range_._replace(first=b"(" + ALL + rows[-1].sort_key)

    def _check_rows(self, rows: dict[str, Row], changed: set[str]) -> None:
        actual: Content = {}
        wrong = []
        for task_id, row in rows.items():
            if row.image is None or row.facts is None or task_id in changed:
                continue
            last, _, facts = row.facts.partition(b"\0")
            revision = facts.partition(b"\0")[0]
            actual[task_id] = (int(revision) if revision.isdigit() else 0, row.image)
            known = self._last.get(task_id, 0)
            if not last.isdigit() or (known != int(last) and int(last) >= self.initial.floor):
                wrong.append(task_id)
            record = self._reader.decoded(row)
            if isinstance(record, TaskRecord) and facts_of(record) != facts:
                wrong.append(task_id)
            damage = damage_of(row.image)
            if damage is not None:
                self.problems.append(f"rows, task {task_id!r}: {damage}")
        expected = {
            task_id: content
            for task_id, content in self._content.items()
            if task_id not in changed and content[1]
        }
        self._compare_content("the hash of rows", actual, expected)
        self._report("the facts are wrong for", set(wrong))

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

    def _check_index(self, rows: dict[str, Row], index: list[bytes], changed: set[str]) -> None:
        expected = {
            member
            for task_id, row in rows.items()
            if task_id not in changed
            for member in _members(row)
        }
        actual = {member for member in index if _task_of(member) not in changed}
        for problem, members in (
            ("lacks members for", expected - actual),
            ("has extra members for", actual - expected),
        ):
            self._report(f"the index {problem}", {_task_of(member) for member in members})

    def _hash(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        cursor = b"0"
        while True:
            cursor, flat = self._reader.link.call(
                *("HSCAN", self._reader.keys[name], cursor, "COUNT", PAGE_ROWS)
            )
            yield from zip(flat[::2], flat[1::2], strict=True)
            if cursor == b"0":
                return

    def _check_dedup_keys(
        self, rows: dict[str, Row], dedup_keys: dict[bytes, bytes], changed: set[str]
    ) -> None:
        expected: dict[bytes, str] = {}
        for task_id, row in rows.items():
            key = _dedup_key(row)
            if key is not None:
                expected[key] = task_id
        actual = {key: task_id.decode() for key, task_id in dedup_keys.items()}
        wrong = {
            task_id for _, task_id in actual.items() ^ expected.items() if task_id not in changed
        }
        self._report("the dedup keys are wrong for", wrong)

    def _scores(self) -> Iterator[tuple[str, int]]:
        offset = 0
        while True:
            page = self._reader.link.call(
                *("ZRANGE", self._reader.keys["deleted"], self.initial.floor, "+inf", "BYSCORE"),
                *("LIMIT", offset, PAGE_ROWS, "WITHSCORES"),
            )
            for task_id, score in zip(page[::2], page[1::2], strict=True):
                yield task_id.decode(), int(float(score))
            if len(page) < 2 * PAGE_ROWS:
                return
            offset += PAGE_ROWS

    def _check_deleted(self, deleted: dict[str, int], changed: set[str]) -> None:
        differing = deleted.items() ^ self._deleted.items()
        wrong = {task_id for task_id, _ in differing if task_id not in changed}
        self._report("the deletions are wrong for", wrong)


def _facts(row: Row) -> list[bytes]:
    """The parts of a row's facts after the last seq; empty if the facts are damaged (see
    common.lua)."""
    parts = (row.facts or b"").split(b"\0")[1:]
    return parts if len(parts) == 3 + len(INDEXED) else []


def _members(row: Row) -> Iterator[bytes]:
    """The index members of a row."""
    yield ALL + row.sort_key
    for letter, value in zip(INDEXED.values(), _facts(row)[3:], strict=False):
        if value:
            yield letter + b"\0" + value[1:] + b"\0" + row.sort_key


def _task_of(member: bytes) -> str:
    return id_in_sort_key(member.rpartition(b"\0")[2])


def _dedup_key(row: Row) -> bytes | None:
    """The dedup key of a row, as stored in ``bookings``; ``None`` if the row has none."""
    parts = _facts(row)
    if not parts or not parts[2] or not parts[3]:
        return None
    return parts[3][1:] + b"\0" + parts[2][1:]
