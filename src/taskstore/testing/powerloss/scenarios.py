"""The power loss scenarios for any file-based store."""

from __future__ import annotations

import errno
import os

from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.journal import Change, Put
from taskstore.store.interface import TaskRegistryStore
from taskstore.testing.factories import make_record, next_of, removal_of
from taskstore.testing.powerloss.recorder import Failpoint, KilledError
from taskstore.testing.powerloss.workload import KEEP_ALL, Workload

TRIM = CompactionPolicy(force=True, history_s=0, history_entries=0, keep_snapshots=1)
"""A compaction policy that keeps no history."""

TRIM_PART = CompactionPolicy(force=True, history_s=0, history_entries=2, keep_snapshots=1)
"""A compaction policy that keeps two entries."""

ERASE = CompactionPolicy(erase_deleted=True, history_entries=0)
"""A compaction policy that keeps no history and no bytes of deleted records."""

LONG = "x" * 3_000
"""A text that makes a commit several blocks long."""


def new_ledger(workload: Workload) -> TaskRegistryStore:
    """Create a ledger with two tasks, and return its store."""
    store = workload.open()
    workload.apply(store, Put(make_record()), Put(make_record(run_id="run")))
    return store


def change(workload: Workload, **fields: object) -> Change:
    """Return a Put of the next revision of a task, namely the task with the lowest revision."""
    return next_of(min(workload.records.values(), key=lambda record: record.revision), **fields)


def kill(step: str, *, after: int = 0, written: int = 0) -> Failpoint:
    """Return a failpoint that kills the process at call ``after`` + 1 of the operation ``step``."""
    return Failpoint(step, KilledError(), after, written)


def growth(workload: Workload) -> None:
    """After a process is killed, a second process creates a ledger and commits several batches."""
    workload.killed_opening(kill("rename"))
    store = new_ledger(workload)
    workload.apply(store, *(Put(make_record(label=f"{number}")) for number in range(8)))
    workload.apply(store, change(workload, error=2 * LONG))
    workload.apply(store, removal_of(next(iter(workload.records.values()))), change(workload))
    store.close()
    store = workload.open()
    workload.apply(store, change(workload, label="after reopening"))
    store.close()


def two_processes(workload: Workload) -> None:
    """Two processes commit in turn, and each process compacts."""
    store, other = new_ledger(workload), workload.open()
    workload.apply(other, change(workload, label="by the other"))
    workload.compact(other, KEEP_ALL)
    workload.apply(store, change(workload, label="after folding"))
    workload.compact(store, KEEP_ALL)
    workload.apply(other, change(workload, label="after folding twice"))
    workload.compact(store, TRIM)
    workload.apply(other, change(workload, label="after trimming"))
    other.close()
    store.close()


def failing_steps(workload: Workload) -> None:
    """File operations fail because of a full disk, a broken disk or an interrupt."""
    store = new_ledger(workload)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    for written in (0, 1_700):
        failpoint = Failpoint("pwrite", full, written=written)
        workload.apply(store, change(workload, error=LONG), failpoint=failpoint)
        workload.apply(store, change(workload, label="after a full disk"))
    interrupt = KeyboardInterrupt()
    workload.apply(store, change(workload), failpoint=Failpoint("sync_data", interrupt))
    workload.apply(store, change(workload, error=LONG), failpoint=Failpoint("sync_data", interrupt))
    workload.apply(store, change(workload, label="after an interrupt"))
    workload.compact(store, TRIM, failpoint=Failpoint("sync_file", full))
    workload.apply(store, change(workload, label="after a failed compaction"))
    workload.apply(store, change(workload), failpoint=Failpoint("sync_data", broken))
    store.close()
    store = workload.open()
    workload.apply(store, change(workload, label="after a failed sync"))
    store.close()


def killed_in_commit(workload: Workload) -> None:
    """A process is killed during a commit; then an older process or a new process commits."""
    witness = new_ledger(workload)
    for failpoint in (kill("sync_data"), kill("pwrite", written=800), kill("pwrite")):
        store = workload.open()
        workload.apply(store, change(workload, error=LONG), failpoint=failpoint)
        workload.observe(witness)
        workload.apply(witness, change(workload, error=None))
    witness.close()
    for failpoint in (kill("pwrite", written=800), kill("sync_data")):
        store = workload.open()
        workload.apply(store, change(workload, error=LONG), failpoint=failpoint)
        store = workload.open()
        workload.apply(store, change(workload, error=None))
        store.close()


def alternating_writers(workload: Workload) -> None:
    """Two writers commit in turn, and each writer relies on the fsyncs of the other.  Then one
    writer is killed before its fsync."""
    store, other = new_ledger(workload), workload.open()
    for _ in range(2):
        workload.apply(other, change(workload, label="by the other"))
        workload.apply(store, change(workload, label="in turn"))
    workload.apply(other, change(workload, error=LONG), failpoint=kill("sync_data"))
    workload.observe(store)
    workload.apply(store, change(workload, error=None))
    store.close()


def killed_in_recovery(workload: Workload) -> None:
    """A process is killed during the recovery from a kill; then an older process commits."""
    witness, store = new_ledger(workload), workload.open()
    workload.apply(store, change(workload, error=LONG), failpoint=kill("pwrite", written=2_000))
    workload.killed_opening(kill("sync_data"))
    workload.apply(witness, change(workload))
    witness.close()


def killed_in_compaction(workload: Workload) -> None:
    """Processes are killed during a compaction."""
    store = new_ledger(workload)
    failpoints = [kill("rename", after=number) for number in (0, 1)]
    failpoints += [kill("unlink", after=number) for number in (0, 2, 3)]
    for failpoint in failpoints:
        workload.compact(store, TRIM, failpoint=failpoint)
        store = workload.open()
        workload.apply(store, change(workload, label="after a killed compaction"))
    store.close()


def partial_trim(workload: Workload) -> None:
    """Compactions trim a part of the history; the process is killed during some compactions."""
    store = new_ledger(workload)
    failpoints = [kill("rename", after=number) for number in range(3)]
    for failpoint in (*failpoints, kill("unlink"), None):
        for number in range(3):
            workload.apply(store, change(workload, label=f"before a compaction {number}"))
        workload.compact(store, TRIM_PART, failpoint=failpoint)
        if failpoint is not None:
            store = workload.open()
    workload.apply(store, change(workload, label="after a part was trimmed"))
    store.close()


def erasure(workload: Workload) -> None:
    """A compaction erases the text of a deleted task."""
    store = new_ledger(workload)
    secret = make_record(task="a secret")
    workload.apply(store, Put(secret))
    workload.compact(store, KEEP_ALL)
    workload.apply(store, removal_of(secret))
    workload.compact(store, ERASE, erases=(b"a secret",))
    workload.apply(store, Put(make_record()))
    store.close()


def replacement(workload: Workload) -> None:
    """Processes save snapshots that replace all records; some of the processes are killed."""
    store = new_ledger(workload)
    for failpoint in (None, kill("rename", after=1), kill("sync_directory", after=2)):
        record = make_record(label="replaced")
        workload.save(store, {record.task_id: record}, failpoint)
        store = workload.open() if failpoint is not None else store
        workload.apply(store, Put(make_record(label="its first")))
    workload.compact(store, TRIM)
    store.close()


SCENARIOS = (
    *(growth, two_processes, alternating_writers, failing_steps, killed_in_commit),
    *(killed_in_recovery, killed_in_compaction, partial_trim, erasure, replacement),
)
"""The scenarios for any file-based store."""
