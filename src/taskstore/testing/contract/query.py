"""Query: what the store answers itself is what evaluate() says over all records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from taskstore.model.query import Page, TaskQuery, evaluate
from taskstore.model.records import (
    OPTIONAL_TIMES,
    DeliveryStatus,
    NotifyPolicy,
    ScopeKind,
    TaskRecord,
    TaskStatus,
    TerminalOutcome,
)
from taskstore.store.interface import SupportsQuery, TaskRegistryStore
from taskstore.testing.contract.base import ContractBase, Ledger
from taskstore.testing.factories import EPOCH_MS, create, delete, make_put, play, update
from taskstore.testing.types import FullStore

_NO_FILTERS = {"metadata_json", "unknown_json", "requester_origin"}
FILTERS = (
    "session_key",
    *(field for field in TaskRecord.__struct_fields__ if field not in _NO_FILTERS),
)
"""Everything that a query can filter by."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "status": tuple(TaskStatus),
    "delivery_status": tuple(DeliveryStatus),
    "notify_policy": tuple(NotifyPolicy),
    "scope_kind": tuple(ScopeKind),
    "terminal_outcome": (None, *TerminalOutcome),
    "runtime": ("cli", "cron", "acp"),
    "created_at": tuple(EPOCH_MS + n for n in (0, 0, 0, 1, 2, 5)),
}
_TEXTS = (None, "", "a", "A", "a ", "á", "b")
_TIMES = (None, 0, EPOCH_MS, EPOCH_MS + 1, 2**53 - 1)


def varied(count: int) -> list[dict[str, Any]]:
    """Fields of records that differ in every way that a filter can tell, with many ties."""
    rows = []
    for n in range(count):
        row: dict[str, Any] = {"task_id": f"task-{(n * 7) % count:02}", "owner_key": f"o{n % 3}"}
        for place, field in enumerate(FILTERS):
            if field in ("session_key", "task_id", "revision", "owner_key", "run_digest", "run_id"):
                continue
            choices = _CHOICES.get(field, _TIMES if field in OPTIONAL_TIMES else _TEXTS)
            row[field] = choices[(n * (place % 5 + 1) + place) % len(choices)]
        row["task"] = row["task"] or ""
        row["lease_token"] = row["lease_token"] or None
        row["run_id"] = (None, f"run-{n % 4}")[n % 2]
        row["run_digest"] = f"{n:032}" if row["run_id"] else None
        rows.append(row)
    return rows


def fill(store: TaskRegistryStore, count: int = 30) -> None:
    """Store varied records, some of them updated, some deleted."""
    puts = [make_put(**row) for row in varied(count)]
    store.apply(puts)
    for put in puts[:: count // 5]:
        update(store, put.record, label="changed")
    delete(store, puts[1].record, puts[2].record)


class Questions:
    """Asks a store and compares each answer with what the query means."""

    def __init__(self, store: FullStore) -> None:
        self.store = store
        self.loaded = store.load_snapshot()

    def right(self, **asked: Any) -> Page:
        """What a query means: evaluate() over all records."""
        return evaluate(TaskQuery(**asked), self.loaded.records.values(), self.loaded.seq)

    def __call__(self, **asked: Any) -> Page:
        """Ask, compare, and return the store's answer."""
        # A query of its own, lest the store change the one that it was given.
        page, right = self.store.query(TaskQuery(**asked)), self.right(**asked)
        assert list(page) == list(right), f"the answer to {TaskQuery(**asked)!r} is wrong"
        assert page.next_cursor == right.next_cursor
        assert page.seq == right.seq
        return page


def pages(store: FullStore, **asked: Any) -> Iterator[Page]:
    """Every page of a query, in order."""
    after = None
    while True:
        page = store.query(TaskQuery(**asked, after=after))
        yield page
        after = page.next_cursor
        if after is None:
            return


class QueryContract(ContractBase):
    """What ``SupportsQuery`` promises."""

    level = "query"
    abilities: ClassVar[tuple[type, ...]] = (SupportsQuery,)

    def test_an_empty_store(self, ledger: Ledger) -> None:
        """[5] Nothing is found where nothing is, as of seq 0."""
        for store in ledger.twice():
            ask = Questions(store)
            page = ask()
            assert (len(page), page.next_cursor, page.seq) == (0, None, 0)
            ask(limit=1, status="queued")

    def test_everything_newest_first(self, ledger: Ledger) -> None:
        """[5] Without filters all records come, newest first by (created_at, task_id)."""
        fill(ledger.store)
        for store in ledger.twice():
            ask = Questions(store)
            page = ask()
            assert len(page) == 28
            keys = [record.sort_key for record in page]
            assert keys == sorted(keys, reverse=True)

    def test_ids_are_ordered_byte_by_byte(self, ledger: Ledger) -> None:
        """[11] Ties in created_at are in the order of code points, not of a language."""
        ids = ["a", "B", "b", "A", "a ", "a-", "_a", "á", "é", "z", "Z", "10", "9", "🎉", "\uffff"]
        ledger.store.apply([make_put(task_id=task_id) for task_id in ids])
        for store in ledger.twice():
            ask = Questions(store)
            assert [record.task_id for record in ask()] == sorted(ids, reverse=True)
            found = [record.task_id for page in pages(store, limit=2) for record in page]
            assert found == sorted(ids, reverse=True)

    @pytest.mark.parametrize("field", FILTERS)
    def test_filter(self, ledger: Ledger, field: str) -> None:
        """[5] Each field filters by its value, by several, by absence, and by what nobody has."""
        fill(ledger.store)
        values = list(dict.fromkeys(row.get(field) for row in varied(30)))
        if field == "revision":
            values = [1, 2, 3]
        if field == "session_key":
            values = list(_TEXTS)
        number = field in ("revision", "created_at", *OPTIONAL_TIMES)
        absent: Any = 77 if number else "nobody has this"
        for store in ledger.twice():
            ask = Questions(store)
            for value in values:
                ask(**{field: value})
            ask(**{field: None})
            ask(**{field: values})
            ask(**{field: values[:2]})
            ask(**{field: tuple(values[1:])}, limit=3)
            ask(**{field: []})
            if field not in _CHOICES or field in ("runtime", "created_at"):
                assert len(ask(**{field: absent})) == 0
                ask(**{field: {absent, values[0]}})

    def test_filters_together(self, ledger: Ledger) -> None:
        """[5] Several filters have to hold at once."""
        fill(ledger.store)
        for store in ledger.twice():
            ask = Questions(store)
            for status in TaskStatus:
                ask(status=status, owner_key="o1")
                ask(status=[status, "running"], label=[None, "a"], limit=4)
                ask(runtime="cli", status=str(status), since=EPOCH_MS + 1)
            ask(session_key="a", owner_key=["o0", "o2"], notify_policy="silent")
            ask(session_key="a", child_session_key=None)
            ask(session_key=[None, "b"], limit=2)

    def test_since(self, ledger: Ledger) -> None:
        """[5] since is the earliest created_at, itself included."""
        fill(ledger.store)
        for store in ledger.twice():
            ask = Questions(store)
            for since in (0, EPOCH_MS, EPOCH_MS + 1, EPOCH_MS + 5, EPOCH_MS + 6, 2**53 - 1):
                ask(since=since)
                ask(since=since, limit=2)

    @pytest.mark.parametrize("limit", [1, 2, 3, 5, 13, 27, 28, 29, 1000])
    def test_pages(self, ledger: Ledger, limit: int) -> None:
        """[5] Pages one after the other give every record once, with ties across pages."""
        fill(ledger.store)
        for store in ledger.twice():
            for asked in ({}, {"status": list(TaskStatus)[:4]}, {"since": EPOCH_MS + 1}):
                whole = list(Questions(store).right(**asked))
                found = list(pages(store, **asked, limit=limit))
                assert [record for page in found for record in page] == whole
                assert all(len(page) == limit for page in found[:-1])
                assert len(found) == max(1, -(-len(whole) // limit))

    def test_every_cursor(self, ledger: Ledger) -> None:
        """[5] From the cursor of any record, with or without a limit, come the ones after it."""
        fill(ledger.store)
        for store in ledger.twice():
            ask = Questions(store)
            for page in pages(store, limit=1):
                if page.next_cursor is not None:
                    ask(after=page.next_cursor)
                    ask(after=page.next_cursor, limit=2, scope_kind="session")

    def test_the_cursor_of_a_deleted_record(self, ledger: Ledger) -> None:
        """[7] A cursor is a place in the order, whether or not its record is still there."""
        fill(ledger.store)
        page = ledger.store.query(TaskQuery(limit=10))
        rest = list(ledger.store.query(TaskQuery(after=page.next_cursor)))
        delete(ledger.store, page[-1], rest[0])
        for store in ledger.twice():
            ask = Questions(store)
            assert list(ask(after=page.next_cursor)) == rest[1:]

    def test_what_came_in_between(self, ledger: Ledger) -> None:
        """[5] A newer record does not shift the pages that are still to come."""
        fill(ledger.store)
        page = ledger.store.query(TaskQuery(limit=10))
        rest = list(ledger.store.query(TaskQuery(after=page.next_cursor)))
        create(ledger.store, created_at=EPOCH_MS + 10**6)
        for store in ledger.twice():
            ask = Questions(store)
            assert list(ask(after=page.next_cursor)) == rest

    def test_the_seq_of_the_answer(self, ledger: Ledger) -> None:
        """[5] A page names the commit that it is true for."""
        model = play(ledger.store)
        for store in ledger.twice():
            assert store.query(TaskQuery()).seq == model.head
            assert store.query(TaskQuery(limit=1, label="nobody")).seq == model.head

    def test_updates_are_found_by_what_they_became(self, ledger: Ledger) -> None:
        """[5] After an update the old value finds nothing, the new one does."""
        record = create(ledger.store, status="queued", label="old", error=None)
        update(ledger.store, record, status=TaskStatus.FAILED, label=None, error="e" * 60_000)
        for store in ledger.twice():
            ask = Questions(store)
            assert len(ask(status="queued")) == 0
            assert len(ask(label="old")) == 0
            assert len(ask(status="failed", label=None)) == 1
            assert len(ask(error="e" * 60_000)) == 1
            assert len(ask(error="e" * 59_999)) == 0

    def test_long_texts_that_begin_alike(self, ledger: Ledger) -> None:
        """[11] Texts are compared to their end, however late they differ."""
        long = "x" * 500_000
        one, two = create(ledger.store, task=long + "1"), create(ledger.store, task=long + "2")
        for store in ledger.twice():
            ask = Questions(store)
            for record in (one, two):
                assert [found.task_id for found in ask(task=record.task)] == [record.task_id]
            assert len(ask(task=long)) == 0

    def test_many_values(self, ledger: Ledger) -> None:
        """[5] A filter takes more values than a statement has parameters for."""
        fill(ledger.store)
        many = [f"nobody-{n}" for n in range(70_000)]
        for store in ledger.twice():
            ask = Questions(store)
            ask(task_id=[*many, "task-07", "task-08", "task-09"], limit=2)
