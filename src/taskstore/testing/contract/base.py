"""The base class of the contract suite, and the ledger under test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import pytest

from taskstore.model.journal import JournalEntry, Snapshot, fold
from taskstore.model.records import TaskRecord
from taskstore.store.interface import (
    SupportsJournal,
    TaskRegistryStore,
)
from taskstore.testing.types import FullStore, OpenStore

MISSING_FIXTURE = """\
{name} does not override the fixture make_store.  Add it:

    class {name}(StoreContract):
        @pytest.fixture
        def make_store(self, tmp_path):
            return lambda *, read_only=False: MyStore(tmp_path / "ledger", read_only=read_only)

The fixture returns a callable.  Each call opens the same storage again, as a second
process would.  The storage must be empty when the fixture is set up."""


Clause = Callable[..., None]


def needs(*abilities: type) -> Callable[[Clause], Clause]:
    """Return a decorator for a clause that requires these ``Supports…`` protocols."""

    def mark(clause: Clause) -> Clause:
        vars(clause)["abilities"] = abilities
        return clause

    return mark


class StoreState(NamedTuple):
    """The full content of a store, as a value; a clause compares two such values."""

    seq: int
    at: int
    records: Mapping[str, TaskRecord]
    quarantined: tuple[bytes, ...]
    head: int | None
    floor: int | None
    journal: tuple[JournalEntry, ...]


def state_of(store: TaskRegistryStore) -> StoreState:
    """Return the full content of a store; no commit may happen during the call."""
    loaded = store.load_snapshot()
    head = floor = None
    journal: tuple[JournalEntry, ...] = ()
    if isinstance(store, SupportsJournal):
        head, floor = store.head(), store.floor()
        journal = tuple(store.read_journal(floor - 1, head + 1))
    quarantined = tuple(sorted(item.raw for item in loaded.quarantined))
    records = dict(loaded.records)
    return StoreState(loaded.seq, loaded.at, records, quarantined, head, floor, journal)


def as_of(store: FullStore, seq: int) -> Snapshot:
    """Read the newest snapshot at or before ``seq``, fold the entries up to ``seq`` into this
    snapshot, and return the result."""
    base = store.read_snapshot(seq)
    if base is None:
        assert store.floor() == 1, (
            f"the store has no snapshot at or before seq {seq}; the floor is {store.floor()}"
        )
        base = Snapshot(0)
    if base.seq == seq:
        return base
    return fold(base, store.read_journal(base.seq, seq - base.seq))


def journal_of(store: FullStore) -> list[JournalEntry]:
    """Return every entry of the journal."""
    return list(store.read_journal(store.floor() - 1, store.head() + 1))


class Ledger:
    """The storage under test, and the store instances that a clause opened on this storage."""

    def __init__(self, open_store: OpenStore) -> None:
        self._open_store = open_store
        self._opened: list[TaskRegistryStore] = []
        self._store: FullStore | None = None

    @property
    def store(self) -> FullStore:
        """The store instance that the clause uses; the first access opens the instance."""
        if self._store is None:
            self._store = self.open()
        return self._store

    @property
    def open_store(self) -> OpenStore:
        """The callable that ``make_store`` returned; the caller must close each opened store."""
        return self._open_store

    def open(self, *, read_only: bool = False) -> FullStore:
        """Open one more store instance on the same storage; :meth:`close` closes the instance."""
        store = self._open_store(read_only=True) if read_only else self._open_store()
        if not isinstance(store, TaskRegistryStore):
            pytest.fail(
                f"make_store must return a callable that opens a TaskRegistryStore, "
                f"but the callable returned a {type(store).__name__}"
            )
        self._opened.append(store)
        return cast("FullStore", store)

    def reopened(self) -> FullStore:
        """Close every store instance, as at the end of a process, and open a new instance.

        If the storage is in memory, the callable that ``make_store`` returned keeps the storage, so
        closing all store instances loses no data.
        """
        self.close()
        return self.store

    def before_and_after_reopen(self) -> Iterator[FullStore]:
        """Yield the current store, then close the store and yield a newly opened store."""
        yield self.store
        yield self.reopened()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Check that the ``with`` block changes no content of the store, even after a reopen."""
        before = state_of(self.store)
        yield
        for store in self.before_and_after_reopen():
            assert state_of(store) == before

    def close(self) -> None:
        """Close every store instance that :meth:`open` opened."""
        self._store = None
        while self._opened:
            self._opened.pop().close()


class ContractBase:
    """The fixtures of all clauses.  To test a backend, subclass ``StoreContract`` instead.

    ``level`` is the contract level of the clauses in a class.  If the store lacks
    one of ``abilities``, all clauses of the class are skipped.
    """

    is_taskstore_contract: ClassVar[bool] = True
    level: ClassVar[str] = "core"
    abilities: ClassVar[tuple[type, ...]] = ()
    guarantee: ClassVar[str | None] = None
    """If ``store.unsupported_guarantees`` has this key, the clauses of the class are skipped."""

    @pytest.fixture
    def make_store(self) -> OpenStore:
        """Return a callable that opens the storage under test; subclasses override this fixture."""
        pytest.fail(MISSING_FIXTURE.format(name=type(self).__name__), pytrace=False)

    @pytest.fixture
    def ledger(self, request: pytest.FixtureRequest, make_store: OpenStore) -> Iterator[Ledger]:
        """Yield the :class:`Ledger` of the storage under test; the storage is empty."""
        if not callable(make_store):
            pytest.fail(MISSING_FIXTURE.format(name=type(self).__name__), pytrace=False)
        ledger = Ledger(make_store)
        try:
            self.skip_without_abilities(request.function, ledger.store)
            yield ledger
        finally:
            ledger.close()

    def skip_without_abilities(self, clause: Any, store: TaskRegistryStore) -> None:
        """Skip a clause if the store lacks a required ability or a required guarantee."""
        contract = next(cls for cls in type(self).__mro__ if clause.__name__ in vars(cls))
        required = (*vars(contract).get("abilities", ()), *vars(clause).get("abilities", ()))
        missing = [ability.__name__ for ability in required if not isinstance(store, ability)]
        if missing:
            pytest.skip(f"the store has no {', '.join(missing)}")
        guarantee: str | None = vars(contract).get("guarantee")
        if guarantee is not None and guarantee in store.unsupported_guarantees:
            reason = store.unsupported_guarantees[guarantee]
            pytest.skip(f"the store does not guarantee {guarantee}: {reason}")
