"""The power loss scenarios of the JSON store."""

from __future__ import annotations

from pathlib import Path

from taskstore.model.journal import Put
from taskstore.store.disk import Disk
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing.factories import make_record
from taskstore.testing.powerloss.scenarios import LONG, SCENARIOS, change, kill, new_ledger
from taskstore.testing.powerloss.workload import KEEP_ALL, Workload


def open_json(directory: Path, disk: Disk, *, read_only: bool) -> JSONStore:
    """Open the JSON ledger in a directory with ``durability="full"``."""
    return JSONStore(directory, read_only=read_only, disk=disk)


def open_unsynced(directory: Path, disk: Disk, *, read_only: bool) -> JSONStore:
    """Open the JSON ledger in a directory with ``durability="process"``."""
    return JSONStore(directory, durability="process", read_only=read_only, disk=disk)


def torn_line(workload: Workload) -> None:
    """A store truncates a torn line from the journal, and keeps the line in another file."""
    store = new_ledger(workload)
    lost = "torn, but kept " * 40
    workload.apply(store, Put(make_record(task=lost)), failpoint=kill("pwrite", written=600))
    store = workload.open()
    workload.acknowledge(kept=(lost[:200].encode(),))
    workload.apply(store, change(workload, label="after a torn line"))
    store.close()


def unsynced_writer(workload: Workload) -> None:
    """If one writer makes fsyncs, its commits are durable even if another writer makes no fsync."""
    store, other = new_ledger(workload), workload.open(open_unsynced)
    workload.apply(other, change(workload, error=LONG), durable=False)
    workload.compact(other, KEEP_ALL)
    workload.apply(store, change(workload, error=None))
    workload.apply(other, change(workload, error=LONG), durable=False)
    workload.apply(store, change(workload, error=None))
    third = workload.open()
    workload.apply(third, change(workload, error=LONG), failpoint=kill("pwrite", written=2_000))
    workload.open(open_unsynced).close()  # truncates the torn line
    workload.apply(store, change(workload, error=None))
    other.close()
    store.close()


JSON_SCENARIOS = (torn_line, unsynced_writer, *SCENARIOS)
"""All scenarios for the JSON store."""
