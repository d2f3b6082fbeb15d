"""One connection that was acquired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.expression import Executable


class Session:
    """One connection, in the driver's autocommit, and a cursor of the driver on it.

    Everything runs on that cursor, also what is built with Core: a host's
    engine may have listeners that begin transactions when SQLAlchemy does.
    ``restore`` is what a host's connection is to be set back to afterwards.
    """

    __slots__ = ("_dialect", "connection", "cursor", "raw", "restore")

    def __init__(self, connection: sa.Connection, raw: Any, cursor: Any, dialect: Dialect) -> None:
        self.connection = connection
        self.raw = raw
        self.cursor = cursor
        self._dialect = dialect
        self.restore: tuple[str, ...] = ()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        """Run a statement."""
        self.cursor.execute(sql, parameters)

    def touch(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run an INSERT, UPDATE or DELETE; returns how many rows it touched."""
        self.cursor.execute(sql, parameters)
        count = int(self.cursor.rowcount)
        if count < 0:
            # The standard library's sqlite3 does not count where a WITH comes first.
            count = int(self.row("SELECT changes()")[0])
        return count

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query: SQLite holds its read lock until the last one is fetched."""
        self.cursor.execute(sql, parameters)
        return list(self.cursor.fetchall())

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row of a query, or ``None``."""
        rows = self.rows(sql, parameters)
        return rows[0] if rows else None

    def set_back(self) -> None:
        """Set a host's connection back to how it was."""
        for statement in self.restore:
            self.rows(statement)
        self.restore = ()

    # -- statements that are built where they are used ---------------------

    def change(self, statement: Executable) -> int:
        """Run a Core statement; returns how many rows it touched."""
        return self.touch(*self._compiled(statement))

    def ask(self, query: Executable) -> list[Any]:
        """All rows of a Core query, as tuples."""
        return self.rows(*self._compiled(query))

    def scalar(self, query: Executable) -> Any:
        """The first value of the first row of a Core query, or ``None``."""
        rows = self.ask(query)
        return rows[0][0] if rows else None

    def _compiled(self, statement: Executable) -> tuple[str, tuple[Any, ...]]:
        # An Executable that does not compile is none of ours.
        compiled = statement.compile(  # type: ignore[attr-defined]
            dialect=self._dialect, compile_kwargs={"render_postcompile": True}
        )
        values = compiled.params
        return str(compiled), tuple(values[name] for name in compiled.positiontup or ())
