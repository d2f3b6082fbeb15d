"""The statements of each operation: their number, kind and index."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import sqlalchemy as sa
from sqlkit import Spy, in_process, output_of, write

from taskstore.model.codec import checksum, encode_record
from taskstore.model.journal import Put, Snapshot
from taskstore.model.query import TaskQuery, evaluate
from taskstore.model.records import TaskRecord, TaskStatus
from taskstore.stores.sql.commits import insert_values
from taskstore.stores.sql.dialects import Database
from taskstore.stores.sql.dialects.base import row_groups
from taskstore.stores.sql.query import _select_page
from taskstore.stores.sql.statements import BATCH_SIZES
from taskstore.stores.sql.tables import ONLY_ON, TABLES, tasks
from taskstore.testing.factories import EPOCH_MS, create, make_record, next_of, removal_of, update


def kinds(statements: list[str]) -> list[str]:
    """The verb and the table of each statement."""
    found = []
    for sql in statements:
        words = sql.split()
        verb = next((word for word in words if word in VERBS), None)
        if verb is None:
            continue  # a setting of the connection
        table = next((word for word in words if word.strip("(),") in TABLES), "")
        found.append(f"{verb} {table}".strip())
    return found


VERBS = {"BEGIN", "COMMIT", "ROLLBACK", "SELECT", "INSERT", "UPDATE", "DELETE"}
COMMIT = ["COMMIT"]
CLAIM = ["UPDATE taskstore_head"]


def recorded(spy: Spy, action) -> list[str]:
    spy.statements.clear()
    action()
    # The statement that begins a transaction depends on the dialect.
    return [kind for kind in kinds(spy.statements) if kind != "BEGIN"]


def test_one_event_is_one_small_transaction(store, spy):
    [put] = [Put(make_record())]
    create_task = ["INSERT tasks", "INSERT task_journal"]
    assert recorded(spy, lambda: store.apply([put])) == CLAIM + create_task + COMMIT
    change = next_of(put.record, progress_summary="half", status=TaskStatus.RUNNING)
    change_task = ["UPDATE tasks", "INSERT task_journal"]
    assert recorded(spy, lambda: store.apply([change])) == CLAIM + change_task + COMMIT
    removal = removal_of(change.record)
    remove_task = ["DELETE tasks", "INSERT task_journal"]
    assert recorded(spy, lambda: store.apply([removal])) == CLAIM + remove_task + COMMIT


def test_a_projection_that_changes_takes_one_more(store, spy):
    record = create(store)
    change = next_of(record, owner_key="me")
    expected = ["UPDATE tasks", "UPDATE tasks", "INSERT task_journal"]
    assert recorded(spy, lambda: store.apply([change])) == CLAIM + expected + COMMIT
    assert store.verify().ok


def test_a_hundred_changes_take_a_few_calls(store, spy):
    records = [make_record(created_at=EPOCH_MS + number) for number in range(100)]
    # 100 = 64 + 2 * 16 + 4
    expected = ["INSERT tasks"] * 4 + ["INSERT task_journal"] * 4
    done = recorded(spy, lambda: store.apply([Put(record) for record in records]))
    assert done == CLAIM + expected + COMMIT
    changes = [next_of(record, label="x") for record in records]
    expected = ["UPDATE tasks"] * 4 + ["INSERT task_journal"] * 4
    assert recorded(spy, lambda: store.apply(changes)) == CLAIM + expected + COMMIT
    assert dict(store.load_snapshot().records) == {c.task_id: c.record for c in changes}


def test_every_batch_size_is_right(store):
    records = {}
    for count in (1, 2, 3, 5, 17, 85, 341):
        batch = [make_record(owner_key="me") for _ in range(count)]
        store.apply([Put(record) for record in batch])
        # Half of them keep their projections, half change them.
        changes = [
            next_of(record, owner_key="you" if number % 2 else "me")
            for number, record in enumerate(batch)
        ]
        store.apply(changes)
        gone = {change.task_id for change in changes[::3]}
        store.apply([removal_of(change.record) for change in changes[::3]])
        records |= {c.task_id: c.record for c in changes if c.task_id not in gone}
    assert dict(store.load_snapshot().records) == records
    assert store.verify().ok


def test_rows_are_split_into_groups_of_known_sizes():
    for count in (0, 1, 4, 7, 100, 255, 256, 1000):
        groups = list(row_groups(range(count)))
        assert [item for group in groups for item in group] == list(range(count))
        assert {len(group) for group in groups} <= set(BATCH_SIZES)


@pytest.mark.parametrize("dialect", Database.dialects)
def test_every_statement_compiles_with_the_parameters_it_declares(dialect):
    sql = Database.dialects[dialect].sql
    for name in dir(type(sql)):
        if not name.startswith("_") and not callable(getattr(type(sql), name)):
            assert isinstance(getattr(sql, name), str)
    for size in BATCH_SIZES:
        for name in ("insert_tasks", "update_tasks", "update_tasks_wide", "delete_tasks"):
            assert getattr(sql, name)(size)
        assert sql.insert_journal(size)
        assert sql.insert[tasks](size)


# -- queries ------------------------------------------------------------------


def test_a_page_is_one_select_with_a_limit(store, spy):
    for number in range(10):
        create(store, owner_key="me", created_at=EPOCH_MS + number)
    query = TaskQuery(owner_key="me", status="queued", limit=3)
    done = recorded(spy, lambda: store.query(query))
    assert len(done) == 1
    [statement] = spy.statements
    assert statement.count("LIMIT") == 1
    page = store.query(query)
    assert len(recorded(spy, lambda: store.query(TaskQuery(limit=3, after=page.next_cursor)))) == 1


def test_reading_the_journal_is_one_select(store, spy):
    record = create(store)
    for action in (
        lambda: store.read_journal(0, 10),
        lambda: store.read_history(record.task_id),
        store.head,
        store.floor,
    ):
        assert len(recorded(spy, action)) == 1


FILTERS = [
    {},
    {"owner_key": "owner-1"},
    {"owner_key": ["owner-1", None]},
    {"owner_key": None},
    {"owner_key": []},
    {"status": "running"},
    {"status": ["queued", "running"]},
    {"status": ["running", "failed"]},
    {"runtime": ["cli", "cron"]},
    {"session_key": "session-1"},
    {"session_key": ["session-1", None]},
    {"run_id": "run-3"},
    {"parent_task_id": "task-005"},
    {"parent_flow_id": None, "owner_key": "owner-2"},
    {"task_id": ["task-001", "task-040", "nobody"]},
    {"created_at": [EPOCH_MS + 3, EPOCH_MS + 4]},
    {"label": "odd"},
    {"label": [None], "status": "queued"},
    {"revision": 1, "owner_key": "owner-1"},
    {"terminal_outcome": None, "delivery_status": "not_applicable"},
    {"since": EPOCH_MS + 5, "owner_key": "owner-1"},
    {"label": "nobody has it"},
]


def some_records() -> list[TaskRecord]:
    return [
        make_record(
            task_id=f"task-{number:03}",
            # Several in each millisecond, so that the id decides.
            created_at=EPOCH_MS + number // 5,
            runtime=("cli", "cron", "subagent")[number % 3],
            status=list(TaskStatus)[number % 4],
            owner_key=None if number % 5 == 0 else f"owner-{number % 3}",
            child_session_key=f"session-{number % 7}" if number % 2 else None,
            requester_session_key=f"session-{number % 4}" if number % 3 else None,
            run_id=f"run-{number}" if number % 2 else None,
            parent_task_id=f"task-{number % 10:03}" if number % 4 else None,
            parent_flow_id="flow" if number % 6 else None,
            label="odd" if number % 2 else None,
        )
        for number in range(60)
    ]


def test_the_database_answers_as_memory_does(store):
    records = some_records()
    store.apply([Put(record) for record in records])
    for filters in FILTERS:
        for limit in (None, 1, 7, 1000):
            cursor = None
            for _ in range(100):
                query = TaskQuery(**filters, limit=limit, after=cursor)
                page, expected = store.query(query), evaluate(query, records, 60)
                assert (page, page.seq) == (expected, 60), query
                cursor = page.next_cursor
                if cursor is None:
                    break


def test_an_empty_answer_has_its_seq(store):
    create(store)
    for query in (TaskQuery(owner_key="nobody", limit=1), TaskQuery(label="nobody", limit=1)):
        assert (len(store.query(query)), store.query(query).seq) == (0, 1)


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ({}, "ix_tasks_created"),
        ({"owner_key": "owner-1"}, "ix_tasks_owner"),
        ({"status": "running"}, "ix_tasks_active"),
        ({"status": ["queued", "running"]}, "ix_tasks_active"),
        ({"run_id": "run-3"}, "uq_tasks_booking"),
        ({"session_key": "session-1"}, "ix_tasks_child"),
        ({"session_key": "session-1"}, "ix_tasks_requester"),
        ({"parent_task_id": "task-005"}, "ix_tasks_parent"),
    ],
)
def test_sqlite_walks_along_the_index(sqlite_path, open_, filters, index):
    store = open_(f"sqlite:///{sqlite_path}")
    store.apply([Put(record) for record in some_records()])
    plans = []

    def explain(session):
        real = session.rows
        session_rows = type(session).rows

        def rows(self, sql, parameters=()):
            plans.extend(real(f"EXPLAIN QUERY PLAN {sql}", parameters))
            return session_rows(self, sql, parameters)

        type(session).rows = rows
        try:
            return _select_page(session, TaskQuery(**filters, limit=5), {})
        finally:
            type(session).rows = session_rows

    store._transactions.read(explain)
    assert any(index in row[-1] for row in plans), plans


def test_what_changes_at_every_event_is_in_no_full_index():
    everchanging = {"revision", "status", "payload", "checksum"}
    for index in tasks.indexes:
        if "sqlite" in ONLY_ON.get(index.name, {"sqlite"}):
            assert not everchanging & {column.name for column in index.columns}


MANY = """
import json, sys, tracemalloc
from taskstore import open_store
from taskstore.model.query import TaskQuery
store = open_store(sys.argv[1], read_only=True)
store.query(TaskQuery(limit=1))
tracemalloc.start()
page = store.query(TaskQuery(owner_key="me", limit=50))
print(json.dumps([len(page), tracemalloc.get_traced_memory()[1]]))
"""


def fill(store, count: int) -> None:
    """Insert many tasks into a ledger by raw SQL, which is much faster."""
    sql = store._database.sql
    record = make_record(owner_key="me", task="x" * 500)
    from msgspec.structs import replace

    rows = []
    for number in range(count):
        one = replace(record, task_id=f"{number:08}", created_at=EPOCH_MS + number)
        payload = encode_record(one)
        rows.append(insert_values(one, payload, checksum(payload)))

    def work(session):
        for group in row_groups(rows):
            values = tuple(value for row in group for value in row)
            session.execute(sql.insert[tasks](len(group)), values)

    write(store, work)


def test_a_page_of_many_costs_as_little_as_of_few(tmp_path, open_):
    peaks = []
    for count in (60, 30_000):
        url = f"sqlite:///{tmp_path}/{count}.db"
        fill(open_(url), count)
        found, peak = json.loads(output_of(in_process(MANY, url)))
        assert found == 50
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 1024 * 1024


def test_a_big_save_is_one_transaction(store, spy):
    records = {record.task_id: record for record in (make_record() for _ in range(300))}
    done = recorded(spy, lambda: store.save_snapshot(Snapshot(7, records)))
    assert done.count("COMMIT") == 1
    assert len(done) < 20
    assert dict(store.load_snapshot().records) == records
    assert store.verify().ok


def test_loading_pauses_the_collector_and_starts_it_again(store):
    import gc

    create(store)
    assert gc.isenabled()
    store.load_snapshot()
    assert gc.isenabled()
    gc.disable()
    try:
        store.load_snapshot()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_update_brings_every_projection_along(store):
    record = create(store)
    changed = {
        "runtime": "cli",
        "owner_key": "me",
        "requester_session_key": "r",
        "child_session_key": "c",
        "run_id": "run",
        "run_digest": "b",
        "parent_task_id": "p",
        "parent_flow_id": "f",
    }
    for field, value in changed.items():
        record = update(store, record, **{field: value})
        assert list(store.query(TaskQuery(**{field: value}, limit=2))) == [record]
    assert store.verify().ok


def test_an_update_to_the_dedup_key_of_another_task_is_a_conflict(store):
    from taskstore.errors import ConflictError

    holder = create(store, run_id="run", run_digest="b")
    other = create(store)
    with pytest.raises(ConflictError) as caught:
        update(store, other, run_id="run", run_digest="b")
    [conflict] = caught.value.conflicts
    assert (conflict.task_id, conflict.existing_task_id) == (other.task_id, holder.task_id)
    assert store.head() == 2


def test_no_tracing_is_left_on():
    assert not tracemalloc.is_tracing()
    assert sa.__version__ >= "2.1"
