"""Folding the journal into snapshots: by hand, or by a hook when it is due."""

from __future__ import annotations

import logging
import threading
from typing import Self

from msgspec.structs import replace

from taskstore.errors import StoreBusyError, StoreClosedError, UnsupportedError
from taskstore.model.policies import CompactionPolicy, CompactionReport, JournalStats
from taskstore.registry.hooks import Deleted, Event, Restored
from taskstore.store.interface import SupportsCompaction, TaskRegistryStore

logger = logging.getLogger("taskstore.compaction")


def compact(
    store: TaskRegistryStore,
    policy: CompactionPolicy | None = None,
    *,
    erase_deleted: bool = False,
) -> CompactionReport:
    """Fold a store's journal into a snapshot, if the policy finds that due.

    ``erase_deleted`` keeps no history at all, so that the text of deleted
    tasks is gone when it returns.  Raises :class:`~taskstore.UnsupportedError`
    for a store that cannot, :class:`~taskstore.StoreBusyError` while another
    compactor is at work.
    """
    if not isinstance(store, SupportsCompaction):
        raise UnsupportedError(f"{store!r} cannot compact")
    policy = policy or CompactionPolicy()
    if erase_deleted:
        policy = replace(policy, erase_deleted=True)
    return store.compact(policy)


class Compactor:
    """A hook that compacts a store in a thread of its own when it is due.

    ``registry.hooks.add(Compactor(registry.store))``: it counts what goes by
    and asks the policy; writers are not held up.  ``runs`` counts the
    compactions done, ``failures`` those that raised (they are logged, and
    tried again at the next event that finds one due); ``last_report`` is the
    newest :class:`CompactionReport` or ``None``.  Close it before the store.
    """

    def __init__(self, store: TaskRegistryStore, policy: CompactionPolicy | None = None) -> None:
        if not isinstance(store, SupportsCompaction):
            raise UnsupportedError(f"{store!r} cannot compact")
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
        """Count an event, and start compacting when that makes it due."""
        with self._lock:
            if isinstance(event, Restored):
                # How much came since the last snapshot, the store knows best.
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
        """Wait for the compaction that is running, if one is; returns whether it ended."""
        thread = self._thread
        if thread is None:
            return True
        thread.join(timeout_s)
        return not thread.is_alive()

    def close(self) -> None:
        """Start no more compactions and wait for the one that is running."""
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
            logger.info("another compactor is at work on %s", self._store.location)
        except StoreClosedError:
            logger.info("%s was closed before it could be compacted", self._store.location)
        except Exception:
            self.failures += 1
            logger.exception("compacting %s failed", self._store.location)
