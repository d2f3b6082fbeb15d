"""The SQL store: SQLite and PostgreSQL, through SQLAlchemy Core."""

from taskstore.stores.sql.store import SQLStore, open_sql

__all__ = ["SQLStore", "open_sql"]
