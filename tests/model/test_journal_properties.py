"""Folding is associative, and plan and fold agree with a plain dict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskstore.errors import ConflictError
from taskstore.model.journal import Commit, Put, Remove, Snapshot, entries_of, fold, plan
from taskstore.store.interface import check_net_changes
from taskstore.testing import Model, make_record

IDS = st.sampled_from(["a", "A", "b", "c"])
STEPS = st.lists(st.tuples(IDS, st.sampled_from(["put", "put", "remove", "stale"])), max_size=12)


def batch_of(steps, records, run):
    """Changes that mostly apply to each other; some are deliberately stale."""
    records, changes = dict(records), []
    for number, (task_id, verb) in enumerate(steps):
        stored = records.get(task_id)
        revision = (stored.revision if stored else 0) + (1 if verb != "stale" else number)
        if verb == "remove" and revision > 1:
            changes.append(Remove(task_id, revision))
            records.pop(task_id, None)
        else:
            record = make_record(task_id=task_id, revision=max(revision, 1), label=f"{number}")
            if run and number % 3 == 0:
                dedup_fields = {"run_id": run, "run_digest": "b" * 32}
                stored_run = stored.run_id if stored else run
                if stored_run:
                    record = make_record(
                        task_id=task_id,
                        revision=max(revision, 1),
                        label=f"{number}",
                        **dedup_fields,
                    )
            if stored:
                record = make_record(
                    task_id=task_id,
                    revision=max(revision, 1),
                    label=f"{number}",
                    run_id=stored.run_id,
                    run_digest=stored.run_digest,
                )
            changes.append(Put(record))
            records[task_id] = record
    return changes


@given(st.lists(STEPS, max_size=8), st.data())
def test_folding_in_parts_is_folding_at_once(batches, data):
    model, entries = Model(), []
    for steps in batches:
        changes = batch_of(steps, model.records, None)
        if changes and model.accepts(changes):
            commit = Commit(model.head + 1, model.head + len(changes), len(entries))
            entries += entries_of(changes, commit)
            model.commit(changes)
    whole = fold(Snapshot(0), entries)
    assert (whole.seq, dict(whole.records)) == (model.head, dict(model.records))
    cut = data.draw(st.integers(0, len(entries)))
    part = fold(Snapshot(0), entries[:cut])
    assert dict(part.records) == model.states[cut]
    assert fold(part, entries[cut:]) == whole


@given(st.lists(st.tuples(STEPS, st.sampled_from([None, "run"])), max_size=6))
def test_plan_and_check_accept_what_the_model_accepts(batches):
    stored, model = Snapshot(0), Model()
    for steps, run in batches:
        changes = batch_of(steps, stored.records, run)
        if not changes:
            continue
        accepted = model.accepts(changes, remembers_deletions=False)
        if not accepted:
            with pytest.raises(ConflictError):
                check_net_changes(plan(changes), stored)
            continue
        check_net_changes(plan(changes), stored)
        commit = Commit(model.head + 1, model.head + len(changes), 0)
        stored = fold(stored, entries_of(changes, commit))
        model.commit(changes)
        assert dict(stored.records) == dict(model.records)
