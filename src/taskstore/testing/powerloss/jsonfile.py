"""The life of the JSON store: what befalls every store of files, and what only this one knows."""

from __future__ import annotations

import os
from pathlib import Path

from taskstore.disk import Disk
from taskstore.journal import Put
from taskstore.store import TaskRegistryStore
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing.factories import make_record
from taskstore.testing.powerloss.life import FOLD, TRIM, Life, change, kill, live


def open_json(directory: Path, disk: Disk, *, read_only: bool) -> JSONStore:
    """Open a directory with ``durability="full"``."""
    return JSONStore(directory, read_only=read_only, disk=disk)


def open_unsynced(directory: Path, disk: Disk, *, read_only: bool) -> JSONStore:
    """Open a directory with ``durability="process"``."""
    return JSONStore(directory, durability="process", read_only=read_only, disk=disk)


def live_in_json(life: Life) -> None:
    """:func:`live`, and torn lines and headers, and a process that does not sync."""
    live(life)
    store = life.open()
    store = _torn_line(life, store)
    _beside_one_that_does_not_sync(life, store)
    _torn_header(life, store)


def _torn_line(life: Life, store: TaskRegistryStore) -> TaskRegistryStore:
    """What is cut from the journal is kept beside it."""
    lost = "torn, but kept " * 40
    life.apply(store, Put(make_record(task=lost)), trap=kill("pwrite", written=600))
    store = life.open()
    life.promise(kept=(lost[:200].encode(),))
    life.apply(store, change(life, label="after a torn line"))
    return store


def _beside_one_that_does_not_sync(life: Life, store: TaskRegistryStore) -> None:
    """What another writes without syncing must not harm what is acknowledged around it."""
    other = life.open(open_unsynced)
    life.apply(other, change(life, error="not synced " * 100), durable=False)
    life.compact(other, FOLD)
    life.apply(store, change(life, error=None))
    life.apply(other, change(life, error="not synced " * 100), durable=False)
    life.apply(store, change(life, error=None))
    other.close()


def _torn_header(life: Life, store: TaskRegistryStore) -> None:
    """The header of an empty segment is damaged, as by a drive that does not keep its word."""
    life.compact(store, TRIM)
    store.close()
    disk = life.disk()
    last = disk.open(max(life.directory.glob("journal-*.jsonl")), os.O_WRONLY)
    disk.truncate(last, 20)
    disk.sync_file(last)
    disk.close(last)
    store = life.open()
    life.apply(store, change(life, label="after a torn header"))
    store.close()
