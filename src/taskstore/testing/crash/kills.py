"""Killed writers, and the check that no acknowledged change is lost.

A writer process changes a ledger and reports each change *after* the store acknowledged
the change.  :class:`KillHarness` kills the writer with SIGKILL at a random time, opens
the ledger again, and compares the content of the ledger with the reports.  The ledger must
contain every acknowledged change.  If the kill interrupts a commit, the ledger must contain
all changes of that commit or no change of that commit.

Writers are forked, because a fork is a hundred times faster than an interpreter start.
The process that uses the harness must not have a store open.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.journal import JournalEntry, Put, Remove
from taskstore.model.records import TaskRecord
from taskstore.registry.compactor import Compactor
from taskstore.registry.registry import TaskRegistry
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsIntegrity,
    SupportsJournal,
    TaskRegistryStore,
)
from taskstore.store.opening import open_store
from taskstore.testing.crash.processes import Child, Report
from taskstore.testing.factories import make_record

READY = "ready"
"""The first report of a writer; the writer sends this report when the ledger is open."""

BATCH_SIZE = 5
"""The number of tasks that a writer creates in one batch."""

MAX_TASKS = 60
"""If the ledger has more tasks than ``MAX_TASKS``, a writer deletes tasks to keep rounds short."""

FREQUENT_COMPACTION = CompactionPolicy(
    min_entries=10, ratio=0.1, history_s=0, history_entries=20, keep_snapshots=1
)
"""A policy that compacts often, so that some kills interrupt a compaction."""

_PAGE_ENTRIES = 1000


class KillHarness:
    """Repeatedly starts a writer on the ledger at ``url``, kills the writer, and checks the ledger.

    The store must keep a journal.  ``kills`` counts the killed writers; ``acknowledged``
    counts the acknowledged changes.  Three lists have one sentence for each problem.
    ``lost`` lists lost changes.  ``half_applied`` lists commits that are stored only in part,
    and changes that are stored unexpectedly.  ``damage`` lists problems that ``verify`` found.
    """

    def __init__(self, url: str, seed: int = 0) -> None:
        self.url = url
        self.kills = self.acknowledged = self.floor = 0
        self.lost: list[str] = []
        self.half_applied: list[str] = []
        self.damage: list[str] = []
        self._rng = random.Random(seed)  # noqa: S311 (choices, not secrets)
        self._revisions: dict[str, int] = {}
        self._seq = 0
        with closing(open_store(url)) as store:
            if isinstance(store, SupportsCompaction):
                # Compact once before the first kill; the writers then need not prepare the storage.
                store.compact(FREQUENT_COMPACTION.forced())
            self._read_state(store)
        self._first_floor = self.floor

    @property
    def compacted(self) -> bool:
        """Whether a writer completed a compaction."""
        return self.floor > self._first_floor

    @property
    def problems(self) -> list[str]:
        """All problems that were found, one sentence each."""
        return self.lost + self.half_applied + self.damage

    def kill_one(self, after_s: float, *, commits: int | None = 0) -> None:
        """Start a writer, kill the writer, and check the ledger.

        The writer is killed ``after_s`` seconds after it reported ``commits`` commits.
        If ``commits`` is ``None``, the writer is killed ``after_s`` seconds after its
        start, and the kill can happen while the writer opens the ledger.
        """
        seed = self._rng.getrandbits(32)
        writer = Child(lambda report: run_writer(self.url, seed, report))
        expected_lines = 0 if commits is None else 1 + commits
        reported = list(filter(None, (writer.line() for _ in range(expected_lines))))
        time.sleep(after_s)
        writer.kill()
        reported += writer.finish()
        if len(reported) < expected_lines:
            raise AssertionError("a writer ended before it was killed:\n" + "\n".join(reported))
        self.kills += 1
        for line in reported:
            self._record_report(line)
        with closing(open_store(self.url)) as store:
            # A database server can still be running a commit of the killed writer.  The commit
            # of ``probe`` waits until the server has ended that commit.
            probe = make_record(label="after the kill")
            after = store.apply([Put(probe), Remove(probe.task_id, 2)])
            tail = [entry for entry in _journal(store, self._seq) if entry.seq < after.first_seq]
            self._check_unacknowledged(tail)
            self._check_records(store)
            if isinstance(store, SupportsIntegrity):
                self.damage += store.verify().problems
            self._read_state(store)

    def _record_report(self, line: str) -> None:
        """Record the acknowledged changes of one report."""
        if line == READY:
            return
        seq, *changes = line.split()
        self._seq = int(seq)
        self.acknowledged += len(changes)
        for change in changes:
            task_id, _, revision = change.partition("=")
            if revision == "0":
                self._revisions.pop(task_id, None)
            else:
                self._revisions[task_id] = int(revision)

    def _check_unacknowledged(self, tail: Sequence[JournalEntry]) -> None:
        """Check that the unacknowledged entries, if there are any, form one complete commit."""
        complete = len(tail) in (0, 1, BATCH_SIZE)
        if not complete or len({entry.commit_id for entry in tail}) > 1:
            self.half_applied.append(
                f"kill {self.kills}: the store has {len(tail)} changes "
                f"after the last acknowledged seq {self._seq}"
            )
        for entry in tail:
            if entry.kind == "deleted":
                self._revisions.pop(entry.task_id, None)
            else:
                self._revisions[entry.task_id] = entry.revision

    def _check_records(self, store: TaskRegistryStore) -> None:
        """Compare the stored revision of each task with the expected revision of the task."""
        stored = {task_id: r.revision for task_id, r in store.load_snapshot().records.items()}
        for task_id in stored.keys() | self._revisions.keys():
            actual, expected = stored.get(task_id), self._revisions.get(task_id)
            if actual == expected:
                continue
            problem = (
                f"kill {self.kills}: {task_id} is at revision {actual or 'none'}, "
                f"expected {expected or 'none'}"
            )
            lost = expected is None or (actual or 0) < expected
            (self.lost if lost else self.half_applied).append(problem)

    def _read_state(self, store: TaskRegistryStore) -> None:
        """Read the revisions, head and floor of the ledger before the next writer starts."""
        assert isinstance(store, SupportsJournal), f"{store.location} has no journal"
        loaded = store.load_snapshot()
        self._revisions = {task_id: r.revision for task_id, r in loaded.records.items()}
        self._seq = loaded.seq
        self.floor = store.floor()

    def __str__(self) -> str:
        return (
            f"{self.kills:,} kills, {self.acknowledged:,} acknowledged changes checked, "
            f"{len(self.lost)} lost, {len(self.half_applied)} half-applied, "
            f"verify found {len(self.damage) or 'no'} problems"
        )


def kill_round(url: str, *, after_s: float, seed: int = 0) -> list[str]:
    """Start a writer on the ledger at ``url``, kill the writer, and check the ledger.

    The writer is killed ``after_s`` seconds after it opened the ledger.  Returns one
    sentence for each problem.
    """
    harness = KillHarness(url, seed)
    harness.kill_one(after_s)
    return harness.problems


def _journal(store: TaskRegistryStore, after: int) -> Iterator[JournalEntry]:
    assert isinstance(store, SupportsJournal)
    while entries := store.read_journal(after, _PAGE_ENTRIES):
        yield from entries
        after = entries[-1].seq


def run_writer(url: str, seed: int, report: Report) -> None:
    """Open and change the ledger until the process is killed; report each acknowledged commit."""
    rng = random.Random(seed)  # noqa: S311 (choices, not secrets)
    with TaskRegistry.open(url) as registry:
        if isinstance(registry.store, SupportsCompaction):
            registry.hooks.add(Compactor(registry.store, FREQUENT_COMPACTION))
        report(READY)
        for changes in _changes(registry, rng):
            report(" ".join([str(registry.seq), *changes]))


def _changes(registry: TaskRegistry, rng: random.Random) -> Iterator[list[str]]:
    while True:
        active = registry.active()
        choice = rng.random()
        if registry.summary().total > MAX_TASKS:
            yield [_delete(registry, rng.choice(registry.list()))]
        elif not active or choice < 0.3:
            yield [_report_of(registry.create(runtime="cli", task="work", owner_key="crash-kit"))]
        elif choice < 0.4:
            with registry.batch():
                created = [registry.create(runtime="cli", task="batch") for _ in range(BATCH_SIZE)]
            yield [_report_of(record) for record in created]
        else:
            yield [_change_task(registry, rng.choice(active), rng)]


def _change_task(registry: TaskRegistry, task: TaskRecord, rng: random.Random) -> str:
    choice = rng.random()
    if choice < 0.6:
        return _report_of(registry.record_progress(task.task_id, f"step {rng.random()}"))
    if choice < 0.8:
        return _report_of(registry.finish(task.task_id, "succeeded"))
    return _delete(registry, task)


def _delete(registry: TaskRegistry, task: TaskRecord) -> str:
    registry.delete(task.task_id)
    return f"{task.task_id}=0"


def _report_of(record: TaskRecord) -> str:
    return f"{record.task_id}={record.revision}"
