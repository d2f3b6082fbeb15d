"""Full disks, lost connections, failed syncs, and passwords that stay secret."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlkit import Spy, in_process, output_of, write

from taskstore.errors import (
    OutcomeUnknownError,
    StoreBusyError,
    StoreClosedError,
    StoreUnavailableError,
    TaskStoreError,
    ValidationError,
)
from taskstore.stores.sql import open_sql
from taskstore.stores.sql.sqlite_library import has_wal_reset_bug, sqlite_module
from taskstore.testing.factories import create, make_put, next_of

# -- paths --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["100%.db", "100%25.db", "a b#c.db", "me:x@y.db", "ü%2e.db"])
def test_special_characters_in_paths(tmp_path, open_, name):
    url = f"sqlite:///{tmp_path}/{name}"
    with open_(url) as store:
        create(store)
        assert store.location == str(tmp_path / name)
    assert (tmp_path / name).is_file()
    assert open_(url, read_only=True).head() == 1


def test_what_is_new_is_private(tmp_path, open_):
    place = tmp_path / "there"
    place.mkdir(mode=0o755)
    store = open_(f"sqlite:///{place}/new/deep/tasks.db")
    create(store)
    modes = {path.name: path.stat().st_mode & 0o777 for path in place.rglob("*")}
    assert modes == {
        "new": 0o700,
        "deep": 0o700,
        "tasks.db": 0o600,
        "tasks.db-wal": 0o600,
        "tasks.db-shm": 0o600,
    }
    assert place.stat().st_mode & 0o777 == 0o755


def test_an_existing_file_keeps_its_mode(sqlite_path, open_):
    sqlite_path.touch(mode=0o640)
    sqlite_path.chmod(0o640)
    create(open_(f"sqlite:///{sqlite_path}"))
    assert sqlite_path.stat().st_mode & 0o777 == 0o640


def test_relative_and_absolute(tmp_path, open_, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_("sqlite:///tasks.db")
    monkeypatch.chdir("/")
    create(store)
    assert open_(f"sqlite:///{tmp_path}/tasks.db").head() == 1


def test_paths_that_cannot_be(tmp_path, open_):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "file" / "tasks.db", tmp_path / ("x" * 300)):
        for read_only in (False, True):
            with pytest.raises(StoreUnavailableError) as caught:
                open_(f"sqlite:///{path}", read_only=read_only)
            assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite://host/tasks.db",
        "sqlite:///tasks.db?mode=ro",
        "sqlite:///a\0b.db",
        "postgresql+psycopg2://u:secret@h/d",
        "postgresql+nonsense://u:secret@h/d",
        "postgresql+psycopg://u:secret@h:port/d",
    ],
)
def test_urls_that_are_none(url):
    with pytest.raises(ValidationError) as caught:
        open_sql(url)
    assert caught.value.field == "url"
    assert "secret" not in str(caught.value)


# -- full disks -----------------------------------------------------------------


def test_a_full_database(sqlite_path, open_):
    store = open_(f"sqlite:///{sqlite_path}")
    record = create(store)
    writer = store._transactions.pool.write_session
    [pages] = writer.row("PRAGMA page_count")
    writer.rows(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreUnavailableError, match="limit is reached") as caught:
        create(store, task="x" * 100_000)
    assert str(sqlite_path) in str(caught.value)
    assert caught.value.retryable
    assert dict(store.load_snapshot().records) == {record.task_id: record}
    writer.rows("PRAGMA max_page_count = 1000000")
    create(store, task="x" * 100_000)
    assert (store.head(), store.verify().ok) == (2, True)


FULL_DISK = """
import resource, sys
from taskstore import open_store
from taskstore.errors import OutcomeUnknownError, StoreUnavailableError
from taskstore.testing.factories import create
store = open_store(sys.argv[1])
create(store)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
written = 1
try:
    while True:
        create(store, task="x" * 20_000)
        written += 1
except (StoreUnavailableError, OutcomeUnknownError) as error:
    print(error)
assert store.head() == written == len(store.load_snapshot().records)
store.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store = open_store(sys.argv[1])
assert store.head() == written == len(store.load_snapshot().records)
create(store, task="x" * 20_000)
assert store.verify().ok, store.verify()
print(store.head() == written + 1)
"""


def test_a_file_that_may_not_grow(sqlite_path):
    # The system says EFBIG here, as EDQUOT for a quota: to SQLite an I/O error,
    # of which pysqlite3 does not tell whether it was in writing or in syncing.
    printed = output_of(in_process(FULL_DISK, f"sqlite:///{sqlite_path}")).splitlines()
    assert str(sqlite_path) in printed[0]
    assert printed[1] == "True"


# -- syncing --------------------------------------------------------------------


def sqlite_error(text: str, code: int) -> Exception:
    error = sqlite_module().OperationalError(text)
    error.sqlite_errorcode = code
    return error


def at_commit(spy: Spy, error: Callable[[], Exception], times: int = 1) -> None:
    left = [times]

    def fail(sql: str) -> None:
        if sql == "COMMIT" and left[0]:
            left[0] -= 1
            raise error()

    spy.before = fail


def test_after_a_failed_sync_nothing_is_written_any_more(sqlite_path, open_):
    url = f"sqlite:///{sqlite_path}"
    store = open_(url)
    record = create(store)
    at_commit(Spy(store), lambda: sqlite_error("disk I/O error", 10 | (4 << 8)))
    with pytest.raises(OutcomeUnknownError, match="reached the disk") as caught:
        create(store)
    assert str(sqlite_path) in str(caught.value)
    assert caught.value.__cause__ is not None
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="refuses writes") as refused:
            create(store)
        assert "open the store again" in str(refused.value)
    # Reads continue, and a new instance can write.
    assert dict(store.load_snapshot().records) == {record.task_id: record}
    create(open_(url))


def test_a_commit_that_found_it_locked_is_run_again(sqlite_path, open_):
    store = open_(f"sqlite:///{sqlite_path}")
    spy = Spy(store)
    at_commit(spy, lambda: sqlite_error("database is locked", 5), times=3)
    create(store)
    assert spy.statements.count("COMMIT") == 4
    assert (store.head(), store.verify().ok) == (1, True)


def test_durability_is_asked_of_sqlite(sqlite_path, open_):
    url = f"sqlite:///{sqlite_path}"
    for durability, synchronous in (("full", 2), ("process", 1)):
        store = open_(url, durability=durability)
        assert store.durability == durability
        create(store)
        held = store._transactions.pool.write_session
        assert held.row("PRAGMA synchronous") == (synchronous,)
        assert held.row("PRAGMA journal_mode") == ("wal",)
        assert held.row("PRAGMA wal_autocheckpoint") == (4000,)
        store.close()


def test_durability_is_asked_of_postgresql(postgres_url, open_):
    for durability, synchronous in (("full", "on"), ("process", "off")):
        store = open_(postgres_url, durability=durability)
        seen = []
        write(store, lambda session, seen=seen: seen.append(session.row("SHOW synchronous_commit")))
        assert seen == [(synchronous,)]
        store.close()


def test_a_careless_server_is_overruled(postgres_server, open_):
    url = postgres_server.new_database()
    name = url.partition("@/")[2].partition("?")[0]
    postgres_server.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    store = open_(url)
    seen = []
    write(store, lambda session: seen.append(session.row("SHOW synchronous_commit")))
    assert seen == [("on",)]
    assert any("fsync=off" in notice for notice in store.report().notices)


# -- lost connections -------------------------------------------------------------


def terminate_others(postgres_server, url: str) -> None:
    name = url.partition("@/")[2].partition("?")[0]
    postgres_server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    )


@pytest.fixture
def pg_store(postgres_url, open_):
    store = open_(postgres_url)
    create(store)
    return store


def test_idle_connections_that_died_are_replaced(pg_store, postgres_server, postgres_url):
    for _ in range(2):
        terminate_others(postgres_server, postgres_url)
        create(pg_store)
        terminate_others(postgres_server, postgres_url)
        assert len(pg_store.load_snapshot().records) == pg_store.head()
    assert (pg_store.head(), pg_store.verify().ok) == (3, True)


@pytest.mark.parametrize("statement", ["UPDATE taskstore_head", "INSERT INTO task", "COMMIT"])
def test_a_connection_lost_before_the_commit_is_taken(
    pg_store, postgres_server, postgres_url, statement
):
    spy, cut = Spy(pg_store), []

    def before(sql: str) -> None:
        if statement in sql and not cut:
            cut.append(sql)
            terminate_others(postgres_server, postgres_url)

    spy.before = before
    record = create(pg_store)
    assert cut
    assert pg_store.head() == 2
    assert [entry.task_id for entry in pg_store.read_journal(1, 9)] == [record.task_id]
    assert pg_store.verify().ok


def test_a_commit_whose_answer_was_lost_is_found(pg_store, postgres_server, postgres_url):
    spy, cut = Spy(pg_store), []

    def after(sql: str) -> None:
        if sql == "COMMIT" and not cut:
            import psycopg

            cut.append(sql)
            terminate_others(postgres_server, postgres_url)
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    spy.after = after
    change = make_put()
    commit = pg_store.apply([change])
    assert (commit.first_seq, commit.last_seq) == (2, 2)
    [entry] = pg_store.read_journal(1, 9)
    assert (entry.task_id, entry.commit_id) == (change.task_id, commit.commit_id)
    assert entry.at == commit.at
    assert any("FOR UPDATE" in sql for sql in spy.statements)


def test_a_lost_answer_that_was_trimmed_away_is_unknown(pg_store, postgres_server, postgres_url):
    spy, cut = Spy(pg_store), []

    def after(sql: str) -> None:
        if sql == "COMMIT" and not cut:
            import psycopg

            cut.append(sql)
            name = postgres_url.partition("@/")[2].partition("?")[0]
            postgres_server.execute("DELETE FROM task_journal", name)
            postgres_server.execute("UPDATE taskstore_head SET floor = 3", name)
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    spy.after = after
    with pytest.raises(OutcomeUnknownError, match="trimmed past seq 2"):
        create(pg_store)
    assert len(pg_store.load_snapshot().records) == 2


def test_an_outcome_that_cannot_be_read_is_unknown(postgres_url, open_, monkeypatch):
    import psycopg

    pg_store = open_(postgres_url, reconnect_s=0.3)
    create(pg_store)
    spy, pool = Spy(pg_store), pg_store._transactions.pool

    def before(sql: str) -> None:
        if sql == "COMMIT":
            monkeypatch.setattr(pool, "acquire", unreachable)
            pool.write_session = None
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    def unreachable() -> None:
        raise psycopg.OperationalError("connection refused")

    spy.before = before
    with pytest.raises(OutcomeUnknownError, match="cannot be read back"):
        create(pg_store)
    monkeypatch.undo()
    assert pg_store.head() == 1


def test_serialization_failures_are_run_again(pg_store):
    import psycopg

    spy, failures = Spy(pg_store), []

    def before(sql: str) -> None:
        if "INSERT INTO task_journal" in sql and len(failures) < 3:
            kind = psycopg.errors.DeadlockDetected
            failures.append(kind("deadlock detected"))
            raise failures[-1]

    spy.before = before
    create(pg_store)
    assert len(failures) == 3
    assert pg_store.head() == 2


def test_a_real_deadlock_is_run_again(pg_store, postgres_url):
    """Another client locks a task and then the head; the store locks them in reverse order."""
    import psycopg

    task = create(pg_store)
    spy, blocked = Spy(pg_store), []
    with (
        psycopg.connect(postgres_url.replace("+psycopg", "")) as other,
        ThreadPoolExecutor(1) as executor,
    ):
        other.execute("SET deadlock_timeout = '60s'")  # the store is the deadlock victim
        other.execute("SELECT 1 FROM tasks WHERE task_id = %s FOR UPDATE", [task.task_id])

        def before(sql: str) -> None:
            if "UPDATE tasks SET" in sql and not blocked:
                lock = "SELECT 1 FROM taskstore_head FOR UPDATE"
                blocked.append(executor.submit(lambda: [other.execute(lock), other.rollback()]))

        spy.before = before
        pg_store.apply([next_of(task, error="after the deadlock")])
        blocked[0].result(10)
    assert len(spy.matching("UPDATE taskstore_head")) > 1
    assert (pg_store.head(), pg_store.verify().ok) == (3, True)


def test_a_lock_that_is_never_given_is_busy(postgres_url, open_):
    store = open_(postgres_url)
    create(store)
    blocker = open_(postgres_url)
    release, held = threading.Event(), threading.Event()

    def block(session):
        session.rows(blocker._database.sql.lock_head)
        held.set()
        release.wait(10)

    thread = threading.Thread(target=write, args=(blocker, block))
    thread.start()
    held.wait(10)
    store._transactions.pool.write_session.raw.execute("SET lock_timeout = '200ms'")
    with pytest.raises(StoreBusyError, match="locked"):
        create(store)
    # A reader does not notice.
    assert len(store.load_snapshot().records) == 1
    release.set()
    thread.join()
    create(store)


def test_a_database_that_holds_no_unicode(postgres_server, open_):
    postgres_server.execute(
        "CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'"
    )
    with pytest.raises(StoreUnavailableError, match="SQL_ASCII"):
        open_(postgres_server.url_of("ascii"))


# -- secrets ----------------------------------------------------------------------

SECRET = "s3/cr:et%@pass word"


def everything_said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:{}@127.0.0.1:1/db",
        "postgresql+psycopg://me:{}@no-such-host.invalid/db",
        "postgresql+psycopg://me@127.0.0.1:1/db?password={}",
        "postgresql+psycopg://me:{}@127.0.0.1:1/db?nonsense=1",
        "postgresql+psycopg://me:{}@127.0.0.1:99999999/db",
    ],
)
def test_no_password_is_ever_said(url, caplog):
    from urllib.parse import quote

    caplog.set_level(logging.DEBUG)
    with pytest.raises(TaskStoreError) as caught:
        open_sql(url.format(quote(SECRET, safe="")))
    said = everything_said(caught.value) + caplog.text
    for spelling in (SECRET, quote(SECRET, safe=""), quote(SECRET)):
        assert spelling not in said


def test_a_password_with_special_characters_gets_in(postgres_server, open_):
    from urllib.parse import quote

    url = postgres_server.new_database()
    postgres_server.execute("DROP ROLE IF EXISTS guarded")
    postgres_server.execute(f"CREATE ROLE guarded SUPERUSER LOGIN PASSWORD '{SECRET}'")
    told = url.replace("//postgres@", f"//guarded:{quote(SECRET, safe='')}@")
    store = open_(told)
    create(store)
    assert store._database.engine.url.password == SECRET
    for text in (repr(store), store.location, repr(store._database.engine)):
        assert "s3" not in text
        assert "guarded" in text
    store.close()
    from taskstore.stores.sql import migrate

    engine = migrate.database_for_url(told).engine
    assert migrate.check(engine) == []
    migrate.downgrade(engine, "base", allow_data_loss=True)
    migrate.upgrade(engine)
    engine.dispose()


def test_the_text_of_a_driver_is_cleaned():
    from taskstore.stores.sql.errors import Translator, postgresql_error_kind

    class DriverError(Exception):
        pass

    translator = Translator("there", DriverError, postgresql_error_kind, secret=SECRET)
    with pytest.raises(StoreUnavailableError) as caught, translator:
        raise DriverError(f"could not log in with {SECRET}")
    assert SECRET not in everything_said(caught.value)
    with pytest.raises(StoreUnavailableError) as caught, translator:
        raise DriverError("harmless")
    assert isinstance(caught.value.__cause__, DriverError)


# -- closing, forking, old libraries ----------------------------------------------


def test_closed_is_closed(url, open_):
    store = open_(url)
    store.close()
    store.close()
    for action in (
        store.load_snapshot,
        store.head,
        store.verify,
        lambda: store.apply([make_put()]),
        lambda: store.wait_for(0, 1),
    ):
        with pytest.raises(StoreClosedError):
            action()


def test_close_wakes_waiters(url, open_):
    store = open_(url)
    outcome = []

    def wait():
        try:
            store.wait_for(0, 30)
        except StoreClosedError as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    store.close()
    thread.join(5)
    assert not thread.is_alive()
    assert len(outcome) == 1


def test_a_fork_has_to_open_its_own(sqlite_path):
    script = """
import os, sys
from taskstore import open_store
from taskstore.errors import StoreClosedError
from taskstore.testing.factories import create
store = open_store(sys.argv[1])
create(store)
child = os.fork()
if child == 0:
    try:
        create(store)
    except StoreClosedError as error:
        assert "before the process forked" in str(error)
        store.close()
        os._exit(0 if open_store(sys.argv[1]).head() == 1 else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
create(store)
assert store.verify().ok
"""
    output_of(in_process(script, f"sqlite:///{sqlite_path}"))


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 4), False),
    ],
)
def test_which_versions_can_corrupt_a_log(version, affected):
    assert has_wal_reset_bug(version) is affected


def test_without_pysqlite3_the_standard_library_serves(sqlite_path):
    script = """
import sys
sys.modules["pysqlite3"] = None
import logging
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from taskstore import open_store
from taskstore.testing.factories import create
import sqlite3
with open_store(sys.argv[1]) as store:
    create(store)
    assert store.verify().ok
    notices = store.report().notices
from taskstore.stores.sql.sqlite_library import has_wal_reset_bug
print(bool(notices) == has_wal_reset_bug(sqlite3.sqlite_version_info))
"""
    printed = output_of(in_process(script, f"sqlite:///{sqlite_path}")).splitlines()
    assert printed[-1] == "True"
    assert len(printed) <= 2  # the notice, once
