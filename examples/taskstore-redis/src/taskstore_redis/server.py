"""What the server is set to: what it makes of an acknowledged change."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from msgspec import Struct
from taskstore import StoreUnavailableError

from taskstore_redis.errors import ERRORS
from taskstore_redis.link import Link

OLDEST = (6, 2)
"""The first version with everything that the scripts use (XTRIM MINID, ZRANGE BYLEX)."""

_SETTINGS = ("appendonly", "appendfsync", "save", "maxmemory", "maxmemory-policy")


class ServerFacts(Struct, frozen=True, kw_only=True):
    """What INFO and CONFIG GET say; ``None`` where the server keeps a setting to itself."""

    version: tuple[int, ...]
    appendonly: bool
    appendfsync: str | None = None
    save: str | None = None
    policy: str | None = None
    replicas: int = 0
    role: str = "master"

    @property
    def durability(self) -> str:
        """What an acknowledged change survives: ``full`` (power loss) or ``process``."""
        return "full" if self.appendonly and self.appendfsync == "always" else "process"

    def notices(self, asked: str) -> tuple[str, ...]:
        """What the operator should know; ``asked`` is the durability that was asked for."""
        found = [self._survives()]
        if asked == "full" and self.durability != "full":
            found[0] = f"durability=full was asked for and is not what the server gives: {found[0]}"
        if self.policy is not None and self.policy.startswith("allkeys-"):
            found.append(
                f"maxmemory-policy is {self.policy}: at its memory limit the server throws "
                f"the ledger away, piece by piece; set noeviction"
            )
        elif self.policy is not None and self.policy.startswith("volatile-"):
            found.append(
                f"maxmemory-policy is {self.policy}: that spares the ledger, whose keys have no "
                f"expiry; at its memory limit the server may only evict a compactor's lease"
            )
        if self.replicas or self.role != "master":
            found.append(
                "the server is replicated, and replicas follow asynchronously: "
                "a failover can lose the last acknowledged changes"
            )
        return tuple(found)

    def _survives(self) -> str:
        if not self.appendonly:
            if self.save == "":
                return (
                    "appendonly is no and nothing is saved: an acknowledged change survives "
                    "our death, and is lost when the server stops"
                )
            return (
                "appendonly is no: an acknowledged change survives our death; when the server "
                "dies, everything since its last save of the whole database is lost"
            )
        match self.appendfsync:
            case "always":
                return "appendfsync is always: an acknowledged change survives power loss"
            case "everysec":
                return (
                    "appendfsync is everysec: an acknowledged change survives our death and the "
                    "server's; power loss takes the last second or two"
                )
            case "no":
                return (
                    "appendfsync is no: an acknowledged change survives our death and the "
                    "server's; power loss takes whatever the system had not written, often "
                    "half a minute"
                )
        return (
            "appendonly is yes, but the server does not tell its appendfsync: an acknowledged "
            "change survives our death and the server's; what power loss takes is not known"
        )


def read_facts(link: Link) -> ServerFacts:
    """Ask the server; raises :class:`~taskstore.StoreUnavailableError` for one that is too old."""
    info = _info(link)
    version = tuple(int(part) for part in re.findall(r"\d+", info.get("redis_version", "")))
    if version and version[: len(OLDEST)] < OLDEST:
        raise StoreUnavailableError(
            f"{link.translate.location} is Redis {info['redis_version']}",
            hint=f"taskstore-redis needs {'.'.join(map(str, OLDEST))} or newer",
        )
    settings = _settings(link)
    appendonly = settings.get("appendonly")
    return ServerFacts(
        version=version,
        appendonly=info.get("aof_enabled") == "1" if appendonly is None else appendonly == "yes",
        appendfsync=settings.get("appendfsync"),
        save=settings.get("save"),
        policy=settings.get("maxmemory-policy", info.get("maxmemory_policy")),
        replicas=int(info.get("connected_slaves", "0")),
        role=info.get("role", "master"),
    )


def _info(link: Link) -> dict[str, str]:
    # The first command of all: without patience for a server that is not there.
    lines = link.call_now("INFO").decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _settings(link: Link) -> dict[str, str]:
    """The settings that we may see; managed servers often refuse CONFIG."""
    found: dict[str, str] = {}
    for name in _SETTINGS:
        with suppress(StoreUnavailableError, *ERRORS):
            reply: Any = link.call_now("CONFIG", "GET", name)
            if len(reply) == 2:  # noqa: PLR2004 (a name and its value)
                found[name] = reply[1].decode()
    return found
