"""The follower: a thread that applies commits of other processes to memory.

The follower waits in the method ``wait_for`` of the store.  When another process commits, the
store's change feed wakes the follower (:class:`taskstore.stores.common.change_feed.ChangeFeed`,
with one watcher per kind of store).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Self

from taskstore.errors import StoreClosedError, TaskStoreError
from taskstore.store.interface import SupportsJournal

logger = logging.getLogger("taskstore")

POLL_INTERVAL_S = 0.5
"""The longest wait of the follower for a commit, in seconds.  Even if no commit comes, the follower
then refreshes the memory, because a refresh detects that another history has replaced the
journal."""

LOCAL_COMMIT_S = 0.001
"""How long the follower waits for a local commit to reach memory, in seconds."""

LOCAL_WRITES_PAUSE_S = 0.005
"""How long the follower pauses after each local commit, in seconds."""

MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
"""The maximum backoff while the store cannot be read, in seconds.  The backoff begins at
``MIN_BACKOFF_S`` and doubles up to this maximum."""

STOP_TIMEOUT_S = 5.0
"""How long :meth:`Follower.stop` waits for the thread to end, in seconds."""


class Follower:
    """The thread that :meth:`taskstore.TaskRegistry.follow` starts.  ``stop()``, or the end of a
    ``with`` block, ends the thread.

    If the store cannot be read, the follower logs the error once and retries.
    """

    def __init__(
        self, journal: SupportsJournal, seq: Callable[[], int], refresh: Callable[[], object]
    ) -> None:
        """``seq`` returns the last seq in memory; ``refresh`` brings memory up to date."""
        self._journal = journal
        self._seq = seq
        self._refresh = refresh
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="taskstore-follower", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True while the follower is running (``bool``)."""
        return not self._stopped.is_set() and self._thread.is_alive()

    def stop(self) -> None:
        """End the follower, and wait for its thread.  Repeated calls, and calls from a
        hook, are allowed."""
        self.request_stop()
        self.wait()

    def request_stop(self) -> None:
        """Ask the follower's thread to end, and return without waiting for the end."""
        self._stopped.set()

    def wait(self) -> None:
        """Wait until the thread has ended, unless the caller is the follower's thread."""
        if threading.current_thread() is not self._thread:
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        backoff_s = MIN_BACKOFF_S
        while not self._stopped.is_set():
            try:
                self._refresh()
                if backoff_s > MIN_BACKOFF_S:
                    logger.info("the follower continues from seq %d", self._seq())
                backoff_s = MIN_BACKOFF_S
                self._wait_for_commit()
            except StoreClosedError:
                return
            except BaseException as error:  # a hook can raise any exception
                if backoff_s == MIN_BACKOFF_S:
                    known = isinstance(error, TaskStoreError)
                    logger.warning(
                        "the follower failed, and retries: %s", error, exc_info=not known
                    )
                self._stopped.wait(backoff_s)
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    def _wait_for_commit(self) -> None:
        """Wait until another process has possibly committed, or the poll interval has passed."""
        while not self._stopped.is_set():
            seq = self._seq()
            if not self._journal.wait_for(seq, POLL_INTERVAL_S):
                return
            # A local commit reaches memory without a refresh, together with all earlier
            # commits of other processes.
            self._stopped.wait(LOCAL_COMMIT_S)
            if self._seq() <= seq:
                return
            self._stopped.wait(LOCAL_WRITES_PAUSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
