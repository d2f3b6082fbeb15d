"""Writers that are killed, and the check that nothing acknowledged is lost.

A writer process works on a ledger and reports each change *after* it was
acknowledged.  :class:`KillHarness` kills it with SIGKILL at a random moment,
opens the ledger again and compares.  What was acknowledged has to be there;
of what was under way, all or nothing.

Writers are forked, which takes a hundredth of the time of starting an
interpreter; the process that uses the harness may have no store open.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

from taskstore.model.journal import JournalEntry, Put, Remove
from taskstore.model.policies import CompactionPolicy
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
"""What a writer reports first: it has opened the ledger."""

BATCH_SIZE = 5
"""How many tasks a writer creates in one batch."""

PLENTY = 60
"""With more tasks than this a writer deletes, so that a thousand rounds cost what the first did."""

EAGER = CompactionPolicy(
    min_entries=10, ratio=0.1, history_s=0, history_entries=20, keep_snapshots=1
)
"""Compacts all the time, so that kills fall into compactions too."""

_PAGE = 1000


class KillHarness:
    """Writers on the ledger at ``url``, killed one after the other.

    The store has to keep a journal.  ``kills`` and ``acknowledged`` count the
    writers and what they were told is stored; ``lost`` and ``half_applied`` are
    sentences on what went wrong with that, ``damage`` what ``verify`` found.
    """

    def __init__(self, url: str, seed: int = 0) -> None:
        self.url = url
        self.kills = self.acknowledged = self.floor = 0
        self.lost: list[str] = []
        self.half_applied: list[str] = []
        self.damage: list[str] = []
        self._seeds = random.Random(seed)  # noqa: S311 (choices, not secrets)
        self._revisions: dict[str, int] = {}
        self._seq = 0
        with closing(open_store(url)) as store:
            if isinstance(store, SupportsCompaction):
                # Once here, and what it makes ready is not made anew in each short life.
                store.compact(EAGER.forced())
            self._look(store)
        self._first_floor = self.floor

    @property
    def compacted(self) -> bool:
        """Whether any of the writers came through a compaction."""
        return self.floor > self._first_floor

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, as sentences."""
        return self.lost + self.half_applied + self.damage

    def kill_one(self, after_s: float, *, commits: int | None = 0) -> None:
        """Let a writer work, kill it, and check.

        It dies ``after_s`` seconds after it told of so many ``commits``; with
        ``None`` after it was started, maybe while it opens what the last one left.
        """
        seed = self._seeds.getrandbits(32)
        writer = Child(lambda report: write_for_ever(self.url, seed, report))
        waited_for = 0 if commits is None else 1 + commits
        told = list(filter(None, (writer.line() for _ in range(waited_for))))
        time.sleep(after_s)
        writer.kill()
        told += writer.finish()
        if len(told) < waited_for:
            raise AssertionError("a writer ended by itself:\n" + "\n".join(told))
        self.kills += 1
        for line in told:
            self._note(line)
        with closing(open_store(self.url)) as store:
            # On a server, the writer's last commit may still be under way: this one
            # has to wait for it.
            mark = make_record(label="after the kill")
            after = store.apply([Put(mark), Remove(mark.task_id, 2)])
            tail = [entry for entry in _journal(store, self._seq) if entry.seq < after.first_seq]
            self._check_tail(tail)
            self._check_records(store)
            if isinstance(store, SupportsIntegrity):
                self.damage += store.verify().problems
            self._look(store)

    def _note(self, line: str) -> None:
        """Take in what a writer was told is stored."""
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

    def _check_tail(self, tail: Sequence[JournalEntry]) -> None:
        """Check that what was not acknowledged any more is one whole commit, or nothing."""
        whole = len(tail) in (0, 1, BATCH_SIZE)
        if not whole or len({entry.commit_id for entry in tail}) > 1:
            self.half_applied.append(
                f"kill {self.kills}: {len(tail)} changes were stored beyond seq {self._seq}, "
                "the last that was acknowledged"
            )
        for entry in tail:
            if entry.kind == "deleted":
                self._revisions.pop(entry.task_id, None)
            else:
                self._revisions[entry.task_id] = entry.revision

    def _check_records(self, store: TaskRegistryStore) -> None:
        """Compare the records with what was acknowledged and what the journal adds."""
        found = {task_id: r.revision for task_id, r in store.load_snapshot().records.items()}
        for task_id in found.keys() | self._revisions.keys():
            now, due = found.get(task_id), self._revisions.get(task_id)
            if now == due:
                continue
            sentence = (
                f"kill {self.kills}: {task_id} is at revision {now or 'none'}, "
                f"and should be at {due or 'none'}"
            )
            forgotten = due is None or (now or 0) < due
            (self.lost if forgotten else self.half_applied).append(sentence)

    def _look(self, store: TaskRegistryStore) -> None:
        """Note where the next writer starts from."""
        assert isinstance(store, SupportsJournal), f"{store.location} keeps no journal"
        loaded = store.load_snapshot()
        self._revisions = {task_id: r.revision for task_id, r in loaded.records.items()}
        self._seq = loaded.seq
        self.floor = store.floor()

    def __str__(self) -> str:
        return (
            f"{self.kills:,} kills, {self.acknowledged:,} acknowledged changes checked, "
            f"{len(self.lost)} lost, {len(self.half_applied)} half-applied, "
            f"verify {'clean' if not self.damage else f'found {len(self.damage)} problems'}"
        )


def kill_round(url: str, *, after_s: float, seed: int = 0) -> list[str]:
    """Let a writer work on the ledger at ``url``, kill it, and check.

    ``after_s`` is how long it may work after it opened the ledger (seconds).
    Returns what is wrong as sentences, none when all is well.
    """
    harness = KillHarness(url, seed)
    harness.kill_one(after_s)
    return harness.problems


def _journal(store: TaskRegistryStore, after: int) -> Iterator[JournalEntry]:
    assert isinstance(store, SupportsJournal)
    while entries := store.read_journal(after, _PAGE):
        yield from entries
        after = entries[-1].seq


def write_for_ever(url: str, seed: int, report: Report) -> None:
    """Open the ledger and change it without end, reporting each acknowledged commit."""
    chance = random.Random(seed)  # noqa: S311 (choices, not secrets)
    with TaskRegistry.open(url) as registry:
        if isinstance(registry.store, SupportsCompaction):
            registry.hooks.add(Compactor(registry.store, EAGER))
        report(READY)
        for changes in _work(registry, chance):
            report(" ".join([str(registry.seq), *changes]))


def _work(registry: TaskRegistry, chance: random.Random) -> Iterator[list[str]]:
    while True:
        active = registry.active()
        choice = chance.random()
        if registry.summary().total > PLENTY:
            yield [_deleted(registry, chance.choice(registry.list()))]
        elif not active or choice < 0.3:
            yield [_told(registry.create(runtime="cli", task="work", owner_key="crash-kit"))]
        elif choice < 0.4:
            with registry.batch():
                made = [registry.create(runtime="cli", task="batch") for _ in range(BATCH_SIZE)]
            yield [_told(record) for record in made]
        else:
            yield [_change(registry, chance.choice(active), chance)]


def _change(registry: TaskRegistry, task: TaskRecord, chance: random.Random) -> str:
    choice = chance.random()
    if choice < 0.6:
        return _told(registry.record_progress(task.task_id, f"step {chance.random()}"))
    if choice < 0.8:
        return _told(registry.finish(task.task_id, "succeeded"))
    return _deleted(registry, task)


def _deleted(registry: TaskRegistry, task: TaskRecord) -> str:
    registry.delete(task.task_id)
    return f"{task.task_id}=0"


def _told(record: TaskRecord) -> str:
    return f"{record.task_id}={record.revision}"
