"""The one place for what differs between databases.

A :class:`Database` is one database as its dialect wants to be spoken to: how
its engine is made, how transactions begin, how seqs are claimed, what
durability takes.  Adding a dialect is adding a module here with a subclass
and a way to open a URL, naming them in ``DIALECTS`` and in ``engines.py``,
and saying in ``errors.py`` what the driver's errors mean.
"""

from taskstore.stores.sql.dialects.base import Database, Guard
from taskstore.stores.sql.dialects.mariadb import MariaDBDatabase
from taskstore.stores.sql.dialects.postgresql import PostgreSQLDatabase
from taskstore.stores.sql.dialects.sqlite import SQLiteDatabase

DIALECTS: dict[str, type[Database]] = {
    "sqlite": SQLiteDatabase,
    "postgresql": PostgreSQLDatabase,
    "mysql": MariaDBDatabase,
    "mariadb": MariaDBDatabase,
}
"""The dialects that there are, by SQLAlchemy's names for them."""

__all__ = [
    "DIALECTS",
    "Database",
    "Guard",
    "MariaDBDatabase",
    "PostgreSQLDatabase",
    "SQLiteDatabase",
]
