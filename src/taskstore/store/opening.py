"""Opening a store by its URL: schemes, entry points and options.

A backend is a distribution that declares an entry point in the group
``taskstore.backends``.  The entry point has the URL scheme as its name and refers to
a callable ``open(url, *, durability, migrate, read_only) -> TaskRegistryStore``.
The built-in backends are declared in the same way.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import shlex
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from taskstore.errors import BackendNotFoundError, TaskStoreError, ValidationError
from taskstore.store.interface import TaskRegistryStore

ENTRY_POINT_GROUP = "taskstore.backends"
"""The entry-point group in which backends are declared."""

DURABILITIES = ("full", "process")
MIGRATE_MODES = ("auto", "never")

_OTHER_NAMES = {
    "postgres": "postgresql",
    "pgsql": "postgresql",
    "pg": "postgresql",
    "psql": "postgresql",
    "psycopg": "postgresql",
    "maria": "mariadb",
    "mysql": "mariadb",  # taskstore refuses a MySQL server
    "sqlite3": "sqlite",
    "pysqlite": "sqlite",
    "mem": "memory",
}
"""Maps other names of databases, as used in the URLs of other programs, to the first part of the
taskstore scheme."""

# SQLAlchemy has drivers with an underscore in their names, such as psycopg_async.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*):")
# As in SQLAlchemy, a password can contain slashes before the first @.  If there are several
# @ before the path, the password ends at the last of these, otherwise at the first @.
_PASSWORD = re.compile(r"(?<=://)([^:/?#\s]*):[^@]*@(?:[^/?#\s]*@)?")
_PASSWORD_OPTION = re.compile(r"([?&][^=&\s]*passw[^=&\s]*=)[^&\s]*", re.IGNORECASE)


def redacted(url: str) -> str:
    """Return a URL with its password replaced by ``***``, for messages and logs."""
    return _PASSWORD_OPTION.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))


def without_password(text: str, url: str) -> str:
    """Return a text in which ``***`` replaces the password of ``url``.

    The function replaces the password in these forms: the whole URL, ``:PASSWORD@`` (also
    percent-decoded), and the URL options that contain a password.  All other text, such as a
    task id that looks like a URL, does not change.
    """
    text = text.replace(url, redacted(url)) if url else text
    for match in _PASSWORD.finditer(url):
        password = match[0][len(match[1]) + 1 : -1]
        for form in filter(None, (password, unquote(password))):
            text = text.replace(f":{form}@", ":***@")
    for match in _PASSWORD_OPTION.finditer(url):
        text = text.replace(match[0][1:], f"{match[1][1:]}***")
    return text


def shell_command(*words: str, url: str = "") -> str:
    """Return a ``taskstore`` command, quoted for a POSIX shell, with ``url`` as the option
    ``--url``.

    A password in ``url`` is replaced by ``***``.  The user must replace the stars, and
    :func:`password_note` says so.  If ``words`` contains ``--`` (as for ``taskstore run``), the
    option ``--url`` is placed before ``--``.
    """
    end = words.index("--") if "--" in words else len(words)
    options = ("--url", redacted(url)) if url else ()
    return " ".join(map(_shell_word, ("taskstore", *words[:end], *options, *words[end:])))


def password_note(url: str) -> str:
    """Return a note that tells the user to put the password in place of the stars in a command of
    :func:`shell_command`; return an empty text if the URL has no password."""
    return "" if redacted(url) == url else "put the password in place of ***"


def _shell_word(word: str) -> str:
    """Quote a word for a shell; the result is one line of printable characters.

    A message would escape a character that cannot be printed, and the command would change.  In
    ``$'…'``, the octal numbers of its bytes therefore stand for such a character.
    """
    if word.isprintable():
        return shlex.quote(word)
    escaped = (
        char
        if char.isprintable() and char not in "\\'"
        else "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))
        for char in word
    )
    return f"$'{''.join(escaped)}'"


def scheme_of(url: str) -> str:
    """Return the scheme of a store URL (``str``), in lower case.

    Raises :class:`~taskstore.ValidationError` for text that is not a URL.
    """
    if not isinstance(url, str):
        raise ValidationError("url", f"must be text, not {type(url).__name__}")
    match = _SCHEME.match(url)
    if match is None:
        is_path = url and url.isprintable() and not url.startswith(("//", " ", ":"))
        scheme = "json" if url.endswith(("/", ".json")) else "sqlite"
        question = f"; did you mean '{scheme}:///{redacted(url)}'?" if is_path else ""
        raise ValidationError(
            "url", f"{redacted(url)!r} is not a URL such as 'sqlite:///tasks.db'{question}"
        )
    return match[1].lower()


def path_of(url: str) -> Path:
    """Return the path in a URL ``SCHEME:///PATH`` of a backend that takes no options.

    The path is not percent-decoded.  Raises :class:`~taskstore.ValidationError` for every other
    URL.
    """
    path, _, options = url.partition(":///")[2].partition("?")
    if options:
        name = options.partition("=")[0]
        raise ValidationError("url", f"has the unknown option {name!r}")
    if not path or "\0" in path:
        raise ValidationError("url", f"{redacted(url)!r} names no file: write 'SCHEME:///PATH'")
    return Path(path)


def installed_backends() -> dict[str, list[EntryPoint]]:
    """Return the declared backends by scheme; several packages can declare the same scheme."""
    backends: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        declared = backends.setdefault(entry.name, [])
        if entry.value not in [other.value for other in declared]:
            declared.append(entry)
    return backends


def backends_of(scheme: str) -> list[EntryPoint]:
    """Return the declared backends of a scheme, at least one.

    Raises :class:`~taskstore.BackendNotFoundError` for a scheme without a backend; the hint of
    the error names a similar scheme.
    """
    backends = installed_backends()
    if scheme not in backends:
        raise BackendNotFoundError(scheme, backends, hint=_similar_scheme(scheme, backends))
    return backends[scheme]


def open_store(
    url: str,
    *,
    durability: str = "full",
    migrate: str = "auto",
    read_only: bool = False,
    **options: Any,
) -> TaskRegistryStore:
    """Open the store that a URL names.

    With ``durability="full"``, acknowledged changes survive power loss; with ``"process"``,
    acknowledged changes survive a kill of the writer.  With ``migrate="auto"``, a new or
    empty database gets its schema; with ``"never"``, the schema does not change.  A store
    that is opened ``read_only`` changes nothing.  The backend receives all other options.

    Raises :class:`~taskstore.BackendNotFoundError` for a scheme without a backend,
    :class:`~taskstore.ValidationError` for an invalid option, and the errors of the
    backend: :class:`~taskstore.StoreUnavailableError`,
    :class:`~taskstore.CorruptStoreError`, :class:`~taskstore.SchemaMismatchError`.
    """
    scheme = scheme_of(url)
    check_options(durability, migrate)
    opener = _load_opener(scheme)
    _check_accepted(opener, scheme, options)
    store: TaskRegistryStore = opener(
        url, durability=durability, migrate=migrate, read_only=read_only, **options
    )
    return store


def _check_accepted(opener: Any, scheme: str, options: Iterable[str]) -> None:
    """Raise :class:`~taskstore.ValidationError` for an option that a backend does not have."""
    if not options:
        return
    parameters = inspect.signature(opener).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return  # the backend itself checks the names
    known = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ValidationError(
                name, f"the backend of {scheme!r} has no such option; options: {', '.join(known)}"
            )


def check_options(durability: str, migrate: str) -> None:
    """Raise :class:`~taskstore.ValidationError` if one of the two options has an unknown value."""
    if durability not in DURABILITIES:
        raise ValidationError("durability", f"must be one of {DURABILITIES}, not {durability!r}")
    if migrate not in MIGRATE_MODES:
        raise ValidationError("migrate", f"must be one of {MIGRATE_MODES}, not {migrate!r}")


def _load_opener(scheme: str) -> Any:
    """Import and return the callable that opens URLs of a scheme."""
    declared = backends_of(scheme)
    if len(declared) > 1:
        packages = ", ".join(sorted(_package_of(entry) for entry in declared))
        raise TaskStoreError(
            f"several packages declare a backend for the URL scheme {scheme!r}: {packages}",
            hint="uninstall all of these packages except one",
        )
    try:
        return declared[0].load()
    except ImportError as error:
        raise BackendNotFoundError(
            scheme,
            [name for name in installed_backends() if name != scheme],
            hint=f"the backend in {_package_of(declared[0])} cannot be imported: {error}",
        ) from error


def _similar_scheme(scheme: str, known: Iterable[str]) -> str | None:
    """Return a question that names the scheme that the user probably means."""
    if scheme in ("file", "jsonl", "dir"):
        return "did you mean 'sqlite:///PATH', or 'json:///DIRECTORY'?"
    name = scheme.partition("+")[0]
    name = _OTHER_NAMES.get(name, name)
    same = sorted(each for each in known if each.partition("+")[0] == name)
    similar = same or difflib.get_close_matches(scheme, list(known), n=1)
    return f"did you mean '{similar[0]}:'?" if similar else None


def _package_of(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def default_url() -> str:
    """Return the URL of the default ledger: an SQLite file in the platform's user
    state directory.

    Raises :class:`~taskstore.ValidationError` if the user has no home directory.
    """
    from platformdirs import user_state_path

    try:
        path = user_state_path("taskstore", appauthor=False) / "tasks.db"
    except RuntimeError:
        path = Path()  # the user has no home directory
    if not path.is_absolute():  # older versions of platformdirs return the path "~/..." then
        raise ValidationError(
            "url",
            f"must be given: the user id {os.getuid()} of this process has no home directory for "
            "a default ledger; name a ledger (on the command line, with --url or TASKSTORE_URL), "
            "or set HOME",
        )
    return f"sqlite:///{path.as_posix()}"
