"""The one door that stores enter through: URL schemes and entry points.

A backend is a distribution that declares an entry point in the group
``taskstore.backends``, named by its URL scheme and pointing at a callable
``open(url, *, durability, migrate, read_only) -> TaskRegistryStore``.  The
built-in ones do the same.
"""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from taskstore.errors import BackendNotFoundError, TaskStoreError, ValidationError
from taskstore.store.interface import TaskRegistryStore

GROUP = "taskstore.backends"
"""The entry-point group in which backends are declared."""

DURABILITIES = ("full", "process")
MIGRATIONS = ("auto", "never")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
# As SQLAlchemy reads it, a password is everything up to the first @, slashes
# included; up to the last one before the path where an @ was not escaped.
_PASSWORD = re.compile(r"(?<=://)([^:/?#\s]*):[^@]*@(?:[^/?#\s]*@)?")
_PASSWORD_OPTION = re.compile(r"([?&][^=&\s]*passw[^=&\s]*=)[^&\s]*", re.IGNORECASE)


def redacted(url: str) -> str:
    """Return a URL without the password that it may carry, for messages and logs."""
    return _PASSWORD_OPTION.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))


def scheme_of(url: str) -> str:
    """Return the scheme of a store URL (``str``), in lower case.

    Raises :class:`~taskstore.ValidationError` for text that is not a URL.
    """
    if not isinstance(url, str):
        raise ValidationError("url", f"must be text, not {type(url).__name__}")
    match = _SCHEME.match(url)
    if match is None:
        raise ValidationError("url", f"{redacted(url)!r} is not a URL such as sqlite:///tasks.db")
    return match[1].lower()


def installed_backends() -> dict[str, list[EntryPoint]]:
    """Return the declared backends by scheme; more than one where packages collide."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        declared = found.setdefault(entry.name, [])
        if entry.value not in [other.value for other in declared]:
            declared.append(entry)
    return found


def open_store(
    url: str,
    *,
    durability: str = "full",
    migrate: str = "auto",
    read_only: bool = False,
    **options: Any,
) -> TaskRegistryStore:
    """Open the store that a URL names.

    ``durability`` is ``"full"`` (acknowledged changes survive power loss) or
    ``"process"`` (the writer's death); ``migrate`` is ``"auto"`` (a new or
    empty database gets its schema) or ``"never"``; ``read_only`` promises
    not to change anything.  Further options go to the backend as they are.

    Raises :class:`~taskstore.BackendNotFoundError` for a scheme that nothing
    serves, :class:`~taskstore.ValidationError` for a wrong option, and what
    the backend raises: :class:`~taskstore.StoreUnavailableError`,
    :class:`~taskstore.CorruptStoreError`, :class:`~taskstore.SchemaMismatchError`.
    """
    scheme = scheme_of(url)
    check_options(durability, migrate)
    opener = _load(scheme)
    store: TaskRegistryStore = opener(
        url, durability=durability, migrate=migrate, read_only=read_only, **options
    )
    return store


def check_options(durability: str, migrate: str) -> None:
    """Raise :class:`~taskstore.ValidationError` for a value that these options do not have."""
    if durability not in DURABILITIES:
        raise ValidationError("durability", f"must be one of {DURABILITIES}, not {durability!r}")
    if migrate not in MIGRATIONS:
        raise ValidationError("migrate", f"must be one of {MIGRATIONS}, not {migrate!r}")


def _load(scheme: str) -> Any:
    """Import the callable that opens a scheme."""
    backends = installed_backends()
    declared = backends.get(scheme)
    if not declared:
        longer = sorted(name for name in backends if name.startswith(f"{scheme}+"))
        hint = f"did you mean {longer[0]}:?" if longer else None
        raise BackendNotFoundError(scheme, backends, hint=hint)
    if len(declared) > 1:
        owners = ", ".join(sorted(_owner(entry) for entry in declared))
        raise TaskStoreError(
            f"several packages serve the URL scheme {scheme!r}: {owners}",
            hint="uninstall all but one",
        )
    try:
        return declared[0].load()
    except ImportError as error:
        raise BackendNotFoundError(
            scheme,
            [name for name in backends if name != scheme],
            hint=f"its backend in {_owner(declared[0])} does not import: {error}",
        ) from error


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def default_url() -> str:
    """Return the URL of the ledger that is used when none is named: an SQLite
    file under the platform's user state directory."""
    from platformdirs import user_state_path

    path = user_state_path("taskstore", appauthor=False) / "tasks.db"
    return f"sqlite:///{path.as_posix()}"
