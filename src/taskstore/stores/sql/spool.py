"""The temporary file in which a compaction keeps what it read until it is written back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from taskstore.errors import StoreUnavailableError
from taskstore.stores.sql.dialects import Database


class Spool:
    """A file without a name, in the database's ``scratch`` directory or the system's.

    What goes wrong with it is :class:`~taskstore.StoreUnavailableError`, and
    says where.
    """

    def __init__(self, database: Database) -> None:
        self._location = database.location
        self._place = database.scratch or tempfile.gettempdir()
        with self._told():
            self._file = tempfile.TemporaryFile(dir=self._place)  # noqa: SIM115 - see close

    def clear(self) -> None:
        """Throw away what was written."""
        with self._told():
            self._file.seek(0)
            self._file.truncate()

    def write(self, chunk: bytes) -> None:
        """Add a chunk."""
        with self._told():
            self._file.write(chunk)
            self._file.flush()  # later it would fail where nobody expects it

    def rewind(self) -> None:
        """Begin to read."""
        with self._told():
            self._file.seek(0)

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        with self._told():
            return self._file.read(size)

    def close(self) -> None:
        """Give the file up, and what could not be written to it."""
        with suppress(OSError):
            self._file.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreUnavailableError(
                f"{self._location} cannot be compacted: a temporary file in {self._place} "
                f"fails: {error}",
                hint="free some space there and try again",
            ) from error
