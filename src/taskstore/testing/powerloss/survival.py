"""What has to be left of a ledger, and the check that it is."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from msgspec import Struct

from taskstore.errors import StoreUnavailableError
from taskstore.model.journal import Put
from taskstore.model.records import TaskRecord
from taskstore.store.disk import SYSTEM, Disk
from taskstore.store.interface import SupportsIntegrity, SupportsJournal, TaskRegistryStore
from taskstore.testing.factories import Model, make_record

_LIMIT = 1_000_000


class OpenOn(Protocol):
    """Opens the ledger in a directory, which changes its files through ``disk``."""

    def __call__(self, directory: Path, disk: Disk, *, read_only: bool) -> TaskRegistryStore:
        """Open it once more."""


class Known(Struct, frozen=True, eq=False):
    """What somebody was told that the ledger holds.

    ``opened``: that there is one; ``erased``: bytes that are nowhere in its
    files any more; ``kept``: bytes that are somewhere in them.
    """

    content: Model
    opened: bool = True
    erased: tuple[bytes, ...] = ()
    kept: tuple[bytes, ...] = ()

    def fits(self, directory: Path) -> bool:
        """Whether bytes are kept and erased in the files as was told."""
        files = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]

        def somewhere(text: bytes) -> bool:
            return any(text in data for data in files)

        return all(map(somewhere, self.kept)) and not any(map(somewhere, self.erased))


class Facts(NamedTuple):
    """What a store says that it holds."""

    head: int
    records: Mapping[str, TaskRecord]
    floor: int | None
    entries: Sequence[tuple[Any, ...]]

    @classmethod
    def of(cls, store: TaskRegistryStore) -> Facts:
        """Ask a store."""
        snapshot = store.load_snapshot()
        assert not snapshot.quarantined, f"set aside: {snapshot.quarantined[0].reason}"
        if not isinstance(store, SupportsJournal):
            return cls(snapshot.seq, dict(snapshot.records), None, ())
        assert store.head() == snapshot.seq, f"head {store.head()}, loaded at {snapshot.seq}"
        floor = store.floor()
        entries = [
            (entry.seq, entry.kind, entry.task_id, entry.revision, entry.record)
            for entry in store.read_journal(floor - 1, _LIMIT)
        ]
        return cls(snapshot.seq, dict(snapshot.records), floor, entries)

    def is_of(self, known: Known) -> bool:
        """Whether this is what somebody was told."""
        model = known.content
        if (self.head, self.records) != (model.head, model.records):
            return False
        return self.floor is None or (self.floor, self.entries) == (model.floor, model.entries)


def check(open_on: OpenOn, directory: Path, allowed: Sequence[Known]) -> str | None:
    """Check that a ledger is as one of ``allowed``, and that life goes on; what is wrong, if it is.

    First somebody looks who may only read, then somebody writes, and then
    both again.
    """
    try:
        found = _read(open_on, directory)
        if found is None and any(not known.opened for known in allowed):
            found = Facts(0, {}, None, ())
        fitting = [known for known in allowed if found is not None and found.is_of(known)]
        if not fitting:
            return f"{_told(found)}, allowed were {[_told(known.content) for known in allowed]}"
        if not any(known.fits(directory) for known in fitting):
            return "what was erased is back, or what was kept is gone"
        with closing(open_on(directory, SYSTEM, read_only=False)) as store:
            found = Facts.of(store)
            if not any(found.is_of(known) for known in fitting):
                return f"who writes finds {_told(found)}, who only read {_told(fitting[0].content)}"
            survivor = make_record(label="a survivor")
            commit = store.apply([Put(survivor)])
            if commit.first_seq != found.head + 1:
                return f"seq {commit.first_seq} was given after {found.head}"
        records = {**found.records, survivor.task_id: survivor}
        again = _read(open_on, directory)
        if again is None or (again.head, again.records) != (found.head + 1, records):
            return f"after one more commit {_told(again)}"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    return None


def _read(open_on: OpenOn, directory: Path) -> Facts | None:
    """What somebody finds who may only read; ``None`` when there is no ledger."""
    try:
        store = open_on(directory, SYSTEM, read_only=True)
    except StoreUnavailableError:
        return None
    with closing(store):
        _verify(store)
        return Facts.of(store)


def _verify(store: TaskRegistryStore) -> None:
    if isinstance(store, SupportsIntegrity):
        problems = store.verify().problems
        assert not problems, "; ".join(problems)


def _told(found: Facts | Model | None) -> str:
    if found is None:
        return "there is no ledger"
    return f"{len(found.records)} records at seq {found.head}, the journal from {found.floor}"
