"""The matrix notices what is broken on purpose, and goes through a store of any kind."""

from __future__ import annotations

import contextlib

import pytest

from taskstore import Commit, TaskRegistry
from taskstore.errors import OutcomeUnknownError, StoreUnavailableError
from taskstore.model.journal import entries_of
from taskstore.store.interface import TaskRegistryStore
from taskstore.stores.jsonfile import open_json
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.faults import Door, FaultyStore, problems, run_matrix
from taskstore.testing.faults.__main__ import main

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def url(memory_path) -> str:
    return f"json:///{memory_path}/ledger"


class Around(TaskRegistryStore):
    """A store that is asked before this one does something else."""

    def __init__(self, store):
        super().__init__()
        self.store, self.location = store, store.location
        self.close, self.load_snapshot = store.close, store.load_snapshot
        for name in ("head", "floor", "read_journal", "read_snapshot", "wait_for", "verify"):
            setattr(self, name, getattr(store, name))

    def load_snapshot(self):
        raise AssertionError("replaced by the store's own")

    def save_snapshot(self, snapshot):
        self.store.save_snapshot(snapshot)

    def apply(self, changes):
        return self.store.apply(changes)


class Swallowing(Around):
    def apply(self, changes):
        try:
            return self.store.apply(changes)
        except StoreUnavailableError:
            head = self.store.head()
            return Commit(head + 1, head + len(changes), self.clock())


class Untranslated(Around):
    def apply(self, changes):
        try:
            return self.store.apply(changes)
        except StoreUnavailableError as error:
            raise error.__cause__ from None


class FailingAfterwards(Around):
    """Says that nothing was written when only the lock could not be looked at again."""

    def apply(self, changes):
        done = self.store.apply(changes)
        try:
            self.store.floor()
        except StoreUnavailableError as error:
            raise StoreUnavailableError("cannot be read") from error
        return done


def careless_about_syncing(store):
    """fsync fails, and is taken for done."""
    disk = store._writer.disk
    sync = disk.sync_data

    def careless(descriptor: int) -> None:
        with contextlib.suppress(OSError):
            sync(descriptor)

    store._writer.disk = type("Careless", (type(disk),), {"sync_data": staticmethod(careless)})()
    return store


def going_on_after_a_failed_sync(store):
    writer = store._writer
    take_back = writer._take_back

    def forgetting(*arguments, **options):
        try:
            take_back(*arguments, **options)
        finally:
            writer._refusal = None

    writer._take_back = forgetting
    return store


def publishing_first(store, hooks):
    """Memory runs ahead of the disk."""
    registry = TaskRegistry(store, hooks=hooks)
    committer = registry._committer
    apply = store.apply

    def ahead(changes):
        commit = Commit(registry.seq + 1, registry.seq + len(changes), store.clock())
        committer._cache._take_in(entries_of(changes, commit), local=True)
        return apply(changes)

    store.apply = ahead
    return registry


@pytest.mark.parametrize(
    ("wrap", "complaint"),
    [
        (Swallowing, "acknowledged, and not there"),
        (Untranslated, "which is no error of ours"),
        (FailingAfterwards, "and the change is there"),
        (careless_about_syncing, "fdatasync journal-#.jsonl failed, and nobody was told"),
        (going_on_after_a_failed_sync, "failed, and the instance goes on writing"),
    ],
)
def test_a_broken_store_is_noticed(url, wrap, complaint):
    found = problems(run_matrix(url, scenarios=["update"], wrap=wrap))
    assert any(complaint in line for line in found), found


def test_memory_that_runs_ahead_is_noticed(url):
    found = problems(run_matrix(url, scenarios=["create"], make_registry=publishing_first))
    assert any("memory is at seq" in line for line in found), found


def test_hooks_that_are_not_told_are_noticed(url):
    def deaf(store, hooks):
        registry = TaskRegistry(store, hooks=hooks)
        registry.hooks.emit = lambda events: None
        return registry

    found = problems(run_matrix(url, scenarios=["create"], make_registry=deaf))
    assert any("a hook heard up to seq" in line for line in found), found


def test_a_store_that_is_known_by_its_methods_only():
    cells = run_matrix("memory:")
    assert problems(cells) == []
    got = {(cell.step, cell.fault, cell.side): cell.got for cell in cells}
    assert got["apply", "unavailable", "before"] == "StoreUnavailableError"
    assert got["apply", "unknown", "after"] == "OutcomeUnknownError"
    assert got["apply", "delay", ""] == "ok"


def test_a_wrapper_has_the_abilities_of_what_it_wraps(tmp_path):
    from taskstore import SupportsCompaction, SupportsJournal, UnsupportedError

    for store in (MemoryStore(MemoryStorage()), open_json(f"json:///{tmp_path}/ledger")):
        with FaultyStore(store, Door()) as faulty:
            assert isinstance(faulty, SupportsJournal)
            assert isinstance(faulty, SupportsCompaction)
    assert not isinstance(UnsupportedError, SupportsJournal)


def test_the_command_prints_the_matrix(url, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["faults", url, "--scenario", "update", "--steps", "2"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "fdatasync journal-#.jsonl" in printed
    assert "memory equals disk" in printed


def test_the_command_says_what_is_wrong(url, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["faults", url, "--scenario", "update", "--steps", "2"])
    apply = TaskRegistry.record_progress

    def wrong(*arguments, **options):
        try:
            return apply(*arguments, **options)
        except (StoreUnavailableError, OutcomeUnknownError):
            return None

    monkeypatch.setattr(TaskRegistry, "record_progress", wrong)
    assert main() == 1
    assert "WRONG: update" in capsys.readouterr().out
