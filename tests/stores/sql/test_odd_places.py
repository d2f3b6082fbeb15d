"""Files that may not grow, that are not text; and passwords with an @ in them."""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlkit import in_process, output_of

from taskstore.errors import (
    CorruptStoreError,
    ValidationError,
)
from taskstore.stores.sql import SQLStore, open_sql
from taskstore.stores.sql.errors import ErrorKind, Translator, sqlite_error_kind
from taskstore.stores.sql.sqlite_library import sqlite_module
from taskstore.testing.factories import create

LIMITED = """
import resource, signal, sys
sys.modules["pysqlite3"] = None  # the standard library's module has the extended I/O error code
from taskstore import open_store
from taskstore.errors import StoreUnavailableError
from taskstore.testing.factories import create
store = open_store(sys.argv[1])
create(store)
unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
written = 1
for limit in (400_000, 600_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for _ in range(2):
        try:
            while True:
                create(store, task="x" * 20_000)
                written += 1
        except StoreUnavailableError as error:
            assert sys.argv[1].removeprefix("sqlite:///") in str(error)
        assert store.head() == written == len(store.load_snapshot().records)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    create(store, task="x" * 20_000)
    written += 1
store.close()
store = open_store(sys.argv[1])
assert store.head() == written == len(store.load_snapshot().records)
print(store.verify().ok)
"""


def test_a_file_that_may_not_grow_is_written_again_when_it_may(sqlite_path):
    assert output_of(in_process(LIMITED, f"sqlite:///{sqlite_path}")) == "True\n"


def test_sqlite_result_codes_of_write_and_sync_errors():
    def kind_of(code: int) -> ErrorKind:
        error = sqlite_module().OperationalError("disk I/O error")
        error.sqlite_errorcode = code
        return sqlite_error_kind(error)

    assert [kind_of(10 | (kind << 8)) for kind in (0, 4, 5)] == [ErrorKind.FSYNC_FAILED] * 3
    assert kind_of(10 | (3 << 8)) is ErrorKind.DISK_FULL
    assert kind_of(10 | (1 << 8)) is ErrorKind.OTHER


def test_an_error_message_that_is_no_text(sqlite_path, open_):
    url = f"sqlite:///{sqlite_path}"
    with open_(url) as store:
        create(store)
    data = sqlite_path.read_bytes()
    assert b"created_at, task_id" in data
    sqlite_path.write_bytes(data.replace(b"created_at, task_id", b"\xa5reated_at, task_id", 1))
    for read_only in (True, False):
        with pytest.raises(CorruptStoreError) as caught:
            open_(url, read_only=read_only).load_snapshot()
        assert str(sqlite_path) in str(caught.value)


def test_a_value_that_is_no_text_is_damage():
    translator = Translator("there", sqlite_module().Error, sqlite_error_kind)
    with pytest.raises(CorruptStoreError, match="malformed"), translator:
        b"malformed \xa5".decode()


NOBODY = """
import os, sys
from taskstore import open_store
from taskstore.errors import StoreUnavailableError
import taskstore.stores.sql, taskstore.stores.jsonfile
os.setgid(65534)
os.setuid(65534)
for name in ("there.db", "nowhere.db", "deeper/tasks.db"):
    for read_only in (True, False):
        try:
            open_store(f"sqlite:///{sys.argv[1]}/{name}", read_only=read_only)
        except StoreUnavailableError as error:
            print(f"{sys.argv[1]}/{name}" in str(error))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="has to become somebody else")
def test_a_directory_that_may_not_be_entered(open_):
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o755)
        secret = Path(place, "secret")
        secret.mkdir(mode=0o700)
        create(open_(f"sqlite:///{secret}/there.db"))
        assert output_of(in_process(NOBODY, secret)) == "True\n" * 6


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mariadb+pymysql"])
def test_an_at_sign_that_is_not_escaped(driver):
    with pytest.raises(ValidationError, match="%40") as caught:
        open_sql(f"{driver}://me:sec@ret@127.0.0.1/db")
    said = f"{caught.value!r} {caught.value.__cause__!r}"
    assert "ret@" not in said
    assert "sec" not in said


def test_an_at_sign_in_the_password_of_a_hosts_engine():
    engine = sa.create_engine("postgresql+psycopg://me:sec@ret@127.0.0.1:1/db")
    with pytest.raises(ValidationError, match="%40") as caught:
        SQLStore(engine)
    said = "".join(traceback.format_exception(caught.value))
    assert "ret@" not in said
    assert "sec" not in said
