"""The messages and skips of the contract suite for backend authors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from taskstore.model.journal import Snapshot
from taskstore.store.interface import (
    SupportsCommitIds,
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
    """The pytest output for a file of incorrect contract classes."""
    folder = tmp_path_factory.mktemp("author")
    (folder / "test_mine.py").write_text(AUTHORS)
    command = [sys.executable, "-m", "pytest", "-rsfE", "-p", "no:cacheprovider", "-k", CLAUSES]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    return result.stdout


@pytest.mark.parametrize("name", ["TestForgotten", "TestNotCallable"])
def test_a_missing_fixture_fails_with_an_example(outcome, name):
    assert len(re.findall(rf"ERROR test_mine.py::{name}::test_\w+", outcome)) == 4
    assert f"class {name}(StoreContract):\n" in outcome
    assert "return lambda *, read_only=False: MyStore(" in outcome


def test_a_value_that_is_no_store_fails(outcome):
    assert "opens a TaskRegistryStore, but the callable returned a dict" in outcome


def test_new_storage_at_each_call_fails(outcome):
    assert "FAILED test_mine.py::TestFreshEachTime::test_every_call_opens" in outcome
    assert "each call of the callable that make_store returns must open the same storage" in outcome


def test_a_skip_names_the_missing_ability(outcome):
    reasons = re.findall(r"SKIPPED \[\d+\] \S+ (the store has no .*)", outcome)
    assert "the store has no SupportsJournal" in reasons
    assert "the store has no SupportsJournal, SupportsCompaction" in reasons


def test_a_failing_clause_shows_its_values(outcome):
    assert re.search(r"^E +assert .*==.*", outcome, re.MULTILINE)


def test_levels_and_their_abilities():
    levels = {cls.level for cls in StoreContract.__mro__ if issubclass(cls, ContractBase)}
    assert levels == {"core", "journal", "compaction", "query", "integrity", "shared", "crash-safe"}
    required = {
        ability
        for cls in StoreContract.__mro__
        for holder in (cls, *vars(cls).values())
        for ability in getattr(holder, "abilities", ())
    }
    assert required == {
        SupportsJournal,
        SupportsExclusive,
        SupportsHistory,
        SupportsCommitIds,
        SupportsCompaction,
        SupportsIdSearch,
        SupportsStreaming,
        SupportsQuery,
        SupportsSummary,
        SupportsIntegrity,
    }
    assert all(isinstance(MemoryStore(), ability) for ability in required)


def test_no_two_classes_define_the_same_clause():
    defined = {}
    for cls in StoreContract.__mro__:
        for name in vars(cls):
            if name.startswith("test_"):
                assert name not in defined, f"{name} is in {cls} and in {defined[name]}"
                defined[name] = cls


def test_every_clause_reads_again_after_reopening():
    """Search the source of each clause; some clauses are exempt."""
    exempt = {
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
        "test_a_dropped_store_gives_its_descriptors_back",
        "test_a_damaged_record_is_found",
    }
    not_reopened = []
    for cls in StoreContract.__mro__:
        if getattr(cls, "level", None) == "crash-safe":
            continue  # these clauses always reopen after a kill
        source = Path(sys.modules[cls.__module__].__file__).read_text() if cls is not object else ""
        for name in vars(cls):
            if not name.startswith("test_") or name in exempt:
                continue
            body = source[source.index(f"def {name}(") :]
            body = body[: body.find("\n    def ", 5)]
            if not re.search(
                r"before_and_after_reopen\(\)|reopened\(\)|unchanged\(\)|_read_while", body
            ):
                not_reopened.append(name)
    assert not_reopened == []


def test_a_minimal_store_needs_two_methods():
    assert TaskRegistryStore.__abstractmethods__ == {"load_snapshot", "save_snapshot"}
    assert Snapshot(0).seq == 0
