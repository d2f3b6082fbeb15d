"""Query clauses: a store returns the same pages as ``evaluate()``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from taskstore.model.journal import Quarantined, Snapshot
from taskstore.model.query import Page, Summary, TaskQuery, evaluate
from taskstore.model.records import (
    OPTIONAL_TIMES,
    DeliveryStatus,
    NotifyPolicy,
    ScopeKind,
    TaskRecord,
    TaskStatus,
    TerminalOutcome,
)
from taskstore.store.interface import (
    SupportsIdSearch,
    SupportsJournal,
    SupportsQuery,
    SupportsStreaming,
    SupportsSummary,
    TaskRegistryStore,
)
from taskstore.testing.contract.base import ContractBase, Ledger
from taskstore.testing.factories import EPOCH_MS, create, delete, make_put, play, update
from taskstore.testing.types import FullStore

_NO_FILTERS = {"metadata_json", "unknown_json", "requester_origin"}
FILTERS = (
    "session_key",
    *(field for field in TaskRecord.__struct_fields__ if field not in _NO_FILTERS),
)
"""The fields that a query can filter by."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "status": tuple(TaskStatus),
    "delivery_status": tuple(DeliveryStatus),
    "notify_policy": tuple(NotifyPolicy),
    "scope_kind": tuple(ScopeKind),
    "terminal_outcome": (None, *TerminalOutcome),
    "runtime": ("cli", "cron", "acp"),
    "created_at": tuple(EPOCH_MS + n for n in (0, 0, 0, 1, 2, 5)),
}
_TEXT_VALUES = (None, "", "a", "A", "a ", "á", "b")
_TIME_VALUES = (None, 0, EPOCH_MS, EPOCH_MS + 1, 2**53 - 1)


def varied_fields(count: int) -> list[dict[str, Any]]:
    """Return the fields of ``count`` records: values for every filter, and some equal sort keys."""
    rows = []
    for n in range(count):
        row: dict[str, Any] = {"task_id": f"task-{(n * 7) % count:02}", "owner_key": f"o{n % 3}"}
        for index, field in enumerate(FILTERS):
            if field in ("session_key", "task_id", "revision", "owner_key", "run_digest", "run_id"):
                continue
            choices = _CHOICES.get(field, _TIME_VALUES if field in OPTIONAL_TIMES else _TEXT_VALUES)
            row[field] = choices[(n * (index % 5 + 1) + index) % len(choices)]
        row["task"] = row["task"] or ""
        row["lease_token"] = row["lease_token"] or None
        row["run_id"] = (None, f"run-{n % 4}")[n % 2]
        row["run_digest"] = f"{n:032}" if row["run_id"] else None
        rows.append(row)
    return rows


def create_varied(store: TaskRegistryStore, count: int = 30) -> None:
    """Create records with various fields; then update some records and delete two."""
    puts = [make_put(**row) for row in varied_fields(count)]
    store.apply(puts)
    for put in puts[:: count // 5]:
        update(store, put.record, label="changed")
    delete(store, puts[1].record, puts[2].record)


class QueryChecker:
    """Sends queries to a store and compares each page with ``evaluate()``."""

    def __init__(self, store: FullStore) -> None:
        self.store = store
        self.loaded = store.load_snapshot()

    def expected(self, **filters: Any) -> Page:
        """Return the page that ``evaluate()`` computes from all loaded records."""
        return evaluate(TaskQuery(**filters), self.loaded.records.values(), self.loaded.seq)

    def __call__(self, **filters: Any) -> Page:
        """Send a query, compare the page with ``evaluate()``, and return the page."""
        # The store and ``evaluate()`` get separate query objects; a store might change its object.
        page, expected = self.store.query(TaskQuery(**filters)), self.expected(**filters)
        assert list(page) == list(expected), f"wrong page for {TaskQuery(**filters)!r}"
        assert page.next_cursor == expected.next_cursor
        assert page.seq == expected.seq
        return page


def pages_of(store: FullStore, **filters: Any) -> Iterator[Page]:
    """Yield every page of a query, in order."""
    after = None
    while True:
        page = store.query(TaskQuery(**filters, after=after))
        yield page
        after = page.next_cursor
        if after is None:
            return


class QueryContract(ContractBase):
    """The guarantees of ``SupportsQuery``."""

    level = "query"
    abilities: ClassVar[tuple[type, ...]] = (SupportsQuery,)

    def test_an_empty_store(self, ledger: Ledger) -> None:
        """[5] A query on an empty store returns an empty page with seq 0."""
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            page = check()
            assert (len(page), page.next_cursor, page.seq) == (0, None, 0)
            check(limit=1, status="queued")

    def test_everything_newest_first(self, ledger: Ledger) -> None:
        """[5] A query without filters returns all records, descending by (created_at, task_id)."""
        create_varied(ledger.store)
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            page = check()
            assert len(page) == 28
            keys = [record.sort_key for record in page]
            assert keys == sorted(keys, reverse=True)

    def test_ids_are_ordered_byte_by_byte(self, ledger: Ledger) -> None:
        """[11] With equal created_at, records are sorted by task_id in code point order."""
        ids = ["a", "B", "b", "A", "a ", "a-", "_a", "á", "é", "z", "Z", "10", "9", "🎉", "\uffff"]
        ledger.store.apply([make_put(task_id=task_id) for task_id in ids])
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            assert [record.task_id for record in check()] == sorted(ids, reverse=True)
            found = [record.task_id for page in pages_of(store, limit=2) for record in page]
            assert found == sorted(ids, reverse=True)

    @pytest.mark.parametrize("field", FILTERS)
    def test_filter(self, ledger: Ledger, field: str) -> None:
        """[5] A filter accepts one value, several values, None, and values that no record has."""
        create_varied(ledger.store)
        values = list(dict.fromkeys(row.get(field) for row in varied_fields(30)))
        if field == "revision":
            values = [1, 2, 3]
        if field == "session_key":
            values = list(_TEXT_VALUES)
        number = field in ("revision", "created_at", *OPTIONAL_TIMES)
        absent: Any = 77 if number else "no record has this"
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            for value in values:
                check(**{field: value})
            check(**{field: None})
            check(**{field: values})
            check(**{field: values[:2]})
            check(**{field: tuple(values[1:])}, limit=3)
            check(**{field: []})
            if field not in _CHOICES or field in ("runtime", "created_at"):
                assert len(check(**{field: absent})) == 0
                check(**{field: {absent, values[0]}})

    def test_filters_together(self, ledger: Ledger) -> None:
        """[5] A record must match all filters of a query."""
        create_varied(ledger.store)
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            for status in TaskStatus:
                check(status=status, owner_key="o1")
                check(status=[status, "running"], label=[None, "a"], limit=4)
                check(runtime="cli", status=str(status), since=EPOCH_MS + 1)
            check(session_key="a", owner_key=["o0", "o2"], notify_policy="silent")
            check(session_key="a", child_session_key=None)
            check(session_key=[None, "b"], limit=2)

    def test_since(self, ledger: Ledger) -> None:
        """[5] The filter "since" selects the records that were created at or after a time."""
        create_varied(ledger.store)
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            for since in (0, EPOCH_MS, EPOCH_MS + 1, EPOCH_MS + 5, EPOCH_MS + 6, 2**53 - 1):
                check(since=since)
                check(since=since, limit=2)

    @pytest.mark.parametrize("limit", [1, 2, 3, 5, 13, 27, 28, 29, 1000])
    def test_pages(self, ledger: Ledger, limit: int) -> None:
        """[5] Successive query pages contain each record once, even if created_at values repeat."""
        create_varied(ledger.store)
        for store in ledger.before_and_after_reopen():
            for filters in ({}, {"status": list(TaskStatus)[:4]}, {"since": EPOCH_MS + 1}):
                records = list(QueryChecker(store).expected(**filters))
                found = list(pages_of(store, **filters, limit=limit))
                assert [record for page in found for record in page] == records
                assert all(len(page) == limit for page in found[:-1])
                assert len(found) == max(1, -(-len(records) // limit))

    def test_every_cursor(self, ledger: Ledger) -> None:
        """[5] A query after any record's cursor returns all later records, up to the limit."""
        create_varied(ledger.store)
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            for page in pages_of(store, limit=1):
                if page.next_cursor is not None:
                    check(after=page.next_cursor)
                    check(after=page.next_cursor, limit=2, scope_kind="session")

    def test_the_cursor_of_a_deleted_record(self, ledger: Ledger) -> None:
        """[7] A cursor remains valid after its record is deleted."""
        create_varied(ledger.store)
        page = ledger.store.query(TaskQuery(limit=10))
        rest = list(ledger.store.query(TaskQuery(after=page.next_cursor)))
        delete(ledger.store, page[-1], rest[0])
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            assert list(check(after=page.next_cursor)) == rest[1:]

    def test_what_came_in_between(self, ledger: Ledger) -> None:
        """[5] A record that is created between two pages does not shift the second page."""
        create_varied(ledger.store)
        page = ledger.store.query(TaskQuery(limit=10))
        rest = list(ledger.store.query(TaskQuery(after=page.next_cursor)))
        create(ledger.store, created_at=EPOCH_MS + 10**6)
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            assert list(check(after=page.next_cursor)) == rest

    def test_the_seq_of_the_answer(self, ledger: Ledger) -> None:
        """[5] A query page has the records as of the seq of the page."""
        model = play(ledger.store)
        for store in ledger.before_and_after_reopen():
            assert store.query(TaskQuery()).seq == model.head
            assert store.query(TaskQuery(limit=1, label="nobody")).seq == model.head

    def test_updates_are_found_by_what_they_became(self, ledger: Ledger) -> None:
        """[5] After an update, a query finds the record by the new values only."""
        record = create(ledger.store, status="queued", label="old", error=None)
        update(ledger.store, record, status=TaskStatus.FAILED, label=None, error="e" * 60_000)
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            assert len(check(status="queued")) == 0
            assert len(check(label="old")) == 0
            assert len(check(status="failed", label=None)) == 1
            assert len(check(error="e" * 60_000)) == 1
            assert len(check(error="e" * 59_999)) == 0

    def test_long_texts_that_begin_alike(self, ledger: Ledger) -> None:
        """[11] Filters compare texts in full, even if only the last character differs."""
        long = "x" * 500_000
        one, two = create(ledger.store, task=long + "1"), create(ledger.store, task=long + "2")
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            for record in (one, two):
                assert [found.task_id for found in check(task=record.task)] == [record.task_id]
            assert len(check(task=long)) == 0

    def test_many_values(self, ledger: Ledger) -> None:
        """[5] A filter accepts more values than the parameter limit of an SQL statement."""
        create_varied(ledger.store)
        absent_ids = [f"nobody-{n}" for n in range(70_000)]
        for store in ledger.before_and_after_reopen():
            check = QueryChecker(store)
            check(task_id=[*absent_ids, "task-07", "task-08", "task-09"], limit=2)


class StreamingContract(ContractBase):
    """The guarantees of ``SupportsStreaming``."""

    level = "query"
    abilities: ClassVar[tuple[type, ...]] = (SupportsStreaming,)

    @pytest.mark.parametrize("size", [1, 3, 14, 28, 1000])
    def test_parts_of_a_page(self, ledger: Ledger, size: int) -> None:
        """[5] The parts together are the page; the last part has the next_cursor of the page."""
        create_varied(ledger.store)
        queries: list[dict[str, Any]] = [{}, {"limit": 1}, {"limit": 28}, {"limit": 9}]
        queries += [{"status": list(TaskStatus)[:4], "limit": 5}, {"since": EPOCH_MS + 1}]
        queries += [{"label": "no record has this"}, {"task": "a", "limit": 2}]
        for store in ledger.before_and_after_reopen():
            checker = QueryChecker(store)
            for filters in queries:
                expected = checker.expected(**filters)
                parts = list(store.stream(TaskQuery(**filters), size))
                assert [record for part in parts for record in part] == list(expected)
                assert len(parts) == max(1, -(-len(expected) // size))
                assert all(len(part) == size for part in parts[:-1])
                assert {part.seq for part in parts} == {expected.seq}
                assert parts[-1].next_cursor == expected.next_cursor

    def test_every_part_has_its_cursor(self, ledger: Ledger) -> None:
        """[5] A query after the cursor of any part returns the records of the later parts."""
        create_varied(ledger.store)
        for store in ledger.before_and_after_reopen():
            parts = list(store.stream(TaskQuery(), 5))
            for number, part in enumerate(parts[:-1], 1):
                rest = next(store.stream(TaskQuery(after=part.next_cursor), 1000))
                assert list(rest) == [record for later in parts[number:] for record in later]

    def test_all_parts_are_of_one_moment(self, ledger: Ledger) -> None:
        """[5] All parts show the records as of one seq, even if a commit happens meanwhile."""
        create_varied(ledger.store)
        for store in ledger.before_and_after_reopen():
            expected = QueryChecker(store).expected()
            writer = ledger.open()
            found: list[TaskRecord] = []
            for number, part in enumerate(store.stream(TaskQuery(), 5)):
                assert part.seq == expected.seq
                found += part
                if number == 1:
                    update(writer, expected[-1], label="changed in between")
                    delete(writer, expected[-2], expected[0])
                    create(writer, created_at=0)
            assert found == list(expected)
            QueryChecker(store)()

    def test_parts_that_are_not_read(self, ledger: Ledger) -> None:
        """[2] If a reader closes the iterator before the last part, no writer has to wait."""
        create_varied(ledger.store)
        for store in ledger.before_and_after_reopen():
            parts = store.stream(TaskQuery(), 3)
            next(parts)
            parts.close()  # type: ignore[attr-defined]  # every iterator here is a generator
            create(store)
            QueryChecker(store)()


class SummaryContract(ContractBase):
    """The guarantees of ``SupportsSummary``."""

    level = "query"
    abilities: ClassVar[tuple[type, ...]] = (SupportsSummary,)

    def test_the_summary_counts_the_records(self, ledger: Ledger) -> None:
        """[5] The summary has the same counts and the same seq as the loaded records."""
        assert ledger.store.summary() == Summary.from_records((), 0)
        create_varied(ledger.store)
        record = create(ledger.store, status="queued", runtime="a-runtime")
        for status in (TaskStatus.RUNNING, TaskStatus.FAILED):
            for store in ledger.before_and_after_reopen():
                loaded = store.load_snapshot()
                assert store.summary() == Summary.from_records(loaded.records.values(), loaded.seq)
            record = update(ledger.store, record, status=status)
        delete(ledger.store, record)
        for store in ledger.before_and_after_reopen():
            loaded = store.load_snapshot()
            counted = store.summary()
            assert counted == Summary.from_records(loaded.records.values(), loaded.seq)
            assert "a-runtime" not in counted.by_runtime

    def test_the_summary_of_a_saved_snapshot(self, ledger: Ledger) -> None:
        """[12] The summary does not count the quarantined records of a saved snapshot."""
        records = {put.task_id: put.record for put in (make_put() for _ in range(3))}
        raw = b'{"v":"9.0","task_id":"from the future","revision":3}'
        item = Quarantined(raw, "elsewhere", "from a newer version", "from the future", 3)
        ledger.store.save_snapshot(Snapshot(7, records, EPOCH_MS, (item,)))
        for store in ledger.before_and_after_reopen():
            assert store.summary() == Summary.from_records(records.values(), 7)


_IDS = (
    "01890000-0000-7000-8000-00000000abcd",
    "01890000-0000-7000-8000-10000000abcd",
    "01890000-0000-7000-8000-10000000ABCD",
    "abcd",
    "x_bcd",
    "x%bcd",
    "x\\bcd",
    "xbcd",
    "é",
    "e\u0301",
    "🎉 end",
    "trailing ",
)


class IdSearchContract(ContractBase):
    """The guarantees of ``SupportsIdSearch``."""

    level = "query"
    abilities: ClassVar[tuple[type, ...]] = (SupportsIdSearch,)

    def test_ids_by_their_ending(self, ledger: Ledger) -> None:
        """[11] Endings of ids are compared exactly, and no character is a wildcard."""
        ledger.store.apply([make_put(task_id=task_id) for task_id in _IDS])
        cases: list[tuple[str, ...]]
        cases = [(task_id[-size:],) for task_id in _IDS for size in (1, 2, 4, 5, 12, 40)]
        cases += [("%bcd",), ("_bcd",), ("\\bcd",), ("%",), ("nobody",), ("",), ("y" * 300,)]
        cases += [("\0",), ("\ud800",), ("trailing",), ("abcd", "🎉 end"), (), ("", "xbcd")]
        for store in ledger.before_and_after_reopen():
            for endings in cases:
                expected = [i for i in sorted(_IDS) if any(e and i.endswith(e) for e in endings)]
                assert list(store.find_ids(endings, 100)) == expected, endings
            assert (
                list(store.find_ids(["bcd"], 3)) == [i for i in sorted(_IDS) if i[-3:] == "bcd"][:3]
            )

    def test_deleted_ids(self, ledger: Ledger) -> None:
        """[3] A search finds the ids of stored tasks; with deleted=True, those of deleted tasks."""
        kept, gone = create(ledger.store, task_id="kept-1234"), None
        for store in ledger.before_and_after_reopen():
            gone = create(
                store,
                task_id=f"gone-{len(store.load_snapshot().records)}{store.load_snapshot().seq}-1234",
            )
            assert len(store.find_ids(["1234"], 9)) == 2
            delete(store, update(store, gone))
            assert list(store.find_ids(["1234"], 9)) == [kept.task_id]
        if isinstance(ledger.store, SupportsJournal):
            for store in ledger.before_and_after_reopen():
                deleted = store.find_ids(["1234"], 9, deleted=True)
                assert len(deleted) == 2
                assert gone is not None
                assert gone.task_id in deleted
                assert list(store.find_ids(["kept-1234"], 9, deleted=True)) == []
