"""For asyncio: a follower that holds up no event loop, and a registry that is being opened."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from taskstore.following import Follower


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
