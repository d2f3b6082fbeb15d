"""What befalls a ledger in files: short lives, each of them with one kind of trouble."""

from __future__ import annotations

import errno
import os

from taskstore.model.journal import Change, Put
from taskstore.model.policies import CompactionPolicy
from taskstore.store.interface import TaskRegistryStore
from taskstore.testing.factories import make_record, next_of, removal_of
from taskstore.testing.powerloss.life import FOLD, Life
from taskstore.testing.powerloss.recorder import KilledError, Trap

TRIM = CompactionPolicy(force=True, history_s=0, history_entries=0, keep_snapshots=1)
"""Keeps no history."""

ERASE = CompactionPolicy(erase_deleted=True)
"""Keeps no history, and no bytes of deleted records."""

LONG = "x" * 3_000
"""A text that makes a commit several blocks long."""


def begun(life: Life) -> TaskRegistryStore:
    """Begin: create the ledger and some tasks."""
    store = life.open()
    life.apply(store, Put(make_record()), Put(make_record(run_id="run")))
    return store


def change(life: Life, **fields: object) -> Change:
    """The next change of some task."""
    return next_of(min(life.records.values(), key=lambda record: record.revision), **fields)


def kill(step: str, *, after: int = 0, written: int = 0) -> Trap:
    """Kill the process at a step, or at one of the same name ``after`` some others."""
    return Trap(step, KilledError(), after, written)


def growing(life: Life) -> None:
    """A ledger is created, at the second attempt, and grows: small, long and many changes."""
    life.killed_opening(kill("rename"))
    store = begun(life)
    life.apply(store, *(Put(make_record(label=f"{number}")) for number in range(8)))
    life.apply(store, change(life, error=2 * LONG))
    life.apply(store, removal_of(next(iter(life.records.values()))), change(life))
    store.close()
    store = life.open()
    life.apply(store, change(life, label="after reopening"))
    store.close()


def together(life: Life) -> None:
    """Two processes take turns, one of them compacts, and then the other."""
    store, other = begun(life), life.open()
    life.apply(other, change(life, label="by the other"))
    life.compact(other, FOLD)
    life.apply(store, change(life, label="after folding"))
    life.compact(store, FOLD)
    life.apply(other, change(life, label="after folding twice"))
    life.compact(store, TRIM)
    life.apply(other, change(life, label="after trimming"))
    other.close()
    store.close()


def failing(life: Life) -> None:
    """Steps fail: a full disk, a disk that is broken, an interrupt."""
    store = begun(life)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    for written in (0, 1_700):
        life.apply(store, change(life, error=LONG), trap=Trap("pwrite", full, written=written))
        life.apply(store, change(life, label="after a full disk"))
    life.apply(store, change(life), trap=Trap("sync_data", KeyboardInterrupt()))
    life.apply(store, change(life, error=LONG), trap=Trap("sync_data", KeyboardInterrupt()))
    life.apply(store, change(life, label="after an interrupt"))
    life.compact(store, TRIM, trap=Trap("sync_file", full))
    life.apply(store, change(life, label="after a failed compaction"))
    life.apply(store, change(life), trap=Trap("sync_data", broken))
    store.close()
    store = life.open()
    life.apply(store, change(life, label="after a failed sync"))
    store.close()


def killed(life: Life) -> None:
    """Processes are killed in a commit, and the next one has to cope, or one that is there."""
    witness = begun(life)
    for trap in (kill("sync_data"), kill("pwrite", written=800), kill("pwrite")):
        store = life.open()
        life.apply(store, change(life, error=LONG), trap=trap)
        life.look(witness)
        life.apply(witness, change(life, error=None))
    witness.close()
    for trap in (kill("pwrite", written=800), kill("sync_data")):
        store = life.open()
        life.apply(store, change(life, error=LONG), trap=trap)
        store = life.open()
        life.apply(store, change(life, error=None))
        store.close()


def in_turns(life: Life) -> None:
    """Two write in turn and rely on what the other has synced, until it is killed before that."""
    store, other = begun(life), life.open()
    for _ in range(2):
        life.apply(other, change(life, label="by the other"))
        life.apply(store, change(life, label="in turn"))
    life.apply(other, change(life, error=LONG), trap=kill("sync_data"))
    life.look(store)
    life.apply(store, change(life, error=None))
    store.close()


def killed_mending(life: Life) -> None:
    """Who finds what a killed one has left is killed itself, beside one who has been there."""
    witness, store = begun(life), life.open()
    life.apply(store, change(life, error=LONG), trap=kill("pwrite", written=2_000))
    life.killed_opening(kill("sync_data"))
    life.apply(witness, change(life))
    witness.close()


def killed_compacting(life: Life) -> None:
    """Processes are killed in a compaction."""
    store = begun(life)
    traps = [kill("rename", after=number) for number in (0, 1)]
    traps += [kill("unlink", after=number) for number in (0, 2, 3)]
    for trap in traps:
        life.compact(store, TRIM, trap=trap)
        store = life.open()
        life.apply(store, change(life, label="after a killed compaction"))
    store.close()


def erased(life: Life) -> None:
    """The text of a deleted task is erased."""
    store = begun(life)
    secret = make_record(task="a secret")
    life.apply(store, Put(secret))
    life.compact(store, FOLD)
    life.apply(store, removal_of(secret))
    life.compact(store, ERASE, erases=(b"a secret",))
    life.apply(store, Put(make_record()))
    store.close()


def replaced(life: Life) -> None:
    """Everything is replaced, also by one who is killed on the way."""
    store = begun(life)
    for trap in (None, kill("rename", after=1), kill("sync_directory", after=2)):
        record = make_record(label="a new life")
        life.save(store, {record.task_id: record}, trap)
        store = life.open() if trap is not None else store
        life.apply(store, Put(make_record(label="its first")))
    life.compact(store, TRIM)
    store.close()


LIVES = (
    *(growing, together, in_turns, failing, killed, killed_mending),
    *(killed_compacting, erased, replaced),
)
"""Everything that can happen to any store of files."""
