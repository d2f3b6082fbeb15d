"""The SQL store: SQLite, PostgreSQL and MariaDB, through SQLAlchemy Core."""

from taskstore.stores.sql.dialects.base import VacuumReport
from taskstore.stores.sql.store import SQLStore, open_sql, vacuum

__all__ = ["SQLStore", "VacuumReport", "open_sql", "vacuum"]
