"""The workload: processes that change a ledger, and the allowed content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from msgspec.structs import replace

from taskstore.errors import OutcomeUnknownError, TaskStoreError
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.journal import Change, Snapshot
from taskstore.model.records import TaskRecord
from taskstore.store.interface import SupportsCompaction, TaskRegistryStore
from taskstore.testing.factories import Model
from taskstore.testing.powerloss.expected import Actual, Expected, OpenOn
from taskstore.testing.powerloss.recorder import (
    Failpoint,
    KilledError,
    Omits,
    RecordedDisk,
    Recorder,
)

KEEP_ALL = CompactionPolicy(force=True)
"""A compaction policy that keeps all history."""


class Workload:
    """Simulated processes that change a ledger, and the content allowed after each change.

    Each change adds a trace entry with the content that a power loss is allowed to leave.
    Until a change is acknowledged, a power loss is allowed to leave the old or the new
    content.  After a change is acknowledged, a power loss must leave the new content.
    """

    def __init__(self, recorder: Recorder, open_on: OpenOn, omits: Omits | None = None) -> None:
        self.directory = recorder.root / "parent" / "ledger"
        self.open_on = open_on
        self._recorder = recorder
        self._omits = omits
        self._disks: dict[int, RecordedDisk] = {}
        self._current = Expected(Model(), exists=False)
        self._allow(self._current)

    def disk(self) -> RecordedDisk:
        """Return a disk for a new process."""
        return self._recorder.disk(self._omits)

    def open(self, open_on: OpenOn | None = None) -> TaskRegistryStore:
        """Open the ledger in a new process; ``open_on`` replaces the workload's ``open_on``."""
        disk = self.disk()
        store = (open_on or self.open_on)(self.directory, disk, read_only=False)
        self._disks[id(store)] = disk
        self.observe(store)
        if not self._current.exists:
            self.acknowledge(exists=True)
        return store

    def acknowledge(self, **fields: object) -> None:
        """Set fields of the expected content, for example ``kept`` (see :class:`Expected`)."""
        self._current = replace(self._current, **fields)
        self._allow(self._current)

    def observe(self, store: TaskRegistryStore) -> None:
        """Read the ledger after a kill; the workload continues with the content that it read.

        After this call, a power loss can still lose an unacknowledged change that was read, but no
        acknowledged change.
        """
        actual = Actual.of(store)
        matching = [expected for expected in self._allowed if actual.matches(expected)]
        assert matching, "the ledger has unexpected content even without a power loss"
        self._current = matching[-1]

    def killed_opening(self, failpoint: Failpoint) -> None:
        """Open the ledger in a process that is killed at the failpoint."""
        disk = self.disk()
        disk.failpoint = failpoint
        with suppress(KilledError):
            self.open_on(self.directory, disk, read_only=False).close()
            return
        disk.close_all()

    @property
    def records(self) -> Mapping[str, TaskRecord]:
        """The current records of the ledger."""
        return self._current.content.records

    def apply(
        self,
        store: TaskRegistryStore,
        *changes: Change,
        failpoint: Failpoint | None = None,
        durable: bool = True,
    ) -> None:
        """Commit a batch.  If ``durable`` is false, a power loss is allowed to lose the batch."""
        after = self._copy()
        after.commit(list(changes))
        self._run(store, after, lambda: store.apply(changes), failpoint, durable=durable)

    def save(
        self,
        store: TaskRegistryStore,
        records: Mapping[str, TaskRecord],
        failpoint: Failpoint | None = None,
    ) -> None:
        """Save a snapshot that replaces all records."""
        snapshot = Snapshot(self._copy().head + 10, records)
        self._run(store, Model(snapshot), lambda: store.save_snapshot(snapshot), failpoint)

    def compact(
        self,
        store: TaskRegistryStore,
        policy: CompactionPolicy,
        *,
        erases: tuple[bytes, ...] = (),
        failpoint: Failpoint | None = None,
    ) -> None:
        """Compact if the store supports compaction.

        ``policy`` must be ``KEEP_ALL``, or a policy that keeps exactly ``policy.history_entries``
        entries; the kept entries must be whole commits.  After the compaction, no file is allowed
        to contain a byte string of ``erases``.
        """
        if not isinstance(store, SupportsCompaction):
            return
        after = self._copy()
        if policy is not KEEP_ALL:
            if policy.history_entries and "exact-history" in store.unsupported_guarantees:
                return
            after.trim(after.head + 1 - policy.history_entries)
        self._run(store, after, lambda: store.compact(policy), failpoint, erases=erases)

    def _run(
        self,
        store: TaskRegistryStore,
        after: Model,
        change: Callable[[], object],
        failpoint: Failpoint | None,
        *,
        erases: tuple[bytes, ...] = (),
        durable: bool = True,
    ) -> None:
        before, current = self._allowed, self._current
        self._allow(*before, replace(current, content=after))
        self._disks[id(store)].failpoint = failpoint
        try:
            change()
        except KilledError:
            self._disks[id(store)].close_all()
            store.close()  # the disk of a killed process ignores this call
        except OutcomeUnknownError:
            assert failpoint is not None, "a change failed without a failpoint"
        except (TaskStoreError, KeyboardInterrupt):
            assert failpoint is not None, "a change failed without a failpoint"
            self._allow(*before)
        else:
            self._current = replace(current, content=after, erased=current.erased + erases)
            self._allow(*(() if durable else before), self._current)
        self._disks[id(store)].failpoint = None

    def _copy(self) -> Model:
        content, copy = self._current.content, Model()
        copy.head, copy.floor = content.head, content.floor
        copy.states, copy.entries = dict(content.states), list(content.entries)
        return copy

    def _allow(self, *allowed: Expected) -> None:
        self._allowed = allowed
        self._recorder.expect(allowed)
