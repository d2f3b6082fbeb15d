"""The state machine: random operations, checked on a store and on plain dicts.

Hypothesis draws sequences of operations: creations, updates, conflicts, deletions,
batches, saves, compactions, restarts and uses of a second store instance, in any order.
Hypothesis shortens a failing sequence of operations.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from taskstore.errors import ConflictError, CursorExpiredError
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.journal import Change, Put, Remove, Snapshot
from taskstore.model.query import TaskQuery, evaluate
from taskstore.model.records import TaskRecord, TaskStatus
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    TaskRegistryStore,
)
from taskstore.testing.contract.base import ContractBase, Ledger, as_of, journal_of
from taskstore.testing.contract.journal import entry_fields
from taskstore.testing.factories import EPOCH_MS, Model, make_record, next_of
from taskstore.testing.types import FullStore, OpenStore

IDS = ("a", "A", "a ", "á", "b", "c", "d")
RUNS = (None, None, "run", "Run")

_task_ids = st.sampled_from(IDS)
_runs = st.sampled_from(RUNS)
_fields = st.fixed_dictionaries(
    {
        "label": st.sampled_from([None, "", "x", "é"]),
        "status": st.sampled_from(TaskStatus),
        "error": st.none() | st.text("ab\n🎉", max_size=3),
    }
)
_policies = st.builds(
    CompactionPolicy,
    force=st.just(value=True),
    history_entries=st.sampled_from([0, 3, 10_000]),
    history_s=st.sampled_from([0.0, 10_000.0]),
    keep_snapshots=st.integers(1, 3),
    erase_deleted=st.sampled_from([False, False, False, True]),
)


class StoreMachine(RuleBasedStateMachine):
    """A Hypothesis state machine; ``open_store`` is the callable that opens the store."""

    open_store: ClassVar[OpenStore]

    def __init__(self) -> None:
        super().__init__()
        self.instances: list[FullStore] = [self._open()]
        self.model = Model()
        self.journalled = isinstance(self.store, SupportsJournal)

    @property
    def store(self) -> FullStore:
        """The store instance that the next operation uses."""
        return self.instances[0]

    def _open(self) -> FullStore:
        store: TaskRegistryStore = type(self).open_store()
        return cast("FullStore", store)

    @initialize()
    def begin(self) -> None:
        """Remove the records that the previous sequence of operations left in the ledger."""
        loaded = self.store.load_snapshot()
        if loaded.seq:
            loaded = Snapshot(loaded.seq + 1)
            self.store.save_snapshot(loaded)
        self.model = Model(loaded)

    # -- writing ----------------------------------------------------------

    def _apply(self, *changes: Change) -> None:
        batch = list(changes)
        accepted = self.model.accepts(batch, remembers_deletions=self.journalled)
        conflict_error: ConflictError | None = None
        try:
            commit = self.store.apply(batch)
        except ConflictError as conflict:
            conflict_error = conflict
        if conflict_error is not None:
            assert not accepted, f"the store refused a batch without a conflict: {conflict_error}"
            ids = {change.task_id for change in batch}
            assert conflict_error.conflicts
            assert all(item.task_id in ids for item in conflict_error.conflicts)
            return
        assert accepted, "the store applied a batch with a conflict"
        first = self.model.head + 1
        self.model.commit(batch)
        assert (commit.first_seq, commit.last_seq) == (first, self.model.head)

    def _change(self, task_id: str, run: str | None, fields: dict[str, Any]) -> Put:
        stored = self.model.records.get(task_id)
        if stored is not None:
            return next_of(stored, **fields)
        return Put(make_record(task_id=task_id, run_id=run, run_digest=run and "b" * 32, **fields))

    @rule(task_id=_task_ids, run=_runs, fields=_fields)
    def put(self, task_id: str, run: str | None, fields: dict[str, Any]) -> None:
        """Create or update a task."""
        self._apply(self._change(task_id, run, fields))

    @rule(task_id=_task_ids, revision=st.integers(1, 5))
    def put_any_revision(self, task_id: str, revision: int) -> None:
        """Store a record at any revision; the store can refuse the change as a conflict."""
        stored = self.model.records.get(task_id)
        # A task keeps its dedup key in every revision.
        run, run_digest = (stored.run_id, stored.run_digest) if stored else (None, None)
        record = make_record(task_id=task_id, revision=revision, run_id=run, run_digest=run_digest)
        self._apply(Put(record))

    @rule(task_id=_task_ids)
    def remove(self, task_id: str) -> None:
        """Delete the task with the given id; the task can be missing."""
        stored = self.model.records.get(task_id)
        self._apply(Remove(task_id, stored.revision + 1 if stored is not None else 2))

    @rule(task_id=_task_ids, revision=st.integers(2, 5))
    def remove_any_revision(self, task_id: str, revision: int) -> None:
        """Delete a task at any revision; the store can refuse the deletion as a conflict."""
        self._apply(Remove(task_id, revision))

    @rule(
        steps=st.lists(
            st.tuples(_task_ids, _runs, _fields, st.sampled_from(["put", "put", "put", "remove"])),
            min_size=2,
            max_size=6,
        )
    )
    def batch(self, steps: list[tuple[str, str | None, dict[str, Any], str]]) -> None:
        """Apply one batch of several changes; a batch can change the same task several times."""
        records: dict[str, TaskRecord | None] = dict(self.model.records)
        changes: list[Change] = []
        for task_id, run, fields, verb in steps:
            stored = records.get(task_id)
            if verb == "remove" and stored is not None:
                changes.append(Remove(task_id, stored.revision + 1))
                records[task_id] = None
                continue
            change = next_of(stored, **fields) if stored else self._change(task_id, run, fields)
            changes.append(change)
            records[task_id] = change.record
        self._apply(*changes)

    @rule(ahead=st.integers(-1, 3), kept=st.sets(_task_ids))
    def save(self, ahead: int, kept: set[str]) -> None:
        """Save a snapshot of some records; the seq of the snapshot can be below the head."""
        seq = max(self.model.head + ahead, 0)
        records = {key: record for key, record in self.model.records.items() if key in kept}
        snapshot = Snapshot(seq, records, EPOCH_MS)
        try:
            self.store.save_snapshot(snapshot)
        except ConflictError:
            assert self.model.head >= seq
            assert self.model.head > 0
        else:
            assert seq > self.model.head or self.model.head == 0
            self.model = Model(snapshot)

    @rule(policy=_policies)
    def compact(self, policy: CompactionPolicy) -> None:
        """Compact the store, and trim the model to the floor that the store reports."""
        if isinstance(self.store, SupportsCompaction):
            report = self.store.compact(policy)
            assert self.model.floor <= report.floor <= self.model.head + 1
            if policy.erase_deleted:
                assert report.floor == self.model.head + 1
            self.model.trim(report.floor)

    # -- instances --------------------------------------------------------

    @rule()
    def reopen(self) -> None:
        """Close every store instance and open the storage again."""
        while self.instances:
            self.instances.pop().close()
        self.instances = [self._open()]

    @rule()
    def second_instance(self) -> None:
        """Switch between two store instances; the first switch opens the second instance."""
        if not self.journalled:
            return
        if len(self.instances) == 1:
            self.instances.append(self._open())
        self.instances.reverse()

    def teardown(self) -> None:
        """Close every instance."""
        while self.instances:
            self.instances.pop().close()

    # -- reading ----------------------------------------------------------

    @invariant()
    def the_same_records(self) -> None:
        """Check that every store instance loads the records of the model."""
        for store in self.instances:
            loaded = store.load_snapshot()
            assert (loaded.seq, dict(loaded.records)) == (
                self.model.head,
                dict(self.model.records),
            )

    @invariant()
    def the_same_journal(self) -> None:
        """Compare the head, the floor and all journal entries of a store with the model."""
        if self.journalled:
            store = self.instances[-1]
            assert (store.head(), store.floor()) == (self.model.head, self.model.floor)
            assert [entry_fields(entry) for entry in journal_of(store)] == self.model.entries
            for seq in (self.model.floor - 1, self.model.head):
                assert dict(as_of(store, seq).records) == self.model.states[seq]

    @rule(back=st.integers(0, 8))
    def read_at_seq(self, back: int) -> None:
        """Check the records as of a seq, or check that reading a trimmed seq raises an error."""
        seq = self.model.head - back
        if not self.journalled or seq < 0:
            return
        if seq >= self.model.floor - 1:
            assert dict(as_of(self.store, seq).records) == self.model.states[seq]
        else:
            with pytest.raises(CursorExpiredError) as caught:
                self.store.read_journal(seq, 1)
            assert caught.value.floor == self.model.floor

    @rule(limit=st.none() | st.integers(1, 3), label=st.sampled_from([None, "", "x"]))
    def ask(self, limit: int | None, label: str | None) -> None:
        """Query the store and compare the page with the result of ``evaluate()``."""
        if isinstance(self.store, SupportsQuery):
            query = TaskQuery(limit=limit, label=label)
            page = self.store.query(query)
            assert page == evaluate(query, self.model.records.values(), self.model.head)
            assert page.seq == self.model.head

    @rule()
    def verify(self) -> None:
        """Check that the store's ``verify`` finds no problem."""
        if isinstance(self.store, SupportsIntegrity):
            assert self.store.verify().problems == ()


MACHINE_SETTINGS = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
"""The default settings: Hypothesis runs 25 sequences of up to 25 operations."""


def run_store_machine(open_store: OpenStore, *, settings: settings = MACHINE_SETTINGS) -> None:
    """Run the state machine on a store, with the given Hypothesis settings.

    All sequences of operations use the storage that ``open_store`` opens; each sequence
    first removes all records.
    """
    machine = type("StoreMachine", (StoreMachine,), {"open_store": staticmethod(open_store)})
    run_state_machine_as_test(machine, settings=settings)


class ModelContract(ContractBase):
    """A clause that runs the state machine of this module."""

    def test_many_random_lives(self, ledger: Ledger) -> None:
        """[5] After any sequence of operations, the store has the same content as the model."""
        run_store_machine(ledger.open_store)
