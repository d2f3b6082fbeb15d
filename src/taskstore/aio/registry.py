"""The registry for asyncio: each verb of the registry, as a coroutine.

The event loop's thread never waits for a store.  A writer thread commits the changes of
several coroutines as one group, and wakes the event loop once per group.  Lookups read
memory and are synchronous.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from datetime import datetime
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from taskstore.errors import StoreClosedError, TaskStoreError
from taskstore.model.ids import Clock
from taskstore.model.journal import JournalEntry, Snapshot
from taskstore.model.records import TaskRecord
from taskstore.model.validation import check_key, check_seconds
from taskstore.registry import history
from taskstore.registry.cache import Lookups
from taskstore.registry.commit import Batch, Operation
from taskstore.registry.follower import Follower
from taskstore.registry.hooks import Hook, Hooks
from taskstore.registry.registry import RegistryBase
from taskstore.registry.verbs import (
    ChangeRun,
    OperationFactory,
    RunScope,
    RunSelector,
    TaskOperation,
)
from taskstore.store.interface import SupportsJournal, TaskRegistryStore
from taskstore.store.opening import default_url, open_store

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound="AsyncTaskRegistry")

POLL_INTERVAL_S = 2.0
"""The interval, in seconds, at which ``changes()`` reads the journal if no commit is reported."""

_batches: ContextVar[Mapping[int, Batch]] = ContextVar("taskstore-batches")
"""The open batches of the current asyncio task, by ``id()`` of the registry."""


def _async_verb(
    verb: Callable[Concatenate[OperationFactory, P], Operation[T]],
) -> Callable[Concatenate[AsyncTaskRegistry, P], Coroutine[Any, Any, T]]:
    """Return the verb as a coroutine function that commits the verb's operation."""

    @functools.wraps(verb)
    async def call(self: AsyncTaskRegistry, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._commit(verb(self._factory, *args, **kwargs))

    return call


class AsyncTaskRegistry(RegistryBase):
    """A :class:`taskstore.TaskRegistry` for one event loop.

    Use ``async with AsyncTaskRegistry.open(url) as registry:``.  The caller awaits verbs,
    but not lookups (``get``, ``find``, ``list``, …).  If the wait for a verb is cancelled,
    the verb's change is committed completely or not at all.  Hooks are called in order,
    never in the event loop's thread.  A verb returns after the hooks received the event of
    the verb, unless an earlier event is still being delivered.
    """

    def __init__(
        self, store: TaskRegistryStore, *, hooks: Iterable[Hook] = (), clock: Clock | None = None
    ) -> None:
        """Create a registry over a store; the caller closes the store.

        ``async with`` loads the records.  :meth:`open` and :meth:`over` return a registry that has
        loaded the records.
        """
        if clock is not None:
            store.clock = clock
        super().__init__(store, Hooks(hooks, raise_interrupts=False))
        self._factory = OperationFactory(self._now)
        self._loop = asyncio.get_running_loop()
        self._done: deque[asyncio.Future[None]] = deque()
        self._wake_scheduled = False
        self._delivering = False
        self._closing: asyncio.Future[None] | None = None
        # The thread pools are separate, so that a wait for a commit or a hook does not block other
        # calls.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="taskstore-aio")
        self._commit_waiter = CommitWaiter(self._loop)
        self._hook_executor = ThreadPoolExecutor(1, thread_name_prefix="taskstore-hooks")

    @classmethod
    def open(
        cls,
        url: str | None = None,
        *,
        hooks: Iterable[Hook] = (),
        durability: str = "full",
        migrate: str = "auto",
        read_only: bool = False,
        clock: Clock | None = None,
        **options: Any,
    ) -> RegistryOpener[Self]:
        """Open the ledger at a URL and load it: see :meth:`taskstore.TaskRegistry.open`.

        Use ``await`` to get the registry, or ``async with`` to get the registry and to close it at
        the end of the block.
        """
        make_store = functools.partial(
            open_store,
            default_url() if url is None else url,
            durability=durability,
            migrate=migrate,
            read_only=read_only,
            **options,
        )
        return RegistryOpener(cls._open(make_store, hooks, clock))

    @classmethod
    async def _open(
        cls,
        make_store: Callable[[], TaskRegistryStore],
        hooks: Iterable[Hook],
        clock: Clock | None,
    ) -> Self:
        opening = asyncio.get_running_loop().run_in_executor(None, make_store)
        try:
            store = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The thread opens the store in spite of the cancellation, so the store must be closed.
            opening.add_done_callback(_close_abandoned)
            raise
        try:
            registry = await cls.over(store, hooks=hooks, clock=clock)
        except BaseException:
            await asyncio.to_thread(store.close)
            raise
        registry._owns_store = True  # noqa: SLF001 (its own class)
        return registry

    @classmethod
    def over(
        cls, store: TaskRegistryStore, *, hooks: Iterable[Hook] = (), clock: Clock | None = None
    ) -> RegistryOpener[Self]:
        """Make a registry over a store and load the records; the caller closes the store."""
        return RegistryOpener(cls._over(store, hooks, clock))

    @classmethod
    async def _over(
        cls, store: TaskRegistryStore, hooks: Iterable[Hook], clock: Clock | None
    ) -> Self:
        registry = cls(store, hooks=hooks, clock=clock)
        await registry._in_thread(registry._committer.load)
        return registry

    # -- creating and changing ------------------------------------------------

    create = _async_verb(OperationFactory.create)
    mark_running = _async_verb(OperationFactory.mark_running)
    record_progress = _async_verb(OperationFactory.record_progress)
    finish = _async_verb(OperationFactory.finish)
    mark_lost = _async_verb(OperationFactory.mark_lost)
    recover = _async_verb(OperationFactory.recover)
    cancel = _async_verb(OperationFactory.cancel)
    set_delivery_status = _async_verb(OperationFactory.set_delivery_status)
    set_notify_policy = _async_verb(OperationFactory.set_notify_policy)
    set_cleanup_after = _async_verb(OperationFactory.set_cleanup_after)
    link_flow = _async_verb(OperationFactory.link_flow)
    update_metadata = _async_verb(OperationFactory.update_metadata)
    delete = _async_verb(OperationFactory.delete)
    take_lease = _async_verb(OperationFactory.take_lease)
    renew_lease = _async_verb(OperationFactory.renew_lease)
    release_lease = _async_verb(OperationFactory.release_lease)

    def run(
        self, run_id: str, *, runtime: str | None = None, session_key: str | None = None
    ) -> RunScope[Coroutine[Any, Any, list[TaskRecord]]]:
        """Return the verbs for all tasks of a run: see :meth:`taskstore.TaskRegistry.run`."""
        return RunScope(RunSelector(run_id, runtime, session_key), self._now, self._commit_run)

    @asynccontextmanager
    async def batch(self) -> AsyncIterator[Self]:
        """Commit all changes of the ``async with`` body as one commit, or none of them.

        A batch belongs to the current asyncio task, and to the asyncio tasks that are
        started in the body, until the body ends.  All other rules are those of
        :meth:`taskstore.TaskRegistry.batch`.
        """
        outer = self._batch
        batch = self._new_batch(outer)
        token = _batches.set(MappingProxyType({**_batches.get({}), id(self): batch}))
        try:
            yield self
        finally:
            batch.closed = True
            _batches.reset(token)
        if outer is not None and not outer.closed:
            outer.join(batch)
        elif batch.operations:
            await self._commit(batch.replay)

    # -- the journal ------------------------------------------------------------

    async def refresh(self) -> int:
        """Apply the commits of other processes to memory; return the newest seq in memory."""
        self._check_open()
        await self._in_thread(self._committer.refresh)
        return self._cache.seq

    async def changes(
        self, after: int | str = 0, wait: float | None = None
    ) -> AsyncIterator[JournalEntry]:
        """Yield the journal entries after ``after``, up to the head.

        ``after`` is a seq or the ``cursor`` of an entry.  With ``wait``, the iterator waits for
        new entries and ends after ``wait`` seconds without a new entry.  The first step of the
        iteration raises the errors of :meth:`taskstore.TaskRegistry.changes`.
        """
        self._check_open()
        journal = history.require_journal(self._store, "changes")
        reader = history.JournalReader(journal, self._with_commit_id(after))
        if wait is not None:
            check_seconds("wait", wait, 0, history.MAX_WAIT_S)
        deadline = self._loop.time() + (wait or 0)
        while True:
            self._check_open()
            while entries := await self._in_thread(reader.next_page):
                for entry in entries:
                    yield entry
                    self._check_open()
                deadline = self._loop.time() + (wait or 0)
            left = max(0.0, deadline - self._loop.time())
            # After each poll interval, next_page() checks that the journal was not replaced.
            if wait is None or (
                not await self._commit_waiter.wait_for(
                    journal, reader.position.seq, min(left, POLL_INTERVAL_S)
                )
                and left <= POLL_INTERVAL_S
            ):
                return

    async def history(self, task_id: str) -> Sequence[JournalEntry]:
        """Return a task's journal entries: see :meth:`taskstore.TaskRegistry.history`."""
        self._check_open()
        key = check_key("task_id", task_id)
        return await self._in_thread(history.history, self._store, key)

    async def as_of(self, moment: int | datetime) -> Snapshot:
        """Return every record as of a seq or time: see :meth:`taskstore.TaskRegistry.as_of`."""
        self._check_open()
        return await self._in_thread(history.as_of, self._store, moment)

    def follow(self) -> AsyncFollower:
        """Start a follower: see :meth:`taskstore.TaskRegistry.follow`.

        The follower's thread calls the hooks for commits of other processes.  At the end of an
        ``async with`` block, the follower ends, and the block waits for the follower's thread.
        ``stop()`` ends the follower and does not wait for the thread.
        """
        return self._start_follower(AsyncFollower)

    # -- closing ------------------------------------------------------------------

    async def close(self) -> None:
        """Commit the changes in progress, then close the registry.

        If :meth:`open` opened the store, the call also closes the store.  Repeated calls are
        allowed.  If a call is cancelled, the registry is closed in the background.
        """
        if self._closing is None:
            self._closed = True
            closed = StoreClosedError(f"the registry over {self._store.location} is closed")
            self._commit_waiter.close(closed)
            # A cancellation cannot interrupt ``_shut_down``, which runs in a thread.
            self._closing = self._loop.run_in_executor(self._threads, self._shut_down)
            self._closing.add_done_callback(self._stop_threads)
        await asyncio.shield(self._closing)

    def _stop_threads(self, _: object) -> None:
        self._threads.shutdown(wait=False)
        self._hook_executor.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        if self._cache.stale:
            await self._in_thread(self._committer.load)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncTaskRegistry {self._store.location} at seq {self._cache.seq}>"

    # -- internal -----------------------------------------------------------------

    @property
    def _batch(self) -> Batch | None:
        """The open batch of the current asyncio task, or ``None``."""
        batch = _batches.get({}).get(id(self))
        return None if batch is None or batch.closed else batch

    def _reload(self) -> None:
        """Do nothing: a lookup must not wait for the store.  The next change reloads the records
        from the store."""

    def _lookups(self) -> Lookups:
        batch = self._batch
        return self._cache if batch is None else batch.staging

    async def _commit(self, operation: Operation[T], /) -> T:
        """Commit an operation in the writer thread, or add it to this asyncio task's batch."""
        self._check_open()
        batch = self._batch
        if batch is not None:
            with self._cache.lock:
                return batch.add(operation)
        if asyncio.get_running_loop() is not self._loop:
            # This error is raised before the commit, because only the registry's event loop can
            # wait for the commit.
            raise TaskStoreError(
                f"the registry over {self._store.location} belongs to another event loop",
                hint="open a registry in each event loop",
            )
        done: asyncio.Future[None] = self._loop.create_future()
        request = self._committer.submit(operation, functools.partial(self._notify_done, done))
        try:
            await done
        except asyncio.CancelledError:
            request.withdraw()
            raise
        return request.outcome()

    async def _commit_run(
        self, run: RunSelector, make_operation: Callable[[], TaskOperation]
    ) -> list[TaskRecord]:
        return await self._commit(ChangeRun(run, make_operation()))

    def _notify_done(self, done: asyncio.Future[None]) -> None:
        """Wake the event loop once per group of done requests.  The writer thread calls this
        method."""
        self._done.append(done)
        if not self._wake_scheduled:
            self._wake_scheduled = True
            # A closed event loop has no waiting coroutines.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._process_done)

    def _process_done(self) -> None:
        """Deliver the queued events, then resume the coroutines whose requests are done."""
        self._wake_scheduled = False
        done = []
        while self._done:
            done.append(self._done.popleft())
        if not self._hooks.events or self._delivering:
            _resolve(done)
            return
        self._deliver_events(done)

    def _deliver_events(self, done: Sequence[asyncio.Future[None]]) -> None:
        """Deliver all events in the hook thread, then resume the coroutines that wait for
        ``done``."""
        self._delivering = True

        def delivered(_: object) -> None:
            self._delivering = False
            _resolve(done)
            # Events queued during the delivery must not wait for the next change.
            if self._hooks.events and not self._closed:
                self._deliver_events(())

        self._loop.run_in_executor(self._hook_executor, self._hooks.deliver).add_done_callback(
            delivered
        )

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        threads: Executor = self._threads
        return await self._loop.run_in_executor(threads, functools.partial(call, *args, **kwargs))


def _resolve(done: Iterable[asyncio.Future[None]]) -> None:
    for future in done:
        if not future.done():
            future.set_result(None)


def _close_abandoned(opening: asyncio.Future[TaskRegistryStore]) -> None:
    """Close a store in a new thread, because the call that opened the store was cancelled."""
    if not opening.cancelled() and opening.exception() is None:
        threading.Thread(target=opening.result().close, name="taskstore-closing").start()


class AsyncFollower(Follower):
    """A follower that does not block the event loop.

    The end of an ``async with`` block waits for the follower's thread; :meth:`stop` does not wait.
    """

    def stop(self) -> None:
        """Ask the thread to end.  Repeated calls, and calls from a hook, are allowed."""
        self.request_stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.request_stop()
        await asyncio.to_thread(self.wait)


class RegistryOpener(Coroutine[Any, Any, R], AbstractAsyncContextManager[R]):
    """An awaitable that opens a registry; ``async with`` also closes the registry."""

    def __init__(self, opening: Coroutine[Any, Any, R]) -> None:
        self._opening = opening

    def __await__(self) -> Generator[Any, Any, R]:
        return self._opening.__await__()

    def send(self, value: Any) -> Any:
        """Send a value to the coroutine that opens the registry."""
        return self._opening.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an exception in the coroutine that opens the registry."""
        return self._opening.throw(*error)

    def close(self) -> None:
        """End the coroutine that opens the registry."""
        self._opening.close()

    async def __aenter__(self) -> R:
        self._registry = await self._opening
        return self._registry

    async def __aexit__(self, *_: object) -> None:
        await self._registry.close()


class CommitWaiter:
    """The coroutines of one event loop that wait for commits of one journal.

    While a coroutine waits, a thread waits for the next commit, for a short time in each call.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="taskstore-commit-waiter")
        self._waiters: dict[asyncio.Future[None], int] = {}
        self._poller: asyncio.Task[None] | None = None
        self._head = 0
        self._closed: Exception | None = None

    async def wait_for(self, journal: SupportsJournal, after: int, seconds: float) -> bool:
        """Wait at most ``seconds`` until the head exceeds ``after``; return false after a
        timeout."""
        if self._closed is not None:
            raise self._closed
        if self._poller is None:
            self._head = 0
            self._poller = self._loop.create_task(self._poll(journal))
        elif self._head > after:
            return True
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters[waiter] = after
        try:
            await asyncio.wait([waiter], timeout=seconds)
        finally:
            del self._waiters[waiter]
        if not waiter.done():
            return False
        waiter.result()
        return True

    def close(self, error: Exception) -> None:
        """Let each current and later call of ``wait_for`` raise ``error``."""
        self._closed = error
        self._fail(error)
        self._thread.shutdown(wait=False)

    async def _poll(self, journal: SupportsJournal) -> None:
        try:
            while self._waiters:
                # A coroutine can call ``self.wait_for`` during this call.  If
                # ``self._head`` is above ``after``, ``wait_for`` returns at once.
                # Otherwise a later head wakes the coroutine.
                self._head = await self._loop.run_in_executor(
                    self._thread, _next_head, journal, self._head
                )
                for waiter, after in self._waiters.items():
                    if self._head > after and not waiter.done():
                        waiter.set_result(None)
        except Exception as error:  # noqa: BLE001 - each waiting coroutine raises it
            self._fail(error)
        finally:
            self._poller = None
            for waiter in self._waiters:
                waiter.cancel()

    def _fail(self, error: Exception) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)


def _next_head(journal: SupportsJournal, head: int) -> int:
    """Wait a short time until the journal's head exceeds ``head``; return the current head."""
    journal.wait_for(head, history.WAIT_SLICE_S)
    return journal.head()
