"""The registry for asyncio: the same verbs, awaitable.

Nothing here waits for a store on the event loop's thread.  Changes go to a
writer thread, so that coroutines share commits as threads do, and the loop is
woken once for all that were committed together.  Lookups come from memory
and stay synchronous.
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
from taskstore.registry.registry import LedgerReader
from taskstore.registry.verbs import ChangeRun, OperationFactory, RunScope, TaskOperation, TaskRun
from taskstore.store.interface import SupportsJournal, TaskRegistryStore
from taskstore.store.opening import default_url, open_store

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound="AsyncTaskRegistry")

LOOK_S = 2.0
"""How often a follower that hears nothing looks at the journal itself, in seconds."""

_batches: ContextVar[Mapping[int, Batch]] = ContextVar("taskstore-batches")
"""The batches that the current asyncio task is in, by the id of their registry."""


def _awaited(
    verb: Callable[Concatenate[OperationFactory, P], Operation[T]],
) -> Callable[Concatenate[AsyncTaskRegistry, P], Coroutine[Any, Any, T]]:
    """The same verb, to be awaited: then it checks its arguments and has its operation done."""

    @functools.wraps(verb)
    async def call(self: AsyncTaskRegistry, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._commit(verb(self._planner, *args, **kwargs))

    return call


class AsyncTaskRegistry(LedgerReader):
    """A :class:`taskstore.TaskRegistry` for one event loop.

    ``async with AsyncTaskRegistry.open(url) as registry:``.  Verbs are
    awaited; lookups (``get``, ``find``, ``list``, …) are not.  A cancelled
    wait leaves its change fully done or not done.  Hooks are called in order,
    in threads other than the loop's, and before the verb returns whose event
    they are called with, unless they are at an earlier one just then.
    """

    def __init__(
        self, store: TaskRegistryStore, *, hooks: Iterable[Hook] = (), clock: Clock | None = None
    ) -> None:
        """Made over a store that is yours to close, it is loaded by ``async with``.

        :meth:`open` and :meth:`over` do that at once.
        """
        if clock is not None:
            store.clock = clock
        super().__init__(store, Hooks(hooks, interrupts=False))
        self._planner = OperationFactory(self._now)
        self._loop = asyncio.get_running_loop()
        self._settled: deque[asyncio.Future[None]] = deque()
        self._woken = False
        self._delivering = False
        self._closing: asyncio.Future[None] | None = None
        # Apart from each other: those who wait for news hold up nobody else.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="taskstore-aio")
        self._commit_waiter = CommitWaiter(self._loop)
        self._hook_thread = ThreadPoolExecutor(1, thread_name_prefix="taskstore-hooks")

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
    ) -> Opening[Self]:
        """Open the ledger at a URL and load it: see :meth:`taskstore.TaskRegistry.open`.

        To be awaited, or entered with ``async with``, which closes it at the end.
        """
        make_store = functools.partial(
            open_store,
            default_url() if url is None else url,
            durability=durability,
            migrate=migrate,
            read_only=read_only,
            **options,
        )
        return Opening(cls._open(make_store, hooks, clock))

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
            # The thread goes on, and nobody else would close what it opens.
            opening.add_done_callback(_close_unwanted)
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
    ) -> Opening[Self]:
        """Make a registry over a store and load it; closing the store is left to you."""
        return Opening(cls._over(store, hooks, clock))

    @classmethod
    async def _over(
        cls, store: TaskRegistryStore, hooks: Iterable[Hook], clock: Clock | None
    ) -> Self:
        registry = cls(store, hooks=hooks, clock=clock)
        await registry._in_thread(registry._committer.load)
        return registry

    # -- creating and changing ------------------------------------------------

    create = _awaited(OperationFactory.create)
    mark_running = _awaited(OperationFactory.mark_running)
    record_progress = _awaited(OperationFactory.record_progress)
    finish = _awaited(OperationFactory.finish)
    mark_lost = _awaited(OperationFactory.mark_lost)
    recover = _awaited(OperationFactory.recover)
    cancel = _awaited(OperationFactory.cancel)
    set_delivery_status = _awaited(OperationFactory.set_delivery_status)
    set_notify_policy = _awaited(OperationFactory.set_notify_policy)
    set_cleanup_after = _awaited(OperationFactory.set_cleanup_after)
    link_flow = _awaited(OperationFactory.link_flow)
    update_metadata = _awaited(OperationFactory.update_metadata)
    delete = _awaited(OperationFactory.delete)
    take_lease = _awaited(OperationFactory.take_lease)
    renew_lease = _awaited(OperationFactory.renew_lease)
    release_lease = _awaited(OperationFactory.release_lease)

    def run(
        self, run_id: str, *, runtime: str | None = None, session_key: str | None = None
    ) -> RunScope[Coroutine[Any, Any, list[TaskRecord]]]:
        """Address every task of a run: see :meth:`taskstore.TaskRegistry.run`."""
        return RunScope(TaskRun(run_id, runtime, session_key), self._now, self._commit_run)

    @asynccontextmanager
    async def batch(self) -> AsyncIterator[Self]:
        """Make all changes in the ``async with`` body one commit: all or nothing.

        For the current asyncio task, and those that it starts in the body,
        until the body ends.  Otherwise as :meth:`taskstore.TaskRegistry.batch`.
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
        """Bring in what other processes committed; returns the last seq mirrored."""
        self._check_open()
        await self._in_thread(self._committer.refresh)
        return self._cache.seq

    async def changes(
        self, after: int | str = 0, wait: float | None = None
    ) -> AsyncIterator[JournalEntry]:
        """Iterate the journal entries after a seq, or an entry's ``cursor``, and end.

        With ``wait`` it goes on until none has come for so many seconds.
        Errors as in :meth:`taskstore.TaskRegistry.changes`, at the first step.
        """
        self._check_open()
        journal = history.journal_of(self._store, "changes")
        tail = history.Tail(journal, self._cursor(after))
        if wait is not None:
            check_seconds("wait", wait, 0, history.LONGEST_S)
        deadline = self._loop.time() + (wait or 0)
        while True:
            self._check_open()
            while entries := await self._in_thread(tail.page):
                for entry in entries:
                    yield entry
                    self._check_open()
                deadline = self._loop.time() + (wait or 0)
            left = max(0.0, deadline - self._loop.time())
            # Now and then it looks whether it is still the same journal.
            if wait is None or (
                not await self._commit_waiter.wait_for(
                    journal, tail.position.seq, min(left, LOOK_S)
                )
                and left <= LOOK_S
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
        """Keep up with other processes: see :meth:`taskstore.TaskRegistry.follow`.

        Hooks hear of what others commit in the thread that follows.  Use it in
        an ``async with``, or ``stop()`` it, which does not wait for the thread.
        """
        return self._follow(AsyncFollower)

    # -- the end ------------------------------------------------------------------

    async def close(self) -> None:
        """Commit what is under way, then close the registry, and the store if
        :meth:`open` made it.  Twice is fine; cancelled, it goes on in the background."""
        if self._closing is None:
            self._closed = True
            closed = StoreClosedError(f"the registry over {self._store.location} is closed")
            self._commit_waiter.close(closed)
            # In one call, in a thread: nothing can cancel half of it.
            self._closing = self._loop.run_in_executor(self._threads, self._finish)
            self._closing.add_done_callback(self._dismiss)
        await asyncio.shield(self._closing)

    def _dismiss(self, _: object) -> None:
        self._threads.shutdown(wait=False)
        self._hook_thread.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        if self._cache.stale:
            await self._in_thread(self._committer.load)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncTaskRegistry {self._store.location} at seq {self._cache.seq}>"

    # -- within -------------------------------------------------------------------

    @property
    def _batch(self) -> Batch | None:
        """The batch that the current asyncio task is in."""
        batch = _batches.get({}).get(id(self))
        return None if batch is None or batch.closed else batch

    def _reload(self) -> None:
        """Leave it to the next change: a lookup does not wait for the store."""

    def _records(self) -> Lookups:
        batch = self._batch
        return self._cache if batch is None else batch.staging

    async def _commit(self, operation: Operation[T], /) -> T:
        """Have an operation committed by the writer thread."""
        self._check_open()
        batch = self._batch
        if batch is not None:
            with self._cache.lock:
                return batch.add(operation)
        if asyncio.get_running_loop() is not self._loop:
            # Said before anything is committed: nobody here could wait for that.
            raise TaskStoreError(
                f"the registry over {self._store.location} belongs to another event loop",
                hint="open one in each event loop",
            )
        settled: asyncio.Future[None] = self._loop.create_future()
        ticket = self._committer.post(operation, functools.partial(self._note, settled))
        try:
            await settled
        except asyncio.CancelledError:
            ticket.withdraw()
            raise
        return ticket.outcome()

    async def _commit_run(
        self, run: TaskRun, plan: Callable[[], TaskOperation]
    ) -> list[TaskRecord]:
        return await self._commit(ChangeRun(run, plan()))

    def _note(self, settled: asyncio.Future[None]) -> None:
        """Wake the loop, once for all that is settled until it looks.  In the writer thread."""
        self._settled.append(settled)
        if not self._woken:
            self._woken = True
            # A loop that is closed has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        """Let everybody go on whose change is settled, after the hooks have heard of it."""
        self._woken = False
        settled = []
        while self._settled:
            settled.append(self._settled.popleft())
        if not self._hooks.events or self._delivering:
            _release(settled)
            return
        self._deliver(settled)

    def _deliver(self, settled: Sequence[asyncio.Future[None]]) -> None:
        """Let the hooks hear of everything, then let go on who waited for that."""
        self._delivering = True

        def delivered(_: object) -> None:
            self._delivering = False
            _release(settled)
            # What came while nobody looked would have to wait for the next change.
            if self._hooks.events and not self._closed:
                self._deliver(())

        self._loop.run_in_executor(self._hook_thread, self._hooks.deliver).add_done_callback(
            delivered
        )

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        threads: Executor = self._threads
        return await self._loop.run_in_executor(threads, functools.partial(call, *args, **kwargs))


def _release(settled: Iterable[asyncio.Future[None]]) -> None:
    for future in settled:
        if not future.done():
            future.set_result(None)


def _close_unwanted(opening: asyncio.Future[TaskRegistryStore]) -> None:
    """Close what was opened after nobody waited for it any more, off the event loop's thread."""
    if not opening.cancelled() and opening.exception() is None:
        threading.Thread(target=opening.result().close, name="taskstore-closing").start()


class AsyncFollower(Follower):
    """A follower that does not hold up the event loop: ``async with`` waits for its thread,
    ``stop()`` does not."""

    def stop(self) -> None:
        """Follow no longer; the thread ends by itself.  Twice is fine, and so is from a hook."""
        self.ask_to_stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.ask_to_stop()
        await asyncio.to_thread(self.wait)


class Opening(Coroutine[Any, Any, R], AbstractAsyncContextManager[R]):
    """What is being opened: ``await`` it, or let ``async with`` do so, which closes it too."""

    def __init__(self, opening: Coroutine[Any, Any, R]) -> None:
        self._opening = opening

    def __await__(self) -> Generator[Any, Any, R]:
        return self._opening.__await__()

    def send(self, value: Any) -> Any:
        """As for any coroutine."""
        return self._opening.send(value)

    def throw(self, *error: Any) -> Any:
        """As for any coroutine."""
        return self._opening.throw(*error)

    def close(self) -> None:
        """As for any coroutine: give up."""
        self._opening.close()

    async def __aenter__(self) -> R:
        self._opened = await self._opening
        return self._opened

    async def __aexit__(self, *_: object) -> None:
        await self._opened.close()


class CommitWaiter:
    """The coroutines of one event loop that wait for commits of one journal.

    While there are any, a thread waits for the next commit, a slice at a time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="taskstore-news")
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._runner: asyncio.Task[None] | None = None
        self._head = 0
        self._closed: Exception | None = None

    async def wait_for(self, journal: SupportsJournal, after: int, seconds: float) -> bool:
        """Wait until the head exceeds ``after``, at most so long; whether it does."""
        if self._closed is not None:
            raise self._closed
        if self._runner is None:
            self._head = 0
            self._runner = self._loop.create_task(self._run(journal))
        elif self._head > after:
            return True
        news: asyncio.Future[None] = self._loop.create_future()
        self._waiting[news] = after
        try:
            await asyncio.wait([news], timeout=seconds)
        finally:
            del self._waiting[news]
        if not news.done():
            return False
        news.result()
        return True

    def close(self, error: Exception) -> None:
        """End each wait, also later ones, with ``error``."""
        self._closed = error
        self._fail(error)
        self._thread.shutdown(wait=False)

    async def _run(self, journal: SupportsJournal) -> None:
        try:
            while self._waiting:
                # A coroutine that comes while the thread waits has read no further than
                # this head, or is woken by the commit that it lacks.
                self._head = await self._loop.run_in_executor(
                    self._thread, _next_head, journal, self._head
                )
                for news, after in self._waiting.items():
                    if self._head > after and not news.done():
                        news.set_result(None)
        except Exception as error:  # noqa: BLE001 - raised by each coroutine that waits
            self._fail(error)
        finally:
            self._runner = None
            for news in self._waiting:
                news.cancel()

    def _fail(self, error: Exception) -> None:
        for news in self._waiting:
            if not news.done():
                news.set_exception(error)


def _next_head(journal: SupportsJournal, head: int) -> int:
    """The head once it exceeds ``head``, or after a slice."""
    journal.wait_for(head, history.WAIT_SLICE_S)
    return journal.head()
