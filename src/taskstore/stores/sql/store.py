"""The SQL store: implements the store interface on one database."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import methodcaller

import sqlalchemy as sa

from taskstore.errors import (
    CorruptStoreError,
    CursorExpiredError,
    UnsupportedError,
    ValidationError,
)
from taskstore.model.compaction_policy import CompactionPolicy, CompactionReport
from taskstore.model.journal import (
    Change,
    Commit,
    JournalEntry,
    Quarantined,
    Snapshot,
)
from taskstore.model.records import MAX_INT
from taskstore.model.validation import check_key
from taskstore.store.interface import StoreReport, VerifyReport, clock_notices
from taskstore.store.opening import check_options, redacted, scheme_of
from taskstore.stores.common.change_feed import IDLE_TIMEOUT_S, ChangeFeed
from taskstore.stores.common.retry import RECONNECT_S
from taskstore.stores.sql import compaction, snapshots
from taskstore.stores.sql.commits import commit
from taskstore.stores.sql.dialects import Database, database_for_engine, open_database
from taskstore.stores.sql.dialects.base import VacuumReport
from taskstore.stores.sql.migrate import ensure_schema
from taskstore.stores.sql.query import QueryStore
from taskstore.stores.sql.rows import HeadRow, damaged_head_error, entry_of
from taskstore.stores.sql.transactions import ConnectionPool, Transactions
from taskstore.stores.sql.verify import verify
from taskstore.stores.sql.watchers import start_watcher


class SQLStore(QueryStore):
    """A ledger in the tables of an SQL database, opened on one engine.

    ``engine`` belongs to the host.  Each call acquires a connection, restores its settings after
    use and releases it.  :meth:`close` does not dispose of the engine.  The engine's pool must have
    a connection for every calling thread.  To open a URL, call ``taskstore.open_store``.  For a
    URL, taskstore creates an engine of its own and passes a ``Database`` as ``engine``; the
    ``Database`` then determines ``durability`` and ``read_only``.  If ``strict`` is true, a load
    raises :class:`~taskstore.CorruptStoreError` for the first record that cannot be decoded;
    otherwise every such record is quarantined.  On PostgreSQL, ``schema`` names the schema for the
    tables of the ledger; the default is the first schema of the search path.  A missing schema is
    created together with the tables.  If a database server is down, a call waits for up to
    ``reconnect_s`` seconds, and then raises :class:`~taskstore.StoreUnavailableError`.  If the
    engine's database is an SQLite file that has several hard links or is mounted as a single file,
    the store is opened for writing only with ``links="allow"``.
    """

    def __init__(
        self,
        engine: sa.Engine | Database,
        *,
        durability: str = "full",
        migrate: str = "auto",
        read_only: bool = False,
        strict: bool = False,
        reconnect_s: float = RECONNECT_S,
        links: str = "refuse",
        schema: str | None = None,
    ) -> None:
        _check_options(durability, migrate, reconnect_s)
        if links not in ("refuse", "allow"):
            raise ValidationError("links", f"must be 'refuse' or 'allow', not {links!r}")
        database = engine
        if not isinstance(database, Database):
            database = database_for_engine(
                database, durability=durability, read_only=read_only, schema=schema
            )
            database.links_allowed = links == "allow"
        super().__init__(read_only=database.read_only)
        self.durability = database.durability
        self.location = database.location
        self._strict = strict
        self._database = database
        pool = ConnectionPool(database)
        self._transactions = Transactions(pool, reconnect_s)
        # The time of the last commit that this store knows.
        self._last_at = 0
        self._load_quarantined: tuple[Quarantined, ...] = ()
        self._query_quarantined: dict[str, Quarantined] = {}
        self._trim_quarantined: list[Quarantined] = []
        self._pool = pool
        # The first call of wait_for creates the change feed.
        self._feed: ChangeFeed | None = None
        self._feed_lock = threading.Lock()
        try:
            database.register_open()
            ensure_schema(database, migrate)
            self._transactions.read(database.configure)
        except BaseException:
            self._transactions.close()
            raise
        self._release_when_dropped(pool.terminate)

    # -- the store interface ----------------------------------------------

    def load_snapshot(self) -> Snapshot:
        self._check_open()
        loaded = snapshots.load(self._transactions)
        self._load_quarantined, self._last_at = loaded.quarantined, loaded.at
        self._query_quarantined, self._trim_quarantined = {}, []
        if self._strict and loaded.quarantined:
            first = loaded.quarantined[0]
            raise CorruptStoreError(f"{self.location}: {first.where}", first.reason)
        return loaded

    def save_snapshot(self, snapshot: Snapshot) -> None:
        self._check_writable()
        snapshots.save(self._transactions, snapshot)
        if self._feed is not None:
            self._feed.announce(snapshot.seq)

    def apply(self, changes: Sequence[Change]) -> Commit:
        self._check_writable()
        committed = commit(self._transactions, changes, self.clock)
        self._last_at = committed.at
        if self._feed is not None and self._feed.waiters:
            self._feed.announce(committed.last_seq)
        return committed

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        self._check_writable()
        with self._transactions.exclusive():
            yield

    def report(self) -> StoreReport:
        queried = tuple(
            item
            for task_id, item in self._query_quarantined.items()
            if all(known.task_id != task_id for known in self._load_quarantined)
        )
        quarantined = (*self._load_quarantined, *queried, *self._trim_quarantined)
        notices = (*self._database.current_notices(), *clock_notices(self._last_at, self.clock))
        return StoreReport(quarantined, notices)

    def close(self) -> None:
        if not self._closed:
            super().close()
            if not self._in_forked_child:
                with self._feed_lock:
                    feed = self._feed
                if feed is not None:
                    feed.close()
                self._transactions.close()

    # -- journal ----------------------------------------------------------

    def head(self) -> int:
        return self._head().head_seq

    def floor(self) -> int:
        return self._head().floor

    def _head(self) -> HeadRow:
        self._check_open()
        sql = self._database.sql
        head = self._transactions.read(partial(snapshots.read_head, sql=sql))
        self._last_at = head.last_at
        return head

    def commit_id(self, seq: int) -> str:
        self._check_open()
        sql, at = self._database.sql.commit_id, min(seq, MAX_INT)
        row = self._transactions.read(methodcaller("row", sql, (at,)))
        return "" if row is None else str(row[0])

    def read_journal(self, after: int, limit: int) -> Sequence[JournalEntry]:
        self._check_open()
        after = min(after, MAX_INT)
        last = min(after + max(limit, 0), MAX_INT)
        sql = self._database.sql.read_journal
        rows = self._transactions.read(lambda session: session.rows(sql, (after, last)))
        if not rows:
            raise CorruptStoreError(self.location, "the head row is missing")
        floor, head = rows[0][:2]
        if not type(floor) is type(head) is int:
            raise damaged_head_error()
        if after < floor - 1:
            raise CursorExpiredError(after, floor)
        entries = tuple(entry_of(row[2:], self.location) for row in rows if row[2] is not None)
        for seq, entry in enumerate(entries, after + 1):
            if entry.seq != seq:
                raise self._missing_entry_error(seq)
        if len(entries) < min(last, head) - after:
            raise self._missing_entry_error(after + len(entries) + 1)
        return entries

    def _missing_entry_error(self, seq: int) -> CorruptStoreError:
        return CorruptStoreError(f"{self.location}: task_journal", f"seq {seq} is missing")

    def read_history(self, task_id: str) -> Sequence[JournalEntry]:
        self._check_open()
        try:
            check_key("task_id", task_id)
        except ValidationError:
            return ()  # no task can have this id, and some drivers do not accept it
        sql = self._database.sql.read_history
        rows = self._transactions.read(lambda session: session.rows(sql, (task_id,)))
        return tuple(entry_of(row, self.location) for row in rows)

    def read_snapshot(self, at: int) -> Snapshot | None:
        self._check_open()
        return snapshots.read_snapshot(self._transactions, min(at, MAX_INT))

    def wait_for(self, after: int, timeout: float) -> bool:
        with self._feed_lock:
            self._check_open()
            if self._feed is None:
                self._feed = self._new_feed()
        return self._feed.wait_for(after, timeout)

    def _new_feed(self) -> ChangeFeed:
        database = self._database
        return ChangeFeed(
            self.head,
            partial(start_watcher, self._pool, self.head),
            self.location,
            # While no call waits, the change feed must not keep a connection of a host's pool.
            idle_timeout_s=IDLE_TIMEOUT_S if database.owned else 0.0,
            errors=database.translator.errors,
        )

    # -- compaction, integrity -------------------------------------

    def compact(self, policy: CompactionPolicy) -> CompactionReport:
        self._check_writable()
        self._head()  # a store that only compacts has not read the time of the last commit yet
        return compaction.compact(
            self._transactions, policy, self.clock, self._trim_quarantined.append
        )

    def verify(self) -> VerifyReport:
        self._check_open()
        return verify(self._transactions)


def open_sql(
    url: str,
    *,
    durability: str = "full",
    migrate: str = "auto",
    read_only: bool = False,
    strict: bool = False,
    reconnect_s: float = RECONNECT_S,
) -> SQLStore:
    """Open the ledger in the database of a URL, with a new engine for this store.

    The URL of an SQLite file is ``sqlite:///`` and a path without percent-encoding; a
    fourth slash starts an absolute path.  The URL of a server is
    ``DRIVER://user:password@host/database``, where ``DRIVER`` is ``postgresql+psycopg`` or
    ``mariadb+pymysql``.  :func:`taskstore.open_store` documents the options;
    :class:`SQLStore` documents ``strict`` and ``reconnect_s``.
    """
    _check_options(durability, migrate, reconnect_s)
    database = open_database(url, durability=durability, read_only=read_only)
    return SQLStore(database, migrate=migrate, strict=strict, reconnect_s=reconnect_s)


def vacuum(url: str) -> VacuumReport:
    """Rebuild the file of an SQLite ledger without free pages; compactions can shrink the new file.

    A file needs this rebuild only once, and only if its ``PRAGMA auto_vacuum`` is 0.  New files do
    not need the rebuild.

    Raises :class:`~taskstore.StoreBusyError` if another process or store has the ledger open.
    Raises :class:`~taskstore.StoreUnavailableError` if the directory of the file has too little
    free space.  Raises :class:`~taskstore.UnsupportedError` if the ledger is not in an SQLite file.
    Each of these errors leaves the ledger unchanged.  If the process is killed, the file is either
    unchanged or completely rebuilt.
    """
    dialect = Database.dialects.get(scheme_of(url).partition("+")[0])
    if dialect is None:
        raise UnsupportedError(
            f"{redacted(url)}: only an SQLite file can be rebuilt",
            hint="a JSON ledger gives space back at each compaction",
        )
    if dialect.space_hint is None:
        open_sql(url, migrate="never", read_only=True).close()  # the file must contain a ledger
    return dialect.vacuum(url)


def _check_options(durability: str, migrate: str, reconnect_s: float) -> None:
    check_options(durability, migrate)
    if not isinstance(reconnect_s, (int, float)) or not reconnect_s >= 0:
        raise ValidationError(
            "reconnect_s", f"must be a number of seconds, 0 or more, not {reconnect_s!r}"
        )
