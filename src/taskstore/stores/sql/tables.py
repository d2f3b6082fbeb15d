"""The tables of a ledger, for SQLAlchemy Core.

``docs/formats.md`` documents the tables.  The migrations in ``migrations/``
create the tables.  A test compares the migrations with this file on every database.

Keys are text of at most 255 bytes, compared byte by byte: ids that differ only in
case or trailing spaces are different in every locale [11].  Each database has its own syntax for a
comparison byte by byte.  All times are Unix milliseconds.

Two names on disk differ from the words of the code.  The column ``booking`` contains the
``run_digest``, and the table ``task_set_aside`` contains quarantined records.  Both names stay on
disk until the next format.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    text,
)
from sqlalchemy.dialects import mysql

SCHEMA_REVISIONS = ("0001",)
"""The revisions of the known migrations, oldest first.  This version of taskstore requires the
newest revision."""

SCHEMA_EPOCH = 1
"""The newest schema epoch that this version of taskstore can work with."""

COMMENT_PREFIX = "taskstore: "
"""The prefix of the comment on every table of taskstore.  On databases that commit each schema
change separately, a killed migration can leave tables behind.  The prefix distinguishes these
tables from another program's tables with the same names."""

ACTIVE = "status IN ('queued', 'running')"
"""The predicate of the partial index of active tasks; a query must contain this text to use this
index."""

metadata = MetaData(
    naming_convention={"pk": "pk_%(table_name)s", "ck": "ck_%(table_name)s_%(constraint_name)s"}
)


def _key(length: int = 255) -> String:
    """Return the type ``VARCHAR(length)``, whose values are compared byte by byte."""
    return (
        String(length)
        .with_variant(String(length, collation="C"), "postgresql")
        .with_variant(
            mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_nopad_bin"),
            "mysql",
            "mariadb",
        )
    )


def _blob() -> LargeBinary:
    """Return the type of binary columns, for values of some MiB at most."""
    return LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")


def _seq() -> BigInteger:
    """Return the type of a seq that is a primary key.

    On SQLite, the type is INTEGER: with this type, SQLite stores the rows in the order of the
    key.
    """
    return BigInteger().with_variant(Integer(), "sqlite")


tasks = Table(
    "tasks",
    metadata,
    Column("task_id", _key(), primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("status", _key(32), nullable=False),
    Column("runtime", _key(), nullable=False),
    Column("owner_key", _key()),
    Column("requester_session_key", _key()),
    Column("child_session_key", _key()),
    Column("run_id", _key()),
    Column("booking", _key(), key="run_digest"),
    Column("parent_task_id", _key()),
    Column("parent_flow_id", _key()),
    Column("payload", _blob(), nullable=False),
    Column("checksum", BigInteger, nullable=False),
    comment=f"{COMMENT_PREFIX}one row per live task",
)
"""One row per live task.  Records are decoded from ``payload`` only.  The columns ``created_at`` to
``parent_flow_id`` copy payload fields, so that a query can filter by them.  An index that is not
partial contains no column that changes often, with one exception: on MariaDB, an index that is not
partial contains the status."""

COPIED_COLUMNS = tuple(column.key for column in tasks.columns)[2:-2]
"""The keys of the columns of ``tasks`` that copy a payload field.  The field has the same name as
the key of the column."""


def _not_null(column: str) -> dict[str, Any]:
    """Return the options for a partial index of the rows where a column is not null."""
    return {
        "sqlite_where": text(f"{column} IS NOT NULL"),
        "postgresql_where": text(f"{column} IS NOT NULL"),
    }


Index("ix_tasks_created", tasks.c.created_at, tasks.c.task_id)
Index("ix_tasks_owner", tasks.c.owner_key, tasks.c.created_at, tasks.c.task_id)
Index(
    "ix_tasks_active",
    tasks.c.created_at,
    tasks.c.task_id,
    sqlite_where=text(ACTIVE),
    postgresql_where=text(ACTIVE),
)
Index("ix_tasks_status", tasks.c.status, tasks.c.created_at, tasks.c.task_id)
Index("uq_tasks_booking", tasks.c.run_id, tasks.c.run_digest, unique=True, **_not_null("run_id"))
Index("ix_tasks_child", tasks.c.child_session_key, **_not_null("child_session_key"))
Index("ix_tasks_requester", tasks.c.requester_session_key, **_not_null("requester_session_key"))
Index("ix_tasks_parent", tasks.c.parent_task_id, **_not_null("parent_task_id"))

ONLY_ON = {
    "ix_tasks_active": frozenset({"sqlite", "postgresql"}),
    # MariaDB has no partial indexes.
    "ix_tasks_status": frozenset({"mysql", "mariadb"}),
}
"""Maps each index that only some dialects have to the names of these dialects."""

task_journal = Table(
    "task_journal",
    metadata,
    Column("seq", _seq(), primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("kind", _key(16), nullable=False),
    Column("task_id", _key(), nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("commit_id", _key(32), nullable=False),
    Column("payload", _blob()),
    Column("checksum", BigInteger),
    comment=f"{COMMENT_PREFIX}one row per committed change",
)
"""One row per committed change; ``payload`` is null for a deletion.  Readers ignore the rows whose
seq is below the floor.  These are the rows that an incomplete trim left, and the row at floor - 1.
The row at floor - 1 keeps only its commit id and its time."""

Index("ix_task_journal_task", task_journal.c.task_id, task_journal.c.seq)

task_snapshots = Table(
    "task_snapshots",
    metadata,
    Column("seq", _seq(), primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("chunks", BigInteger, nullable=False),
    Column("records", BigInteger, nullable=False),
    Column("set_aside", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("checksum", BigInteger, nullable=False),
    comment=f"{COMMENT_PREFIX}one row per snapshot",
)
"""One row per snapshot, inserted after all chunks of the snapshot."""

task_snapshot_chunks = Table(
    "task_snapshot_chunks",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("chunk", BigInteger, primary_key=True, autoincrement=False),
    Column("payload", _blob(), nullable=False),
    Column("checksum", BigInteger, nullable=False),
    comment=f"{COMMENT_PREFIX}the payloads of snapshots",
)
"""The payloads of a snapshot, several hundred in each chunk.  If a snapshot has no row in
``task_snapshots``, readers ignore the chunks of this snapshot."""

task_set_aside = Table(
    "task_set_aside",
    metadata,
    Column("id", _seq(), primary_key=True, autoincrement=False),
    Column("payload", _blob(), nullable=False),
    Column("checksum", BigInteger, nullable=False),
    comment=f"{COMMENT_PREFIX}what came in and does not decode",
)
"""Quarantined payloads [12] that cannot be rows of ``tasks``.  Some of these payloads come from a
saved snapshot, and have no usable task id.  The others come from trimmed journal entries."""

taskstore_head = Table(
    "taskstore_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("ledger_id", _key(32), nullable=False),
    Column("timeline", BigInteger, nullable=False),
    Column("head_seq", BigInteger, nullable=False),
    Column("floor", BigInteger, nullable=False),
    Column("last_at", BigInteger, nullable=False),
    Column("schema_epoch", BigInteger, nullable=False),
    Column("lease_owner", _key(32)),
    Column("lease_until", BigInteger),
    CheckConstraint("id = 1", name="one_row"),
    comment=f"{COMMENT_PREFIX}the one row that every commit updates first",
)
"""The table with only one row, the head row, which every commit updates first.  The update assigns
seqs; the lock of the head row keeps other writers out."""

TABLES = frozenset(metadata.tables)
"""The names of all tables of a ledger."""

VERSION_TABLE = "taskstore_alembic_version"
"""The table where Alembic stores the revision of taskstore's schema.  Migrations of a host use
another version table."""


def is_own(item: object) -> bool:
    """Return whether a table, or an object of a table such as an index, belongs to taskstore.

    A table belongs to taskstore if it has the name and all columns of a table of a ledger.  A
    host's table with the same name, in this or another schema, has other columns.
    """
    table = item if isinstance(item, Table) else getattr(item, "table", None)
    if not isinstance(table, Table):
        return False
    names = {column.name for column in table.columns}
    if table.name == VERSION_TABLE:
        return names == {"version_num"}
    declared = metadata.tables.get(table.name)
    if declared is not None:
        return names >= {column.name for column in declared.columns}
    # A newer version of taskstore can have made further tables.
    return (table.comment or "").startswith(COMMENT_PREFIX)
