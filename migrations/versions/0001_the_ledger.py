"""The tables of a ledger: tasks, journal, snapshots, quarantined payloads, head row.

The migration declares the tables itself and does not import the metadata: later
versions of taskstore change the metadata, and a migration must never change.
"""

from __future__ import annotations

import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_SERVER_OPTIONS = {"engine": "InnoDB", "row_format": "DYNAMIC", "charset": "utf8mb4"}

_ACTIVE = sa.text("status IN ('queued', 'running')")


def _key(length: int = 255) -> sa.String:
    return (
        sa.String(length)
        .with_variant(sa.String(length, collation="C"), "postgresql")
        .with_variant(
            mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_nopad_bin"),
            "mysql",
            "mariadb",
        )
    )


def _blob() -> sa.LargeBinary:
    return sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")


def _seq() -> sa.BigInteger:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _where(predicate: sa.TextClause) -> dict[str, Any]:
    return {"sqlite_where": predicate, "postgresql_where": predicate}


def _present(column: str) -> dict[str, Any]:
    return _where(sa.text(f"{column} IS NOT NULL"))


def _commits_by_itself() -> bool:
    """Return whether the database commits each DDL statement separately.

    On such a database, the statements of this migration are idempotent.  After a killed migration,
    a second run therefore completes the tables.
    """
    return op.get_context().dialect.name in ("mysql", "mariadb")


def _create_table(name: str, *columns: sa.schema.SchemaItem, comment: str) -> sa.Table:
    options = {
        f"{dialect}_{option}": value
        for dialect in ("mysql", "mariadb")
        for option, value in _SERVER_OPTIONS.items()
    }
    return op.create_table(
        name,
        *columns,
        comment=f"taskstore: {comment}",
        if_not_exists=_commits_by_itself(),
        **options,
    )


def _create_index(name: str, table: str, columns: list[str], **options: Any) -> None:
    op.create_index(name, table, columns, if_not_exists=_commits_by_itself(), **options)


def upgrade() -> None:
    """Create all tables, and insert the head row."""
    _create_tasks()
    _create_journal()
    _create_snapshots()
    _create_head()


def _create_tasks() -> None:
    _create_table(
        "tasks",
        sa.Column("task_id", _key(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("status", _key(32), nullable=False),
        sa.Column("runtime", _key(), nullable=False),
        sa.Column("owner_key", _key()),
        sa.Column("requester_session_key", _key()),
        sa.Column("child_session_key", _key()),
        sa.Column("run_id", _key()),
        sa.Column("booking", _key()),
        sa.Column("parent_task_id", _key()),
        sa.Column("parent_flow_id", _key()),
        sa.Column("payload", _blob(), nullable=False),
        sa.Column("checksum", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", name="pk_tasks"),
        comment="one row per live task",
    )
    _create_index("ix_tasks_created", "tasks", ["created_at", "task_id"])
    _create_index("ix_tasks_owner", "tasks", ["owner_key", "created_at", "task_id"])
    if op.get_context().dialect.name in ("mysql", "mariadb"):
        _create_index("ix_tasks_status", "tasks", ["status", "created_at", "task_id"])
    else:
        _create_index("ix_tasks_active", "tasks", ["created_at", "task_id"], **_where(_ACTIVE))
    _create_index(
        "uq_tasks_booking", "tasks", ["run_id", "booking"], unique=True, **_present("run_id")
    )
    for name, column in (
        ("ix_tasks_child", "child_session_key"),
        ("ix_tasks_requester", "requester_session_key"),
        ("ix_tasks_parent", "parent_task_id"),
    ):
        _create_index(name, "tasks", [column], **_present(column))


def _create_journal() -> None:
    _create_table(
        "task_journal",
        sa.Column("seq", _seq(), autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("kind", _key(16), nullable=False),
        sa.Column("task_id", _key(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("commit_id", _key(32), nullable=False),
        sa.Column("payload", _blob()),
        sa.Column("checksum", sa.BigInteger()),
        sa.PrimaryKeyConstraint("seq", name="pk_task_journal"),
        comment="one row per committed change",
    )
    _create_index("ix_task_journal_task", "task_journal", ["task_id", "seq"])


def _create_snapshots() -> None:
    _create_table(
        "task_snapshots",
        sa.Column("seq", _seq(), autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("chunks", sa.BigInteger(), nullable=False),
        sa.Column("records", sa.BigInteger(), nullable=False),
        sa.Column("set_aside", sa.BigInteger(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("checksum", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_task_snapshots"),
        comment="one row per snapshot",
    )
    _create_table(
        "task_snapshot_chunks",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("chunk", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("payload", _blob(), nullable=False),
        sa.Column("checksum", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", "chunk", name="pk_task_snapshot_chunks"),
        comment="the payloads of snapshots",
    )
    _create_table(
        "task_set_aside",
        sa.Column("id", _seq(), autoincrement=False, nullable=False),
        sa.Column("payload", _blob(), nullable=False),
        sa.Column("checksum", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_task_set_aside"),
        comment="what came in and does not decode",
    )


def _create_head() -> None:
    head = _create_table(
        "taskstore_head",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("ledger_id", _key(32), nullable=False),
        sa.Column("timeline", sa.BigInteger(), nullable=False),
        sa.Column("head_seq", sa.BigInteger(), nullable=False),
        sa.Column("floor", sa.BigInteger(), nullable=False),
        sa.Column("last_at", sa.BigInteger(), nullable=False),
        sa.Column("schema_epoch", sa.BigInteger(), nullable=False),
        sa.Column("lease_owner", _key(32)),
        sa.Column("lease_until", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_taskstore_head"),
        sa.CheckConstraint("id = 1", name="ck_taskstore_head_one_row"),
        comment="the one row that every commit updates first",
    )
    if not op.get_context().as_sql and op.get_bind().scalar(sa.select(head.c.id)) is not None:
        return  # a killed run of this migration has inserted the row
    op.bulk_insert(
        head,
        [
            {
                "id": 1,
                "ledger_id": secrets.token_hex(16),
                "timeline": 1,
                "head_seq": 0,
                "floor": 1,
                "last_at": 0,
                "schema_epoch": 1,
            }
        ],
    )


def downgrade() -> None:
    """Drop all tables, including all records and the whole history."""
    for table in (
        "taskstore_head",
        "task_set_aside",
        "task_snapshot_chunks",
        "task_snapshots",
        "task_journal",
        "tasks",
    ):
        op.drop_table(table, if_exists=_commits_by_itself())
