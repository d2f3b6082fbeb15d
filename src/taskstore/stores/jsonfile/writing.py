"""The writer: take the lock, catch up, check for conflicts, append.

Between two commits the writer keeps the position of the journal's end, and the index as of this
position.  Every operation that changes files runs inside :meth:`Writer.lock`.  This method takes
the lock, and brings the position and the index up to date.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from taskstore.errors import (
    ConflictError,
    CorruptStoreError,
    OutcomeUnknownError,
    StoreBusyError,
    StoreUnavailableError,
)
from taskstore.model import codec
from taskstore.model.ids import Clock, new_commit_id
from taskstore.model.journal import Commit, NetChange, Position, Snapshot, find_conflicts
from taskstore.store.disk import TEMPORARY, Disk
from taskstore.stores.common.retry import Contention
from taskstore.stores.jsonfile.index import Index, load_records
from taskstore.stores.jsonfile.layout import (
    JournalOffset,
    Layout,
    LedgerSnapshotHeader,
    SegmentFile,
    check_newest_snapshot,
    files_gone_error,
    permissions_source,
    read_layout,
    refuse_aliased_segment,
    retry_while_changing,
    segment_name,
    snapshot_name,
    unavailable_error,
)
from taskstore.stores.jsonfile.lines import LINE_PREFIX_BYTES, Identity, encode_commit
from taskstore.stores.jsonfile.locks import (
    STATE_BYTES,
    CompactLock,
    WriteLock,
    busy_error,
    removed_error,
)
from taskstore.stores.jsonfile.segments import CommitReader, prepare_segment, truncate_tail

_REOPEN = "close the store and open it again"


class Writer:
    """Changes the files of a ledger's directory."""

    def __init__(self, directory: Path, *, sync: bool, lock_timeout_s: float, disk: Disk) -> None:
        self.directory = directory
        self.disk = disk
        self.notices: list[str] = []
        self.layout = Layout(directory)
        self.end = JournalOffset(1, 0, 0)
        self.last_commit = Position(0)
        """The position of the newest known commit; the seq is 0 if no commit is known."""
        self.index: Index | None = None
        """The index of the ledger.  It is ``None`` before the first commit, and also if the index
        is possibly wrong; the next commit then rebuilds the index."""
        self.preloaded: tuple[Index, JournalOffset] | None = None
        """The index and the end of the journal that a load has found.  The next commit uses these
        two values if ``index`` is ``None``."""
        self.reserved = False
        """True if this thread already owns the lock, and the next call of :meth:`lock` must use
        this lock."""
        self.timeout_s = lock_timeout_s
        self._lock = WriteLock(directory, disk)
        self._fsync_commits = sync
        self._thread_lock = threading.RLock()
        self._locked = False
        # True if other processes have written since this writer was opened.
        self._saw_other_writer = False
        self._descriptor = -1
        self._refusal: str | None = None

    # -- the lock -----------------------------------------------------------

    @contextmanager
    def lock(self, *, indexed: bool = True) -> Iterator[None]:
        """Take the thread lock and the write lock, and read new commits; then the body runs.

        A nested call of the same thread, for example from a signal handler, raises
        :class:`StoreBusyError`, unless ``reserved`` is true.
        """
        # An interrupt arrives at the start of a Python function or after a call.  Therefore no call
        # is allowed between acquiring a lock and the block that releases this lock.
        with self._thread_lock:
            reserved, self.reserved = self.reserved, False
            if self._locked and not reserved:
                raise StoreBusyError(
                    f"the store {self.directory} is busy: this thread is in another write",
                    hint="do not write from a signal handler",
                )
            try:
                if not reserved:
                    self._locked = True
                    self._acquire(indexed=indexed)
                yield
            finally:
                self._locked = False
                try:
                    fcntl.flock(self._lock.descriptor, fcntl.LOCK_UN)
                except (OSError, ValueError):
                    self._lock.close()  # closing the file also releases the lock

    def _acquire(self, *, indexed: bool) -> None:
        """Take the write lock, and read new commits up to the end of the journal."""
        if self._refusal is not None:
            raise StoreUnavailableError(self._refusal, hint=_REOPEN)
        lock = self._lock
        try:
            if not lock.queue.poll_in_turn(lock.try_acquire, self.timeout_s / 2):
                self._wait_for_progress()
            state = os.pread(lock.state_descriptor, STATE_BYTES, 0)
            if state != lock.state:
                lock.load_state(state)
            grown = None
            if lock.generation == lock.known_generation and (self.index is not None or not indexed):
                # Another program possibly replaced the segment, or copied a backup over it.
                end, segment = self.end, self.layout.segments[-1]
                try:
                    status = segment.path.stat()
                except FileNotFoundError:
                    pass
                else:
                    prefix = os.pread(self._descriptor, len(end.line_prefix), end.line_offset)
                    if status.st_ino == segment.inode and prefix == end.line_prefix:
                        grown = status.st_size - end.offset
            if grown != 0:
                only_grown = grown is not None and grown > 0
                self._catch_up(only_grown=only_grown, indexed=indexed)
        except OSError as error:
            raise unavailable_error(self.directory, error) from error

    def _wait_for_progress(self) -> None:
        """Wait for the write lock as long as the other writers make progress."""
        lock, contention = self._lock, Contention(partial(_progress_marker, self.directory))
        while self.timeout_s > 0 and contention.made_progress():
            if lock.queue.poll_in_turn(lock.try_acquire, self.timeout_s / 2):
                return
        raise busy_error(lock.path, "another writer", self.timeout_s)

    def compact_lock(self) -> CompactLock:
        """Return a new lock object; its owner excludes compactions and replacements of the
        content."""
        return CompactLock(self.directory, self.disk)

    def close(self) -> None:
        """Wait until the current write has ended, and release all resources."""
        with self._thread_lock:
            self._refusal = f"the store {self.directory} is closed"
            self._close_segment()
            self._lock.close()

    # -- catching up --------------------------------------------------------

    def _catch_up(self, *, only_grown: bool, indexed: bool) -> None:
        """Read the commits of other processes.  ``only_grown`` must be true only if the last
        segment has grown and the other files have not changed."""
        # Until this call succeeds, the layout, the end and the index can be outdated.
        self._lock.known_generation = None
        if indexed and self.index is None and self.preloaded is not None:
            self.last_commit = Position(0)
            (self.index, self.end), self.preloaded = self.preloaded, None

        def attempt(number: int) -> None:
            if number > 1:
                # Possibly the journal only seems damaged, because its known end is outdated.
                self.index = None
            known = only_grown and number == 1
            self._saw_other_writer |= known
            self._read_commits(self.layout if known else self._read_or_create(), indexed=indexed)
            if self._fsync_commits and not (known and self._lock.synced == self.end.offset):
                self._sync_segment()

        try:
            retry_while_changing(self.directory, attempt)
        except BaseException:
            # The index can contain an incomplete commit.
            self.index = self._lock.known_generation = None
            raise
        self._lock.confirm_state()

    def _read_commits(self, layout: Layout, *, indexed: bool) -> None:
        """Read the commits after the known end of the journal.  If the known end or the index is
        not valid, the commits to read depend on ``indexed``: if ``indexed`` is true, read all
        commits; otherwise read only the last segment."""
        last_commit = Position(0)
        if self.index is not None and layout.is_valid(self.end):
            index, start, last_commit = self.index, self.end, self.last_commit
        elif indexed:
            index = Index()
            _, start = load_records(layout, strict=False, index=index)
        else:
            index, start = None, layout.start_of(layout.segments[-1])
        reader = CommitReader(layout, start)
        for location in reader:
            last_commit = Position(location.line.last, location.line.commit_id)
            if index is not None:
                index.replay(location.line)
        last = layout.segments[-1]
        if reader.position.first != last.first:
            reason = "this segment does not continue the journal"
            raise CorruptStoreError(str(last.path), reason, offset=0)
        self._open_segment(last)
        size = reader.position.offset
        if last.path.stat().st_size > size:
            with self._lock.changing():
                self.notices.append(truncate_tail(self.disk, self._descriptor, last.path, size))
        self.layout, self.end, self.index = layout, reader.position, index
        self.last_commit = last_commit

    def _read_or_create(self) -> Layout:
        """Read the directory, and return its layout.  If the directory contains no ledger, create a
        ledger; otherwise remove leftover files.

        The first call refuses a ledger whose newest segment has another path.
        """
        layout = read_layout(self.directory)
        if not layout.is_empty:
            if not self.layout.segments:  # the store is being opened
                refuse_aliased_segment(layout.segments[-1].path)
            _remove_leftovers(layout, self.disk)
            return layout
        if self.layout.segments:
            raise files_gone_error(self.directory)
        if self._lock.mentions_ledger:
            raise removed_error(self.directory)
        path = self.directory / segment_name(1)
        temporary = prepare_segment(
            self.disk, path, Identity(uuid.uuid4().hex, 1), at=0, permissions_from=None
        )
        self.disk.publish(temporary, path)
        return read_layout(self.directory)

    def _open_segment(self, segment: SegmentFile) -> None:
        if self._descriptor >= 0 and os.fstat(self._descriptor).st_ino != segment.inode:
            self._close_segment()
        if self._descriptor < 0:
            self._descriptor = self.disk.open(segment.path, os.O_RDWR)

    def _sync_segment(self) -> None:
        """Flush to disk (fsync) the lines that other processes have appended or truncated.

        Another process has possibly died between its write and its fsync.  Without this flush, a
        power loss could leave a torn line before the next line of this writer, and the segment
        would be corrupt.
        """
        try:
            self.disk.sync_data(self._descriptor)
        except OSError as error:
            self._disable_writes("flushing the commits of other processes to disk", error)
            raise

    def _disable_writes(self, operation: str, error: BaseException) -> str:
        """Refuse further writes, because only a reopen checks the files; return the error
        message."""
        self._refusal = (
            f"the store {self.directory} refuses writes until it is reopened: "
            f"{operation} failed: {error}"
        )
        return self._refusal

    def _close_segment(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self.disk.close(descriptor)

    # -- changing -----------------------------------------------------------

    def commit(
        self, net_changes: Sequence[NetChange], count: int, entries: bytes, clock: Clock
    ) -> Commit:
        """Check ``count`` changes for conflicts, and append the changes as one line.  The caller
        must own the write lock."""
        index, start = self.index, self.end
        assert index is not None
        conflicts = find_conflicts(net_changes, index.revisions, index.deleted, index.by_dedup_key)
        if conflicts and any(conflict.deleted for conflict in conflicts):
            # Another process possibly trimmed the entry of the deletion from the journal.
            index.forget_deletions(
                retry_while_changing(self.directory, lambda _: read_layout(self.directory).floor)
            )
            conflicts = find_conflicts(
                net_changes, index.revisions, index.deleted, index.by_dedup_key
            )
        if conflicts:
            raise ConflictError(conflicts)
        seq = start.seq
        commit = Commit(seq + 1, seq + count, max(clock(), start.at), new_commit_id())
        line = encode_commit(commit, entries)
        written = False
        try:
            self.disk.write_at(self._descriptor, line, start.offset)
            written = True
            if self._fsync_commits:
                self.disk.sync_data(self._descriptor)
        except BaseException as error:
            self._undo_append(error, written=written)
            raise
        # The commit is complete.  After an interrupt from here on, the next commit rebuilds the
        # index.
        self.index = None
        index.commit(net_changes, commit.first_seq)
        offset = start.offset + len(line)
        prefix = line[:LINE_PREFIX_BYTES]
        self.end = JournalOffset(
            start.first, commit.last_seq, commit.at, offset, start.inode, start.offset, prefix
        )
        self.last_commit = Position(commit.last_seq, commit.commit_id)
        self.index = index
        if self._fsync_commits and self._saw_other_writer:
            self._lock.record_synced(offset)
        return commit

    def _undo_append(self, error: BaseException, *, written: bool) -> None:
        """Remove the line of a failed commit.  Refuse further writes if the content of the disk is
        unknown."""
        syncing = written and isinstance(error, OSError)
        operation = "flushing a commit to disk" if syncing else "undoing a commit"
        try:
            with self._lock.changing():  # a reader, which takes no lock, has possibly read the line
                self.disk.truncate(self._descriptor, self.end.offset)
                if self._fsync_commits:
                    # Without fsync, a power loss could restore the line or mix it with a new line.
                    self.disk.sync_data(self._descriptor)
        except OSError:
            kind = OutcomeUnknownError if written else StoreUnavailableError
            raise kind(self._disable_writes(operation, error), hint=_REOPEN) from error
        if syncing:
            raise StoreUnavailableError(
                self._disable_writes(operation, error), hint=_REOPEN
            ) from error

    @contextmanager
    def _disable_on_error(self, operation: str) -> Iterator[None]:
        """If the body raises an error, refuse further writes, because only a reopen checks the
        files."""
        try:
            yield
        except BaseException as error:
            self.index = None
            refusal = self._disable_writes(operation, error)
            if isinstance(error, OSError):
                raise OutcomeUnknownError(refusal, hint=_REOPEN) from error
            raise

    def roll(self) -> Layout:
        """Begin a new segment, unless the newest segment is empty; return the layout.  The caller
        must own the write lock."""
        if self.end.seq >= self.end.first:
            path = self.directory / segment_name(self.end.seq + 1)
            last = self.layout.segments[-1].path
            temporary = prepare_segment(
                self.disk, path, self.layout.identity, at=self.end.at, permissions_from=last
            )
            with self._disable_on_error("beginning a segment"), self._lock.changing():
                # It is possible that another process has written without an fsync.  A torn line is
                # allowed only in the last segment.
                self.disk.sync_file(self._descriptor)
                self.disk.publish(temporary, path)
                self._switch_to(path)
        return self.layout

    def _switch_to(self, path: Path) -> None:
        """Make the new, empty segment at ``path`` the segment to which the writer appends."""
        self.layout = read_layout(self.directory)
        last = self.layout.segments[-1]
        assert last.path == path, "a new segment is the last segment"
        self._open_segment(last)
        self.end = self.layout.start_of(last)

    def announce_floor(self, floor: int) -> None:
        """Show other processes that a compaction has moved the floor.  The caller must own the
        write lock."""
        self._lock.bump_generation()
        self.layout = read_layout(self.directory)
        if self.index is not None:
            self.index.forget_deletions(floor)

    def replace(self, snapshot: Snapshot, payloads: Iterable[bytes], lock: CompactLock) -> None:
        """Replace the whole content with a snapshot.  The caller must own the write lock, and the
        compaction lock ``lock``."""
        head, at = self.end.seq, max(snapshot.at, self.end.at)
        if head and snapshot.seq <= head:
            raise ConflictError([], f"the snapshot is at seq {snapshot.seq}, the head at {head}")
        known = self.layout.identity
        identity = Identity(known.ledger, known.timeline + 1) if head else known
        path = self.directory / snapshot_name(snapshot.seq)
        floor, ledger, timeline = snapshot.seq + 1, identity.ledger, identity.timeline
        header = LedgerSnapshotHeader(snapshot.seq, at, ledger, timeline, floor)
        blocks = codec.encode_snapshot_blocks(header, payloads, snapshot.quarantined)
        temporary = self.disk.write_temporary(path, blocks, permissions_source(self.layout))
        try:
            segment = self.directory / segment_name(snapshot.seq + 1)
            last = self.layout.segments[-1].path
            prepared = prepare_segment(
                self.disk, segment, identity, at=at, permissions_from=last, starts_chain=True
            )
            # The three attributes set here are invalid from here on, also after an interrupt.
            self.last_commit, self.index, self.preloaded = Position(0), None, None
            with self._disable_on_error("replacing the content"), self._lock.changing():
                self.disk.publish(prepared, segment)
                lock.lock_next_segment(segment)
                self.disk.publish(temporary, path)
                layout = read_layout(self.directory)
                self.disk.remove_all(layout.obsolete)
                self.disk.sync_directory(self.directory)
                self._switch_to(segment)
        finally:
            with contextlib.suppress(OSError):
                self.disk.remove_all([temporary])


def _progress_marker(directory: Path) -> object:
    """Return a value that changes with every commit; ``None`` if the value cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        last = max(directory.glob("journal-*.jsonl"))
        return (last, last.stat().st_size)
    return None


def _remove_leftovers(layout: Layout, disk: Disk) -> None:
    """Remove leftover files of killed processes.  The caller must own the write lock.

    Only an owner of the write lock makes temporary segments, so each temporary segment is a
    leftover file.  The other files possibly belong to a running compactor, so the function removes
    the other files only if no compactor runs.
    """
    leftovers = list(layout.directory.glob(f"*{TEMPORARY}"))
    disk.remove_all(path for path in leftovers if path.name.startswith("journal-"))
    others = [path for path in leftovers if path.name.startswith("snapshot-")]
    if not others and not layout.obsolete:
        return
    compact_lock = CompactLock(layout.directory, disk)
    # A running compactor removes its own leftover files.  While another user creates the lock file,
    # this user cannot open the lock file.
    with (
        contextlib.suppress(StoreBusyError, PermissionError),
        compact_lock.hold(0, "a compactor"),
    ):
        # The floor comes from the header of the snapshot file, whose checksum is not yet verified.
        check_newest_snapshot(layout)
        disk.remove_all([*layout.obsolete, *others])
        disk.sync_directory(layout.directory)
