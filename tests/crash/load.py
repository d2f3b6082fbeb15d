"""Writers that go on whatever happens, and the check of what they were told.

Every change carries a text of its own, by which the journal tells whether it
was stored.  A writer notes each text under what it was told of it.
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

PATIENCE_S = 60.0


class Load:
    """Threads and coroutines that write into one ledger until they are told to stop.

    ``acknowledged``, ``refused`` and ``unknown`` are texts, in the order in which
    that became known; ``failures`` is what must never reach a caller.
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
        """Let so many threads write through a registry during the body."""
        workers = [
            threading.Thread(target=self._work, args=(registry, f"thread {n}", shared))
            for n in range(number)
        ]
        with self._running(workers):
            yield

    @contextmanager
    def coroutines(self, url: str, number: int, shared: str, **options: object) -> Iterator[None]:
        """Let so many coroutines write through an asynchronous registry of their own."""
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
                thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in threads), "a writer hangs"
        if self.failures:
            raise self.failures[0]

    def _note_failure(self, work: object) -> None:
        try:
            asyncio.run(work)  # type: ignore[arg-type]
        except BaseException as failure:  # noqa: BLE001 - raised where the load was started
            self.failures.append(failure)

    def _work(self, registry: TaskRegistry, name: str, shared: str) -> None:
        chance, own = random.Random(name), shared
        try:
            for text in _texts(name):
                if self._stopping.is_set():
                    return
                with self._told(text):
                    if chance.random() < 0.3:
                        own = registry.create(runtime="cli", task="work", label=text).task_id
                    else:
                        registry.record_progress(chance.choice((own, shared)), text)
        except BaseException as failure:  # noqa: BLE001 - raised where the load was started
            self.failures.append(failure)

    async def _work_async(self, url: str, number: int, shared: str, options: object) -> None:
        async with await AsyncTaskRegistry.open(url, **options) as registry:

            async def one(name: str) -> None:
                chance = random.Random(name)
                for text in _texts(name):
                    if self._stopping.is_set():
                        return
                    with self._told(text):
                        if chance.random() < 0.5:
                            await registry.create(runtime="cli", task="work", label=text)
                        else:
                            await registry.record_progress(shared, text)
                    await asyncio.sleep(chance.uniform(0, 0.05))

            await asyncio.gather(*(one(f"coroutine {n}") for n in range(number)))

    @contextmanager
    def _told(self, text: str) -> Iterator[None]:
        """Note what a caller is told of its change; only named errors are fine."""
        try:
            yield
        except OutcomeUnknownError:
            self.unknown.append(text)
        except (StoreUnavailableError, StoreBusyError):
            self.refused.append(text)
            time.sleep(0.01)  # who is refused at once would do nothing but ask again
        else:
            self.acknowledged.append(text)

    # -- looking ---------------------------------------------------------------

    def until_acknowledged(self, more: int, within_s: float = PATIENCE_S) -> None:
        """Wait until so many more changes were acknowledged."""
        wanted, deadline = len(self.acknowledged) + more, time.monotonic() + within_s
        while len(self.acknowledged) < wanted:
            assert not self.failures, self.failures
            assert time.monotonic() < deadline, f"{self} do not get on"
            time.sleep(0.01)

    def check(self, url: str, registry: TaskRegistry | None = None) -> None:
        """Compare a ledger with what the writers were told, and a registry with the ledger.

        The ledger has to have been empty before, but for the shared task.
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
    """What the last change of a record was called."""
    return record.progress_summary or record.label


def _journal(store) -> Iterator[object]:
    after = 0
    while entries := store.read_journal(after, 1000):
        yield from entries
        after = entries[-1].seq
