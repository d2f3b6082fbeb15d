"""The one place for what differs between databases.

A :class:`Database` is one database as its dialect wants to be spoken to: how
its engine is made, how transactions begin, how seqs are claimed, what
durability takes.  Adding a dialect is adding a module here with a subclass
that names its URLs, importing it here, and saying in
``errors.py`` what the driver's errors mean.
"""

from taskstore.stores.sql.dialects.base import Database, Guard, host_database, open_database
from taskstore.stores.sql.dialects.mariadb import MariaDBDatabase
from taskstore.stores.sql.dialects.postgresql import PostgreSQLDatabase
from taskstore.stores.sql.dialects.sqlite import SQLiteDatabase

__all__ = [
    "Database",
    "Guard",
    "MariaDBDatabase",
    "PostgreSQLDatabase",
    "SQLiteDatabase",
    "host_database",
    "open_database",
]
