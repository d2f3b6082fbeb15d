"""The registry for asyncio: each verb of the registry, as a coroutine."""

from taskstore.aio.registry import AsyncFollower as AsyncFollower
from taskstore.aio.registry import AsyncTaskRegistry as AsyncTaskRegistry
