"""The lives of the JSON store: what befalls every store of files, and what only this one knows."""

from __future__ import annotations

from pathlib import Path

from taskstore.model.journal import Put
from taskstore.store.disk import Disk
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing.factories import make_record
from taskstore.testing.powerloss.life import FOLD, Life
from taskstore.testing.powerloss.lives import LIVES, LONG, begun, change, kill


def open_json(directory: Path, disk: Disk, *, read_only: bool) -> JSONStore:
    """Open a directory with ``durability="full"``."""
    return JSONStore(directory, read_only=read_only, disk=disk)


def open_unsynced(directory: Path, disk: Disk, *, read_only: bool) -> JSONStore:
    """Open a directory with ``durability="process"``."""
    return JSONStore(directory, durability="process", read_only=read_only, disk=disk)


def torn_line(life: Life) -> None:
    """What is cut from the journal is kept beside it."""
    store = begun(life)
    lost = "torn, but kept " * 40
    life.apply(store, Put(make_record(task=lost)), trap=kill("pwrite", written=600))
    store = life.open()
    life.promise(kept=(lost[:200].encode(),))
    life.apply(store, change(life, label="after a torn line"))
    store.close()


def beside_one_that_does_not_sync(life: Life) -> None:
    """What another writes without syncing does not harm what is acknowledged around it."""
    store, other = begun(life), life.open(open_unsynced)
    life.apply(other, change(life, error=LONG), durable=False)
    life.compact(other, FOLD)
    life.apply(store, change(life, error=None))
    life.apply(other, change(life, error=LONG), durable=False)
    life.apply(store, change(life, error=None))
    life.apply(life.open(), change(life, error=LONG), trap=kill("pwrite", written=2_000))
    life.open(open_unsynced).close()  # which cuts it off
    life.apply(store, change(life, error=None))
    other.close()
    store.close()


JSON_LIVES = (torn_line, beside_one_that_does_not_sync, *LIVES)
"""Everything that can happen to a JSON store."""
