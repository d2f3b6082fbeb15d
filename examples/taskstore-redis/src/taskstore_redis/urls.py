"""The URL of a ledger: a server, a database and a namespace."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from msgspec import Struct
from taskstore import ValidationError
from taskstore.store import redacted

URL_FORM = "redis://[user:password@]host[:port][/db][?namespace=NAME]"
DEFAULT_NAMESPACE = "taskstore"
DEFAULT_PORT = 6379
NAMESPACE_BYTES = 200


class Target(Struct, frozen=True):
    """A server, a database on the server, and the namespace with which all keys begin."""

    host: str
    port: int
    db: int
    namespace: str
    username: str | None
    password: str | None
    tls: bool

    @property
    def location(self) -> str:
        """The URL without user and password (``str``)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "rediss" if self.tls else "redis"
        return f"{scheme}://{host}:{self.port}/{self.db}?namespace={self.namespace}"

    def __repr__(self) -> str:
        return f"<Target {self.location}>"


def parse(url: str) -> Target:
    """Parse a URL; raises :class:`~taskstore.ValidationError`, whose message shows no password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        # Its text may quote the invalid part with the password, so it is not chained.
        del error
        raise _invalid_url(url, f"is not {URL_FORM}") from None
    if parts.scheme.lower() not in ("redis", "rediss") or parts.fragment:
        raise _invalid_url(url, f"is not {URL_FORM}")
    db = parts.path.removeprefix("/")
    if db and not (db.isascii() and db.isdecimal()):
        raise _invalid_url(url, "names a database that is not a number")
    options: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name != "namespace" or name in options:
            raise _invalid_url(url, f"has the unknown or repeated option {name!r}")
        options[name] = value
    return Target(
        host=parts.hostname or "localhost",
        port=DEFAULT_PORT if port is None else port,
        db=int(db or 0),
        namespace=check_namespace(options.get("namespace", DEFAULT_NAMESPACE)),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password is not None else None,
        tls=parts.scheme.lower() == "rediss",
    )


def check_namespace(namespace: Any) -> str:
    """Return the namespace if it is valid text between the braces of a hash tag."""
    if not isinstance(namespace, str) or not namespace:
        raise ValidationError("namespace", "must be text, and not empty")
    try:
        size = len(namespace.encode())
    except UnicodeEncodeError:
        raise ValidationError("namespace", "contains a lone surrogate, which is not text") from None
    if size > NAMESPACE_BYTES or any(char in "{}" or not char.isprintable() for char in namespace):
        raise ValidationError(
            "namespace",
            f"must be at most {NAMESPACE_BYTES} bytes of printable text without braces",
        )
    return namespace


def _invalid_url(url: str, reason: str) -> ValidationError:
    return ValidationError("url", f"{redacted(url)!r} {reason}")
