"""One borrowed connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa


class Session:
    """One connection, in the driver's autocommit, and a cursor of the driver on it.

    The methods run SQL text with positional parameters; ``connection`` is
    SQLAlchemy's, for statements that are built where they are used.
    ``restore`` is what a host's connection is to be set back to afterwards.
    """

    __slots__ = ("connection", "cursor", "raw", "restore")

    def __init__(self, connection: sa.Connection, raw: Any, cursor: Any) -> None:
        self.connection = connection
        self.raw = raw
        self.cursor = cursor
        self.restore: tuple[str, ...] = ()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run a statement; returns how many rows it touched."""
        self.cursor.execute(sql, parameters)
        return int(self.cursor.rowcount)

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query: SQLite holds its read lock until the last one is fetched."""
        self.cursor.execute(sql, parameters)
        return list(self.cursor.fetchall())

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row of a query, or ``None``."""
        rows = self.rows(sql, parameters)
        return rows[0] if rows else None
