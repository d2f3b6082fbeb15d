"""[5] verify compares the writer's index with the files."""

from __future__ import annotations

import pytest

from taskstore.testing.factories import create, delete


def forget_key(index):
    index.by_dedup_key.clear()


def swap_key(index):
    [(key, _)] = index.by_dedup_key.items()
    index.by_dedup_key[key] = "another task"


def raise_revision(index):
    for task_id in index.revisions:
        index.revisions[task_id] += 1


@pytest.mark.parametrize("change", [forget_key, swap_key, raise_revision])
def test_a_wrong_index_is_a_problem(change, open_):
    store = open_()
    create(store, run_id="run", run_digest="digest")
    create(store)
    delete(store, create(store, run_id="other", run_digest="digest"))
    assert store.verify().problems == ()
    change(store._writer.index)
    [problem] = store.verify().problems
    assert "the writer's index is wrong for tasks" in problem
