"""A life of a ledger in files: what processes do with it, and what they were told."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import suppress

from msgspec.structs import replace

from taskstore.errors import OutcomeUnknownError, TaskStoreError
from taskstore.journal import Change, Put, Snapshot
from taskstore.policy import CompactionPolicy
from taskstore.records import TaskRecord
from taskstore.store import SupportsCompaction, TaskRegistryStore
from taskstore.testing.factories import Model, make_record, next_of, removal_of
from taskstore.testing.powerloss.recorder import KilledError, Omits, RecordedDisk, Recorder, Trap
from taskstore.testing.powerloss.survival import Facts, Known, OpenOn

FOLD = CompactionPolicy(force=True)
"""Keeps all history."""

TRIM = CompactionPolicy(force=True, history_s=0, history_entries=0, keep_snapshots=1)
"""Keeps none."""

ERASE = CompactionPolicy(erase_deleted=True)
"""Keeps none, and no bytes of deleted records."""

LONG = "x" * 5_000
"""A text that makes a commit several blocks and pages long."""


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
        """Compact, when the store can, by :data:`FOLD`, :data:`TRIM` or :data:`ERASE`.

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


def live(life: Life) -> None:
    """Everything that can happen to a ledger, in a few dozen deeds."""
    life.killed_opening(kill("rename"))
    store = life.open()
    one, two, three = (make_record(label=label) for label in ("one", "two", "three"))
    life.apply(store, Put(one))
    life.apply(store, Put(two), Put(three), next_of(one, label="a batch"))
    life.apply(store, next_of(two, error=LONG, label="long"))
    _together(life, store)
    store = _failing(life, store)
    store = _killed(life, store)
    _erased(life, store)
    _replaced(life, store)


def change(life: Life, **fields: object) -> Change:
    """The next change of some task."""
    return next_of(min(life.records.values(), key=lambda record: record.revision), **fields)


def kill(step: str, *, after: int = 0, written: int = 0) -> Trap:
    """Kill the process at a step, or at one of the same name ``after`` some others."""
    return Trap(step, KilledError(), after, written)


def _together(life: Life, store: TaskRegistryStore) -> None:
    """Two processes take turns, one of them compacts, and then the other."""
    other = life.open()
    life.apply(other, change(life, label="by the other"))
    life.apply(store, change(life), Put(make_record(run_id="run")))
    life.compact(other, FOLD)
    life.apply(store, change(life, label="after folding"))
    life.compact(store, FOLD)
    life.apply(other, change(life, label="after folding twice"))
    life.compact(store, TRIM)
    life.apply(other, change(life, label="after trimming"))
    other.close()


def _failing(life: Life, store: TaskRegistryStore) -> TaskRegistryStore:
    """Steps fail: a full disk, a disk that is broken, an interrupt."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    for written in (0, 700):
        life.apply(store, change(life, error=LONG), trap=Trap("pwrite", full, written=written))
        life.apply(store, change(life, label="after a full disk"))
    life.apply(store, change(life), trap=Trap("sync_data", KeyboardInterrupt()))
    life.apply(store, change(life, error=LONG), trap=Trap("sync_data", KeyboardInterrupt()))
    life.apply(store, change(life, label="after an interrupt"))
    life.compact(store, TRIM, trap=Trap("sync_file", full))
    life.apply(store, change(life, label="after a failed compaction"))
    life.apply(store, change(life), trap=Trap("sync_data", broken))
    store.close()
    return life.open()


def _killed(life: Life, store: TaskRegistryStore) -> TaskRegistryStore:
    """Processes are killed in the middle of something, and the next one has to cope."""
    for trap in (kill("pwrite", written=800), kill("pwrite"), kill("sync_data")):
        life.apply(store, change(life, error=LONG), trap=trap)
        store = life.open()
        life.apply(store, change(life, error=None))
    for trap in (kill("sync_data"), kill("pwrite", written=800)):
        other = life.open()
        life.apply(other, change(life, error=LONG), trap=trap)
        life.look(store)
        life.apply(store, change(life, error=None))
    for trap in (
        *(kill("rename", after=number) for number in (0, 1)),
        *(kill("unlink", after=number) for number in (0, 2, 3)),
    ):
        life.compact(store, TRIM, trap=trap)
        store = life.open()
        life.apply(store, change(life, label="after a killed compaction"))
    return store


def _erased(life: Life, store: TaskRegistryStore) -> None:
    """The text of a deleted task is erased."""
    secret = make_record(task="a secret")
    life.apply(store, Put(secret))
    life.compact(store, FOLD)
    life.apply(store, removal_of(secret))
    life.compact(store, ERASE, erases=(b"a secret",))
    life.apply(store, Put(make_record()))


def _replaced(life: Life, store: TaskRegistryStore) -> None:
    """Everything is replaced, also by one who is killed on the way."""
    for trap in (None, kill("rename", after=1), kill("sync_directory", after=2)):
        record = make_record(label="a new life")
        life.save(store, {record.task_id: record}, trap)
        store = life.open() if trap is not None else store
        life.apply(store, Put(make_record(label="its first")))
    life.compact(store, TRIM)
    store.close()
