"""The kit tells backend authors what they forgot, and what it left out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from taskstore.model.journal import Snapshot
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsExclusive,
    SupportsHistory,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    TaskRegistryStore,
)
from taskstore.stores.memory import MemoryStore
from taskstore.testing import StoreContract
from taskstore.testing.contract.base import ContractBase

AUTHORS = """
import pytest
from taskstore.model.codec import decode_snapshot, encode_snapshot
from taskstore.model.journal import Snapshot
from taskstore.store.interface import TaskRegistryStore
from taskstore.stores.memory import MemoryStore
from taskstore.testing import StoreContract


class TestForgotten(StoreContract):
    pass


class TestNotCallable(StoreContract):
    @pytest.fixture
    def make_store(self):
        return MemoryStore()


class TestNotAStore(StoreContract):
    @pytest.fixture
    def make_store(self):
        return lambda *, read_only=False: {}


class TestFreshEachTime(StoreContract):
    @pytest.fixture
    def make_store(self):
        return lambda *, read_only=False: MemoryStore()


class Minimal(TaskRegistryStore):
    saved = Snapshot(0)

    def load_snapshot(self):
        return self.saved

    def save_snapshot(self, snapshot):
        type(self).saved = snapshot


class TestMinimal(StoreContract):
    @pytest.fixture
    def make_store(self):
        Minimal.saved = Snapshot(0)
        return lambda *, read_only=False: Minimal(read_only=read_only)
"""
CLAUSES = "seqs_are_contiguous or every_call_opens or not_due or a_new_journal"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of a file of careless authors."""
    folder = tmp_path_factory.mktemp("author")
    (folder / "test_mine.py").write_text(AUTHORS)
    command = [sys.executable, "-m", "pytest", "-rsfE", "-p", "no:cacheprovider", "-k", CLAUSES]
    ran = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 1
    return ran.stdout


@pytest.mark.parametrize("name", ["TestForgotten", "TestNotCallable"])
def test_a_forgotten_fixture_fails_and_says_what_to_write(outcome, name):
    assert len(re.findall(rf"ERROR test_mine.py::{name}::test_\w+", outcome)) == 4
    assert f"class {name}(StoreContract):\n" in outcome
    assert "return lambda *, read_only=False: MyStore(" in outcome


def test_what_is_no_store_is_named(outcome):
    assert "opens a TaskRegistryStore, but it gave a dict" in outcome


def test_fresh_storage_at_each_call_is_noticed(outcome):
    assert "FAILED test_mine.py::TestFreshEachTime::test_every_call_opens" in outcome
    assert "each call of what make_store returns has to open the same storage" in outcome


def test_a_skip_names_the_missing_ability(outcome):
    reasons = re.findall(r"SKIPPED \[\d+\] \S+ (the store has no .*)", outcome)
    assert "the store has no SupportsJournal" in reasons
    assert "the store has no SupportsJournal, SupportsCompaction" in reasons


def test_a_failing_clause_shows_its_values(outcome):
    assert re.search(r"^E +assert .*==.*", outcome, re.MULTILINE)


def test_rooms_and_their_abilities():
    rooms = {cls.level for cls in StoreContract.__mro__ if issubclass(cls, ContractBase)}
    assert rooms == {"core", "journal", "compaction", "query", "integrity", "shared", "crash-safe"}
    asked = {
        ability
        for cls in StoreContract.__mro__
        for holder in (cls, *vars(cls).values())
        for ability in getattr(holder, "abilities", ())
    }
    assert asked == {
        SupportsJournal,
        SupportsExclusive,
        SupportsHistory,
        SupportsCompaction,
        SupportsQuery,
        SupportsIntegrity,
    }
    assert all(isinstance(MemoryStore(), ability) for ability in asked)


def test_no_two_rooms_have_a_clause_of_the_same_name():
    seen = {}
    for cls in StoreContract.__mro__:
        for name in vars(cls):
            if name.startswith("test_"):
                assert name not in seen, f"{name} is in {cls} and in {seen[name]}"
                seen[name] = cls


def test_every_clause_reads_once_more_after_reopening():
    """By its words; those that have nothing to read again are named here."""
    nothing_to_read = {
        "test_close_before_any_use",
        "test_a_store_is_a_context_manager",
        "test_a_closed_store_refuses_every_call",
        "test_it_says_what_it_is",
        "test_waiting_does_not_spin",
        "test_any_timeout",
        "test_everybody_who_waits_is_woken",
        "test_another_process_ends_the_wait",
        "test_many_random_lives",
        "test_a_reading_process_sees_no_gap",
    }
    once = []
    for cls in StoreContract.__mro__:
        if getattr(cls, "level", None) == "crash-safe":
            continue  # being opened again after a kill is all that these are about
        source = Path(sys.modules[cls.__module__].__file__).read_text() if cls is not object else ""
        for name in vars(cls):
            if not name.startswith("test_") or name in nothing_to_read:
                continue
            body = source[source.index(f"def {name}(") :]
            body = body[: body.find("\n    def ", 5)]
            if not re.search(r"twice\(\)|reopened\(\)|unchanged\(\)|_read_while", body):
                once.append(name)
    assert once == []


def test_a_minimal_store_needs_two_methods():
    assert TaskRegistryStore.__abstractmethods__ == {"load_snapshot", "save_snapshot"}
    assert Snapshot(0).seq == 0
