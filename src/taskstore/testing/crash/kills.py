"""Killed writers, and the check that no acknowledged change is lost.

A writer process changes a ledger and reports each change *after* the store acknowledged
the change.  :class:`KillHarness` kills the writer with SIGKILL at a random time, opens
the ledger again, and compares its content with the reports.  Every acknowledged change
must be stored.  The commit that was not acknowledged must be stored completely or not at
all.

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
"""The first report of a writer; the writer sends it after it opened the ledger."""

BATCH_SIZE = 5
"""The number of tasks that a writer creates in one batch."""

MAX_TASKS = 60
"""The number of tasks above which a writer deletes tasks; so all rounds take the same time."""

FREQUENT_COMPACTION = CompactionPolicy(
    min_entries=10, ratio=0.1, history_s=0, history_entries=20, keep_snapshots=1
)
"""A policy that compacts often, so that kills also hit compactions."""

_PAGE_ENTRIES = 1000


class KillHarness:
    """Starts and kills one writer after the other on the ledger at ``url``.

    The store must keep a journal.  ``kills`` counts the killed writers; ``acknowledged``
    counts the acknowledged changes.  Three lists have a sentence for each problem:
    ``lost`` for lost changes, ``half_applied`` for changes that are partly or
    unexpectedly stored, ``damage`` for problems that ``verify`` found.
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
                # Compact once here, so that short-lived writers need not prepare the storage.
                store.compact(FREQUENT_COMPACTION.forced())
            self._read_state(store)
        self._first_floor = self.floor

    @property
    def compacted(self) -> bool:
        """Whether a writer completed a compaction."""
        return self.floor > self._first_floor

    @property
    def problems(self) -> list[str]:
        """All problems, one sentence each."""
        return self.lost + self.half_applied + self.damage

    def kill_one(self, after_s: float, *, commits: int | None = 0) -> None:
        """Start a writer, kill it, and check the ledger.

        The writer is killed ``after_s`` seconds after it reported ``commits`` commits.
        If ``commits`` is ``None``, the writer is killed ``after_s`` seconds after its
        start, and the kill can hit the opening of the ledger.
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
            # A server can still be running the writer's last commit; the commit below waits for
            # its end.
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
        """Check that the unacknowledged entries are no commit or exactly one complete commit."""
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
        """Compare the records with the acknowledged changes and the unacknowledged commit."""
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
        """Read the state from which the next writer starts."""
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
    """Start a writer on the ledger at ``url``, kill it, and check the ledger.

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
    """Open the ledger, change it until the kill, and report each acknowledged commit."""
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
