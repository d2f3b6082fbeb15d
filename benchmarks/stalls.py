"""The longest block of the event loop while the ledger works.

A watchdog on the loop repeatedly sleeps for a millisecond and measures how late
it wakes; lookups (`get`, and `list` of the newest 50) run concurrently.  The
phases are: idle, as the baseline; 10,000 changes by 64 coroutines; a compaction
by the Compactor's thread, and one by another process; a refresh that replicates
100,000 new records of another process; a reload of all records, because another
process replaced the content; and a compaction of these records.  Prints the
longest block of each phase: the median over the runs, and every run.

    python benchmarks/stalls.py [--url URL | --dir DIRECTORY] [--runs N] [--uvloop] [--freeze]

For the reload it also prints the ratio of its duration to that of `load_snapshot`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from taskstore import CompactionPolicy, Compactor, Put, Snapshot, compact, open_store
from taskstore.aio import AsyncTaskRegistry
from taskstore.model import lifecycle
from taskstore.model.ids import new_task_id

COROUTINES = 64
BATCH = 1_000
FULL = CompactionPolicy(force=True, history_s=0, history_entries=0)


def new_puts(store: Any, first: int, count: int) -> list[Put]:
    return [
        Put(
            lifecycle.new_record(
                now=store.clock(),
                task_id=new_task_id(),
                runtime="cli",
                task=f"Summarise the inbox of account {number}",
                status="running",
                fields={
                    "owner_key": f"agent:{number % 50}",
                    "run_id": f"run-{number}",
                    "child_session_key": f"session-{number}",
                    "metadata": {"mails": number, "folder": "inbox"},
                },
            )
        )
        for number in range(first, first + count)
    ]


class OtherProcess:
    """Another process, which changes the ledger on command."""

    def __init__(self, url: str) -> None:
        # A fork is fast, and safe before threads exist.
        context = multiprocessing.get_context("fork")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=self._serve, args=(url, child_pipe), daemon=True)
        self._process.start()

    def run(self, *command: Any) -> None:
        self._pipe.send(command)
        answer = self._pipe.recv()
        if answer != "done":
            raise RuntimeError(answer)

    def stop(self) -> None:
        self._pipe.send(("stop",))
        self._process.join()

    @staticmethod
    def _serve(url: str, pipe: Connection) -> None:
        while True:
            name, *facts = pipe.recv()
            if name == "stop":
                return
            try:
                store = open_store(url)
                if name == "create":
                    for start in range(0, facts[0], BATCH):
                        store.apply(new_puts(store, start, min(BATCH, facts[0] - start)))
                elif name == "replace":
                    old = store.load_snapshot()
                    store.save_snapshot(Snapshot(old.seq + 1, old.records, old.at))
                else:
                    compact(store, FULL)
                store.close()
                pipe.send("done")
            except Exception as error:  # noqa: BLE001 (the parent raises it)
                pipe.send(repr(error))


class Watchdog:
    """Measures the longest block of the loop, in seconds."""

    def __init__(self, registry: AsyncTaskRegistry) -> None:
        self._registry = registry
        self.longest = 0.0
        self.lookups = 0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        self.longest = 0.0
        tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._look_up())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            started = time.perf_counter()
            try:
                await asyncio.sleep(0.001)
            finally:
                self.longest = max(self.longest, time.perf_counter() - started - 0.001)

    async def _look_up(self) -> None:
        while True:
            for record in self._registry.list(limit=50):
                self._registry.get(record.task_id)
            self.lookups += 1
            await asyncio.sleep(0.001)


async def changes(registry: AsyncTaskRegistry, count: int) -> None:
    async def work(number: int, left: int) -> None:
        task = await registry.create(
            runtime="cli",
            task=f"Summarise {number}",
            owner_key="agent:main",
            run_id=f"async-{number}",
        )
        for step in range(left - 2):
            await registry.record_progress(task.task_id, f"{step} of {left}")
        await registry.finish(task.task_id, "succeeded")

    await asyncio.gather(*(work(n, count // COROUTINES) for n in range(COROUTINES)))


async def compaction(registry: AsyncTaskRegistry) -> None:
    compactor = Compactor(registry.store, FULL)
    remove = registry.hooks.add(compactor)
    before = compactor.runs
    # A change wakes the compactor, as in a service.
    while compactor.runs == before:
        await registry.create(runtime="cli", task="one more")
        await asyncio.to_thread(compactor.wait)
    remove()
    await asyncio.to_thread(compactor.close)
    if compactor.failures:
        raise RuntimeError("the compaction failed")


class Run:
    """One run on its own ledger."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.count = options.changes
        self.records = options.records
        self.stalls: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    async def phase(self, name: str, watchdog: Watchdog, work: Awaitable[Any]) -> None:
        started = time.perf_counter()
        async with watchdog.watching():
            await work
        self.seconds[name] = time.perf_counter() - started
        self.stalls[name] = watchdog.longest * 1e3

    async def run(self, store: Any, other_process: OtherProcess) -> None:
        registry = await AsyncTaskRegistry.over(store)
        watchdog = Watchdog(registry)

        def other(*command: Any) -> Awaitable[None]:
            return asyncio.to_thread(other_process.run, *command)

        await self.phase("idle", watchdog, asyncio.sleep(1))
        await self.phase(f"{self.count:,} changes", watchdog, changes(registry, self.count))
        await self.phase("compaction in a thread", watchdog, compaction(registry))
        await self.phase("compaction by another process", watchdog, other("compact"))
        await self.phase("another process commits", watchdog, other("create", self.records))
        await self.phase(f"refresh of {self.records:,}", watchdog, registry.refresh())
        assert registry.summary().total > self.records
        await other("replace")
        await self.phase(f"reload of {self.records:,}", watchdog, registry.refresh())
        assert registry.seq == store.head()
        await self.phase("compaction after the reload", watchdog, compaction(registry))
        started = time.perf_counter()
        await asyncio.to_thread(store.load_snapshot)
        self.seconds["load_snapshot alone"] = time.perf_counter() - started
        await registry.close()


def measured(url: str, options: argparse.Namespace) -> Run:
    """One run on the empty ledger at ``url``."""
    run = Run(options)
    other_process = OtherProcess(url)
    store = open_store(url)
    if options.freeze:  # as docs/concepts.md advises
        gc.collect()
        gc.freeze()
    loop_factory = None
    if options.uvloop:
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(run.run(store, other_process))
    store.close()
    other_process.stop()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="server or directory of the new ledger (default: SQLite)")
    parser.add_argument("--dir", help="directory of the SQLite file (default: a temporary one)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--changes", type=int, default=10_000)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--freeze", action="store_true", help="call gc.freeze() after the imports")
    options = parser.parse_args()
    # taskstore.testing imports pytest and more.  The measured process must not: the longest
    # pause of the garbage collector scans all imported objects.
    from taskstore.testing.scratch import scratch

    spawn = multiprocessing.get_context("spawn")
    stalls: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        url = options.url or f"sqlite:///{Path(folder).resolve()}/tasks.db"
        for _ in range(options.runs):
            with scratch(url) as ledger, ProcessPoolExecutor(1, mp_context=spawn) as process:
                [ledger_url] = ledger.args
                run = process.submit(measured, ledger_url, options).result()
            for name, stall in run.stalls.items():
                stalls[name].append(stall)
            for name, spent in run.seconds.items():
                seconds[name].append(spent)
    scheme = url.partition(":")[0]
    for name, times in stalls.items():
        every = " ".join(f"{stall:.0f}" for stall in times)
        print(
            f"{scheme} {name:>30}: longest block {statistics.median(times):6.1f} ms (runs {every}),"
            f" {statistics.median(seconds[name]):6.2f} s"
        )
    loads = zip(
        seconds[f"reload of {options.records:,}"], seconds["load_snapshot alone"], strict=True
    )
    print(f"ratio reload / load_snapshot alone: {statistics.median(a / b for a, b in loads):.2f}")


if __name__ == "__main__":
    sys.exit(main())
