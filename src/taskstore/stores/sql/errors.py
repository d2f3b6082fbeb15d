"""The one place where driver errors become ours.

``fault_of`` says what kind of trouble an exception is, so that callers can
decide whether to try again; ``translated`` turns whatever is left into an
error of :mod:`taskstore.errors`, from its cause.  No message carries the
password of the engine's URL: where a cause does, the cause is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
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
from taskstore.stores.common.retry import FailureKind


class Fault(Enum):
    """What kind of trouble a driver reports."""

    BUSY = "busy"
    """A lock was not given in time."""
    RETRY = "retry"
    """A serialization failure or deadlock: the transaction may be run again at once."""
    LOST = "lost"
    """The connection is gone, or there is none to be had."""
    STANDBY = "standby"
    """This server takes no writes; another one may, or this one will."""
    CORRUPT = "corrupt"
    """The database is damaged, or the file is none."""
    FULL = "full"
    """No space is left."""
    SYNC = "sync"
    """What was written may not have reached the disk."""
    READ_ONLY = "read-only"
    """The database takes no writes."""
    SCHEMA = "schema"
    """A table or column is missing."""
    INTEGRITY = "integrity"
    """A constraint was violated."""
    OTHER = "other"
    """Anything else."""


GONE = frozenset({Fault.LOST, Fault.STANDBY})
"""What a new connection, a little later, may mend."""

_SQLITE = {
    5: Fault.BUSY,
    6: Fault.BUSY,
    8: Fault.READ_ONLY,
    11: Fault.CORRUPT,
    13: Fault.FULL,
    19: Fault.INTEGRITY,
    26: Fault.CORRUPT,
}
"""Primary result codes of SQLite."""

_SQLITE_SYNC = {10, 10 | (4 << 8), 10 | (5 << 8)}
"""SQLITE_IOERR_FSYNC, …_DIR_FSYNC, and SQLITE_IOERR without detail, which is all that
pysqlite3 tells and therefore, at a COMMIT, taken for the worst."""

_SQLITE_WRITE = 10 | (3 << 8)
"""SQLITE_IOERR_WRITE: the log did not take a page, so that the transaction is undone."""

_POSTGRESQL = {
    "08": Fault.LOST,
    "22": Fault.OTHER,
    "23": Fault.INTEGRITY,
    "25006": Fault.STANDBY,
    "40001": Fault.RETRY,
    "40P01": Fault.RETRY,
    "40003": Fault.LOST,
    "42P01": Fault.SCHEMA,
    "42703": Fault.SCHEMA,
    "53100": Fault.FULL,
    "55P03": Fault.BUSY,
    "57014": Fault.BUSY,
    "57P0": Fault.LOST,
    "XX001": Fault.CORRUPT,
    "XX002": Fault.CORRUPT,
}
"""SQLSTATEs, or the beginning of them; the longest that fits counts."""

_MARIADB = {
    Fault.BUSY: {1317, 1907, 1969},
    # 1205, a lock that was not given in time, has undone its statement only; what
    # we run again after it is the whole transaction.
    Fault.RETRY: {1020, 1040, 1203, 1205, 1213, 1412, 1614},
    Fault.LOST: {
        1053, 1077, 1079, 1152, 1158, 1159, 1160, 1161, 1180, 1927, 2002, 2003, 2006, 2013, 2014,
        2027, 2055, 4031,
    },
    Fault.CORRUPT: {1033, 1034, 1035, 1194, 1195, 1712, 1877, 1932},
    Fault.FULL: {1021, 1041, 1114},
    Fault.READ_ONLY: {1142, 1290, 1792, 1836},
    Fault.SCHEMA: {1054, 1146},
    Fault.INTEGRITY: {1022, 1048, 1062, 1169, 1557, 1586, 4025},
}  # fmt: skip
"""Error numbers of MariaDB and of its client."""


def driver_error(error: BaseException) -> BaseException:
    """The driver's exception inside SQLAlchemy's, if it is one of these."""
    if isinstance(error, sa.exc.DBAPIError) and error.orig is not None:
        return error.orig
    return error


def sqlite_fault(error: BaseException) -> Fault:
    """Classify an exception of an SQLite module by its result code."""
    code: int | None = getattr(driver_error(error), "sqlite_errorcode", None)
    if code is None:
        return Fault.OTHER
    if code in _SQLITE_SYNC:
        return Fault.SYNC
    if code == _SQLITE_WRITE:
        return Fault.FULL
    if code & 0xFF == 1 and "no such" in str(driver_error(error)):
        return Fault.SCHEMA
    return _SQLITE.get(code & 0xFF, Fault.OTHER)


def postgresql_fault(error: BaseException) -> Fault:
    """Classify an exception of psycopg by its SQLSTATE."""
    cause = driver_error(error)
    state: str | None = getattr(cause, "sqlstate", None)
    if state is None:
        # Without one, the server did not say it: the connection broke or
        # could not be made.
        return Fault.LOST if type(cause).__name__ == "OperationalError" else Fault.OTHER
    for length in (5, 4, 2):
        fault = _POSTGRESQL.get(state[:length])
        if fault is not None:
            return fault
    return Fault.OTHER


def mariadb_fault(error: BaseException) -> Fault:
    """Classify an exception of PyMySQL by its error number."""
    cause = driver_error(error)
    number = cause.args[0] if cause.args else None
    if not isinstance(number, int) or number == 0:
        # The driver's own words: the connection was closed, or talks nonsense.
        broken = type(cause).__name__ in ("InterfaceError", "InternalError", "OperationalError")
        return Fault.LOST if broken else Fault.OTHER
    return next((fault for fault, numbers in _MARIADB.items() if number in numbers), Fault.OTHER)


class Translator:
    """Turns driver errors of one database into ours: a context manager, reusable.

    ``location`` names the database without its password, ``secret`` is that
    password, ``fault_of`` the classification of its dialect, and ``driver`` the
    root of the driver's exceptions.  ``waits`` tells whether the database has
    waited for a lock before it says that it is not free.
    """

    def __init__(
        self,
        location: str,
        driver: type[Exception],
        fault_of: Callable[[BaseException], Fault],
        secret: str | None = None,
        *,
        waits: bool = True,
    ) -> None:
        self.location = location
        self._waits = waits
        # A message or a value of a damaged database may be no text.
        self.errors: tuple[type[Exception], ...] = (
            driver,
            sa.exc.SQLAlchemyError,
            UnicodeDecodeError,
        )
        self._fault_of = fault_of
        self._secrets = _spellings(secret)

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

    def fault_of(self, error: BaseException) -> Fault:
        """What kind of trouble an exception of the driver is."""
        return Fault.CORRUPT if isinstance(error, UnicodeDecodeError) else self._fault_of(error)

    def failure_kind(self, error: BaseException) -> FailureKind:
        """What an exception of the driver means for trying again."""
        if isinstance(error, sa.exc.TimeoutError):
            return FailureKind.PERMANENT  # of a pool that has no connection to spare
        fault = self.fault_of(error)
        if fault in GONE:
            return FailureKind.UNAVAILABLE
        if fault is Fault.BUSY:
            return FailureKind.LOCK_TIMEOUT if self._waits else FailureKind.LOCK_BUSY
        return FailureKind.SERIALIZATION if fault is Fault.RETRY else FailureKind.PERMANENT

    def cause(self, error: BaseException) -> BaseException | None:
        """The driver's exception, or ``None`` when it would give the password away."""
        cause = driver_error(error)
        said = str(cause)
        return None if any(secret in said for secret in self._secrets) else cause

    def translate(self, error: BaseException) -> TaskStoreError:
        """Our error for a driver's, its text without the password."""
        where, text = self.location, self.text(error)
        if isinstance(error, sa.exc.TimeoutError):
            return StoreBusyError(
                f"{where}: the engine's pool had no free connection",
                hint="give the engine a larger pool",
            )
        match self.fault_of(error):
            case Fault.BUSY | Fault.RETRY:
                return StoreBusyError(f"{where} is locked by another writer: {text}")
            case Fault.CORRUPT:
                return CorruptStoreError(where, text)
            case Fault.FULL:
                return StoreUnavailableError(
                    f"{where}: no space is left, or none may be used: {text}",
                    hint="free some space or raise the limit, and try again",
                )
            case Fault.READ_ONLY | Fault.STANDBY:
                return StoreUnavailableError(
                    f"{where} cannot be written: {text}",
                    hint="check the permissions of the file and its directory, "
                    "or whether the server is a standby",
                )
            case Fault.SCHEMA:
                return SchemaMismatchError(
                    f"{where} does not have our tables: {text}", found=None, needed=None
                )
            case Fault.INTEGRITY:
                return CorruptStoreError(
                    where, f"a row stands where none should: {text}", hint="run taskstore verify"
                )
            case _:
                return StoreUnavailableError(f"{where} cannot be used: {text}")

    def text(self, error: BaseException) -> str:
        """What the driver said, on one line, without the password."""
        cause = driver_error(error)
        said = str(cause)
        if isinstance(cause, UnicodeDecodeError):
            said = f"text that is none: {cause.object.decode('utf-8', 'replace')}"
        text = " ".join(said.split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text or type(error).__name__


def _spellings(secret: str | None) -> tuple[str, ...]:
    """A password as it may appear in texts: as it is, and encoded for a URL."""
    if not secret:
        return ()
    return tuple(sorted({secret, quote(secret, safe=""), quote_plus(secret)}, key=len))[::-1]
