"""Classification of driver errors, and their translation into taskstore's errors.

For each dialect, one function classifies an exception; callers use the returned kind to decide
whether to retry.  :class:`Translator` raises the matching error of :mod:`taskstore.errors`,
with the driver's exception as the cause.  No message contains the URL's password.  If the driver's
message contains the password, the raised error has no cause.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, quote_plus

import sqlalchemy as sa

from taskstore.errors import (
    CorruptStoreError,
    SchemaMismatchError,
    StoreBusyError,
    StoreUnavailableError,
    TaskStoreError,
)
from taskstore.store.opening import password_note, shell_command
from taskstore.stores.common.retry import FailureKind
from taskstore.stores.sql.sqlite_guard import WAS_CUT, lacks_pages


class ErrorKind(Enum):
    """The kind of an error that a driver reports."""

    LOCK_TIMEOUT = "lock timeout"
    """A lock was not free, or was not acquired before a timeout."""
    SERIALIZATION = "serialization"
    """A serialization failure or a deadlock.  The store can retry the transaction at once."""
    CONNECTION_LOST = "connection lost"
    """The connection broke or could not be opened."""
    STANDBY = "standby"
    """The server accepts no writes at present.  A later attempt can find a server that accepts
    writes."""
    POOLED = "pooled"
    """A prepared statement belongs to another connection: a pooler shares the server's sessions.
    Without prepared statements, the store can retry the transaction at once."""
    CORRUPT = "corrupt"
    """The database is damaged, or the file is not a database."""
    DISK_FULL = "disk full"
    """There is no free space on the disk."""
    FSYNC_FAILED = "fsync failed"
    """An fsync possibly failed: it is unknown whether the written data is on disk."""
    READ_ONLY = "read-only"
    """The database refuses writes."""
    MISSING_SCHEMA = "missing schema"
    """A table, column or index is missing."""
    INTEGRITY = "integrity"
    """A constraint was violated."""
    OTHER = "other"
    """Any other error."""


_DAMAGE = (UnicodeError, MemoryError, OverflowError)
"""The exceptions that a driver or a decoder raises for a damaged value, in addition to the driver's
own exceptions: text that is not UTF-8, a length or a number that is too large."""

UNREACHABLE = frozenset({ErrorKind.CONNECTION_LOST, ErrorKind.STANDBY})
"""The kinds of errors after which a later attempt on a new connection can succeed."""

_SQLITE_CODES = {
    5: ErrorKind.LOCK_TIMEOUT,
    6: ErrorKind.LOCK_TIMEOUT,
    8: ErrorKind.READ_ONLY,
    11: ErrorKind.CORRUPT,
    13: ErrorKind.DISK_FULL,
    # SQLITE_TOOBIG: taskstore writes no value that is too long, so the stored length is wrong.
    18: ErrorKind.CORRUPT,
    19: ErrorKind.INTEGRITY,
    24: ErrorKind.CORRUPT,
    26: ErrorKind.CORRUPT,
}
"""Maps each primary result code of SQLite to a kind."""

_SQLITE_DAMAGE = ("malformed", "unsupported file format")
"""The first words of SQLite's messages about a damaged header or a damaged schema that have the
result code SQLITE_ERROR."""

_CUT_HINT = (
    "nothing was changed; copy the file to a safe place, then put the complete file or a backup in "
    "its place"
)

_SQLITE_FSYNC_ERRORS = {10, 10 | (4 << 8), 10 | (5 << 8)}
"""The result codes that can mean a failed fsync: SQLITE_IOERR_FSYNC, SQLITE_IOERR_DIR_FSYNC and
SQLITE_IOERR.  pysqlite3 reports SQLITE_IOERR for every I/O error, so SQLITE_IOERR at a COMMIT must
count as a failed fsync."""

_SQLITE_WRITE_ERROR = 10 | (3 << 8)
"""SQLITE_IOERR_WRITE: writing a page to the log failed, and SQLite rolls the transaction back."""

_SQLSTATES = {
    "08": ErrorKind.CONNECTION_LOST,
    "22": ErrorKind.OTHER,
    "23": ErrorKind.INTEGRITY,
    "25006": ErrorKind.STANDBY,
    "26000": ErrorKind.POOLED,
    "40001": ErrorKind.SERIALIZATION,
    "40P01": ErrorKind.SERIALIZATION,
    "40003": ErrorKind.CONNECTION_LOST,
    "42P01": ErrorKind.MISSING_SCHEMA,
    "42P05": ErrorKind.POOLED,
    "42703": ErrorKind.MISSING_SCHEMA,
    "53100": ErrorKind.DISK_FULL,
    "55P03": ErrorKind.LOCK_TIMEOUT,
    "57014": ErrorKind.LOCK_TIMEOUT,
    "57P0": ErrorKind.CONNECTION_LOST,
    "XX001": ErrorKind.CORRUPT,
    "XX002": ErrorKind.CORRUPT,
}
"""Maps each SQLSTATE or SQLSTATE prefix to a kind; the longest matching prefix applies."""

_MARIADB_NUMBERS = {
    ErrorKind.LOCK_TIMEOUT: {1317, 1907, 1969},
    # MariaDB's error 1205 is a lock timeout that rolls back only one statement; the store retries
    # the whole transaction.
    ErrorKind.SERIALIZATION: {1020, 1040, 1203, 1205, 1213, 1412, 1614},
    ErrorKind.CONNECTION_LOST: {
        1053, 1077, 1079, 1152, 1158, 1159, 1160, 1161, 1180, 1927, 2002, 2003, 2006, 2013, 2014,
        2027, 2055, 4031,
    },
    ErrorKind.CORRUPT: {1033, 1034, 1035, 1194, 1195, 1712, 1877, 1932},
    ErrorKind.DISK_FULL: {1021, 1041, 1114},
    ErrorKind.READ_ONLY: {1142, 1290, 1792, 1836},
    ErrorKind.MISSING_SCHEMA: {1054, 1146, 1176},
    ErrorKind.INTEGRITY: {1022, 1048, 1062, 1169, 1557, 1586, 4025},
}  # fmt: skip
"""Maps each kind to the error numbers of the MariaDB server and of PyMySQL."""


def driver_error(error: BaseException) -> BaseException:
    """Return the driver's exception inside SQLAlchemy's exception, or the exception itself."""
    if isinstance(error, sa.exc.DBAPIError) and error.orig is not None:
        return error.orig
    return error


def sqlite_error_kind(error: BaseException) -> ErrorKind:
    """Classify an exception of an SQLite module by its result code."""
    code: int | None = getattr(driver_error(error), "sqlite_errorcode", None)
    message = str(driver_error(error))
    if code is None:
        undecodable = message.startswith("Could not decode to UTF-8")
        return ErrorKind.CORRUPT if undecodable else ErrorKind.OTHER
    if code in _SQLITE_FSYNC_ERRORS:
        return ErrorKind.FSYNC_FAILED
    if code == _SQLITE_WRITE_ERROR:
        return ErrorKind.DISK_FULL
    if code & 0xFF == 1 and "no such" in message:
        return ErrorKind.MISSING_SCHEMA
    if code & 0xFF == 1 and message.startswith(_SQLITE_DAMAGE):
        return ErrorKind.CORRUPT
    return _SQLITE_CODES.get(code & 0xFF, ErrorKind.OTHER)


def postgresql_error_kind(error: BaseException) -> ErrorKind:
    """Classify an exception of psycopg by its SQLSTATE."""
    cause = driver_error(error)
    state: str | None = getattr(cause, "sqlstate", None)
    if state is None:
        # The error is not from the server: the connection broke or could not be opened.
        broken = type(cause).__name__ == "OperationalError"
        return ErrorKind.CONNECTION_LOST if broken else ErrorKind.OTHER
    for length in (5, 4, 2):
        kind = _SQLSTATES.get(state[:length])
        if kind is not None:
            return kind
    return ErrorKind.OTHER


def mariadb_error_kind(error: BaseException) -> ErrorKind:
    """Classify an exception of PyMySQL by its error number."""
    cause = driver_error(error)
    number = cause.args[0] if cause.args else None
    if not isinstance(number, int) or number == 0:
        # PyMySQL itself raised the error: the connection is closed or not usable.
        broken = type(cause).__name__ in ("InterfaceError", "InternalError", "OperationalError")
        return ErrorKind.CONNECTION_LOST if broken else ErrorKind.OTHER
    kinds = (kind for kind, numbers in _MARIADB_NUMBERS.items() if number in numbers)
    return next(kinds, ErrorKind.OTHER)


class Translator:
    """Translates the driver errors of one database; an instance is a reusable context manager.

    ``location`` names the database and contains no password; ``secret`` is the
    password.  ``error_kind`` classifies the exceptions of the dialect's driver.  ``driver`` is
    the base class of the driver's exceptions.  ``waits`` is true if the database waits for a
    lock before it reports that the lock is not free.
    """

    def __init__(
        self,
        location: str,
        driver: type[Exception],
        error_kind: Callable[[BaseException], ErrorKind],
        secret: str | None = None,
        *,
        waits: bool = True,
    ) -> None:
        self.location = location
        self._waits = waits
        self.errors: tuple[type[Exception], ...] = (driver, sa.exc.SQLAlchemyError, *_DAMAGE)
        self._error_kind = error_kind
        self._secrets = _encodings_of(secret)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, self.errors):
            raise self.translate(error) from self.cause(error)

    def error_kind(self, error: BaseException) -> ErrorKind:
        """Classify an exception of the driver."""
        return ErrorKind.CORRUPT if isinstance(error, _DAMAGE) else self._error_kind(error)

    def failure_kind(self, error: BaseException) -> FailureKind:
        """Return the kind of failure, which decides whether and how the store retries."""
        if isinstance(error, sa.exc.TimeoutError):
            return FailureKind.PERMANENT  # SQLAlchemy's pool had no free connection
        kind = self.error_kind(error)
        if kind in UNREACHABLE:
            return FailureKind.UNAVAILABLE
        if kind is ErrorKind.LOCK_TIMEOUT:
            return FailureKind.LOCK_TIMEOUT if self._waits else FailureKind.LOCK_BUSY
        retryable = kind in (ErrorKind.SERIALIZATION, ErrorKind.POOLED)
        return FailureKind.SERIALIZATION if retryable else FailureKind.PERMANENT

    def cause(self, error: BaseException) -> BaseException | None:
        """Return the driver's exception, or ``None`` if the exception's text contains the
        password."""
        cause = driver_error(error)
        message = str(cause)
        return None if any(secret in message for secret in self._secrets) else cause

    def translate(self, error: BaseException) -> TaskStoreError:
        """Return taskstore's error for a driver's error, without the password."""
        where, text = self.location, self.text(error)
        if isinstance(error, sa.exc.TimeoutError):
            return StoreBusyError(
                f"{where}: the engine's pool had no free connection",
                hint="give the engine a larger pool",
            )
        match self.error_kind(error):
            case ErrorKind.LOCK_TIMEOUT | ErrorKind.SERIALIZATION:
                return StoreBusyError(f"{where} is locked by another writer: {text}")
            case ErrorKind.CORRUPT:
                cut = self._error_kind is sqlite_error_kind and lacks_pages(Path(where))
                reason, hint = (f"the file {WAS_CUT}", _CUT_HINT) if cut else (text, None)
                return CorruptStoreError(where, reason, hint=hint)
            case ErrorKind.DISK_FULL:
                return StoreUnavailableError(
                    f"{where}: the disk is full or a size limit is reached: {text}",
                    hint="free some space, or raise the limit if there is a limit; then try again",
                )
            case ErrorKind.READ_ONLY | ErrorKind.STANDBY:
                return StoreUnavailableError(
                    f"{where} cannot be written: {text}",
                    hint="if it is a file, check the permissions of the file and its directory; "
                    "if it is a server, check whether the server is a standby",
                )
            case ErrorKind.MISSING_SCHEMA:
                return SchemaMismatchError(
                    f"{where}: a table, column or index is missing: {text}", found=None, needed=None
                )
            case ErrorKind.INTEGRITY:
                return CorruptStoreError(
                    where,
                    f"a row violates a constraint: {text}",
                    hint=f"run: {command_for(where, 'verify')}",
                )
            case _:
                return StoreUnavailableError(f"{where} cannot be used: {text}")

    def text(self, error: BaseException) -> str:
        """Return the driver's message on one line, without the password."""
        cause = driver_error(error)
        message = str(cause)
        if isinstance(cause, UnicodeDecodeError):
            message = f"text is not UTF-8: {cause.object.decode('utf-8', 'replace')}"
        elif isinstance(cause, MemoryError):
            message = (
                "the memory was not enough for a stored value: its stored length is damaged, or "
                "the memory of this process is too small"
            )
        elif isinstance(cause, _DAMAGE):
            message = f"a stored value is damaged: {cause}"
        text = " ".join(message.split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text or type(error).__name__


def command_for(location: str, *words: str) -> str:
    """Return a ``taskstore`` command for the ledger at a URL or at the path of an SQLite file."""
    url = location if "://" in location else f"sqlite:///{location}"
    note = password_note(url)
    return shell_command(*words, url=url) + (f"; {note}" if note else "")


def _encodings_of(secret: str | None) -> tuple[str, ...]:
    """Return the plain and the percent-encoded password; an empty tuple if there is no password."""
    if not secret:
        return ()
    return tuple(sorted({secret, quote(secret, safe=""), quote_plus(secret)}, key=len))[::-1]
