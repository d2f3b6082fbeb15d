"""Translation of driver errors to errors of taskstore.

No message contains the password of the URL; a cause that contains the password is dropped.
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
"""The errors that the driver raises."""

REFUSED = (exceptions.AuthenticationError, exceptions.AuthorizationError)
"""The server refused the login: a retry cannot succeed."""

NETWORK = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)
"""A connection broke, or cannot be made."""

NOT_EXECUTED = (exceptions.BusyLoadingError, exceptions.MaxConnectionsError)
"""Network errors by class, after which the command was not run: the server answered with a
refusal, or no command was sent."""

_REPLY_CODES = {
    exceptions.OutOfMemoryError: "OOM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.MovedError: "MOVED",
    exceptions.ClusterCrossSlotError: "MOVED",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
}
"""The first word of each answer for which redis-py has an error class of its own."""

_MEANINGS = {
    "OOM": ("has no memory left for writes", "give it more memory, or compact the ledger"),
    "READONLY": (
        "is a replica, which accepts no writes",
        "name the master in the URL, or open the store read-only",
    ),
    "MISCONF": ("accepts no writes, since it cannot save them", "see its log for the disk error"),
    "NOREPLICAS": ("accepts no writes, since it has too few replicas", None),
    "MASTERDOWN": ("is a replica that has lost its master", None),
    "CLUSTERDOWN": ("belongs to a cluster that is down", None),
    "MOVED": ("belongs to a cluster in which another node has this ledger", "name that node"),
    "NOPERM": (
        "refuses this user a command or a key that the store needs",
        "grant the user ~{NAMESPACE}:* +@all -@dangerous +info +config|get +client|list",
    ),
}
"""The meaning of an answer and the hint for the user, by the first word of the answer."""


class Translator:
    """Translates driver errors; ``location`` is the URL without user and password."""

    def __init__(self, location: str, password: str | None) -> None:
        self.location = location
        self._secrets = {password, quote(password, safe="")} if password else set()

    def __call__(self, error: BaseException) -> TaskStoreError:
        """The taskstore error for a driver error after which nothing was written."""
        text, where = self.text(error), self.location
        if isinstance(error, REFUSED):
            return StoreUnavailableError(
                f"{where} refuses the login: {text}", hint="check user and password"
            )
        if not isinstance(error, exceptions.ResponseError):
            return StoreUnavailableError(
                f"{where} cannot be reached: {text}", hint="check that the server runs"
            )
        # In an error from within a script, the word is not the first one.
        words = {_REPLY_CODES.get(type(error), ""), *text.split()}
        if "WRONGTYPE" in words:
            return CorruptStoreError(
                where,
                f"a key of this namespace has the wrong type: {text}",
                hint="another program writes to this namespace: name another one in the URL",
            )
        if "BUSY" in words:
            return StoreBusyError(f"{where} is busy with a script: {text}")
        for word in words & _MEANINGS.keys():
            meaning, hint = _MEANINGS[word]
            return StoreUnavailableError(f"{where} {meaning}: {text}", hint=hint)
        return StoreUnavailableError(f"{where} answers: {text}")

    def cause(self, error: BaseException) -> BaseException | None:
        """The driver's exception, or ``None`` if its text contains the password."""
        return None if self.text(error) != _line(error) else error

    def text(self, error: BaseException) -> str:
        """The text of a driver's error, on one line, without the password."""
        text = _line(error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
