"""Waiting for news from coroutines: one thread waits for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from taskstore.history import WAIT_SLICE_S
from taskstore.store import SupportsJournal

_T = TypeVar("_T")


class News:
    """The followers of one journal, on one event loop.

    While there are any, a thread waits for the next commit, a slice at a time,
    and wakes those who have not read that far.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="taskstore-news")
        self._waiting: dict[asyncio.Future[bool], int] = {}
        self._runner: asyncio.Task[None] | None = None
        self._head = 0
        self._closed: Exception | None = None

    async def wait_for(self, journal: SupportsJournal, after: int, seconds: float) -> bool:
        """Wait until the head exceeds ``after``, at most so long; whether it does."""
        if self._closed is not None:
            raise self._closed
        if self._runner is None:
            self._runner = self._loop.create_task(self._run(journal))
        elif self._head > after:
            return True
        news: asyncio.Future[bool] = self._loop.create_future()
        self._waiting[news] = after
        ending = self._loop.call_later(seconds, _settle, news)
        try:
            return await news
        finally:
            ending.cancel()
            del self._waiting[news]

    def close(self, error: Exception) -> None:
        """Tell everybody who waits, or will, that there will be no news."""
        self._closed = error
        self._fail(error)
        self._thread.shutdown(wait=False)

    async def _run(self, journal: SupportsJournal) -> None:
        try:
            while self._waiting:
                # Whoever comes while the thread waits has read no further than this,
                # or is woken by the commit that he lacks.
                self._head = await self._in_thread(journal.head)
                for news, after in self._waiting.items():
                    if self._head > after and not news.done():
                        news.set_result(True)
                await self._in_thread(lambda: journal.wait_for(self._head, WAIT_SLICE_S))
        except Exception as error:  # noqa: BLE001 - raised by everybody who waits
            self._fail(error)
        finally:
            self._runner = None
            for news in self._waiting:
                news.cancel()

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        return await self._loop.run_in_executor(self._thread, call)

    def _fail(self, error: Exception) -> None:
        for news in self._waiting:
            if not news.done():
                news.set_exception(error)


def _settle(news: asyncio.Future[bool]) -> None:
    """The time is over."""
    if not news.done():
        news.set_result(False)
