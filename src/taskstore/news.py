"""Waiting for news from coroutines: one thread waits for all of them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from taskstore.history import WAIT_SLICE_S
from taskstore.store import SupportsJournal


class News:
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
    journal.wait_for(head, WAIT_SLICE_S)
    return journal.head()
