"""The JSON store: one ledger in a directory of files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from taskstore.errors import CorruptStoreError, ValidationError
from taskstore.model import codec
from taskstore.model.compaction_policy import CompactionPolicy, CompactionReport
from taskstore.model.journal import (
    Change,
    ChangeSet,
    Commit,
    JournalEntry,
    Quarantined,
    Snapshot,
    dedup_key,
    plan,
    validated_snapshot,
)
from taskstore.model.records import MAX_INT, TaskRecord
from taskstore.store.disk import SYSTEM, Disk
from taskstore.store.interface import (
    LoadedRecordsStore,
    StoreReport,
    VerifyReport,
    check_base,
    clock_notices,
)
from taskstore.store.opening import check_options, redacted
from taskstore.stores.common.change_feed import ChangeFeed, PollingWatcher, Watcher
from taskstore.stores.common.compaction import compact
from taskstore.stores.common.integrity import MAX_TASKS_NAMED, IntegrityCheck
from taskstore.stores.jsonfile.compaction import Compaction
from taskstore.stores.jsonfile.index import Index, decode_stub, load_records
from taskstore.stores.jsonfile.layout import (
    Layout,
    read_layout,
    read_snapshot,
    retry_while_changing,
    translate_os_errors,
    unavailable_error,
)
from taskstore.stores.jsonfile.lines import Identity, encode_changes, journal_entry
from taskstore.stores.jsonfile.reading import Reader
from taskstore.stores.jsonfile.segments import CommitReader
from taskstore.stores.jsonfile.writing import Writer

LOCK_TIMEOUT_S = 30.0
"""How long a write waits by default for other writers that make no progress, in seconds."""

LONGEST_POLL_PAUSE_S = 0.025
"""While a call waits for a commit, the longest pause between two polls of the files, in seconds."""

_T = TypeVar("_T")


class JSONStore(LoadedRecordsStore):
    """A ledger in a directory of JSON files, for any number of processes on one machine.

    ``path`` is the directory (``str`` or ``Path``); the store creates a missing
    directory.  ``durability`` is ``"full"`` or ``"process"``.  If ``strict`` is true, a load
    raises an error for a record that does not decode; otherwise the record is quarantined.  If
    other writers make no progress for ``lock_timeout_s`` seconds, a write raises
    :class:`~taskstore.StoreBusyError`.  ``disk`` performs all changes of the files.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        durability: str = "full",
        read_only: bool = False,
        strict: bool = False,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        disk: Disk = SYSTEM,
    ) -> None:
        super().__init__(read_only=read_only)
        check_options(durability, "auto")
        if not str(path) or "\0" in str(path):
            raise ValidationError("path", "must be the path of a directory")
        self.durability = durability
        self.directory = Path(path).absolute()  # absolute, because the working directory can change
        self.location = str(path)
        self.strict = strict
        self._reader = Reader(self.directory, strict=strict, ledger_found=not read_only)
        self._writer: Writer | None = None
        self._quarantined: tuple[Quarantined, ...] = ()
        # The time of the last commit at the newest load.
        self._loaded_at = 0
        self._feed = ChangeFeed(
            self.head, partial(_start_watcher, self._reader, self.head), self.location
        )
        with translate_os_errors(self.directory):
            if read_only:
                self._reader.with_layout(lambda layout: layout)
                return
            disk.make_directory(self.directory)
            writer = Writer(
                self.directory,
                sync=durability == "full",
                lock_timeout_s=lock_timeout_s,
                disk=disk,
            )
            try:
                with writer.lock(indexed=False):
                    self._writer = writer
            except BaseException:
                writer.close()
                raise
        self._release_when_dropped(writer.close)

    @property
    def identity(self) -> Identity:
        """Return the ledger and its timeline."""
        return self._read(lambda layout: layout.identity)

    def _read(self, work: Callable[[Layout], _T]) -> _T:
        self._check_open()
        with translate_os_errors(self.directory):
            return self._reader.with_layout(work)

    def _require_writer(self) -> Writer:
        self._check_writable()
        assert self._writer is not None
        return self._writer

    # -- content ----------------------------------------------------------

    def load_snapshot(self) -> Snapshot:
        writer = self._writer

        def work(layout: Layout) -> Snapshot:
            if writer is None or writer.index is not None:
                return load_records(layout, strict=self.strict)[0]
            index = Index()
            snapshot, end = load_records(layout, strict=self.strict, index=index)
            writer.preloaded = (index, end)
            return snapshot

        snapshot = self._read(work)
        self._quarantined, self._loaded_at = snapshot.quarantined, snapshot.at
        return snapshot

    def save_snapshot(self, snapshot: Snapshot) -> None:
        writer = self._require_writer()
        with translate_os_errors(self.directory):
            snapshot = validated_snapshot(snapshot)
            payloads = [
                codec.encode_record(snapshot.records[task_id])
                for task_id in sorted(snapshot.records)
            ]
            with (
                writer.compact_lock().hold(writer.timeout_s, "a compactor") as lock,
                writer.lock(indexed=False),
            ):
                writer.replace(snapshot, payloads, lock)
        self._quarantined = snapshot.quarantined
        self._feed.announce(snapshot.seq)

    def apply(self, changes: Sequence[Change]) -> Commit:
        self._check_open()
        writer = self._writer or self._require_writer()
        net_changes = plan(changes)
        entries = encode_changes(changes)
        try:
            with writer.lock():
                if isinstance(changes, ChangeSet) and changes.base != writer.last_commit:
                    check_base(self, changes)
                commit = writer.commit(net_changes, len(changes), entries, self.clock)
        except OSError as error:
            raise unavailable_error(self.directory, error) from error
        if self._feed.waiters:
            self._feed.announce(commit.last_seq)
        return commit

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        writer = self._require_writer()
        with writer.lock():
            try:
                writer.reserved = True
                yield
            finally:
                writer.reserved = False

    def report(self) -> StoreReport:
        notices: list[str | None] = [] if self._writer is None else [*self._writer.notices]
        notices += (self._reader.missing_history, self._reader.alias_notice())
        written_at = 0 if self._writer is None else self._writer.end.at
        notices += clock_notices(max(written_at, self._loaded_at), self.clock)
        if self.read_only:
            notices.append(self._reader.torn_line_notice())
        return StoreReport(self._quarantined, tuple(filter(None, notices)))

    def close(self) -> None:
        if not self._closed:
            super().close()
            self._feed.close()
            if self._writer is not None and not self._in_forked_child:
                self._writer.close()

    # -- journal ----------------------------------------------------------

    def head(self) -> int:
        return self._read(lambda layout: self._reader.end(layout).seq)

    def floor(self) -> int:
        return self._read(lambda layout: layout.floor)

    def commit_id(self, seq: int) -> str:
        return self._read(lambda layout: self._reader.commit_id(layout, seq))

    def read_journal(self, after: int, limit: int) -> Sequence[JournalEntry]:
        return self._read(lambda layout: self._reader.read(layout, after, limit))

    def read_history(self, task_id: str) -> Sequence[JournalEntry]:
        return self._read(lambda layout: self._reader.history(layout, task_id))

    def read_snapshot(self, at: int) -> Snapshot | None:
        def work(layout: Layout) -> Snapshot | None:
            seqs = [seq for seq in layout.snapshots if seq <= at]
            return read_snapshot(layout, seqs[-1], strict=self.strict) if seqs else None

        return self._read(work)

    def wait_for(self, after: int, timeout: float) -> bool:
        self._check_open()
        return self._feed.wait_for(after, timeout)

    # -- compaction, integrity -------------------------------------

    def compact(self, policy: CompactionPolicy) -> CompactionReport:
        steps = Compaction(self._require_writer(), self._reader, erase=policy.erase_deleted)
        try:
            with translate_os_errors(self.directory):
                return compact(steps, policy, self.clock)
        finally:
            self._quarantined = (*self._quarantined, *steps.superseded)

    def verify(self) -> VerifyReport:
        self._check_open()
        with translate_os_errors(self.directory):
            return verify(self.directory, self._writer)


def _start_watcher(reader: Reader, head: Callable[[], int]) -> Watcher:
    def version() -> object:
        with translate_os_errors(reader.directory):
            return reader.version()

    return PollingWatcher(head, version, longest_pause_s=LONGEST_POLL_PAUSE_S)


def open_json(
    url: str,
    *,
    durability: str = "full",
    migrate: str = "auto",
    read_only: bool = False,
    strict: bool = False,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> JSONStore:
    """Open the directory in a URL: ``json:///relative/dir`` or ``json:////absolute/dir``.

    The path is not percent-decoded.  A JSON ledger has no schema, so ``migrate`` has no effect.
    """
    del migrate
    return JSONStore(
        _path_of(url),
        durability=durability,
        read_only=read_only,
        strict=strict,
        lock_timeout_s=lock_timeout_s,
    )


def _path_of(url: str) -> Path:
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "json" or not rest.startswith("///"):
        raise ValidationError(
            "url",
            f"{redacted(url)!r} must have the form 'json:///relative/dir' or "
            "'json:////absolute/dir'",
        )
    if "?" in rest:
        raise ValidationError(
            "url", f"{redacted(url)!r} has a query, but a JSON store takes no options"
        )
    path = rest.removeprefix("///")
    if not path or "\0" in path:
        raise ValidationError("url", f"{redacted(url)!r} does not name a directory")
    return Path(path)


def verify(directory: Path, writer: Writer | None) -> VerifyReport:
    """Check the files of a directory and, if ``writer`` is given, the writer's index; return a
    report.

    If the first check finds problems, the function checks a second time, because other processes
    have possibly changed files during the first check.
    """
    report = retry_while_changing(directory, lambda _: _verify(directory, writer))
    if report.ok:
        return report
    return retry_while_changing(directory, lambda _: _verify(directory, writer))


def _verify(directory: Path, writer: Writer | None) -> VerifyReport:
    try:
        layout = read_layout(directory)
    except CorruptStoreError as error:
        return VerifyReport(0, 0, 0, (str(error),))
    paths = {seq: str(layout.snapshot_path(seq)) for seq in layout.snapshots}
    check = IntegrityCheck(
        layout.floor, paths, lambda seq: read_snapshot(layout, seq, strict=False)
    )
    if layout.missing_history:
        check.problems.append(layout.missing_history)
    check.journal(_entries(layout))
    if writer is not None and check.complete:
        _compare_index(writer, check)
    return check.report()


def _entries(layout: Layout) -> Iterator[JournalEntry | CorruptStoreError]:
    """Yield the journal entries; in place of each gap and each unreadable part, yield an error."""
    seq = layout.floor - 1
    for segment in layout.segments:
        if segment.first > seq + 1:
            missing = f"from seq {seq + 1} to {segment.first - 1}"
            reason = f"the entries {missing} are missing before this segment"
            yield CorruptStoreError(str(segment.path), reason)
        reader = CommitReader(layout, layout.start_of(segment))
        try:
            for location in reader.commits_in(segment):
                for index in range(len(location.line.entries)):
                    yield journal_entry(location.line, index, location.where, strict=False)
            seq = reader.position.seq
        except CorruptStoreError as error:
            yield error
            seq = MAX_INT  # the last seq of the damaged segment is unknown


def _compare_index(writer: Writer, check: IntegrityCheck) -> None:
    """Compare the writer's index with the checked content, if both are as of the same seq."""
    end, index = writer.end, writer.index
    if index is None or end.seq != check.seq:
        return
    found: set[tuple[str, object]] = {*index.revisions.items()}
    found |= {(task_id, key) for key, task_id in index.by_dedup_key.items()}
    stored: set[tuple[str, object]] = set()
    for task_id, (revision, record) in check.content.items():
        if isinstance(task_id, str):
            stored.add((task_id, revision))
            key = dedup_key(record if isinstance(record, TaskRecord) else decode_stub(record))
            stored |= {(task_id, key)} if key is not None else set()
    if writer.end == end and found != stored:
        wrong = {task_id for task_id, _ in found ^ stored}
        shown = ", ".join(sorted(map(repr, wrong))[:MAX_TASKS_NAMED])
        check.problems.append(f"the writer's index is wrong for tasks ({len(wrong)}): {shown}")
