"""The allowed content of a ledger after a power loss, and the check of a ledger."""

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
    """Opens the ledger in a directory; the store must change its files through ``disk``."""

    def __call__(self, directory: Path, disk: Disk, *, read_only: bool) -> TaskRegistryStore:
        """Return a newly opened store."""


class Expected(Struct, frozen=True, eq=False):
    """Content that a ledger is allowed to have after a power loss.

    ``exists`` is false if the directory has no ledger.  The files in the directory must not
    contain any byte string of ``erased``.  Each byte string of ``kept`` must be in a file.
    """

    content: Model
    exists: bool = True
    erased: tuple[bytes, ...] = ()
    kept: tuple[bytes, ...] = ()

    def matches_files(self, directory: Path) -> bool:
        """Return whether the files contain each item of ``kept`` and no item of ``erased``."""
        files = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]

        def in_a_file(text: bytes) -> bool:
            return any(text in data for data in files)

        return all(map(in_a_file, self.kept)) and not any(map(in_a_file, self.erased))


class Actual(NamedTuple):
    """The content of a ledger, as a store returns it."""

    head: int
    records: Mapping[str, TaskRecord]
    floor: int | None
    entries: Sequence[tuple[Any, ...]]

    @classmethod
    def of(cls, store: TaskRegistryStore) -> Actual:
        """Return the content that a store reads from its ledger."""
        snapshot = store.load_snapshot()
        assert not snapshot.quarantined, f"quarantined: {snapshot.quarantined[0].reason}"
        if not isinstance(store, SupportsJournal):
            return cls(snapshot.seq, dict(snapshot.records), None, ())
        assert store.head() == snapshot.seq, (
            f"head() is {store.head()}, load_snapshot() has seq {snapshot.seq}"
        )
        floor = store.floor()
        entries = [
            (entry.seq, entry.kind, entry.task_id, entry.revision, entry.record)
            for entry in store.read_journal(floor - 1, _LIMIT)
        ]
        return cls(snapshot.seq, dict(snapshot.records), floor, entries)

    def matches(self, expected: Expected) -> bool:
        """Return whether the content equals the expected content."""
        model = expected.content
        if (self.head, self.records) != (model.head, model.records):
            return False
        return self.floor is None or (self.floor, self.entries) == (model.floor, model.entries)


def check(open_on: OpenOn, directory: Path, allowed: Sequence[Expected]) -> str | None:
    """Check that a ledger has allowed content and accepts a write; return a problem or ``None``.

    First, a read-only store reads the ledger; then a writing store reads the ledger and
    commits; then a read-only store reads the ledger again.
    """
    try:
        actual = _read(open_on, directory)
        if actual is None and any(not option.exists for option in allowed):
            actual = Actual(0, {}, None, ())
        matching = [option for option in allowed if actual is not None and actual.matches(option)]
        if not matching:
            return (
                f"actual: {_text(actual)}; allowed: {[_text(option.content) for option in allowed]}"
            )
        if not any(option.matches_files(directory) for option in matching):
            return "a file contains erased bytes, or no file contains kept bytes"
        with closing(open_on(directory, SYSTEM, read_only=False)) as store:
            actual = Actual.of(store)
            if not any(actual.matches(option) for option in matching):
                read = _text(matching[0].content)
                return f"a writer reads {_text(actual)}, but a read-only instance read {read}"
            record = make_record(label="after the power loss")
            commit = store.apply([Put(record)])
            if commit.first_seq != actual.head + 1:
                return f"the store assigned seq {commit.first_seq} after seq {actual.head}"
        records = {**actual.records, record.task_id: record}
        again = _read(open_on, directory)
        if again is None or (again.head, again.records) != (actual.head + 1, records):
            return f"after one more commit, the actual content is: {_text(again)}"
    except Exception as error:  # noqa: BLE001 - every error is a problem
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    return None


def _read(open_on: OpenOn, directory: Path) -> Actual | None:
    """Return the content that a read-only store reads, or ``None`` if there is no ledger."""
    try:
        store = open_on(directory, SYSTEM, read_only=True)
    except StoreUnavailableError:
        return None
    with closing(store):
        _verify(store)
        return Actual.of(store)


def _verify(store: TaskRegistryStore) -> None:
    if isinstance(store, SupportsIntegrity):
        problems = store.verify().problems
        assert not problems, "; ".join(problems)


def _text(content: Actual | Model | None) -> str:
    if content is None:
        return "no ledger"
    return f"{len(content.records)} records at seq {content.head}, journal from {content.floor}"
