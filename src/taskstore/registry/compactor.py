"""Compaction of a store: a function, and a hook that compacts automatically."""

from __future__ import annotations

import logging
import threading
from typing import Self

from msgspec.structs import replace

from taskstore.errors import StoreBusyError, StoreClosedError, UnsupportedError
from taskstore.model.compaction_policy import CompactionPolicy, CompactionReport, JournalStats
from taskstore.registry.hooks import Deleted, Event, Restored
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

    Add the compactor with ``registry.hooks.add(Compactor(registry.store))``.  The compactor
    counts events, and asks the policy whether compaction is due.  The compactor does not
    block writers.  ``runs`` counts completed compactions, ``failures`` counts failed
    compactions.  A failure is logged, and the compactor tries again when compaction is next
    due.  ``last_report`` is the newest :class:`CompactionReport` or ``None``.  Close the
    compactor before the store.
    """

    def __init__(self, store: TaskRegistryStore, policy: CompactionPolicy | None = None) -> None:
        if not isinstance(store, SupportsCompaction):
            raise UnsupportedError(f"{store!r} does not support compaction")
        self._store = store
        self._policy = policy or CompactionPolicy()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._entries = 0
        self._records = 0
        self._oldest_at: int | None = None
        self.runs = 0
        self.failures = 0
        self.last_report: CompactionReport | None = None

    def __call__(self, event: Event) -> None:
        """Count an event, and start a compaction if compaction is due."""
        with self._lock:
            if isinstance(event, Restored):
                # The store itself counts the entries since its newest snapshot.
                self._records = event.count
                self._start()
                return
            self._entries += 1
            self._oldest_at = self._oldest_at or event.at
            if isinstance(event, Deleted):
                self._records -= 1
            elif event.previous is None:
                self._records += 1
            stats = JournalStats(
                entries=self._entries,
                records=max(self._records, 0),
                now=event.at,
                oldest_at=self._oldest_at,
            )
            if self._policy.due(stats) is not None:
                self._start()

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

    def _start(self) -> None:
        if self._closed or (self._thread is not None and self._thread.is_alive()):
            return
        self._entries = 0
        self._oldest_at = None
        self._thread = threading.Thread(target=self._run, name="taskstore-compactor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.last_report = compact(self._store, self._policy)
            self.runs += self.last_report.compacted
        except StoreBusyError:
            logger.info("skipped compaction of %s: another compactor runs", self._store.location)
        except StoreClosedError:
            logger.info("skipped compaction of %s: the store is closed", self._store.location)
        except Exception:
            self.failures += 1
            logger.exception("compaction of %s failed", self._store.location)
