"""A write waits while other writers make progress; its error names the lock owner."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import psycopg
import pymysql
import pytest
from sqlkit import Spy, in_process, output_of

from taskstore import StoreBusyError
from taskstore.stores.common import retry
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
