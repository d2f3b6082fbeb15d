"""The Lua scripts: the files of ``lua/``, each prefixed with ``common.lua``."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class Script(NamedTuple):
    """A script, and the digest that identifies it in Redis."""

    name: str
    source: bytes
    digest: str


@cache
def script(name: str) -> Script:
    """The script of the file ``lua/NAME.lua``."""
    folder = files(__package__) / "lua"
    source = (folder / "common.lua").read_bytes() + (folder / f"{name}.lua").read_bytes()
    # Redis identifies scripts by SHA-1; security does not depend on it.
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest())
