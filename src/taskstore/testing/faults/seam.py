"""Faults of a store that is known by its methods only: a wrapper that raises.

:class:`FaultyStore` stands between a registry and any store.  Each call of the
seam is a step; what strikes are the errors that a store may raise, before the
call reached the store or after it did its work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taskstore.errors import OutcomeUnknownError, StoreBusyError, StoreUnavailableError
from taskstore.model.journal import Change, Commit, Snapshot
from taskstore.store.interface import StoreReport, TaskRegistryStore
from taskstore.testing.faults.door import DELAY, Call, Door, Fault, Step

_ABILITIES = ("compact", "exclusive", "floor", "head", "query", "read_history", "read_journal",
              "read_snapshot", "verify", "wait_for")  # fmt: skip


class FaultyStore(TaskRegistryStore):
    """A store whose calls go through a door.  It has the abilities of what it wraps."""

    def __init__(self, store: TaskRegistryStore, door: Door) -> None:
        super().__init__(read_only=store.read_only)
        self.location = store.location
        self.durability = store.durability
        self.unsupported_guarantees = store.unsupported_guarantees
        self._store = store
        self._door = door
        for name in _ABILITIES:
            if hasattr(store, name):
                setattr(self, name, self._through(name, getattr(store, name)))

    def load_snapshot(self) -> Snapshot:
        """As the store does."""
        loaded: Snapshot = self._door.through(Step("load_snapshot", ""), self._store.load_snapshot)
        return loaded

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """As the store does."""
        self._door.through(Step("save_snapshot", ""), self._store.save_snapshot, snapshot)

    def apply(self, changes: Sequence[Change]) -> Commit:
        """As the store does."""
        self._store.clock = self.clock
        done: Commit = self._door.through(Step("apply", ""), self._store.apply, changes)
        return done

    def report(self) -> StoreReport:
        """As the store does."""
        return self._store.report()

    def close(self) -> None:
        """Close the store."""
        super().close()
        self._store.close()

    def _through(self, name: str, call: Call) -> Call:
        return lambda *arguments: self._door.through(Step(name, ""), call, *arguments)


def _instead(error: Callable[[], Exception]) -> Callable[[Step, Call, tuple[Any, ...]], Any]:
    def strike(_step: Step, _call: Call, _arguments: tuple[Any, ...]) -> Any:
        raise error()

    return strike


def _afterwards(_step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
    call(*arguments)
    raise OutcomeUnknownError("the answer was lost")


def _unavailable() -> Exception:
    return StoreUnavailableError("no space is left")


def _busy() -> Exception:
    return StoreBusyError("somebody else writes")


def _unknown() -> Exception:
    return OutcomeUnknownError("the connection was lost")


def _changes(step: Step) -> bool:
    return step.name in {"apply", "save_snapshot", "compact"}


FAULTS: Sequence[Fault] = (
    Fault("unavailable", "before", _instead(_unavailable)),
    Fault("unavailable stays", "before", _instead(_unavailable), stays=True),
    Fault("busy", "before", _instead(_busy)),
    Fault("unknown", "before", _instead(_unknown), _changes),
    Fault("unknown", "after", _afterwards, _changes),
    DELAY,
)
