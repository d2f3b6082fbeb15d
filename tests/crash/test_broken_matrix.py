"""The fault matrix finds the bugs of broken stores, and runs on any store."""

from __future__ import annotations

import contextlib

import pytest

from taskstore import Commit, TaskRegistry
from taskstore.errors import OutcomeUnknownError, StoreUnavailableError
from taskstore.model.journal import entries_of
from taskstore.store.interface import TaskRegistryStore
from taskstore.stores.jsonfile import open_json
from taskstore.stores.memory import MemoryStorage, MemoryStore
from taskstore.testing.faults import FaultyStore, InjectionPoint, problems, run_matrix
from taskstore.testing.faults.__main__ import main

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def url(memory_path) -> str:
    return f"json:///{memory_path}/ledger"


class Wrapper(TaskRegistryStore):
    """A store that forwards its calls to another one."""

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


class Swallowing(Wrapper):
    def apply(self, changes):
        try:
            return self.store.apply(changes)
        except StoreUnavailableError:
            head = self.store.head()
            return Commit(head + 1, head + len(changes), self.clock())


class Untranslated(Wrapper):
    def apply(self, changes):
        try:
            return self.store.apply(changes)
        except StoreUnavailableError as error:
            raise error.__cause__ from None


class FailingAfterwards(Wrapper):
    """Reports a failed write when only a read after the commit failed."""

    def apply(self, changes):
        commit = self.store.apply(changes)
        try:
            self.store.floor()
        except StoreUnavailableError as error:
            raise StoreUnavailableError("cannot be read") from error
        return commit


def ignoring_sync_errors(store):
    """Ignore the errors of fdatasync."""
    disk = store._writer.disk
    sync = disk.sync_data

    def sync_ignoring_errors(descriptor: int) -> None:
        with contextlib.suppress(OSError):
            sync(descriptor)

    store._writer.disk = type(
        "Careless", (type(disk),), {"sync_data": staticmethod(sync_ignoring_errors)}
    )()
    return store


def writing_after_a_failed_sync(store):
    writer = store._writer
    undo_append = writer._undo_append

    def forgetting(*arguments, **options):
        try:
            undo_append(*arguments, **options)
        finally:
            writer._refusal = None

    writer._undo_append = forgetting
    return store


def publishing_first(store, hooks):
    """Publish to memory before the store commits."""
    registry = TaskRegistry(store, hooks=hooks)
    committer = registry._committer
    apply = store.apply

    def ahead(changes):
        commit = Commit(registry.seq + 1, registry.seq + len(changes), store.clock())
        committer._cache._apply_entries(entries_of(changes, commit), local=True)
        return apply(changes)

    store.apply = ahead
    return registry


@pytest.mark.parametrize(
    ("wrap", "problem"),
    [
        (Swallowing, "the change was acknowledged but is not stored"),
        (Untranslated, "which is not a TaskStoreError"),
        (FailingAfterwards, "but the change is stored"),
        (ignoring_sync_errors, "fdatasync journal-#.jsonl failed, but no caller got an error"),
        (writing_after_a_failed_sync, "failed, but the instance still accepts writes"),
    ],
)
def test_a_broken_store_is_detected(url, wrap, problem):
    found = problems(run_matrix(url, scenarios=["update"], wrap=wrap))
    assert any(problem in line for line in found), found


def test_memory_ahead_of_the_disk_is_detected(url):
    found = problems(run_matrix(url, scenarios=["create"], make_registry=publishing_first))
    assert any("memory is at seq" in line for line in found), found


def test_missing_events_are_detected(url):
    def without_events(store, hooks):
        registry = TaskRegistry(store, hooks=hooks)
        registry.hooks.enqueue = lambda events: None
        return registry

    found = problems(run_matrix(url, scenarios=["create"], make_registry=without_events))
    assert any("the hook is at seq" in line for line in found), found


def test_faults_of_any_store_are_injected_at_its_methods():
    cells = run_matrix("memory:")
    assert problems(cells) == []
    outcomes = {(cell.step, cell.fault, cell.timing): cell.outcome for cell in cells}
    assert outcomes["apply", "unavailable", "before"] == "StoreUnavailableError"
    assert outcomes["apply", "unknown", "after"] == "OutcomeUnknownError"
    assert outcomes["apply", "delay", ""] == "ok"


def test_a_faulty_store_has_the_abilities_of_the_wrapped_store(tmp_path):
    from taskstore import SupportsCompaction, SupportsJournal, UnsupportedError

    for store in (MemoryStore(MemoryStorage()), open_json(f"json:///{tmp_path}/ledger")):
        with FaultyStore(store, InjectionPoint()) as faulty:
            assert isinstance(faulty, SupportsJournal)
            assert isinstance(faulty, SupportsCompaction)
    assert not isinstance(UnsupportedError, SupportsJournal)


def test_the_command_prints_the_matrix(url, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["faults", url, "--scenario", "update", "--steps", "2"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "fdatasync journal-#.jsonl" in printed
    assert "memory equals disk" in printed


def test_the_command_prints_the_problems(url, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["faults", url, "--scenario", "update", "--steps", "2"])
    record_progress = TaskRegistry.record_progress

    def ignoring_errors(*arguments, **options):
        try:
            return record_progress(*arguments, **options)
        except (StoreUnavailableError, OutcomeUnknownError):
            return None

    monkeypatch.setattr(TaskRegistry, "record_progress", ignoring_errors)
    assert main() == 1
    assert "WRONG: update" in capsys.readouterr().out
