"""A life of a ledger in files: what processes do with it, and what they were told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from msgspec.structs import replace

from taskstore.errors import OutcomeUnknownError, TaskStoreError
from taskstore.model.journal import Change, Snapshot
from taskstore.model.policies import CompactionPolicy
from taskstore.model.records import TaskRecord
from taskstore.store.interface import SupportsCompaction, TaskRegistryStore
from taskstore.testing.factories import Model
from taskstore.testing.powerloss.recorder import KilledError, Omits, RecordedDisk, Recorder, Trap
from taskstore.testing.powerloss.survival import Facts, Known, OpenOn

FOLD = CompactionPolicy(force=True)
"""Keeps all history.  A life compacts by this policy, or by one that keeps none."""


class Life:
    """Processes that change one ledger, and a record of what each was told.

    Each deed says to the recorder what may be left after a power loss: from
    its beginning what was there or what it makes, from its end what it made.
    """

    def __init__(self, recorder: Recorder, open_on: OpenOn, omits: Omits | None = None) -> None:
        self.directory = recorder.root / "made" / "ledger"
        self.open_on = open_on
        self._recorder = recorder
        self._omits = omits
        self._disks: dict[int, RecordedDisk] = {}
        self._now = Known(Model(), opened=False)
        self._allow(self._now)

    def disk(self) -> RecordedDisk:
        """The disk of one more process."""
        return self._recorder.disk(self._omits)

    def open(self, open_on: OpenOn | None = None) -> TaskRegistryStore:
        """Open the ledger in one more process; ``open_on`` does it in a way of its own."""
        disk = self.disk()
        store = (open_on or self.open_on)(self.directory, disk, read_only=False)
        self._disks[id(store)] = disk
        self.look(store)
        if not self._now.opened:
            self.promise(opened=True)
        return store

    def promise(self, **more: object) -> None:
        """Somebody was told something more of what is there: see :class:`Known`."""
        self._now = replace(self._now, **more)
        self._allow(self._now)

    def look(self, store: TaskRegistryStore) -> None:
        """Let a process look what is there now, which the end of a killed one left open.

        What is seen is not promised: only a change that was acknowledged is.
        """
        facts = Facts.of(store)
        fitting = [known for known in self._allowed if facts.is_of(known)]
        assert fitting, "a process found another ledger, without any loss of power"
        self._now = fitting[-1]

    def killed_opening(self, trap: Trap) -> None:
        """Open the ledger in a process that is killed on its way."""
        disk = self.disk()
        disk.trap = trap
        with suppress(KilledError):
            self.open_on(self.directory, disk, read_only=False).close()
            return
        disk.bury()

    @property
    def records(self) -> Mapping[str, TaskRecord]:
        """What the ledger holds."""
        return self._now.content.records

    def apply(
        self,
        store: TaskRegistryStore,
        *changes: Change,
        trap: Trap | None = None,
        durable: bool = True,
    ) -> None:
        """Commit a batch; one that is not ``durable`` is promised by nobody."""
        after = self._copy()
        after.commit(list(changes))
        self._do(store, after, lambda: store.apply(changes), trap, durable=durable)

    def save(
        self,
        store: TaskRegistryStore,
        records: Mapping[str, TaskRecord],
        trap: Trap | None = None,
    ) -> None:
        """Replace everything."""
        snapshot = Snapshot(self._copy().head + 10, records)
        self._do(store, Model(snapshot), lambda: store.save_snapshot(snapshot), trap)

    def compact(
        self,
        store: TaskRegistryStore,
        policy: CompactionPolicy,
        *,
        erases: tuple[bytes, ...] = (),
        trap: Trap | None = None,
    ) -> None:
        """Compact, when the store can, by :data:`FOLD` or a policy that keeps no history.

        ``erases`` are bytes that are gone afterwards.
        """
        if not isinstance(store, SupportsCompaction):
            return
        after = self._copy()
        if policy is not FOLD:
            after.trim(after.head + 1)
        self._do(store, after, lambda: store.compact(policy), trap, erases=erases)

    def _do(
        self,
        store: TaskRegistryStore,
        after: Model,
        work: Callable[[], object],
        trap: Trap | None,
        *,
        erases: tuple[bytes, ...] = (),
        durable: bool = True,
    ) -> None:
        before, now = self._allowed, self._now
        self._allow(*before, replace(now, content=after))
        self._disks[id(store)].trap = trap
        try:
            work()
        except KilledError:
            self._disks[id(store)].bury()
        except OutcomeUnknownError:
            assert trap is not None, "a deed failed by itself"
        except (TaskStoreError, KeyboardInterrupt):
            assert trap is not None, "a deed failed by itself"
            self._allow(*before)
        else:
            self._now = replace(now, content=after, erased=now.erased + erases)
            self._allow(*(() if durable else before), self._now)
        self._disks[id(store)].trap = None

    def _copy(self) -> Model:
        known, copy = self._now.content, Model()
        copy.head, copy.floor = known.head, known.floor
        copy.states, copy.entries = dict(known.states), list(known.entries)
        return copy

    def _allow(self, *allowed: Known) -> None:
        self._allowed = allowed
        self._recorder.say(allowed)
