"""Compaction of a store: a function, and a hook that compacts automatically."""

from __future__ import annotations

import logging
import threading
from typing import Self

from msgspec.structs import replace

from taskstore.errors import ReadOnlyError, StoreBusyError, StoreClosedError, UnsupportedError
from taskstore.model.compaction_policy import (
    CompactionPolicy,
    CompactionReport,
    JournalStats,
    approximate_size,
)
from taskstore.registry.hooks import Deleted, Event, Restored, Upserted
from taskstore.store.interface import SupportsCompaction, TaskRegistryStore

logger = logging.getLogger("taskstore.compaction")


def compact(
    store: TaskRegistryStore,
    policy: CompactionPolicy | None = None,
    *,
    erase_deleted: bool = False,
) -> CompactionReport:
    """Compact a store's journal into a snapshot, if the policy says that compaction is due.

    ``erase_deleted`` removes all history, including the text of deleted tasks.
    Raises :class:`~taskstore.UnsupportedError` for a store without compaction,
    and :class:`~taskstore.StoreBusyError` while another compactor runs.
    """
    if not isinstance(store, SupportsCompaction):
        raise UnsupportedError(f"{store!r} does not support compaction")
    policy = policy or CompactionPolicy()
    if erase_deleted:
        policy = replace(policy, erase_deleted=True)
    return store.compact(policy)


class Compactor:
    """A hook that compacts a store in its own thread when compaction is due.

    Add the compactor with ``registry.hooks.add(Compactor(registry.store))``.  A new compactor asks
    the store at once whether compaction is due, so the entries that were committed earlier count
    too.  Later the compactor counts the events after the newest snapshot.  When the count shows
    that compaction is due, the compactor asks the store again.  The compactor does not block
    writers.  ``runs`` is the number of completed compactions, and ``failures`` is the number of
    failed compactions.  A failure is logged, and the compactor tries again after ``min_entries``
    more events.  ``last_report`` is the newest :class:`CompactionReport` or ``None``.  Close the
    compactor before the store; ``async with`` closes the compactor without blocking the event loop.

    The constructor raises :class:`~taskstore.UnsupportedError` for a store without compaction, and
    :class:`~taskstore.ReadOnlyError` for a store that was opened read-only.
    """

    def __init__(self, store: TaskRegistryStore, policy: CompactionPolicy | None = None) -> None:
        if not isinstance(store, SupportsCompaction):
            raise UnsupportedError(f"{store!r} does not support compaction")
        if store.read_only:
            raise ReadOnlyError(
                f"cannot compact {store.location}: this store was opened read-only",
                hint="attach the compactor to a store that is opened for writing",
            )
        self._store = store
        self._policy = policy or CompactionPolicy()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        # The journal at the newest report; the events since this report are counted separately.
        self._known = JournalStats(entries=0, records=0, now=0)
        self._created = 0
        self._bytes = 0
        self._oldest_at: int | None = None
        # The lowest seq whose event can start a compaction.
        self._not_before = 0
        self._seq = 0
        self.runs = 0
        self.failures = 0
        self.last_report: CompactionReport | None = None
        with self._lock:
            self._start()

    def __call__(self, event: Event) -> None:
        """Count an event, and start a compaction if compaction is due."""
        with self._lock:
            self._seq = event.seq
            if isinstance(event, Restored):
                # The content can be another: the store counts the entries anew.
                self._not_before = 0
                self._start()
                return
            self._oldest_at = self._oldest_at or event.at
            if isinstance(event, Deleted):
                self._created -= 1
                self._bytes += approximate_size(None)
            else:
                self._created += event.previous is None
                self._bytes += approximate_size(event.record)
            if event.seq >= self._not_before and self._policy.due(self._stats(event)) is not None:
                self._start()

    def _stats(self, event: Upserted | Deleted) -> JournalStats:
        """Return the last statistics from the store, with the counted events added."""
        known = self._known
        return JournalStats(
            entries=max(event.seq - known.newest_snapshot_seq, 0),
            records=max(known.records + self._created, 0),
            now=event.at,
            bytes=known.bytes + self._bytes,
            oldest_at=known.oldest_at or self._oldest_at,
            newest_snapshot_seq=known.newest_snapshot_seq,
            history_bytes=known.history_bytes + self._bytes,
        )

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait at most ``timeout_s`` seconds for a running compaction; return false on a
        timeout."""
        thread = self._thread
        if thread is None:
            return True
        thread.join(timeout_s)
        return not thread.is_alive()

    def close(self) -> None:
        """Start no more compactions, and wait for a running compaction."""
        with self._lock:
            self._closed = True
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        import asyncio  # programs without an event loop do not need this module

        await asyncio.to_thread(self.close)

    def _start(self) -> None:
        if self._closed or (self._thread is not None and self._thread.is_alive()):
            return
        self._created = self._bytes = 0
        self._oldest_at = None
        self._thread = threading.Thread(target=self._run, name="taskstore-compactor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        report = None
        try:
            report = compact(self._store, self._policy)
        except StoreBusyError:
            logger.info("skipped compaction of %s: another compactor runs", self._store.location)
        except StoreClosedError:
            logger.info("skipped compaction of %s: the store is closed", self._store.location)
        except Exception:
            self.failures += 1
            logger.exception("compaction of %s failed", self._store.location)
        with self._lock:
            if report is None or (report.stats is None and not report.compacted):
                # The store did not say how many entries there are.
                self._not_before = self._seq + self._policy.min_entries
            if report is not None:
                self.last_report = report
                self.runs += report.compacted
                self._known = self._stats_after(report)

    def _stats_after(self, report: CompactionReport) -> JournalStats:
        """Return the statistics of the journal after a compaction."""
        stats = report.stats
        if stats is not None and not report.compacted:
            return stats
        size = 0 if stats is None else stats.history_bytes
        if size > self._policy.history_bytes:
            size = self._policy.kept_bytes
        return JournalStats(
            entries=0,
            records=report.records,
            now=0,
            newest_snapshot_seq=report.seq,
            history_bytes=size,
        )
