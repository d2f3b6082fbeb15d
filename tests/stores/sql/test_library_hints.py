"""A notice about the SQLite library says what this user can do here."""

from __future__ import annotations

import importlib.util
import platform
import sqlite3
import sys
from types import ModuleType, SimpleNamespace

import pysqlite3.dbapi2
import pytest
import sqlalchemy as sa
from sqlkit import in_process, output_of

from taskstore.errors import StoreUnavailableError
from taskstore.stores.sql import SQLStore
from taskstore.stores.sql.sqlite_library import has_wal_reset_bug, library_hint, library_notice

PASS = "pass module=pysqlite3.dbapi2 to create_engine"
NEW, AFFECTED = "3.53.0", "3.46.1"


def module_of(name, version):
    module = ModuleType(name)
    module.sqlite_version = version
    module.sqlite_version_info = tuple(map(int, version.split(".")))
    return module


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be on a platform, with an installed pysqlite3 (a version, "broken" or None)."""

    def pretend(where, installed):
        system, _, name = where.partition(" ")
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: name)
        found = installed and SimpleNamespace()
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: found)
        usable = None
        if installed not in (None, "broken"):
            usable = module_of("pysqlite3.dbapi2", installed)
        monkeypatch.setitem(sys.modules, "pysqlite3.dbapi2", usable)

    return pretend


@pytest.mark.parametrize(
    ("where", "installed", "used", "owned", "said", "not_said"),
    [
        # The host passes Python's own module.
        ("linux x86_64", NEW, "sqlite3", False, PASS, "install "),
        ("linux aarch64", NEW, "sqlite3", False, PASS, "wheels"),
        ("linux x86_64", AFFECTED, "sqlite3", False, f"--upgrade pysqlite3', and {PASS}", "Python"),
        ("linux x86_64", None, "sqlite3", False, f"install --upgrade pysqlite3', and {PASS}", "Py"),
        (
            "linux x86_64",
            "broken",
            "sqlite3",
            False,
            f"--force-reinstall pysqlite3', and {PASS}",
            "Py",
        ),
        ("linux aarch64", None, "sqlite3", False, "use a Python with SQLite 3.51.3", "pip"),
        ("linux aarch64", AFFECTED, "sqlite3", False, "use a Python with SQLite 3.51.3", "pip"),
        ("darwin x86_64", None, "sqlite3", False, "no wheels for darwin on x86_64", "pip"),
        # The host passes an outdated pysqlite3.
        ("linux x86_64", AFFECTED, "pysqlite3", False, "run 'pip install --upgrade", "module="),
        # taskstore chose the module.
        ("linux x86_64", None, "sqlite3", True, "run 'pip install --upgrade", "module="),
        ("darwin arm64", None, "sqlite3", True, "run 'pip install --upgrade", "module="),
        ("linux x86_64", AFFECTED, "pysqlite3", True, "run 'pip install --upgrade", "module="),
        ("linux x86_64", "broken", "sqlite3", True, "--force-reinstall", "module="),
        ("linux aarch64", None, "sqlite3", True, "only one process write", "pip"),
        ("linux riscv64", AFFECTED, "pysqlite3", True, "only one process write", "pip"),
    ],
)
def test_the_notice_of_an_affected_library(machine, where, installed, used, owned, said, not_said):
    machine(where, installed)
    notice = library_notice(module_of(f"{used}.dbapi2", AFFECTED), owned=owned)
    assert f"SQLite {AFFECTED} (module {used}) has the WAL-reset bug" in notice
    hint = notice.partition("checkpoint; ")[2]
    assert said in hint
    assert not_said not in hint
    assert hint == library_hint(module_of(f"{used}.dbapi2", AFFECTED), owned=owned)


def test_the_notice_of_a_host_on_this_machine(sqlite_path):
    engine = sa.create_engine(f"sqlite:///{sqlite_path}")
    with SQLStore(engine) as store:
        named = [text for text in store.report().notices if "WAL-reset" in text]
    engine.dispose()
    assert bool(named) == has_wal_reset_bug(sqlite3.sqlite_version_info)
    for notice in named:
        assert f"pysqlite3 with SQLite {pysqlite3.dbapi2.sqlite_version} is installed" in notice
        assert notice.endswith(PASS)
    engine = sa.create_engine(f"sqlite:///{sqlite_path}", module=pysqlite3.dbapi2)
    with SQLStore(engine) as store:  # what the hint says helps
        assert not any("WAL-reset" in text for text in store.report().notices)
    engine.dispose()


WITHOUT = """
import sys
sys.modules["pysqlite3"] = None
from taskstore import TaskRegistry
with TaskRegistry.open(sys.argv[1]) as registry:
    print(*registry.store.report().notices)
"""


def test_the_notice_of_a_ledger_without_pysqlite3(sqlite_path):
    notice = output_of(in_process(WITHOUT, f"sqlite:///{sqlite_path}"))
    assert bool(notice.strip()) == has_wal_reset_bug(sqlite3.sqlite_version_info)
    assert "module=" not in notice


def test_a_library_that_is_too_old(sqlite_path, monkeypatch):
    monkeypatch.setattr(sqlite3.dbapi2, "sqlite_version_info", (3, 34, 1))
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    engine = sa.create_engine(f"sqlite:///{sqlite_path}", module=sqlite3)
    with pytest.raises(StoreUnavailableError, match="too old") as caught:
        SQLStore(engine)
    assert PASS in caught.value.hint
    engine.dispose()


def test_two_libraries_name_the_one_to_use(sqlite_path, open_):
    ours = open_(f"sqlite:///{sqlite_path}")
    engine = sa.create_engine(f"sqlite:///{sqlite_path}", module=sqlite3)
    host = SQLStore(engine)
    [notice] = [text for text in host.report().notices if "two SQLite libraries" in text]
    assert notice.endswith("create every engine for this file with module=pysqlite3.dbapi2")
    ours.close()
    host.close()
    engine.dispose()


def test_a_journal_mode_names_its_remedy(sqlite_path, open_):
    engine = sa.create_engine(f"sqlite:///{sqlite_path}", module=pysqlite3.dbapi2)
    with SQLStore(engine) as store:
        [notice] = store.report().notices
    assert "PRAGMA journal_mode = WAL" in notice
    engine.dispose()
    [notice] = open_(f"sqlite:///{sqlite_path}", read_only=True).report().notices
    assert "open the ledger once for writing" in notice
    assert open_(f"sqlite:///{sqlite_path}").report().notices == ()
    assert open_(f"sqlite:///{sqlite_path}", read_only=True).report().notices == ()
