"""The ledger under test: its registry, a recording hook, and the stored state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from taskstore.model.journal import JournalEntry, Snapshot
from taskstore.model.records import TaskRecord
from taskstore.registry.hooks import Event, Hook, Restored, Upserted
from taskstore.registry.registry import TaskRegistry
from taskstore.store.interface import SupportsIntegrity, SupportsJournal, TaskRegistryStore

LAST_ENTRIES = 40
"""How many of the newest journal entries each check reads and compares."""

OpenStore = Callable[..., TaskRegistryStore]
OpenRegistry = Callable[[TaskRegistryStore, Sequence[Hook]], TaskRegistry]


def open_registry(store: TaskRegistryStore, hooks: Sequence[Hook]) -> TaskRegistry:
    """Return a registry that uses the store."""
    return TaskRegistry(store, hooks=hooks)


class RecordingHook:
    """A hook that records the events that it receives, and checks that no event is missing."""

    def __init__(self) -> None:
        self.records: dict[str, TaskRecord] = {}
        self.seq: int | None = None
        self.entries: dict[int, tuple[str, str]] = {}
        self.problems: list[str] = []

    def __call__(self, event: Event) -> None:
        """Record one event."""
        if isinstance(event, Restored):
            self.records, self.entries = dict(event.records), {}
        else:
            if self.seq is None or event.seq != self.seq + 1:
                self.problems.append(f"the hook received seq {event.seq} after seq {self.seq}")
            task_id = event.record.task_id if isinstance(event, Upserted) else event.task_id
            if event.previous != self.records.get(task_id):
                self.problems.append(f"the hook got a wrong previous record at seq {event.seq}")
            self.records.pop(task_id, None)
            if isinstance(event, Upserted):
                self.records[task_id] = event.record
            self.entries[event.seq] = (str(event.kind), task_id)
        self.seq = event.seq


class State(NamedTuple):
    """The stored content of a ledger, read by a store instance that has no cached data."""

    snapshot: Snapshot
    entries: Mapping[int, JournalEntry]
    problems: Sequence[str] = ()


def _read(store: TaskRegistryStore, *, verify: bool) -> State:
    loaded = store.load_snapshot()
    entries: Sequence[JournalEntry] = ()
    if isinstance(store, SupportsJournal):
        after = max(store.floor() - 1, loaded.seq - LAST_ENTRIES)
        entries = store.read_journal(after, LAST_ENTRIES)
    problems: Sequence[str] = ()
    if verify and isinstance(store, SupportsIntegrity):
        problems = store.verify().problems
    return State(loaded, {entry.seq: entry for entry in entries}, problems)


class Harness:
    """One ledger, a registry on this ledger, and the events that the registry's hook received.

    Each call of ``open_store`` opens the ledger with a new store instance.  ``wrap`` wraps the
    store instance that the registry uses.  If ``caches_reads`` is true, a store instance caches the
    data that the instance read, so :meth:`read_stored` opens a new instance for each read.
    """

    def __init__(
        self,
        open_store: OpenStore,
        wrap: Callable[[TaskRegistryStore], TaskRegistryStore],
        make_registry: OpenRegistry,
        *,
        caches_reads: bool = True,
    ) -> None:
        self.open_store = open_store
        self._caches_reads = caches_reads
        self._observer: TaskRegistryStore | None = None
        self._wrap = wrap
        self._make_registry = make_registry
        self.registry: TaskRegistry | None = None
        self.hook = RecordingHook()

    def open(self) -> TaskRegistry:
        """Open the ledger with a new store, registry and hook; return the registry."""
        self.hook = RecordingHook()
        store = self._wrap(self.open_store())
        try:
            self.registry = self._make_registry(store, [self.hook])
        except BaseException:
            store.close()
            raise
        return self.registry

    def opened(self) -> TaskRegistry:
        """Return the open registry."""
        assert self.registry is not None
        return self.registry

    def close(self) -> None:
        """Close the registry and its store, if they are open."""
        registry, self.registry = self.registry, None
        if registry is not None:
            registry.close()
            registry.store.close()

    def read_stored(self, *, verify: bool = False) -> State:
        """Return the stored state, read by a store instance that has no cached data."""
        store = self._observer or self.open_store(read_only=True)
        try:
            return _read(store, verify=verify)
        finally:
            if self._caches_reads:
                store.close()
            else:
                self._observer = store

    def close_all(self) -> None:
        """Close the registry, and the store instance that reads the stored state."""
        self.close()
        if self._observer is not None:
            self._observer.close()

    def differences(self, stored: State) -> list[str]:
        """Compare the registry's memory and the hook with the stored state; return the differences.

        The hook collects the records of the events that it receives.
        """
        assert self.registry is not None
        snapshot, problems = stored.snapshot, list(self.hook.problems)
        memory = {record.task_id: record for record in self.registry.list()}
        if (self.registry.seq, memory) != (snapshot.seq, dict(snapshot.records)):
            problems.append(
                f"memory is at seq {self.registry.seq} with {len(memory)} records, "
                f"the disk is at seq {snapshot.seq} with {len(snapshot.records)} records"
                + ("" if memory.keys() != snapshot.records.keys() else " of the same tasks")
            )
        if (self.hook.seq, self.hook.records) != (snapshot.seq, dict(snapshot.records)):
            problems.append(f"the hook is at seq {self.hook.seq}, the disk at seq {snapshot.seq}")
        for seq, received in self.hook.entries.items():
            entry = stored.entries.get(seq)
            if entry is not None and received != (str(entry.kind), entry.task_id):
                problems.append(
                    f"the hook received {received} at seq {seq}, but the journal has another entry"
                )
        return problems
