"""The tables of a ledger, as SQLAlchemy Core sees them.

``docs/formats.md`` describes them for readers of the database; the
migrations in ``migrations/`` create them, and a test proves that both agree
on every engine.

Keys are text of at most 255 bytes compared byte by byte, which each engine
spells in its own way: case, trailing spaces and locale must never make two
ids one [11].  All times are Unix milliseconds.
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

REVISIONS = ("0001",)
"""The migrations that this version knows, oldest first; the last is the head it needs."""

SCHEMA_EPOCH = 1
"""The newest schema epoch that this version can work with."""

MARK = "taskstore: "
"""What the comment of each of our tables begins with, where tables have comments.
Where changes of the schema commit one by one, it tells what a migration that was
killed has left from what somebody else called by our names."""

ACTIVE = "status IN ('queued', 'running')"
"""The predicate of the index of active tasks; a query has to say it in these words."""

metadata = MetaData(
    naming_convention={"pk": "pk_%(table_name)s", "ck": "ck_%(table_name)s_%(constraint_name)s"}
)


def _key(length: int = 255) -> String:
    """Text compared as bytes: ``VARCHAR(length)``."""
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
    """Bytes of some MiB at most."""
    return LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")


def _seq() -> BigInteger:
    """A seq as primary key.  SQLite keeps rows in order of one that is called INTEGER."""
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
    comment=f"{MARK}one row per live task",
)
"""One row per live task.  ``payload`` is the truth; the columns before it are
projections for filters, and what changes at every event is in no full index
(but on MariaDB, which has only these, for the status)."""

PROJECTED = tuple(column.key for column in tasks.columns)[2:-2]
"""The columns of ``tasks`` that repeat a field of the payload under its name."""


def _present(column: str) -> dict[str, Any]:
    """Options of an index that leaves out the rows where a column is null."""
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
Index("uq_tasks_booking", tasks.c.run_id, tasks.c.run_digest, unique=True, **_present("run_id"))
Index("ix_tasks_child", tasks.c.child_session_key, **_present("child_session_key"))
Index("ix_tasks_requester", tasks.c.requester_session_key, **_present("requester_session_key"))
Index("ix_tasks_parent", tasks.c.parent_task_id, **_present("parent_task_id"))

ONLY_ON = {
    "ix_tasks_active": frozenset({"sqlite", "postgresql"}),
    # Where an index cannot leave rows out.
    "ix_tasks_status": frozenset({"mysql", "mariadb"}),
}
"""The indexes that not every dialect has, and which do."""

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
    comment=f"{MARK}one row per committed change",
)
"""One row per committed change; ``payload`` is null for a deletion.  Rows below
the floor of the head row are leftovers of a trim: no answer depends on them."""

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
    comment=f"{MARK}one row per snapshot",
)
"""One row per snapshot, written when all of its chunks are."""

task_snapshot_chunks = Table(
    "task_snapshot_chunks",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("chunk", BigInteger, primary_key=True, autoincrement=False),
    Column("payload", _blob(), nullable=False),
    Column("checksum", BigInteger, nullable=False),
    comment=f"{MARK}the payloads of snapshots",
)
"""The payloads of a snapshot, some hundred in each chunk.  Those without a row in
``task_snapshots`` are leftovers: no answer depends on them."""

task_set_aside = Table(
    "task_set_aside",
    metadata,
    Column("id", _seq(), primary_key=True, autoincrement=False),
    Column("payload", _blob(), nullable=False),
    Column("checksum", BigInteger, nullable=False),
    comment=f"{MARK}what came in and does not decode",
)
"""What came in with a saved snapshot and does not decode [12].  It may have no
id at all, so it cannot be a row of ``tasks``."""

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
    comment=f"{MARK}the one row that every commit updates first",
)
"""The one row that every commit updates first: it gives out seqs and is the lock."""

TABLES = frozenset(metadata.tables)
"""The names of all tables of a ledger."""
