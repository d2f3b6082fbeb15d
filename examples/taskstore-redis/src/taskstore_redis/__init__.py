"""A taskstore backend on a Redis server: ``redis://host:6379/0?namespace=NAME``."""

from taskstore_redis.store import RedisStore, open_redis

__all__ = ["RedisStore", "open_redis"]
