"""The SQL store: SQLite, PostgreSQL and MariaDB, through SQLAlchemy Core."""

from taskstore.stores.sql.store import SQLStore, open_sql

__all__ = ["SQLStore", "open_sql"]
