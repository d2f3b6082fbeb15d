"""What killed writers and compactors left in the directory."""

from __future__ import annotations

from taskstore.disk import TEMPORARY, Disk
from taskstore.stores.jsonfile.layout import Layout
from taskstore.stores.jsonfile.locks import FileLock
from taskstore.stores.jsonfile.snapshots import check_newest


def clear_up(layout: Layout, disk: Disk, compact_lock: FileLock) -> None:
    """Remove it, as far as nobody is at work on it.  The caller holds the writers' lock.

    ``compact_lock`` is closed afterwards.
    """
    leftovers = list(layout.directory.glob(f"*{TEMPORARY}"))
    disk.remove_all([path for path in leftovers if path.name.startswith("journal-")])
    others = [path for path in leftovers if path.name.startswith("snapshot-")]
    if not others and not layout.void:
        return
    try:
        # A compactor that is at work clears up after itself.
        if compact_lock.acquire(0):
            # What is void stands in a header that nobody has checked yet.
            check_newest(layout)
            disk.remove_all([*layout.void, *others])
            disk.sync_directory(layout.directory)
    finally:
        compact_lock.close()
