"""taskstore: a durable ledger of background tasks for Python programs.

Open a :class:`TaskRegistry` and record the state of your tasks.  The records
survive a crash, and other processes can read them.
"""

from taskstore.errors import (
    BackendNotFoundError,
    Conflict,
    ConflictError,
    CorruptStoreError,
    CursorExpiredError,
    InvalidTransition,
    OutcomeUnknownError,
    ReadOnlyError,
    SchemaMismatchError,
    StoreBusyError,
    StoreClosedError,
    StoreReplacedError,
    StoreUnavailableError,
    TaskNotFound,
    TaskStoreError,
    UnsupportedError,
    ValidationError,
)
from taskstore.model.compaction_policy import CompactionPolicy, CompactionReport
from taskstore.model.journal import (
    Change,
    ChangeSet,
    Commit,
    EntryKind,
    JournalEntry,
    Position,
    Put,
    Quarantined,
    Remove,
    Snapshot,
    fold,
)
from taskstore.model.query import Page, Summary, TaskQuery
from taskstore.model.records import (
    DeliveryContext,
    DeliveryStatus,
    NotifyPolicy,
    ScopeKind,
    TaskRecord,
    TaskStatus,
    TerminalOutcome,
)
from taskstore.registry.compactor import Compactor, compact
from taskstore.registry.hooks import Deleted, Event, Hook, Restored, Upserted
from taskstore.registry.registry import TaskRegistry
from taskstore.registry.verbs import RunScope
from taskstore.store.interface import (
    StoreReport,
    SupportsCompaction,
    SupportsExclusive,
    SupportsHistory,
    SupportsIdSearch,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    SupportsStreaming,
    SupportsSummary,
    TaskRegistryStore,
    VerifyReport,
)
from taskstore.store.opening import open_store

__version__ = "0.1.0"


def alembic_include_object(
    item: object,
    name: str | None,
    type_: str,
    reflected: bool,  # noqa: FBT001 - Alembic passes the arguments by position
    compare_to: object | None,
) -> bool:
    """Return false for the tables of a ledger and their indexes, and true for everything else.

    A program that keeps a ledger in its own database passes this function as ``include_object`` to
    ``context.configure`` in its ``env.py``.  Without this function, ``alembic revision
    --autogenerate`` writes a migration that drops the ledger.  The function also compares columns:
    if a table of the program has only its name in common with a table of a ledger, the function
    returns true for this table.
    """
    from taskstore.stores.sql.tables import is_own

    del name, type_, reflected, compare_to
    return not is_own(item)


__all__ = [
    "BackendNotFoundError",
    "Change",
    "ChangeSet",
    "Commit",
    "CompactionPolicy",
    "CompactionReport",
    "Compactor",
    "Conflict",
    "ConflictError",
    "CorruptStoreError",
    "CursorExpiredError",
    "Deleted",
    "DeliveryContext",
    "DeliveryStatus",
    "EntryKind",
    "Event",
    "Hook",
    "InvalidTransition",
    "JournalEntry",
    "NotifyPolicy",
    "OutcomeUnknownError",
    "Page",
    "Position",
    "Put",
    "Quarantined",
    "ReadOnlyError",
    "Remove",
    "Restored",
    "RunScope",
    "SchemaMismatchError",
    "ScopeKind",
    "Snapshot",
    "StoreBusyError",
    "StoreClosedError",
    "StoreReplacedError",
    "StoreReport",
    "StoreUnavailableError",
    "Summary",
    "SupportsCompaction",
    "SupportsExclusive",
    "SupportsHistory",
    "SupportsIdSearch",
    "SupportsIntegrity",
    "SupportsJournal",
    "SupportsQuery",
    "SupportsStreaming",
    "SupportsSummary",
    "TaskNotFound",
    "TaskQuery",
    "TaskRecord",
    "TaskRegistry",
    "TaskRegistryStore",
    "TaskStatus",
    "TaskStoreError",
    "TerminalOutcome",
    "UnsupportedError",
    "Upserted",
    "ValidationError",
    "VerifyReport",
    "alembic_include_object",
    "compact",
    "fold",
    "open_store",
]
