"""The differences between databases: one module per dialect.

A :class:`Database` subclass defines for its dialect how the engine is made, how transactions begin,
how seqs are claimed, and which settings durability needs.  To add a dialect, add a module to this
folder.  In the new module, define a :class:`Database` subclass with the URL schemes of the dialect
in ``names``.  Import the new module in this file.  Then change the files outside this folder:
classify the driver's errors in ``errors.py``, add column and index variants to ``tables.py``, write
a migration, and declare the URL schemes as entry points.  If the database can send notifications,
add a watcher to ``watchers.py``.
"""

from taskstore.stores.sql.dialects.base import Database, Guard, database_for_engine, open_database
from taskstore.stores.sql.dialects.mariadb import MariaDBDatabase
from taskstore.stores.sql.dialects.postgresql import PostgreSQLDatabase
from taskstore.stores.sql.dialects.sqlite import SQLiteDatabase

__all__ = [
    "Database",
    "Guard",
    "MariaDBDatabase",
    "PostgreSQLDatabase",
    "SQLiteDatabase",
    "database_for_engine",
    "open_database",
]
