"""A store that wraps another store and injects faults at method calls.

:class:`FaultyStore` wraps a store of any kind.  Each method call is a step.  A fault is
an error that a store is allowed to raise.  The wrapper raises the error either before it
calls the wrapped store, or after the wrapped store has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taskstore.errors import OutcomeUnknownError, StoreBusyError, StoreUnavailableError
from taskstore.model.journal import Change, Commit, Snapshot
from taskstore.store.interface import StoreReport, TaskRegistryStore
from taskstore.testing.faults.injection import DELAY, Call, Fault, Inject, InjectionPoint, Step

_ABILITIES = ("compact", "exclusive", "commit_id", "floor", "head", "query", "read_history",
              "read_journal", "read_snapshot", "verify", "wait_for")  # fmt: skip


class FaultyStore(TaskRegistryStore):
    """Wraps a store and has its abilities; passes each method call to an injection point."""

    def __init__(self, store: TaskRegistryStore, injection: InjectionPoint) -> None:
        super().__init__(read_only=store.read_only)
        self.location = store.location
        self.durability = store.durability
        self.unsupported_guarantees = store.unsupported_guarantees
        self._store = store
        self._injection = injection
        for name in _ABILITIES:
            if hasattr(store, name):
                setattr(self, name, self._wrap(name, getattr(store, name)))

    def load_snapshot(self) -> Snapshot:
        """Return the snapshot that the wrapped store loads."""
        load = self._store.load_snapshot
        snapshot: Snapshot = self._injection.run_step(Step("load_snapshot", ""), load)
        return snapshot

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Save a snapshot in the wrapped store."""
        self._injection.run_step(Step("save_snapshot", ""), self._store.save_snapshot, snapshot)

    def apply(self, changes: Sequence[Change]) -> Commit:
        """Commit changes to the wrapped store; return the commit."""
        self._store.clock = self.clock
        commit: Commit = self._injection.run_step(Step("apply", ""), self._store.apply, changes)
        return commit

    def report(self) -> StoreReport:
        """Return the report of the wrapped store."""
        return self._store.report()

    def close(self) -> None:
        """Close this store and the wrapped store."""
        super().close()
        self._store.close()

    def _wrap(self, name: str, call: Call) -> Call:
        return lambda *arguments: self._injection.run_step(Step(name, ""), call, *arguments)


def _fail_before(error: Callable[[], Exception]) -> Inject:
    def inject(_step: Step, _call: Call, _arguments: tuple[Any, ...]) -> Any:
        raise error()

    return inject


def _fail_after(_step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
    call(*arguments)
    raise OutcomeUnknownError("the response was lost")


def _unavailable() -> Exception:
    return StoreUnavailableError("no space left")


def _busy() -> Exception:
    return StoreBusyError("another writer holds the lock")


def _unknown() -> Exception:
    return OutcomeUnknownError("the connection was lost")


def _writes(step: Step) -> bool:
    return step.name in {"apply", "save_snapshot", "compact"}


FAULTS: Sequence[Fault] = (
    Fault("unavailable", "before", _fail_before(_unavailable)),
    Fault("unavailable, persistent", "before", _fail_before(_unavailable), persistent=True),
    Fault("busy", "before", _fail_before(_busy)),
    Fault("unknown", "before", _fail_before(_unknown), _writes),
    Fault("unknown", "after", _fail_after, _writes),
    DELAY,
)
