"""A write load that survives server failures, and the check of its outcomes.

Every change has a unique text, by which the check finds it in the journal.  A writer
records each text by its outcome.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from taskstore import (
    OutcomeUnknownError,
    StoreBusyError,
    StoreUnavailableError,
    TaskRegistry,
    open_store,
)
from taskstore.aio import AsyncTaskRegistry

TIMEOUT_S = 60.0


class Load:
    """Threads and coroutines that write into one ledger until the body ends.

    ``acknowledged``, ``refused`` and ``unknown`` are texts, in the order of their
    outcomes; ``failures`` are exceptions that must not reach a caller.
    """

    def __init__(self) -> None:
        self.acknowledged: list[str] = []
        self.refused: list[str] = []
        self.unknown: list[str] = []
        self.failures: list[BaseException] = []
        self._stopping = threading.Event()

    # -- writing ---------------------------------------------------------------

    @contextmanager
    def threads(self, registry: TaskRegistry, number: int, shared: str) -> Iterator[None]:
        """Run ``number`` writer threads on a registry during the body."""
        workers = [
            threading.Thread(target=self._work, args=(registry, f"thread {n}", shared))
            for n in range(number)
        ]
        with self._running(workers):
            yield

    @contextmanager
    def coroutines(self, url: str, number: int, shared: str, **options: object) -> Iterator[None]:
        """Run ``number`` writer coroutines on a new asynchronous registry during the body."""
        work = self._work_async(url, number, shared, options)
        with self._running([threading.Thread(target=lambda: self._note_failure(work))]):
            yield

    @contextmanager
    def _running(self, threads: list[threading.Thread]) -> Iterator[None]:
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join(TIMEOUT_S)
        assert not any(thread.is_alive() for thread in threads), "a writer thread did not end"
        if self.failures:
            raise self.failures[0]

    def _note_failure(self, work: object) -> None:
        try:
            asyncio.run(work)  # type: ignore[arg-type]
        except BaseException as failure:  # noqa: BLE001 - raised where the load was started
            self.failures.append(failure)

    def _work(self, registry: TaskRegistry, name: str, shared: str) -> None:
        rng, own = random.Random(name), shared
        try:
            for text in _texts(name):
                if self._stopping.is_set():
                    return
                with self._outcome_recorded(text):
                    if rng.random() < 0.3:
                        own = registry.create(runtime="cli", task="work", label=text).task_id
                    else:
                        registry.record_progress(rng.choice((own, shared)), text)
        except BaseException as failure:  # noqa: BLE001 - raised where the load was started
            self.failures.append(failure)

    async def _work_async(self, url: str, number: int, shared: str, options: object) -> None:
        async with await AsyncTaskRegistry.open(url, **options) as registry:

            async def one(name: str) -> None:
                rng = random.Random(name)
                for text in _texts(name):
                    if self._stopping.is_set():
                        return
                    with self._outcome_recorded(text):
                        if rng.random() < 0.5:
                            await registry.create(runtime="cli", task="work", label=text)
                        else:
                            await registry.record_progress(shared, text)
                    await asyncio.sleep(rng.uniform(0, 0.05))

            await asyncio.gather(*(one(f"coroutine {n}") for n in range(number)))

    @contextmanager
    def _outcome_recorded(self, text: str) -> Iterator[None]:
        """Record the outcome of a change; only the named errors are expected."""
        try:
            yield
        except OutcomeUnknownError:
            self.unknown.append(text)
        except (StoreUnavailableError, StoreBusyError):
            self.refused.append(text)
            time.sleep(0.01)  # limits the rate of retries while the server refuses writes
        else:
            self.acknowledged.append(text)

    # -- checks ----------------------------------------------------------------

    def until_acknowledged(self, more: int, within_s: float = TIMEOUT_S) -> None:
        """Wait until ``more`` further changes are acknowledged."""
        target, deadline = len(self.acknowledged) + more, time.monotonic() + within_s
        while len(self.acknowledged) < target:
            assert not self.failures, self.failures
            assert time.monotonic() < deadline, f"no progress after {within_s:g} s: {self}"
            time.sleep(0.01)

    def check(self, url: str, registry: TaskRegistry | None = None) -> None:
        """Compare the ledger with the outcomes, and a registry with the ledger.

        Before the load the ledger must have contained only the shared task.
        """
        with open_store(url, read_only=True) as store:
            assert store.verify().problems == ()
            records = dict(store.load_snapshot().records)
            entries = list(_journal(store))
        assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
        stored = Counter(_text(entry.record) for entry in entries)
        assert not [text for text in self.acknowledged if stored[text] != 1]
        assert not [text for text in self.refused if text in stored]
        assert not [text for text in self.unknown if stored[text] > 1]
        revisions = Counter(entry.task_id for entry in entries)
        assert {task_id: record.revision for task_id, record in records.items()} == revisions
        if registry is not None:
            registry.refresh()
            assert {record.task_id: record for record in registry.list()} == records
            assert registry.seq == len(entries)

    def __str__(self) -> str:
        return (
            f"{len(self.acknowledged)} changes acknowledged, {len(self.refused)} refused, "
            f"{len(self.unknown)} of unknown outcome"
        )


def _texts(name: str) -> Iterator[str]:
    return (f"{name}, change {number}" for number in count())


def _text(record: object) -> str:
    """Return the text of the last change of a record."""
    return record.progress_summary or record.label


def _journal(store) -> Iterator[object]:
    after = 0
    while entries := store.read_journal(after, 1000):
        yield from entries
        after = entries[-1].seq
