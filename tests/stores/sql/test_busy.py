"""A write waits while other writers make progress; its error names the lock owner."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable

import psycopg
import pymysql
import pytest
import sqlalchemy as sa
from sqlkit import Spy, in_process, output_of

from taskstore import CompactionPolicy, StoreBusyError
from taskstore.stores.common import retry
from taskstore.stores.sql import SQLStore
from taskstore.stores.sql.compaction import SQLCompactionSteps
from taskstore.stores.sql.dialects import mariadb, postgresql, sqlite
from taskstore.testing import make_put

HOLD = """
import sys
from taskstore.stores.sql import open_sql
store = open_sql(sys.argv[1])
with store._transactions.write() as tx:
    tx.row(store._database.sql.lock_head) if "sqlite" not in sys.argv[1] else None
    print("held", flush=True)
    sys.stdin.readline()
store.close()
"""


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def any_url(request, sqlite_path):
    if request.param == "sqlite":
        return f"sqlite:///{sqlite_path}"
    return request.getfixturevalue({"postgresql": "postgres_url"}.get(request.param, "mariadb_url"))


UNHURRIED_S = retry.BUSY_TIMEOUT_S


@pytest.fixture
def hurried(monkeypatch):
    """Short timeouts: below a second, or the shortest that the server accepts."""
    monkeypatch.setattr(retry, "BUSY_TIMEOUT_S", 0.8)
    monkeypatch.setattr(sqlite, "WRITE_LOCK_TIMEOUT_S", 0.4)
    monkeypatch.setattr(postgresql, "WRITE_LOCK_TIMEOUT_S", 0.4)
    monkeypatch.setattr(mariadb, "WRITE_LOCK_TIMEOUT_S", 1)


def test_the_lock_owner_is_named(any_url, open_, hurried):
    store = open_(any_url)
    store.apply([make_put()])
    holder = in_process(HOLD, any_url)
    assert holder.stdout.readline() == "held\n"
    started = time.monotonic()
    with pytest.raises(StoreBusyError) as caught:
        store.apply([make_put()])
    assert time.monotonic() - started < UNHURRIED_S / 2
    [told] = caught.value.owners
    assert told in str(caught.value)
    if "sqlite" in any_url:
        assert told == f"pid {holder.pid}, {sys.executable}" if sys.platform == "linux" else ()
    elif "postgresql" in any_url:
        assert told.startswith("server process ")
        assert "taskstore at this machine, idle in transaction, in a transaction for" in told
    else:
        assert "root at " in told
        assert "Sleep, in a transaction for" in told
    holder.stdin.write("\n")
    output_of(holder)
    store.apply([make_put()])
    assert store.head() == 2


def engine_of_a_patient_host(url: str, journal_mode: str = "wal") -> sa.Engine:
    """An engine whose own lock timeouts are 1,000 s, or longer."""
    options = {}
    if "sqlite" in url:
        options = {"module": sqlite.sqlite_module(), "connect_args": {"timeout": 1000}}
    engine = sa.create_engine(url, pool_size=3, max_overflow=0, **options)

    @sa.event.listens_for(engine, "connect")
    def set_up(raw, _record):
        cursor = raw.cursor()
        if "sqlite" in url:
            cursor.execute(f"PRAGMA journal_mode = {journal_mode}")
        if "mariadb" in url:
            cursor.execute("SET innodb_lock_wait_timeout = 1000, lock_wait_timeout = 1000")

    return engine


TIMEOUTS = {
    "sqlite": "PRAGMA busy_timeout",
    "postgresql": "SHOW lock_timeout",
    "mariadb": "SELECT CONCAT(@@innodb_lock_wait_timeout, ',', @@lock_wait_timeout)",
}


def timeouts_of(engine: sa.Engine) -> set[object]:
    """The lock timeouts of all connections in the pool."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(engine.connect()) for _ in range(3)]
        query = TIMEOUTS[engine.dialect.name]
        return {connection.exec_driver_sql(query).scalar() for connection in connections}


def ended(call: Callable[[], object]) -> BaseException | None:
    """Call in a thread; return the error, or ``None`` if the call waits for the host's timeout."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the test checks the error
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(UNHURRIED_S * 2)
    return errors[0] if errors else None


def test_the_lock_timeouts_of_a_host_are_not_added(any_url, open_, hurried):
    open_(any_url).apply([make_put()])
    engine = engine_of_a_patient_host(any_url)
    own = timeouts_of(engine)
    with SQLStore(engine) as store:
        store.apply([make_put()])
        assert timeouts_of(engine) == own
        holder = in_process(HOLD, any_url)
        assert holder.stdout.readline() == "held\n"
        try:
            assert isinstance(ended(lambda: store.apply([make_put()])), StoreBusyError)
        finally:
            holder.stdin.write("\n")
            output_of(holder)
        assert timeouts_of(engine) == own
        store.apply([make_put()])
        assert store.head() == 3
    engine.dispose()


@pytest.mark.parametrize("held", ["reader", "writer"])
def test_a_host_without_wal_waits_for_its_readers_as_long(sqlite_path, hurried, held, monkeypatch):
    monkeypatch.setattr(sqlite, "_BUSY_TIMEOUT_S", 0.2)
    url = f"sqlite:///{sqlite_path}"
    engine = engine_of_a_patient_host(url, "delete")
    with SQLStore(engine) as store:
        store.apply([make_put()])
        with contextlib.closing(sqlite.sqlite_module().connect(sqlite_path)) as other:
            other.isolation_level = None
            other.execute("BEGIN" if held == "reader" else "BEGIN EXCLUSIVE")
            other.execute("SELECT count(*) FROM tasks").fetchone()
            assert isinstance(ended(lambda: store.apply([make_put()])), StoreBusyError)
            if held == "writer":
                assert isinstance(ended(store.head), StoreBusyError)
                with pytest.raises(StoreBusyError):
                    SQLStore(engine, migrate="never")
        store.apply([make_put()])
        assert store.head() == 2
    assert timeouts_of(engine) == {1_000_000}
    engine.dispose()


def lock_trouble(url) -> Exception:
    """The driver's error of a lock timeout."""
    if "postgresql" in url:
        return psycopg.errors.LockNotAvailable("canceling statement due to lock timeout")
    if "mariadb" in url:
        return pymysql.err.OperationalError(1205, "Lock wait timeout exceeded")
    error = sqlite.sqlite_module().OperationalError("database is locked")
    error.sqlite_errorcode = 5
    return error


class Locked:
    """A store that gets no lock for some seconds, with different activity of other writers."""

    def __init__(
        self, store, url: str, seconds: float, others: Callable[[], object] = lambda: None
    ) -> None:
        self.tries = 0
        self._until = time.monotonic() + seconds
        self._others = others
        spy = Spy(store)
        spy.before = self._before
        self._error: Callable[[], Exception] = lambda: lock_trouble(url)

    def _before(self, sql: str) -> None:
        if time.monotonic() < self._until and (
            "BEGIN IMMEDIATE" in sql or "UPDATE taskstore_head" in sql or "FOR UPDATE" in sql
        ):
            self.tries += 1
            time.sleep(0.05)  # as a server waits
            self._others()
            raise self._error()


def test_a_writer_waits_while_others_make_progress(any_url, open_, hurried):
    store, other = open_(any_url), open_(any_url)
    locked = Locked(store, any_url, 1.5, lambda: other.apply([make_put()]))
    store.apply([make_put()])
    assert locked.tries > 1
    assert store.head() == other.head() == locked.tries + 1


def test_without_progress_the_caller_gets_an_error(any_url, open_, hurried):
    store = open_(any_url)
    locked = Locked(store, any_url, 1000)
    started = time.monotonic()
    with pytest.raises(StoreBusyError, match="the system does not report the lock owner"):
        store.apply([make_put()])
    assert time.monotonic() - started < UNHURRIED_S / 2
    assert locked.tries >= 2
    assert store.head() == 0


def count_waits(store, monkeypatch) -> list[None]:
    """Return a list that gets an item for each write that begins, with a timeout of its own."""
    begun, attempts = [], store._transactions.attempts

    def counted(**options):
        begun.append(None)
        return attempts(**options)

    monkeypatch.setattr(store._transactions, "attempts", counted)
    return begun


@pytest.mark.parametrize("step", ["the first", "a later"])
def test_a_compaction_waits_once_for_a_foreign_lock(any_url, open_, hurried, monkeypatch, step):
    store = open_(any_url)
    for _ in range(3):
        store.apply([make_put()])
    begun = count_waits(store, monkeypatch)
    holders = []

    def hold() -> None:
        holders.append(in_process(HOLD, any_url))
        assert holders[0].stdout.readline() == "held\n"
        begun.clear()

    if step == "the first":
        hold()
    else:
        begin = SQLCompactionSteps.begin

        def begin_and_hold(steps):
            point = begin(steps)
            hold()
            return point

        monkeypatch.setattr(SQLCompactionSteps, "begin", begin_and_hold)
    policy = CompactionPolicy(force=True)
    try:
        with pytest.raises(StoreBusyError):
            store.compact(policy)
        assert len(begun) == 1
    finally:
        holders[0].stdin.write("\n")
        output_of(holders[0])
    monkeypatch.undo()
    # This process takes over the lease of its failed compaction at once.
    assert store.compact(policy).compacted
    assert store.verify().problems == ()
