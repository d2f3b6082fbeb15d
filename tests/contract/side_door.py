"""A change of a ledger in an SQL database without the store."""

from __future__ import annotations

from taskstore.stores.sql.dialects import open_database
from taskstore.stores.sql.tables import tasks


def change_owner(url: str, task_id: str) -> None:
    """Change the column by which a query finds the tasks of an owner."""
    database = open_database(url)
    with database.engine.begin() as connection:
        same_task = tasks.c.task_id == task_id
        connection.execute(tasks.update().where(same_task).values(owner_key="damaged"))
    database.close()
