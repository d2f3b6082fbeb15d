"""The rate of durable changes: one caller, 64 threads, 64 coroutines (group commit).

Runs on one ledger, in interleaved rounds: `store.apply` with the records that
`record_progress` would make; `record_progress` by one thread, by 64 threads and
by 64 coroutines.  On SQLite also the bare driver: one UPDATE and one INSERT of
the same sizes per commit, in another file.  Prints the median rate of each, and
ratios, each the median over the rounds.

    python benchmarks/sharing.py [--url URL | --dir DIRECTORY] [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from taskstore import Put, TaskRegistry
from taskstore.aio import AsyncTaskRegistry
from taskstore.model import lifecycle
from taskstore.model.codec import encode_record
from taskstore.testing.scratch import scratch

WORDS = itertools.count(1)


def summary() -> str:
    """A new summary, so that every call of `record_progress` is a change."""
    return f"{next(WORDS)} of 1,000,000 mails read"


def fill(registry: TaskRegistry, tasks: int) -> list[str]:
    ids: list[str] = []
    while len(ids) < tasks:
        with registry.batch():
            for number in range(len(ids), min(len(ids) + 1000, tasks)):
                task = registry.create(
                    runtime="cli",
                    task=f"Summarise the inbox of account {number}",
                    owner_key=f"agent:{number % 50}",
                    run_id=f"run-{number}",
                    metadata={"mails": number, "folder": "inbox"},
                    status="running",
                )
                ids.append(task.task_id)
    return ids


class Ledger:
    """One ledger, and four ways to change it.  Each method returns changes per second."""

    def __init__(self, store: Any, tasks: int, callers: int) -> None:
        self.store = store
        self.callers = callers
        self.registry = TaskRegistry(store)
        self.ids = fill(self.registry, tasks)
        self.turn = itertools.cycle(self.ids)

    def apply(self, changes: int) -> float:
        """Call `store.apply` with prepared records."""
        now = self.store.clock()
        records = {task_id: self.registry.get(task_id) for task_id in self.ids}
        prepared = []
        for task_id in itertools.islice(self.turn, changes):
            before = records[task_id]
            records[task_id] = lifecycle.progress(summary())(before, now)
            prepared.append([Put(records[task_id])])
        started = time.perf_counter()
        for change in prepared:
            self.store.apply(change)
        rate = changes / (time.perf_counter() - started)
        self.registry.refresh()
        return rate

    def one_thread(self, changes: int) -> float:
        progress = self.registry.record_progress
        prepared = [(task_id, summary()) for task_id in itertools.islice(self.turn, changes)]
        started = time.perf_counter()
        for task_id, text in prepared:
            progress(task_id, text)
        return changes / (time.perf_counter() - started)

    def _shares(self, changes: int) -> list[list[tuple[str, str]]]:
        each = changes // self.callers
        return [
            [(task_id, summary()) for task_id in itertools.islice(self.turn, each)]
            for _ in range(self.callers)
        ]

    def threads(self, changes: int) -> float:
        shares = self._shares(changes)
        ready = threading.Barrier(len(shares) + 1)

        def work(share: Sequence[tuple[str, str]]) -> None:
            ready.wait()
            for task_id, text in share:
                self.registry.record_progress(task_id, text)

        threads = [threading.Thread(target=work, args=(share,)) for share in shares]
        for thread in threads:
            thread.start()
        ready.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        return sum(map(len, shares)) / (time.perf_counter() - started)

    def coroutines(self, changes: int) -> float:
        async def work(registry: AsyncTaskRegistry, share: Sequence[tuple[str, str]]) -> None:
            for task_id, text in share:
                await registry.record_progress(task_id, text)

        async def main() -> float:
            registry = await AsyncTaskRegistry.over(self.store)
            shares = self._shares(changes)
            started = time.perf_counter()
            await asyncio.gather(*(work(registry, share) for share in shares))
            rate = sum(map(len, shares)) / (time.perf_counter() - started)
            await registry.close()
            return rate

        rate = asyncio.run(main())
        self.registry.refresh()
        return rate


class Raw:
    """The bare driver: the minimum for one durable change of a row and a journal."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        from taskstore.stores.sql.sqlite_library import sqlite_module

        self.database = sqlite_module().connect(path, isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 4000"):
            self.database.execute(f"PRAGMA {pragma}")
        self.database.execute(
            "CREATE TABLE tasks (id TEXT PRIMARY KEY, payload BLOB) WITHOUT ROWID"
        )
        self.database.execute(
            "CREATE TABLE journal (seq INTEGER PRIMARY KEY, id TEXT, payload BLOB)"
        )
        self.payloads = [
            (encode_record(ledger.registry.get(task_id)), task_id) for task_id in ledger.ids
        ]
        self.database.executemany("INSERT INTO tasks (payload, id) VALUES (?, ?)", self.payloads)
        self.turn = itertools.cycle(self.payloads)

    def commit(self, changes: int) -> float:
        execute = self.database.execute
        started = time.perf_counter()
        for row in itertools.islice(self.turn, changes):
            execute("BEGIN IMMEDIATE")
            execute("UPDATE tasks SET payload = ? WHERE id = ?", row)
            execute("INSERT INTO journal (payload, id) VALUES (?, ?)", row)
            execute("COMMIT")
        return changes / (time.perf_counter() - started)


def measure(
    ways: dict[str, tuple[Callable[[int], float], int]], rounds: int, slices: int
) -> Iterator[dict[str, float]]:
    """One dict of rates per round.

    A round runs all ways ``slices`` times, so that a slow period of the machine
    affects all of them.
    """
    for _ in range(rounds):
        seconds = dict.fromkeys(ways, 0.0)
        for _ in range(slices):
            for name, (way, changes) in ways.items():
                seconds[name] += 1 / way(changes)
        yield {name: slices / spent for name, spent in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="server or directory of the new ledger (default: SQLite)")
    parser.add_argument("--dir", help="directory of the SQLite file (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tasks", type=int, default=1_000)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument(
        "--changes", type=int, default=400, help="changes of a single caller, per round"
    )
    options = parser.parse_args()
    slices = 4
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.dir))
        url = options.url or f"sqlite:///{Path(folder).resolve()}/tasks.db"
        store = stack.enter_context(scratch(url))()
        stack.callback(store.close)
        ledger = Ledger(store, options.tasks, options.callers)
        few = options.changes // slices
        many = options.callers * max(5, few // 4)
        ways = {
            "store.apply": (ledger.apply, few),
            "one thread": (ledger.one_thread, few),
            f"{options.callers} threads": (ledger.threads, many),
            f"{options.callers} coroutines": (ledger.coroutines, many),
        }
        if url.startswith("sqlite:"):
            raw = Raw(Path(folder) / "raw.db", ledger)
            ways = {"raw driver": (raw.commit, few), **ways}
        rounds = list(measure(ways, options.rounds, slices))
    report(url.partition(":")[0], list(ways), rounds)


def report(scheme: str, ways: list[str], rounds: list[dict[str, float]]) -> None:
    for way in ways:
        rates = [rates[way] for rates in rounds]
        print(
            f"{scheme} {way:>14}: {statistics.median(rates):8,.0f} changes/s"
            f" (rounds {min(rates):,.0f} to {max(rates):,.0f})"
        )
    pairs = [(way, "one thread") for way in ways[-2:]] + [("one thread", "store.apply")]
    if "raw driver" in ways:
        pairs.append(("store.apply", "raw driver"))
    for way, base in pairs:
        ratios = [rates[way] / rates[base] for rates in rounds]
        print(
            f"ratio {way} / {base}: {statistics.median(ratios):.2f}"
            f" (rounds {min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
