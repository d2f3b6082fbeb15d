"""The server's version and settings, and the durability that they give."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from msgspec import Struct
from taskstore import StoreUnavailableError

from taskstore_redis.errors import ERRORS
from taskstore_redis.link import Link

MIN_VERSION = (6, 2)
"""The first version with all commands of the scripts (XTRIM MINID, ZRANGE BYLEX)."""

_SETTINGS = ("appendonly", "appendfsync", "save", "maxmemory", "maxmemory-policy")


class ServerInfo(Struct, frozen=True, kw_only=True):
    """The answers of INFO and CONFIG GET; ``None`` for a setting that the server refuses."""

    version: tuple[int, ...]
    appendonly: bool
    appendfsync: str | None = None
    save: str | None = None
    policy: str | None = None
    replicas: int = 0
    role: str = "master"

    @property
    def durability(self) -> str:
        """The actual durability: ``full`` (changes survive power loss) or ``process``."""
        return "full" if self.appendonly and self.appendfsync == "always" else "process"

    def notices(self, requested: str) -> tuple[str, ...]:
        """The notices for the operator; ``requested`` is the requested durability."""
        notices = [self._durability_notice()]
        if requested == "full" and self.durability != "full":
            notices[0] = (
                f"durability=full was requested, but the server does not provide it: {notices[0]}"
            )
        if self.policy is not None and self.policy.startswith("allkeys-"):
            notices.append(
                f"maxmemory-policy is {self.policy}: at its memory limit the server deletes "
                f"parts of the ledger; set noeviction"
            )
        elif self.policy is not None and self.policy.startswith("volatile-"):
            notices.append(
                f"maxmemory-policy is {self.policy}: the ledger is safe, as its keys have no "
                f"expiry; at its memory limit the server may only evict a compactor's lease"
            )
        if self.replicas or self.role != "master":
            notices.append(
                "the server is replicated, and replication is asynchronous: "
                "a failover can lose the last acknowledged changes"
            )
        return tuple(notices)

    def _durability_notice(self) -> str:
        if not self.appendonly:
            if self.save == "":
                return (
                    "appendonly is no and nothing is saved: an acknowledged change survives "
                    "the death of the writer, and is lost when the server stops"
                )
            return (
                "appendonly is no: an acknowledged change survives the death of the writer; "
                "when the server dies, all changes since its last save are lost"
            )
        match self.appendfsync:
            case "always":
                return "appendfsync is always: an acknowledged change survives power loss"
            case "everysec":
                return (
                    "appendfsync is everysec: an acknowledged change survives the death of "
                    "the writer and of the server; power loss loses the last second or two"
                )
            case "no":
                return (
                    "appendfsync is no: an acknowledged change survives the death of the writer "
                    "and of the server; power loss loses what the system had not written, "
                    "often half a minute"
                )
        return (
            "appendonly is yes, but the server does not report its appendfsync: an acknowledged "
            "change survives the death of the writer and of the server; the effect of power loss "
            "is unknown"
        )


def read_server_info(link: Link) -> ServerInfo:
    """Query the server; raises :class:`~taskstore.StoreUnavailableError` if the server is too
    old."""
    info = _info(link)
    version = tuple(int(part) for part in re.findall(r"\d+", info.get("redis_version", "")))
    if version and version[: len(MIN_VERSION)] < MIN_VERSION:
        raise StoreUnavailableError(
            f"{link.translate.location} is Redis {info['redis_version']}",
            hint=f"taskstore-redis needs {'.'.join(map(str, MIN_VERSION))} or newer",
        )
    settings = _settings(link)
    appendonly = settings.get("appendonly")
    return ServerInfo(
        version=version,
        appendonly=info.get("aof_enabled") == "1" if appendonly is None else appendonly == "yes",
        appendfsync=settings.get("appendfsync"),
        save=settings.get("save"),
        policy=settings.get("maxmemory-policy", info.get("maxmemory_policy")),
        replicas=int(info.get("connected_slaves", "0")),
        role=info.get("role", "master"),
    )


def _info(link: Link) -> dict[str, str]:
    # The first command: opening a store must fail at once if no server answers.
    lines = link.call_without_retry("INFO").decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _settings(link: Link) -> dict[str, str]:
    """The settings that the user may read; managed servers often refuse CONFIG."""
    settings: dict[str, str] = {}
    for name in _SETTINGS:
        with suppress(StoreUnavailableError, *ERRORS):
            reply: Any = link.call_without_retry("CONFIG", "GET", name)
            if len(reply) == 2:  # noqa: PLR2004 (a name and its value)
                settings[name] = reply[1].decode()
    return settings
