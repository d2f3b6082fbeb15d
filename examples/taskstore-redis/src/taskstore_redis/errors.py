"""The one place where Redis errors become ours.

No message carries the password of the URL, and where a cause does, it is left out.
"""

from __future__ import annotations

from urllib.parse import quote

from redis import exceptions
from taskstore import (
    CorruptStoreError,
    StoreBusyError,
    StoreUnavailableError,
    TaskStoreError,
)

ERRORS = (exceptions.RedisError, OSError)
"""What the driver raises."""

REFUSED = (exceptions.AuthenticationError, exceptions.AuthorizationError)
"""Not to be mended by trying again."""

NETWORK = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)
"""The connection is gone, or cannot be made."""

NOT_RUN = (exceptions.BusyLoadingError, exceptions.MaxConnectionsError)
"""Network errors by class, but the server has answered: it did not run the command."""

_KINDS = {
    exceptions.OutOfMemoryError: "OOM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.MovedError: "MOVED",
    exceptions.ClusterCrossSlotError: "MOVED",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
}
"""Of the answers whose first word redis-py turns into a class, that word."""

_UNAVAILABLE = {
    "OOM": ("has no memory left for writes", "give it more memory, or compact the ledger"),
    "READONLY": (
        "is a replica, which takes no writes",
        "name the master in the URL, or open the store read-only",
    ),
    "MISCONF": ("takes no writes, since it cannot save them", "see its log for the disk error"),
    "NOREPLICAS": ("takes no writes, since it has too few replicas", None),
    "MASTERDOWN": ("is a replica that has lost its master", None),
    "CLUSTERDOWN": ("belongs to a cluster that is down", None),
    "MOVED": ("belongs to a cluster, where another node has this ledger", "name that node"),
    "NOPERM": (
        "does not let this user do what the store has to",
        "grant it ~{NAMESPACE}:* +@all -@dangerous +info +config|get +client|list",
    ),
}
"""What an answer means, and what to do."""


class Translator:
    """Turns driver errors into ours; ``location`` names the server without its password."""

    def __init__(self, location: str, password: str | None) -> None:
        self.location = location
        self._secrets = {password, quote(password, safe="")} if password else set()

    def __call__(self, error: BaseException) -> TaskStoreError:
        """Our error for a driver's, for nothing that was written."""
        text, where = self.text(error), self.location
        if isinstance(error, REFUSED):
            return StoreUnavailableError(
                f"{where} refuses us: {text}", hint="check user and password"
            )
        if not isinstance(error, exceptions.ResponseError):
            return StoreUnavailableError(
                f"{where} cannot be reached: {text}", hint="check that the server runs"
            )
        # Within a script the word may come later in the answer.
        words = {_KINDS.get(type(error), ""), *text.split()}
        if "WRONGTYPE" in words:
            return CorruptStoreError(
                where,
                f"a key of this namespace is not what it should be: {text}",
                hint="something else writes to this namespace: name another one in the URL",
            )
        if "BUSY" in words:
            return StoreBusyError(f"{where} is busy with a script: {text}")
        for word in words & _UNAVAILABLE.keys():
            meaning, hint = _UNAVAILABLE[word]
            return StoreUnavailableError(f"{where} {meaning}: {text}", hint=hint)
        return StoreUnavailableError(f"{where} answers: {text}")

    def cause(self, error: BaseException) -> BaseException | None:
        """The driver's exception, or ``None`` when it would give the password away."""
        return None if self.text(error) != _line(error) else error

    def text(self, error: BaseException) -> str:
        """What the driver said, on one line, without the password."""
        text = _line(error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
