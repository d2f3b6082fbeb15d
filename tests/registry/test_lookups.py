"""Lookups from memory: they agree with a plain evaluation of all records."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskstore import Snapshot, TaskNotFound, TaskQuery, TaskRegistry, ValidationError
from taskstore.model.query import evaluate
from taskstore.registry.indexes import Indexes
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.factories import EPOCH_MS


def test_find_takes_an_id_then_a_run_then_a_session(registry):
    a = registry.create(runtime="cli", task="a", task_id="token")
    b = registry.create(runtime="cli", task="b", run_id="token")
    c = registry.create(runtime="cli", task="c", child_session_key="token")
    d = registry.create(runtime="cli", task="d", requester_session_key="asker", owner_key="o")
    assert registry.find("token") == a
    registry.delete("token")
    assert registry.find("token") == b
    registry.delete(b.task_id)
    assert registry.find("token") == c
    assert registry.find("asker") == d
    assert registry.find("other") is None


def test_a_run_is_found_active_first_then_newest(registry):
    oldest = registry.create(runtime="cli", task="1", run_id="r", created_at=EPOCH_MS + 1)
    older = registry.create(runtime="cli", task="2", run_id="r", created_at=EPOCH_MS + 2)
    newest = registry.create(runtime="cli", task="3", run_id="r", created_at=EPOCH_MS + 3)
    assert registry.find_by_run("r") == newest
    registry.finish(newest.task_id, "failed")
    assert registry.find_by_run("r") == older
    registry.finish(older.task_id, "failed")
    registry.finish(oldest.task_id, "failed")
    assert registry.find_by_run("r").task_id == newest.task_id
    assert registry.find_by_run("none") is None


def test_lists_are_newest_first_and_paged_by_cursor(registry):
    ids = [
        registry.create(
            runtime="cli", task="x", task_id=f"t{n}", created_at=EPOCH_MS + n // 2
        ).task_id
        for n in range(7)
    ]
    assert [record.task_id for record in registry.list()] == ids[::-1]
    seen, cursor = [], None
    while True:
        page = registry.list(limit=3, after=cursor)
        assert page.seq == 7
        seen += [record.task_id for record in page]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == ids[::-1]
    assert registry.list(TaskQuery(limit=2))[0].task_id == "t6"


def test_a_cursor_stays_valid_after_its_record_is_deleted(registry):
    for n in range(4):
        registry.create(runtime="cli", task="x", task_id=f"t{n}", created_at=EPOCH_MS + n)
    page = registry.list(limit=2)
    registry.delete("t2")
    assert [record.task_id for record in registry.list(after=page.next_cursor)] == ["t1", "t0"]


def test_children_active_and_summary(registry):
    parent = registry.create(runtime="cli", task="p")
    child = registry.create(runtime="cron", task="c", parent_task_id=parent.task_id)
    registry.finish(parent.task_id, "succeeded")
    assert list(registry.children(parent.task_id)) == [child]
    assert list(registry.active()) == [child]
    summary = registry.summary()
    assert (summary.total, summary.active, summary.seq) == (2, 1, 3)
    assert summary.by_status == {"succeeded": 1, "queued": 1}
    assert summary.by_runtime == {"cli": 1, "cron": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"colour": "red"},
        {"metadata": {}},
        {"status": "done"},
        {"limit": 0},
        {"limit": "ten"},
        {"since": 1.5},
        {"after": "nonsense"},
        {"owner_key": 7},
        {"label": "a\0b"},
    ],
)
def test_a_wrong_filter_is_named(registry, wrong):
    with pytest.raises(ValidationError) as raised:
        registry.list(**wrong)
    assert raised.value.field == next(iter(wrong))


def test_get_requires_a_key(registry):
    with pytest.raises(ValidationError):
        registry.get(7)
    with pytest.raises(TaskNotFound):
        registry.get("x")


names = st.sampled_from(["a", "b", "A", None])
steps = st.lists(
    st.tuples(
        st.sampled_from(["create", "start", "finish", "lose", "recover", "flow", "delete"]),
        st.integers(0, 5),
        names,
        names,
        st.integers(EPOCH_MS, EPOCH_MS + 3),
    ),
    max_size=25,
)
queries = st.fixed_dictionaries(
    {},
    optional={
        "owner_key": names,
        "child_session_key": names,
        "session_key": names,
        "parent_flow_id": names,
        "label": names,
        "status": st.sets(st.sampled_from(["queued", "running", "succeeded", "lost"])),
        "since": st.integers(EPOCH_MS, EPOCH_MS + 3),
        "limit": st.integers(1, 4),
    },
)


def _take(registry: TaskRegistry, step: tuple) -> None:
    verb, number, owner, session, created_at = step
    records = registry.list()
    if verb == "create" or not records:
        scope = {} if owner is None else {"owner_key": owner}
        registry.create(
            runtime="cli",
            task="x",
            task_id=None,
            child_session_key=session,
            requester_session_key=session if owner else None,
            label=owner,
            created_at=created_at,
            run_id="r" if number == 0 else None,
            **scope,
        )
        return
    task = records[number % len(records)]
    if verb == "start" and task.status == "queued":
        registry.mark_running(task.task_id)
    elif verb == "finish" and not task.is_terminal:
        registry.finish(task.task_id, "succeeded")
    elif verb == "lose" and not task.is_terminal:
        registry.mark_lost(task.task_id)
    elif verb == "recover" and task.status == "lost":
        registry.recover(task.task_id)
    elif verb == "flow":
        registry.link_flow(task.task_id, owner)
    elif verb == "delete":
        registry.delete(task.task_id)


@given(steps, st.lists(queries, max_size=4), st.integers(0, 25))
def test_indexes_agree_with_a_plain_evaluation(taken, asked, committed):
    """For committed and staged records, after any sequence of changes."""
    registry = TaskRegistry(MemoryStore())
    for step in taken[:committed]:
        _take(registry, step)

    def check():
        everything = list(registry.list())
        for filters in asked:
            query = TaskQuery(**filters)
            expected = evaluate(query, everything, registry.seq)
            got = registry.list(query)
            assert got == expected
            if got.next_cursor is not None:
                rest = {**filters, "after": got.next_cursor}
                assert registry.list(**rest) == evaluate(
                    TaskQuery(**rest), everything, registry.seq
                )
        summary = registry.summary()
        assert summary.total == len(everything)
        assert summary.active == len(registry.active())

    check()
    with registry.batch():
        for step in taken[committed:]:
            _take(registry, step)
        check()
    check()
    reopened = TaskRegistry(registry.store)
    assert list(reopened.list()) == list(registry.list())


def test_lookups_continue_during_a_reload(monkeypatch):
    storage = MemoryStorage()
    registry = TaskRegistry(MemoryStore(storage))
    task = registry.create(runtime="cli", task="x")
    indexing, go_on = threading.Event(), threading.Event()

    class SlowIndexes(Indexes):
        def __init__(self, records):
            indexing.set()
            assert go_on.wait(10)
            super().__init__(records)

    monkeypatch.setattr("taskstore.registry.cache.Indexes", SlowIndexes)
    other = MemoryStore(storage)
    held = other.load_snapshot()
    other.save_snapshot(Snapshot(held.seq + 1, {}))
    refreshing = threading.Thread(target=registry.refresh)
    refreshing.start()
    assert indexing.wait(10)
    looking = threading.Thread(target=lambda: (registry.get(task.task_id), registry.list(limit=5)))
    looking.start()
    looking.join(5)
    assert not looking.is_alive(), "a lookup waits for the load"
    go_on.set()
    refreshing.join(10)
    assert len(registry.list()) == 0
    registry.close()
