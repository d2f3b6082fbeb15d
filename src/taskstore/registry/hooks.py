"""Events, and their delivery to hooks.

Hooks are called after the commit, outside the commit lock, one event at a time and in the order of
the journal.  An exception in a hook is logged and counted; the exception does not undo the commit,
and the other hooks are still called.  If a hook raises an interrupt, for example ``SystemExit``,
all other hooks are still called with the event; then the interrupt is raised in the thread that
delivers the event.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

from msgspec import Struct

from taskstore.model.records import TaskRecord

logger = logging.getLogger("taskstore.hooks")

DRAIN_TIMEOUT_S = 5.0
"""How long ``close()`` waits for hooks that run in another thread, in seconds."""


class Restored(Struct, frozen=True):
    """The registry loaded all its records; this event is sent for an empty store too.

    ``seq`` is the seq of the loaded snapshot, ``count`` is the number of records, and ``records``
    is an immutable mapping from task_id to record.
    """

    kind: ClassVar[str] = "restored"

    seq: int
    count: int
    records: Mapping[str, TaskRecord]
    local: bool = True


class Upserted(Struct, frozen=True, gc=False):
    """A task was created (``previous`` is ``None``) or changed.

    ``at`` is the time of the commit (Unix milliseconds).  ``local`` is true if this registry made
    the change, and false if another writer made the change.
    """

    kind: ClassVar[str] = "upserted"

    seq: int
    at: int
    record: TaskRecord
    previous: TaskRecord | None
    local: bool = True


class Deleted(Struct, frozen=True, gc=False):
    """A task was deleted; ``previous`` is its last record, if known.

    ``at`` is the time of the commit (Unix milliseconds).  ``local`` is true if this registry made
    the change, and false if another writer made the change.
    """

    kind: ClassVar[str] = "deleted"

    seq: int
    at: int
    task_id: str
    previous: TaskRecord | None
    local: bool = True


Event = Restored | Upserted | Deleted
"""The argument of a hook."""

Hook = Callable[[Event], object]
"""Any callable that takes an event."""


class Hooks:
    """The hooks of one registry, and the queue of undelivered events.

    ``events`` are the events that at least one hook has not received.  ``errors`` is the number of
    hook calls that raised an error.  An interrupt (an error that is not an ``Exception``) is raised
    again in the thread that delivers the event, unless ``raise_interrupts`` is false.
    """

    def __init__(self, hooks: Iterable[Hook] = (), *, raise_interrupts: bool = True) -> None:
        self._raise_interrupts = raise_interrupts
        self.registered: dict[object, Hook] = {}
        self.events: deque[Event] = deque()
        # The id of the thread that delivers events now.
        self._deliverer: int | None = None
        # The hooks that were not yet called with the first queued event; ``None`` means all hooks.
        self._remaining: Iterator[Hook] | None = None
        self._lock = threading.Lock()
        self.errors = 0
        for hook in hooks:
            self.add(hook)

    def add(self, hook: Hook) -> Callable[[], None]:
        """Call ``hook`` with every event from now on.

        Returns a function that removes the hook; a second call of this function does
        nothing.
        """
        if not callable(hook):
            raise TypeError(f"a hook must be callable with an event, but {hook!r} is not callable")
        registration = object()  # the same callable can be added more than once
        with self._lock:
            self.registered = {**self.registered, registration: hook}

        def remove() -> None:
            with self._lock:
                others = {key: hook for key, hook in self.registered.items() if key != registration}
                self.registered = others

        return remove

    def enqueue(self, events: Iterable[Event]) -> None:
        """Queue events in the order of their seqs.  The caller must hold the commit lock."""
        if self.registered:
            self.events.extend(events)

    def deliver(self) -> None:
        """Deliver all queued events, unless another call is delivering events.

        The caller must not hold the commit lock.  If a hook changes a task, the nested call of
        ``deliver`` returns at once; the event of this change is delivered after the current event.
        """
        me = threading.get_ident()
        # After a delivery the loop checks for events again.  It is possible that another call
        # queued an event after the last check, and returned because this thread was the deliverer.
        while self.events:
            deliverer = self._deliverer
            if deliverer is not None:
                return
            try:
                with self._lock:
                    if self._deliverer is not None:
                        return
                    self._deliverer = me
                while self.events:
                    self._deliver_first()
            finally:
                if self._deliverer == me:
                    self._deliverer = None

    def drain(self) -> None:
        """Deliver all queued events, and wait for a delivery in another thread.

        A call inside a hook does not wait.  Other calls wait at most ``DRAIN_TIMEOUT_S``,
        because a hook can wait for the thread that calls ``drain``.
        """
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while True:
            self.deliver()
            other = self._deliverer
            if other in (None, threading.get_ident()) or time.monotonic() > deadline:
                return
            time.sleep(0.001)

    def _deliver_first(self) -> None:
        """Call all hooks with the first queued event.  If an earlier delivery of this event was
        interrupted, call only the hooks that were not yet called."""
        event, interrupt = self.events[0], None
        if self._remaining is None:
            self._remaining = iter(self.registered.values())
        for hook in self._remaining:
            try:
                hook(event)
            except BaseException as error:
                self.errors += 1
                logger.exception("a hook raised on %s at seq %d", event.kind, event.seq)
                # An interrupt is raised after all hooks were called.
                if self._raise_interrupts and not isinstance(error, Exception):
                    interrupt = interrupt or error
        self._remaining = None
        self.events.popleft()
        if interrupt is not None:
            raise interrupt
