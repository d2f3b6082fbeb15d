"""Requests, and the queue in which they wait to be committed together.

A caller that is alone commits its own request: no other thread is woken.
While it does, other callers put theirs into the queue, and a writer thread
commits what has come together, all at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from msgspec import Struct

from taskstore.errors import StoreClosedError
from taskstore.mirror import Staging

T = TypeVar("T")

Operation = Callable[[Staging], T]
"""Looks records up, stages changes, returns what the caller gets."""

INTERRUPTED_S = 1.0
"""How long an interrupted caller waits for a commit that has begun, in seconds."""


class Request(Struct, Generic[T]):
    """One caller's operation, and in the end its result or error."""

    operation: Operation[T]
    result: Any = None
    error: BaseException | None = None

    def outcome(self) -> T:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        result: T = self.result
        return result


class Ticket(Request[T], Generic[T], kw_only=True):
    """A request that waits for the writer thread.

    ``settle`` is called by that thread when the outcome is there.
    """

    settle: Callable[[], object]
    # Taken once and never given back: by the writer thread, which begins the
    # request, or by the caller, which withdraws it.
    turn: Any

    def withdraw(self) -> bool:
        """Take the request back unless it has begun; returns whether that succeeded."""
        withdrawn: bool = self.turn.acquire(blocking=False)
        return withdrawn


class CommitQueue:
    """Tickets, taken in the order in which they came.

    ``busy`` tells whether there are tickets whose outcome is not there yet.
    """

    def __init__(self) -> None:
        self.busy = False
        self._tickets: SimpleQueue[Ticket[Any] | None] = SimpleQueue()
        self._gate = threading.Lock()
        self._attended = False
        self._closed = False

    def put(self, operation: Operation[T], settle: Callable[[], object]) -> tuple[Ticket[T], bool]:
        """Queue an operation; returns its ticket, and whether a writer thread has to be started.

        Raises :class:`~taskstore.StoreClosedError` after :meth:`close`.
        """
        ticket = Ticket(operation, settle=settle, turn=threading.Lock())
        with self._gate:
            if self._closed:
                raise StoreClosedError("the registry is closed")
            start = not self._attended
            self._attended = self.busy = True
            self._tickets.put(ticket)
        return ticket, start

    def take(self, idle_s: float) -> list[Ticket[Any]]:
        """Wait for tickets and begin all that are there.

        An empty list says that none came for ``idle_s`` seconds, or that the
        queue was closed: then its writer thread ends.
        """
        while True:
            try:
                found = [self._tickets.get(timeout=idle_s)]
            except Empty:
                found = []
            while not self._tickets.empty():
                found.append(self._tickets.get())
            begun = [t for t in found if t is not None and t.turn.acquire(blocking=False)]
            if None in found and len(found) > 1:
                self._tickets.put(None)  # what came before the end is done first
            if begun:
                return begun
            with self._gate:
                if self._tickets.empty():
                    self.busy = False
                    if not found or None in found:
                        self._attended = False
                        return []

    def settle(self, tickets: Sequence[Ticket[Any]]) -> None:
        """Tell the callers of tickets that their outcome is there."""
        with self._gate:
            self.busy = not self._tickets.empty()
        for ticket in tickets:
            ticket.settle()

    def close(self) -> None:
        """Take no more tickets, and let the writer thread end after those that are there."""
        with self._gate:
            self._closed = True
            if self._attended:
                self._tickets.put(None)


def wait(ticket: Ticket[T], settled: threading.Lock) -> None:
    """Wait until the outcome of a ticket is there: until ``settled`` is released.

    Interrupted, it withdraws a request that has not begun, and waits a moment
    for one that has, since that is usually done soon.
    """
    try:
        settled.acquire()
    except BaseException:
        if not ticket.withdraw():
            settled.acquire(timeout=INTERRUPTED_S)
        raise
