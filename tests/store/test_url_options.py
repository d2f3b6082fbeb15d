"""Unknown and malformed options of URLs are refused by name, on every driver and every way in."""

from __future__ import annotations

import asyncio
import os
import pwd
import subprocess
import sys

import pytest
import sqlalchemy as sa

from taskstore import StoreUnavailableError, TaskRegistry, ValidationError, open_store
from taskstore.aio import AsyncTaskRegistry
from taskstore.store.opening import default_url
from taskstore.stores.sql import SQLStore

# Nothing listens on port 1: an option is checked before the server must answer.
POSTGRESQL = "postgresql+psycopg://ann:secret@127.0.0.1:1/db"
MARIADB = "mariadb+pymysql://ann:secret@127.0.0.1:1/db"
MYSQL = "mysql+pymysql://ann:secret@127.0.0.1:1/db"

REFUSED = [
    *(
        (f"{server}?{option}", option.partition("=")[0].rpartition("&")[2])
        for server in (POSTGRESQL, MARIADB, MYSQL)
        for option in (
            "nonsense=1",
            "nonsense",
            "connect_timeout=",
            "connect_timeout=soon",
            "connect_timeout=1.5",
            "connect_timeout=5&connect_timeout=6",
            "connect_timeout=99999999999",
            "durability=full",
            "read_only=true",
            "prepare_treshold=0",
        )
    ),
    *(
        (f"{POSTGRESQL}?{option}", option.partition("=")[0])
        for option in (
            "prepare_threshold=",
            "prepare_threshold=off",
            "prepare_threshold=-1",
            "prepare_threshold=0&prepare_threshold=0",
            "keepalives=maybe",
            "keepalives_idle=x",
            "tcp_user_timeout=x",
            "port=abc",
            "port=0",
            "port=70000",
            "port=5432,abc",
            "schema=$user",
            "schema=%24user",
            "sslmode=maybe",
            "target_session_attrs=fast",
            "gssencmode=maybe",
            "channel_binding=maybe",
            "load_balance_hosts=maybe",
            "sslcertmode=maybe",
            "ssl_min_protocol_version=SSL",
            "require_auth=nonsense",
            "client_encoding=latin1",
            "charset=utf8mb4",
            "row_factory=x",
            "autocommit=true",
            "hostaddr=bogus",
            "hostaddr=127.0.0.1,127.0.0.1",
            "scram_client_key=zzz",
            "scram_server_key=zzz",
            "sslnegotiation=direct",
            "sslnegotiation=direct&sslmode=prefer",
            "replication=database",
            "replication=true",
            "service=nonsense",
            "min_protocol_version=nonsense",
            "application_name=%00",
            "application_name=a\0b",
            "password=%00",
            "dbname=a%00b",
            "schema=%FF",
            "schema=a%00",
            "application_name=%C3",
            "options=\ud800",
        )
    ),
    *(
        (f"{server}?{option}", option.partition("=")[0])
        for server in (MARIADB, MYSQL)
        for option in (
            "ssl_disabled=maybe",
            "ssl_disabled=",
            "local_infile=2",
            "ssl_verify_cert=x",
            "use_unicode=x",
            "use_unicode=0",
            "use_unicode=false",
            "ssl_check_hostname=x",
            "read_timeout=0",
            "write_timeout=-1",
            "max_allowed_packet=big",
            "client_flag=x",
            "charset=latin1",
            "collation=nonsense",
            "ssl_ca=/nowhere/ca.pem",
            "cursorclass=x",
            "defer_connect=true",
            "compress=true",
            "prepare_threshold=0",
            "port=x",
            "bind_address=bogus",
            "program_name=%00",
            "program_name=%FF",
            "init_command=SELECT+'%00'",
            "database=a%00",
        )
    ),
]


@pytest.mark.parametrize(("url", "name"), REFUSED)
def test_an_option_that_is_refused_is_named(url, name):
    with pytest.raises(ValidationError, match=f"'{name}'") as caught:
        open_store(url)
    assert caught.value.field == "url"
    assert not caught.value.retryable
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgresql+psycopg", "mariadb+pymysql", "mysql+pymysql"])
@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("ann:secret@127.0.0.1:99999/db", "port"),
        ("ann:secret@127.0.0.1:0/db", "port"),
        ("ann:secret@127.0.0.1:65536/db?connect_timeout=1", "port"),
        ("ann:secret@127.0.0.1:1/d%00b", "database"),
        ("ann:secret@127.0.0.1:1/d\0b", "database"),
        ("ann:secret@127.0.0.1:1/\ud800", "database"),
        ("ann:secret@127.0\0.0.1:1/db", "host"),
        ("ann%00:secret@127.0.0.1:1/db", "user name"),
        ("ann%FF:secret@127.0.0.1:1/db", "user name"),
        ("ann:secret%00@127.0.0.1:1/db", "password"),
        ("ann:secret%FF@127.0.0.1:1/db", "password"),
        ("ann:secret%C3%28/?@127.0.0.1:1/db", "password"),
    ],
)
def test_a_part_of_the_address_that_is_refused_is_named(scheme, address, part):
    for read_only in (False, True):
        with pytest.raises(ValidationError, match=part) as caught:
            open_store(f"{scheme}://{address}", read_only=read_only)
        assert caught.value.field == "url"
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1:99999", "127.0.0.1:0", "one:1&host=two:70000"])
def test_the_port_of_a_host_option(host):
    with pytest.raises(ValidationError, match="invalid option 'host'"):
        open_store(f"postgresql+psycopg://ann@/db?host={host}")


def test_no_secret_is_shown():
    for option in ("sslpassword=hunter2&sslmode=maybe", "scram_client_key=hunter2"):
        with pytest.raises(ValidationError) as caught:
            open_store(f"{POSTGRESQL}?{option}")
        assert "hunter2" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    "option",
    [
        "gssencmode=require",
        "sslmode=require",
        "sslmode=require&sslnegotiation=direct",
        "hostaddr=127.0.0.1",
        "sslcert=/nowhere/cert.pem",
        "passfile=/nowhere/pgpass",
        "application_name=%C3%BC%EF%BF%BD%25FF",
    ],
)
def test_an_option_of_a_server_that_does_not_answer(option):
    with pytest.raises(StoreUnavailableError):
        open_store(f"{POSTGRESQL}?{option}", reconnect_s=0)


def test_a_misspelled_option_gets_a_suggestion():
    with pytest.raises(ValidationError, match="did you mean 'prepare_threshold'"):
        open_store(f"{POSTGRESQL}?prepare_treshold=0")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///{}/tasks.db?nonsense=1",
        "json:///{}/ledger?nonsense=1",
        "memory:?nonsense=1",
        "sqlite:///{}/tasks.db?prepare_threshold=0",
    ],
)
def test_files_and_memory_have_no_such_options(url, tmp_path):
    with pytest.raises(ValidationError, match=r"nonsense|prepare_threshold"):
        open_store(url.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["memory:", "json:///x", "sqlite:///x.db", POSTGRESQL, MARIADB, MYSQL]
)
def test_an_unknown_keyword_is_named(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        open_store,
        TaskRegistry.open,
        lambda url, **words: asyncio.run(opened(url, words)),
    ):
        with pytest.raises(ValidationError) as caught:
            call(url, prepare_threshold=0)
        assert caught.value.field == "prepare_threshold"
    assert list(tmp_path.iterdir()) == []


async def opened(url, options):
    async with AsyncTaskRegistry.open(url, **options):
        pass


def test_asyncio_and_the_command_line_refuse_options_too():
    with pytest.raises(ValidationError, match="nonsense"):
        asyncio.run(opened(f"{MARIADB}?nonsense=1", {}))
    for words in (["list"], ["db", "check"], ["verify"]):
        result = subprocess.run(
            [sys.executable, "-m", "taskstore", "--url", f"{POSTGRESQL}?nonsense=1", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode in (2, 3)
        assert "unknown option 'nonsense'" in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "option",
    [
        "collation=utf8mb4_nonsense",
        "sql_mode=nonsense",
        "init_command=BOGUS",
        "init_command=SELECT+nonsense",
    ],
)
def test_an_option_that_the_server_refuses(mariadb_url, option):
    with pytest.raises(ValidationError, match=option.partition("=")[0]):
        open_store(f"{mariadb_url}?{option}")


def test_an_init_command_is_executed_on_each_connection(mariadb_url):
    with open_store(f"{mariadb_url}?init_command=SET+%40greeting='hello'") as store:
        for _ in range(2):
            with store._database.engine.connect() as connection:
                assert connection.exec_driver_sql("SELECT @greeting").scalar() == "hello"
                connection.invalidate()


def test_an_engine_that_reads_bytes_is_refused(mariadb_url):
    engine = sa.create_engine(f"{mariadb_url}?charset=utf8mb4", connect_args={"use_unicode": False})
    try:
        with pytest.raises(ValidationError, match="use_unicode") as caught:
            SQLStore(engine)
        assert caught.value.field == "engine"
    finally:
        engine.dispose()


def test_several_ports_are_not_refused():
    for hosts in ("host=127.0.0.1,127.0.0.1&port=1,1", "host=127.0.0.1&port=1"):
        with pytest.raises(StoreUnavailableError):
            open_store(f"postgresql+psycopg://ann@/db?{hosts}", reconnect_s=0)


@pytest.mark.parametrize(
    "option", ["options=-cnonsense.%20x%3D1", "options=-cwork_mem%3Dmuch", "options=-cnonsense%3D1"]
)
def test_a_setting_that_postgresql_refuses(postgres_url, option):
    with pytest.raises(ValidationError, match="'options'"):
        open_store(f"{postgres_url}&{option}")


def test_options_that_work(mariadb_url, postgres_url):
    for url in (
        f"{mariadb_url}?ssl_disabled=true&connect_timeout=5&read_timeout=60&local_infile=false",
        f"{mariadb_url}?ssl_disabled=false&charset=utf8mb4&use_unicode=1&program_name=x",
        f"{postgres_url}&prepare_threshold=3&connect_timeout=5&keepalives=1&application_name=x",
        f"{postgres_url}&prepare_threshold=NONE&sslmode=prefer&client_encoding=UTF-8",
    ):
        with open_store(url) as store:
            assert store.head() == 0


# -- users and homes that do not exist ------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch):
    """Run as a user that the system does not know, without HOME."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_STATE_HOME", "USER", "LOGNAME", "PGUSER"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_home_the_default_ledger_is_refused(nobody, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (default_url, TaskRegistry.open, lambda: asyncio.run(opened(None, {}))):
        with pytest.raises(ValidationError, match="no home directory") as caught:
            call()
        assert "TASKSTORE_URL" in str(caught.value)
        assert not caught.value.retryable
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert default_url() == f"sqlite:///{tmp_path}/state/taskstore/tasks.db"


UNKNOWN_USER = """
import os, sys
import taskstore.stores.sql, taskstore.cli, msgspec, psycopg, pymysql, sqlalchemy.dialects.mysql
from taskstore import open_store
if os.getuid() == 0:
    os.setgid(54321)
    os.setuid(54321)
for name in ("HOME", "XDG_STATE_HOME", "USER", "LOGNAME", "PGUSER", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
pymysql.connections.DEFAULT_USER = None  # as if it had been imported by this user
for url in sys.argv[1:]:
    try:
        open_store(url)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.getuid() != 0 and not os.environ.get("CI"), reason="only root changes users")
def test_a_server_needs_the_name_of_a_user():
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            UNKNOWN_USER,
            "postgresql+psycopg://127.0.0.1:1/db",
            "mariadb+pymysql://127.0.0.1:1/db",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    told = result.stdout.splitlines()
    assert len(told) == 2, result.stderr
    for line in told:
        assert line.startswith("ValidationError url: names no user")
        assert "54321" in line
