"""Events, and their delivery to whoever watches.

Hooks observe: they are called after the commit, outside its lock, one event
at a time and in the order of the journal.  What a hook raises is logged and
counted; it undoes nothing and stops no other hook.  An interrupt is raised on,
when all hooks have heard of the event.
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

DRAIN_S = 5.0
"""How long closing waits for hooks that are at work in another thread, in seconds."""


class Restored(Struct, frozen=True):
    """The registry (re)loaded its records; sent for an empty store too.

    ``seq`` is the commit that they are true for, ``count`` their number and
    ``records`` an immutable mapping of task_id to record.
    """

    kind: ClassVar[str] = "restored"

    seq: int
    count: int
    records: Mapping[str, TaskRecord]
    local: bool = True


class Upserted(Struct, frozen=True, gc=False):
    """A task was created (``previous`` is ``None``) or changed.

    ``at`` is the time of the commit (Unix milliseconds).  ``local`` tells
    whether this registry made the change or another writer did.
    """

    kind: ClassVar[str] = "upserted"

    seq: int
    at: int
    record: TaskRecord
    previous: TaskRecord | None
    local: bool = True


class Deleted(Struct, frozen=True, gc=False):
    """A task was deleted; ``previous`` is its last record, where it was known.

    ``at`` is the time of the commit (Unix milliseconds).  ``local`` tells
    whether this registry made the change or another writer did.
    """

    kind: ClassVar[str] = "deleted"

    seq: int
    at: int
    task_id: str
    previous: TaskRecord | None
    local: bool = True


Event = Restored | Upserted | Deleted
"""What a hook is called with."""

Hook = Callable[[Event], object]
"""Anything that takes an event."""


class Hooks:
    """The hooks of one registry, and the queue of events that they are owed.

    ``events`` are those that the hooks have not all heard yet; ``errors``
    counts the calls that raised.  What is raised and is no
    ``Exception``, as an interrupt, comes to who delivers, unless
    ``interrupts`` is false: where nobody is there whom it could interrupt.
    """

    def __init__(self, hooks: Iterable[Hook] = (), *, interrupts: bool = True) -> None:
        self._interrupts = interrupts
        self.registered: dict[object, Hook] = {}
        self.events: deque[Event] = deque()
        # The thread that delivers at present.
        self._deliverer: int | None = None
        # The hooks that have still to hear of the first event; ``None``: all.
        self._owed: Iterator[Hook] | None = None
        self._edit = threading.Lock()
        self.errors = 0
        for hook in hooks:
            self.add(hook)

    def add(self, hook: Hook) -> Callable[[], None]:
        """Call ``hook`` with every event from now on.

        Returns a function that removes it again; calling that twice is fine.
        """
        if not callable(hook):
            raise TypeError(f"a hook is called with events: {hook!r} is not callable")
        registration = object()  # the same callable may be added more than once
        with self._edit:
            self.registered = {**self.registered, registration: hook}

        def remove() -> None:
            with self._edit:
                others = {key: hook for key, hook in self.registered.items() if key != registration}
                self.registered = others

        return remove

    def emit(self, events: Iterable[Event]) -> None:
        """Queue events in the order of their seqs.  The caller holds the commit lock."""
        if self.registered:
            self.events.extend(events)

    def deliver(self) -> None:
        """Deliver what is queued, unless another call is at it: then that one does.

        Called without the commit lock.  A hook that changes the registry
        comes back here, finds the place taken, and its event follows after
        the one being delivered.
        """
        me = threading.get_ident()
        # Looked at again after the place is given up: what was queued between
        # the last look and the release found it taken.
        while self.events:
            taken = self._deliverer
            if taken is not None:
                return
            try:
                with self._edit:
                    if self._deliverer is not None:
                        return
                    self._deliverer = me
                while self.events:
                    self._deliver_first()
            finally:
                if self._deliverer == me:
                    self._deliverer = None

    def drain(self) -> None:
        """Deliver what is queued, and wait for whoever is at it just now.

        Not from a hook, which would wait for itself; and not for longer than
        ``DRAIN_S``, because the hook may be waiting for us.
        """
        ends = time.monotonic() + DRAIN_S
        while True:
            self.deliver()
            other = self._deliverer
            if other in (None, threading.get_ident()) or time.monotonic() > ends:
                return
            time.sleep(0.001)

    def _deliver_first(self) -> None:
        """Call the hooks with the first event, or those that an interrupt has left out."""
        event, interrupt = self.events[0], None
        if self._owed is None:
            self._owed = iter(self.registered.values())
        for hook in self._owed:
            try:
                hook(event)
            except BaseException as error:
                self.errors += 1
                logger.exception("a hook raised on %s at seq %d", event.kind, event.seq)
                # An interrupt is raised when all have heard.
                if self._interrupts and not isinstance(error, Exception):
                    interrupt = interrupt or error
        self._owed = None
        self.events.popleft()
        if interrupt is not None:
            raise interrupt
