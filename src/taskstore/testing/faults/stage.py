"""Where a scenario is played: a ledger, its registry and an observer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from taskstore.model.journal import JournalEntry, Snapshot
from taskstore.model.records import TaskRecord
from taskstore.registry.hooks import Event, Hook, Restored, Upserted
from taskstore.registry.registry import TaskRegistry
from taskstore.store.interface import SupportsIntegrity, SupportsJournal, TaskRegistryStore

LAST_ENTRIES = 40
"""How much of the end of the journal is compared."""

OpenStore = Callable[..., TaskRegistryStore]
OpenRegistry = Callable[[TaskRegistryStore, Sequence[Hook]], TaskRegistry]


def open_registry(store: TaskRegistryStore, hooks: Sequence[Hook]) -> TaskRegistry:
    """A registry over a store."""
    return TaskRegistry(store, hooks=hooks)


class Heard:
    """A hook that remembers what it heard, and notices when something is missing."""

    def __init__(self) -> None:
        self.records: dict[str, TaskRecord] = {}
        self.seq: int | None = None
        self.entries: dict[int, tuple[str, str]] = {}
        self.problems: list[str] = []

    def __call__(self, event: Event) -> None:
        """Hear of one event."""
        if isinstance(event, Restored):
            self.records, self.entries = dict(event.records), {}
        else:
            if self.seq is None or event.seq != self.seq + 1:
                self.problems.append(f"a hook heard of seq {event.seq} after {self.seq}")
            task_id = event.record.task_id if isinstance(event, Upserted) else event.task_id
            if event.previous != self.records.get(task_id):
                self.problems.append(f"a hook was told another previous record at seq {event.seq}")
            self.records.pop(task_id, None)
            if isinstance(event, Upserted):
                self.records[task_id] = event.record
            self.entries[event.seq] = (str(event.kind), task_id)
        self.seq = event.seq


class Seen(NamedTuple):
    """What a fresh instance finds on the storage."""

    snapshot: Snapshot
    entries: Mapping[int, JournalEntry]
    problems: Sequence[str] = ()


def _see(store: TaskRegistryStore, *, verify: bool) -> Seen:
    loaded = store.load_snapshot()
    entries: Sequence[JournalEntry] = ()
    if isinstance(store, SupportsJournal):
        after = max(store.floor() - 1, loaded.seq - LAST_ENTRIES)
        entries = store.read_journal(after, LAST_ENTRIES)
    found: Sequence[str] = ()
    if verify and isinstance(store, SupportsIntegrity):
        found = store.verify().problems
    return Seen(loaded, {entry.seq: entry for entry in entries}, found)


class Stage:
    """One ledger, the registry that works on it, and what its hook heard.

    ``open_store`` opens the ledger again and again; ``wrap`` puts something
    around the store that is played with.  An instance that ``remembers`` what
    it read is not asked twice what is stored.
    """

    def __init__(
        self,
        open_store: OpenStore,
        wrap: Callable[[TaskRegistryStore], TaskRegistryStore],
        make_registry: OpenRegistry,
        *,
        remembers: bool = True,
    ) -> None:
        self.open_store = open_store
        self._remembers = remembers
        self._observer: TaskRegistryStore | None = None
        self._wrap = wrap
        self._make_registry = make_registry
        self.registry: TaskRegistry | None = None
        self.heard = Heard()

    def open(self) -> TaskRegistry:
        """Open the ledger, as a program does that starts."""
        self.heard = Heard()
        store = self._wrap(self.open_store())
        try:
            self.registry = self._make_registry(store, [self.heard])
        except BaseException:
            store.close()
            raise
        return self.registry

    def playing(self) -> TaskRegistry:
        """The open registry."""
        assert self.registry is not None
        return self.registry

    def close(self) -> None:
        """Close the registry and its store; a fault may have come between."""
        registry, self.registry = self.registry, None
        if registry is not None:
            registry.close()
            registry.store.close()

    def look(self, *, verify: bool = False) -> Seen:
        """Load the ledger with an instance that knows nothing yet, and have it check itself."""
        store = self._observer or self.open_store(read_only=True)
        try:
            return _see(store, verify=verify)
        finally:
            if self._remembers:
                store.close()
            else:
                self._observer = store

    def leave(self) -> None:
        """Close everything."""
        self.close()
        if self._observer is not None:
            self._observer.close()

    def differences(self, seen: Seen) -> list[str]:
        """How memory, and what the hook heard, differ from what is stored."""
        assert self.registry is not None
        found, problems = seen.snapshot, list(self.heard.problems)
        memory = {record.task_id: record for record in self.registry.list()}
        if (self.registry.seq, memory) != (found.seq, dict(found.records)):
            problems.append(
                f"memory is at seq {self.registry.seq} with {len(memory)} records, "
                f"the disk at seq {found.seq} with {len(found.records)}"
                + ("" if memory.keys() != found.records.keys() else ", of the same tasks")
            )
        if (self.heard.seq, self.heard.records) != (found.seq, dict(found.records)):
            problems.append(f"a hook heard up to seq {self.heard.seq}, the disk is at {found.seq}")
        for seq, heard in self.heard.entries.items():
            entry = seen.entries.get(seq)
            if entry is not None and heard != (str(entry.kind), entry.task_id):
                problems.append(f"at seq {seq} a hook heard of {heard}, the journal says otherwise")
        return problems
