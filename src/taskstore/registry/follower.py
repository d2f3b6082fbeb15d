"""Following: a thread that keeps a registry's memory up with what other processes commit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Self

from taskstore.errors import StoreClosedError, TaskStoreError
from taskstore.store.interface import SupportsJournal

logger = logging.getLogger("taskstore")

LOOK_S = 0.5
"""How long it waits for news at a time: so often it also looks whether the
ledger is still the same one, in seconds."""

SETTLE_S = 0.001
"""How long it lets a commit of our own reach memory by itself, in seconds."""

BUSY_NAP_S = 0.005
"""How long it leaves a registry alone that is writing itself, in seconds."""

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
"""How long it waits when the store cannot be read, doubling from the first, in seconds."""

STOP_S = 5.0
"""How long :meth:`Follower.stop` waits for the thread to end, in seconds."""


class Follower:
    """What :meth:`taskstore.TaskRegistry.follow` gives: ``stop()`` it, or use it in a ``with``.

    Trouble with the store is logged, once, and waited out.
    """

    def __init__(
        self, journal: SupportsJournal, seq: Callable[[], int], refresh: Callable[[], object]
    ) -> None:
        """``seq`` tells how far memory is, ``refresh`` brings it up to date."""
        self._journal = journal
        self._seq = seq
        self._refresh = refresh
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="taskstore-follower", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it is still following (``bool``)."""
        return not self._stopped.is_set() and self._thread.is_alive()

    def stop(self) -> None:
        """Follow no longer.  Twice is fine, and so is from a hook."""
        self.ask_to_stop()
        self.wait()

    def ask_to_stop(self) -> None:
        """Let the thread end when it next looks up."""
        self._stopped.set()

    def wait(self) -> None:
        """Wait until the thread has ended, unless this is it."""
        if threading.current_thread() is not self._thread:
            self._thread.join(STOP_S)

    def _run(self) -> None:
        pause = FIRST_PAUSE_S
        while not self._stopped.is_set():
            try:
                self._refresh()
                if pause > FIRST_PAUSE_S:
                    logger.info("following again, from seq %d", self._seq())
                pause = FIRST_PAUSE_S
                self._wait_for_commit()
            except StoreClosedError:
                return
            except BaseException as error:  # a hook may raise anything: it ends nothing
                if pause == FIRST_PAUSE_S:
                    known = isinstance(error, TaskStoreError)
                    logger.warning("cannot follow: %s", error, exc_info=not known)
                self._stopped.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE_S)

    def _wait_for_commit(self) -> None:
        """Return when somebody else may have committed, or after a while."""
        while not self._stopped.is_set():
            seq = self._seq()
            if not self._journal.wait_for(seq, LOOK_S):
                return
            # Our own commits come to memory by themselves, and bring along
            # what others committed before them.
            self._stopped.wait(SETTLE_S)
            if self._seq() <= seq:
                return
            self._stopped.wait(BUSY_NAP_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
