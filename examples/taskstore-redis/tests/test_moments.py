"""Queries and loads in several pages, with other commits between the pages."""

from __future__ import annotations

import random
from typing import Any

import pytest
from taskstore import CompactionPolicy, Put, Remove, Snapshot, TaskQuery
from taskstore.store import evaluate
from taskstore.testing import EPOCH_MS, Model, OpenStore, make_record, next_of

from taskstore_redis import RedisStore
from taskstore_redis.reading import Reader, Scan

TRIM = CompactionPolicy(force=True, history_entries=0, history_s=0, keep_snapshots=1)
IDS = [f"task-{n:02}" for n in range(20)]
QUERIES: list[dict[str, Any]] = [
    {},
    {"limit": 3},
    {"limit": 7},
    {"status": ["queued", "running"], "limit": 4},
    {"status": ["queued", "running"]},
    {"label": "a", "limit": 3},
    {"session_key": ["s0", "s1"], "label": ["a", "b"], "limit": 5},
    {"owner_key": "o1", "since": EPOCH_MS + 3},
]


class ConcurrentWriter:
    """Between two pages, commits a few changes to a store and to a model."""

    def __init__(self, store: RedisStore, seed: int) -> None:
        self.store = store
        self.rng = random.Random(seed)
        self.model = Model()
        self.compacts = False
        for _ in range(15):
            self.write()

    def write(self) -> None:
        rng, model = self.rng, self.model
        changes: list[Put | Remove] = []
        for task_id in rng.sample(IDS, rng.randint(1, 3)):
            record = model.records.get(task_id)
            facts = {
                "created_at": EPOCH_MS + rng.randrange(8),
                "label": rng.choice("abc"),
                "status": rng.choice(["queued", "running", "lost"]),
                "owner_key": rng.choice(["o0", "o1"]),
                "child_session_key": rng.choice([None, "s0", "s1"]),
                "requester_session_key": rng.choice([None, "s0", "s1"]),
            }
            if record is not None and rng.random() < 0.2:
                changes.append(Remove(task_id, record.revision + 1))
            elif record is not None:
                changes.append(next_of(record, **facts))
            elif task_id not in model.deleted:
                changes.append(Put(make_record(task_id=task_id, **facts)))
        if changes:
            self.store.apply(changes)
            model.commit(list(changes))
        if self.compacts and rng.random() < 0.3:
            kept = dict(model.states)
            model.trim(self.store.compact(TRIM).floor)
            model.states = kept


@pytest.fixture
def make_reader(make_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that returns a store, and a writer that commits after each page that the store
    reads."""
    stores: list[Any] = []

    def make(seed: int) -> tuple[RedisStore, ConcurrentWriter]:
        reader, other = make_store(), make_store()
        stores.extend((reader, other))
        writer = ConcurrentWriter(other, seed)
        scan = Reader.scan

        def scan_and_write(self: Reader, *rest: Any, **options: Any) -> Scan:
            found = scan(self, *rest, **options)
            if self is reader._reader:
                writer.write()
            return found

        monkeypatch.setattr(Reader, "scan", scan_and_write)
        return reader, writer

    yield make
    for store in stores:
        store.close()


@pytest.mark.parametrize("compacts", [False, True], ids=["", "trimmed"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("small_steps")
def test_a_page_is_of_its_seq(make_reader: Any, seed: int, *, compacts: bool) -> None:
    """[5] Records, revisions, order and cursor of a page are those of the page's seq."""
    store, writer = make_reader(seed)
    writer.compacts = compacts
    for filters in QUERIES * 2:
        after = None
        for _ in range(3):
            query = TaskQuery(**filters, after=after)
            page = store.query(query)
            expected = evaluate(query, writer.model.states[page.seq].values(), page.seq)
            assert list(page) == list(expected), filters
            assert page.next_cursor == expected.next_cursor
            after = page.next_cursor
            if after is None:
                break


@pytest.mark.parametrize("compacts", [False, True], ids=["", "trimmed"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.usefixtures("small_steps")
def test_a_load_is_of_its_seq(make_reader: Any, seed: int, *, compacts: bool) -> None:
    """[5] Head, time and records are of one seq, however many pages were read."""
    store, writer = make_reader(seed)
    writer.compacts = compacts
    for _ in range(10):
        loaded = store.load_snapshot()
        assert dict(loaded.records) == writer.model.states[loaded.seq]
        if not compacts:
            [last] = writer.store.read_journal(loaded.seq - 1, 1)
            assert loaded.at == last.at


@pytest.mark.usefixtures("small_steps")
def test_a_save_during_a_load(make_reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, writer = make_reader(1)
    saved = {f"saved-{n}": make_record(task_id=f"saved-{n}") for n in range(5)}
    pages: list[int] = []

    def save_instead() -> None:
        pages.append(1)
        if len(pages) == 2:
            writer.store.save_snapshot(Snapshot(writer.store.head() + 1, saved))

    writer.write = save_instead
    assert dict(store.load_snapshot().records) == saved
