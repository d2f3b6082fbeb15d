"""The registry for asyncio: the same verbs, awaitable."""

from taskstore.aio.registry import AsyncFollower as AsyncFollower
from taskstore.aio.registry import AsyncTaskRegistry as AsyncTaskRegistry
