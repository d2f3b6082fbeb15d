"""New, empty ledgers for the contract suite, each in its own namespace."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec.structs import replace
from taskstore.testing import OpenStore

from taskstore_redis.layout import Keys
from taskstore_redis.link import Link
from taskstore_redis.store import TIMEOUT_S, RedisStore
from taskstore_redis.urls import parse

_SCAN_COUNT = 1000


@contextmanager
def scratch(url: str) -> Iterator[OpenStore]:
    """Yield a function that opens a new ledger on the server of ``url``; delete the ledger at the
    end.

    The keys in the namespace of ``url`` do not change.
    """
    target = replace(parse(url), namespace=f"taskstore-contract-{uuid.uuid4().hex}")

    def open_one(*, read_only: bool = False) -> RedisStore:
        return RedisStore(target, read_only=read_only)

    try:
        yield open_one
    finally:
        link = Link(target, TIMEOUT_S)
        try:
            remove(link, Keys(target.namespace))
        finally:
            link.close()


def remove(link: Link, keys: Keys) -> None:
    """Delete all keys of a namespace, about a thousand per step."""
    # A namespace has no braces; the other special characters of a SCAN pattern are escaped.
    pattern = b"".join(
        b"\\" + bytes([byte]) if byte in b"*?[]^-\\" else bytes([byte]) for byte in keys.prefix
    )
    cursor = b"0"
    while True:
        cursor, batch = link.call("SCAN", cursor, "MATCH", pattern + b"*", "COUNT", _SCAN_COUNT)
        if batch:
            link.call("UNLINK", *batch)
        if cursor == b"0":
            return
