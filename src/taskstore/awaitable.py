"""Verbs made awaitable, and a registry that is still being opened."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from taskstore.following import Follower
from taskstore.groupcommit import Operation
from taskstore.records import TaskRecord
from taskstore.runs import RunScope
from taskstore.store import TaskRegistryStore
from taskstore.verbs import Verbs

P = ParamSpec("P")
T = TypeVar("T")


class Operations(Verbs):
    """The verbs, giving the operation that they make instead of having it committed."""

    def __init__(self, store: TaskRegistryStore) -> None:
        self._store = store

    def _run(self, operation: Operation[T]) -> T:
        return operation  # type: ignore[return-value]  # awaitable() knows


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


class Committing(Protocol):
    """Has operations committed."""

    _operations: Operations

    async def _commit(self, operation: Operation[T]) -> T: ...


def awaitable(
    verb: Callable[Concatenate[Verbs, P], T],
) -> Callable[Concatenate[Committing, P], Coroutine[Any, Any, T]]:
    """Make an awaitable verb of one of :class:`~taskstore.verbs.Verbs`."""

    @functools.wraps(verb)
    async def call(self: Committing, /, *args: P.args, **kwargs: P.kwargs) -> T:
        operation: Any = verb(self._operations, *args, **kwargs)
        result: T = await self._commit(operation)
        return result

    return call


def _awaitable_for_run(
    verb: Callable[Concatenate[RunScope, P], list[TaskRecord]],
) -> Callable[Concatenate[AsyncRunScope, P], Coroutine[Any, Any, list[TaskRecord]]]:
    """Make an awaitable verb of one of :class:`~taskstore.RunScope`."""

    @functools.wraps(verb)
    async def call(self: AsyncRunScope, /, *args: P.args, **kwargs: P.kwargs) -> list[TaskRecord]:
        operation: Any = verb(self._scope, *args, **kwargs)
        records: list[TaskRecord] = await self._commit(operation)
        return records

    return call


class AsyncRunScope:
    """The verbs for every task of a run, awaitable: see :class:`taskstore.RunScope`."""

    def __init__(self, scope: RunScope, commit: Callable[[Operation[Any]], Awaitable[Any]]) -> None:
        self._scope = scope
        self._commit = commit

    mark_running = _awaitable_for_run(RunScope.mark_running)
    record_progress = _awaitable_for_run(RunScope.record_progress)
    finish = _awaitable_for_run(RunScope.finish)
    mark_lost = _awaitable_for_run(RunScope.mark_lost)
    recover = _awaitable_for_run(RunScope.recover)
    cancel = _awaitable_for_run(RunScope.cancel)
    set_delivery_status = _awaitable_for_run(RunScope.set_delivery_status)
    set_notify_policy = _awaitable_for_run(RunScope.set_notify_policy)
    set_cleanup_after = _awaitable_for_run(RunScope.set_cleanup_after)
    link_flow = _awaitable_for_run(RunScope.link_flow)
    update_metadata = _awaitable_for_run(RunScope.update_metadata)
    delete = _awaitable_for_run(RunScope.delete)


class Closing(Protocol):
    """Can be closed."""

    async def close(self) -> None:
        """Close it."""


R = TypeVar("R", bound=Closing)


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

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._opened.close()
