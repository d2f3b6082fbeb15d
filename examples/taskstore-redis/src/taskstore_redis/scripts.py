"""The Lua scripts: each file of ``lua/``, with ``common.lua`` in front of it."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class Script(NamedTuple):
    """A script, and the digest that Redis knows it by."""

    name: str
    source: bytes
    digest: str


@cache
def script(name: str) -> Script:
    """The script of a file in ``lua/``, its name without the suffix."""
    folder = files(__package__) / "lua"
    source = (folder / "common.lua").read_bytes() + (folder / f"{name}.lua").read_bytes()
    # Redis names scripts by their SHA-1; nothing here rests on its strength.
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest())
