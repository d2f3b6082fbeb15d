"""The registry for asyncio: the same verbs, awaited."""

from taskstore.aio.registry import AsyncFollower as AsyncFollower
from taskstore.aio.registry import AsyncTaskRegistry as AsyncTaskRegistry
