"""Many callers, few commits: who waits, who leads, and when a thread of its own takes over.

A caller that is alone commits its own operation: no other thread is woken.
While it does, others queue up; when it is done it goes home, and a writer
thread commits what has come together, all at once, until nobody is left.
(Whoever commits last would otherwise have to stay and serve the others, and
callers that take turns at leading form small batches.)
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from taskstore.errors import OutcomeUnknownError, StoreClosedError, TaskStoreError
from taskstore.mirror import Staging

logger = logging.getLogger("taskstore")

T = TypeVar("T")

Operation = Callable[[Staging], T]
"""Looks records up, stages changes, returns what the caller gets."""

IDLE_S = 5.0
"""How long the writer thread waits for company before it ends, in seconds."""


INTERRUPTED_S = 1.0
"""How long an interrupted caller waits for a commit that has begun, in seconds."""


class Request(Generic[T]):
    """One caller's operation, and in the end its result or error.

    ``settle`` is called by the thread that committed it, when it is time for
    the caller to look at the outcome.
    """

    __slots__ = ("_error", "_result", "is_settled", "operation", "settle")

    def __init__(self, operation: Operation[T], settle: Callable[[], None]) -> None:
        self.operation = operation
        self.settle = settle
        self.is_settled = False
        self._result: T | None = None
        self._error: BaseException | None = None

    def succeed(self, result: T) -> None:
        """Keep the result, instead of an earlier one; the caller is not told before
        :meth:`settle`."""
        self._result = result
        self._error = None

    def fail(self, error: BaseException) -> None:
        """Keep the error, likewise."""
        self._error = error

    def outcome(self) -> T:
        """Return the result, or raise the error."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # T may itself be None


class _Waiting(Request[T]):
    """The request of a caller whose thread waits for it."""

    __slots__ = ("finished",)

    def __init__(self, operation: Operation[T]) -> None:
        # A plain lock is the cheapest thing that one thread can wait for and
        # another can release.
        self.finished = threading.Lock()
        self.finished.acquire()
        super().__init__(operation, self.finished.release)


class CommitQueue:
    """Gathers operations and has them committed, in the order in which they came.

    Of ``commit_one`` and ``commit_all`` one is called at a time.
    ``commit_one`` commits one operation for the thread that calls it, which
    gets what it returns or raises.  ``commit_all`` gives each of several
    requests a result or an error; what it raises goes to all of them.
    """

    def __init__(
        self,
        commit_one: Callable[[Operation[Any]], Any],
        commit_all: Callable[[Sequence[Request[Any]]], None],
    ) -> None:
        self._commit_one = commit_one
        self._commit_all = commit_all
        # Guards everything below.
        self._gate = threading.Lock()
        # Notified when nobody leads any more.
        self._rest = threading.Condition(self._gate)
        self._queue: list[Request[Any]] = []
        # Who commits at present: a caller, known by its operation, the writer thread, or nobody.
        self._leader: Operation[Any] | threading.Thread | None = None
        # The thread of the caller who took the lead last.
        self._led_by = 0
        self._writer: threading.Thread | None = None
        # The writer thread waits for it; it is free when there is something to look at.
        self._wake = threading.Lock()
        self._wake.acquire()
        self._closed = False
        self._pid = os.getpid()

    def run(self, operation: Operation[T]) -> T:
        """Have an operation committed; returns its result or raises its error."""
        try:
            try:
                request = self._enter(operation)
                if request is None:
                    result: T = self._commit_one(operation)
                    return result
                self._await(request)
            finally:
                # Looked up rather than remembered: an interrupt can strike between
                # taking the lead and noting it.
                if self._leader is operation:
                    self._hand_over()
        except BaseException:
            # Or on the way out: whoever kept the lead would keep out everybody, for ever.
            if self._leader is operation:
                self._hand_over()
            raise
        return request.outcome()

    def post(self, request: Request[Any]) -> None:
        """Have a request committed by the writer thread; its ``settle`` tells when."""
        if self._pid != os.getpid():
            self.check_process()
        with self._gate:
            if self._closed:
                self._check_closed()
            if self._leader is None:
                if not self._has_writer():
                    raise TaskStoreError("no thread can be started to commit this")
                self._rouse()
                self._leader = self._writer
            self._queue.append(request)

    def withdraw(self, request: Request[Any]) -> bool:
        """Take a request back that nobody has begun yet; returns whether that succeeded."""
        with self._gate:
            if request not in self._queue:
                return False
            self._queue.remove(request)
            return True

    def close(self) -> bool:
        """Take nothing more, and return when everything that was taken is committed.

        ``False`` in a forked child, where all of it is left to the parent.
        """
        if self._pid != os.getpid():
            return False
        with self._gate:
            self._check_not_within()
            self._closed = True
            self._rest.wait_for(lambda: self._leader is None)
            writer, self._writer = self._writer, None
        if writer is not None:
            self._rouse()
            writer.join()
        return True

    def _enter(self, operation: Operation[T]) -> _Waiting[T] | None:
        """Take the lead if nobody has it, else queue up; returns what to wait for then."""
        with self._gate:
            if self._leader is None and not self._closed:
                self._leader = operation
                self._led_by = threading.get_ident()
                return None
            self._check_closed()
            self._check_not_within()
            request = _Waiting(operation)
            self._queue.append(request)
            return request

    def check_process(self) -> None:
        """Raise :class:`TaskStoreError` in a forked child: locks and threads are its parent's."""
        if self._pid != os.getpid():
            raise forked()

    def _check_closed(self) -> None:
        if self._closed:
            raise StoreClosedError("the registry is closed")

    def _check_not_within(self) -> None:
        """Refuse what would wait for the very call that it interrupts."""
        by_caller = not isinstance(self._leader, threading.Thread | None)
        if by_caller and self._led_by == threading.get_ident():
            raise TaskStoreError(
                "this thread is in the middle of another call to the registry, as it may be when "
                "a signal handler runs",
                hint="let the handler set a flag or raise SystemExit, and go on from there",
            )

    def _await(self, request: _Waiting[Any]) -> None:
        try:
            request.finished.acquire()
        except BaseException:
            # Interrupted: what nobody has begun yet is not done at all.  What has been
            # begun is usually done in a moment, and the hooks hear of it by us.
            if not self.withdraw(request) and not request.is_settled:
                request.finished.acquire(timeout=INTERRUPTED_S)
            raise

    def _serve(self, requests: Sequence[Request[Any]]) -> None:
        """Have requests committed, and let their callers go on whatever happens."""
        try:
            self._commit_all(requests)
        except Exception as error:  # noqa: BLE001 (it is raised in the callers' threads)
            for request in requests:
                request.fail(error)
        except BaseException:
            for request in requests:
                request.fail(OutcomeUnknownError("the thread that committed this was interrupted"))
            raise
        finally:
            for request in requests:
                request.is_settled = True
                request.settle()

    def _hand_over(self) -> None:
        """Give up the lead; to the writer thread if somebody came meanwhile."""
        with self._gate:
            if not self._queue:
                self._leader = None
                if self._closed:
                    self._rest.notify_all()
                return
            if self._has_writer():
                self._rouse()
                self._leader = self._writer
                return
        # No thread to be had: whoever leads serves the others too.
        while requests := self._take():
            self._serve(requests)

    def _has_writer(self) -> bool:
        """Start the writer thread unless there is one; whether there is one now."""
        if self._writer is None:
            writer = threading.Thread(target=self._write, name="taskstore-writer", daemon=True)
            try:
                writer.start()
            except RuntimeError:  # the system gives no more threads
                return False
            self._writer = writer
        return True

    def _rouse(self) -> None:
        """Let the writer thread look whether it leads, or is to end.

        It looks through the gate.  So whoever makes it the leader rouses it first:
        an interrupt in between leaves one look too many, and not one too few.
        """
        if self._wake.locked():
            self._wake.release()

    def _write(self) -> None:
        """Serve the queue whenever it is handed over; end when closed or long idle."""
        while self._stays(roused=self._wake.acquire(timeout=IDLE_S)):
            while self._leader is threading.current_thread() and (requests := self._take()):
                try:
                    self._serve(requests)
                except BaseException:  # the callers have been told; later ones need the thread
                    logger.exception("the writer thread was interrupted")

    def _stays(self, *, roused: bool) -> bool:
        """Whether the writer thread goes on: because it leads, or was roused and not dismissed.

        It may be roused for what it has served already: the hand-over came
        just when it had waited long enough, and was seen without.
        """
        with self._gate:
            if self._leader is threading.current_thread():
                return True
            if self._writer is not threading.current_thread():
                # One that an interrupt kept from being noted may have taken another's call.
                self._rouse()
                return False
            if not roused:
                self._writer = None
            return roused

    def _take(self) -> list[Request[Any]]:
        """Everything that is queued; when that is nothing, the lead is given up."""
        with self._gate:
            requests, self._queue = self._queue, []
            if not requests:
                self._give_up()
            return requests

    def _give_up(self) -> None:
        """Nobody leads any more: :meth:`close` may be waiting for that."""
        self._leader = None
        if self._closed:
            self._rest.notify_all()


def forked() -> TaskStoreError:
    """The error of whoever uses a registry in a forked child."""
    return TaskStoreError(
        "this registry was opened before the process forked",
        hint="open one of its own in each process",
    )
