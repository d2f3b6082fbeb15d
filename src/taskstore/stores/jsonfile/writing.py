"""The writing side: under the lock, catch up with the others, check, append.

What a writer remembers between two commits is the place where the journal
ended, and the index as of there.  Everything it does happens within
:meth:`Writer.entered`, which takes the lock and brings both up to date.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from taskstore.model.journal import Commit, Position, Snapshot, Step, find_conflicts
from taskstore.store.disk import TEMPORARY, Disk
from taskstore.stores.common.retry import Contention
from taskstore.stores.jsonfile.index import Index, load
from taskstore.stores.jsonfile.layout import (
    COMPACT_LOCK_NAME,
    LOCK_NAME,
    JournalOffset,
    Layout,
    SegmentFile,
    SnapshotHeader,
    check_newest,
    read_layout,
    segment_name,
    settled,
    snapshot_name,
    unavailable,
)
from taskstore.stores.jsonfile.lines import STAMP_BYTES, Identity, encode_commit
from taskstore.stores.jsonfile.locks import STATE_BYTES, FileLock, WriteLock, busy
from taskstore.stores.jsonfile.segments import SegmentReader, cut_tail, prepare_segment

_REOPEN = "close it and open it again"


class Writer:
    """The one who changes the files of a directory."""

    def __init__(self, directory: Path, *, sync: bool, lock_timeout_s: float, disk: Disk) -> None:
        self.directory = directory
        self.disk = disk
        self.notices: list[str] = []
        self.layout = Layout(directory)
        self.place = JournalOffset(1, 0, 0)
        self.last = Position(0)
        """The last commit that is known to be in the journal; of seq 0 when none is."""
        self.index: Index | None = None
        """``None`` until a commit needs it, and whenever it may be wrong: it is built anew."""
        self.loaded: tuple[Index, JournalOffset] | None = None
        """What a load learned on its way, for the next commit that has no index."""
        self.reserved = False
        """Whether the thread that holds the lock passes it on to its next :meth:`entered`."""
        self.timeout_s = lock_timeout_s
        self._lock = WriteLock(directory / LOCK_NAME, disk)
        self._sync = sync
        self._gate = threading.RLock()
        self._inside = False
        # Whether others have written beside us.
        self._in_company = False
        self._descriptor = -1
        self._refusal: str | None = None

    # -- the lock -----------------------------------------------------------

    @contextmanager
    def entered(self, *, indexed: bool = True) -> Iterator[None]:
        """Hold the lock of the threads and that of the processes, up to date with the files.

        A call in the middle of another one of the same thread (from a signal
        handler) is refused; the lock that ``reserved`` passes on is taken over.
        """
        # An interrupt strikes at the start of a Python function or after a call.  So no call
        # stands between a lock that is held and the block that releases it.
        with self._gate:
            held, self.reserved = self.reserved, False
            if self._inside and not held:
                raise StoreBusyError(f"the store {self.directory} is busy: this very thread writes")
            try:
                if not held:
                    self._inside = True
                    self._acquire(indexed=indexed)
                yield
            finally:
                self._inside = False
                try:
                    fcntl.flock(self._lock.descriptor, fcntl.LOCK_UN)
                except (OSError, ValueError):
                    self._lock.close()  # which releases it, too

    def _acquire(self, *, indexed: bool) -> None:
        """Take the lock of the processes, and be where the journal ends."""
        if self._refusal is not None:
            raise StoreUnavailableError(self._refusal, hint=_REOPEN)
        lock = self._lock
        try:
            if not lock.waiting_room.wait(lock.try_acquire, self.timeout_s / 2):
                self._wait_on()
            state = os.pread(lock.descriptor, STATE_BYTES, 0)
            if state != lock.state:
                lock.take_in(state)
            grown = None
            if lock.generation == lock.seen and (self.index is not None or not indexed):
                # Another file may have the segment's name, or a backup may lie over it.
                place, segment = self.place, self.layout.segments[-1]
                try:
                    found = segment.path.stat()
                except FileNotFoundError:
                    pass
                else:
                    stamp = os.pread(self._descriptor, len(place.stamp), place.mark)
                    if found.st_ino == segment.inode and stamp == place.stamp:
                        grown = found.st_size - place.offset
            if grown != 0:
                only_grown = grown is not None and grown > 0
                self._catch_up(only_grown=only_grown, indexed=indexed)
        except OSError as error:
            raise unavailable(self.directory, error) from error

    def _wait_on(self) -> None:
        """Go on waiting for the lock as long as the other writers make progress."""
        lock, contention = self._lock, Contention(self._end_of_journal)
        while self.timeout_s > 0 and contention.moves():
            if lock.waiting_room.wait(lock.try_acquire, self.timeout_s / 2):
                return
        raise busy(lock.path, "another writer", self.timeout_s)

    def _end_of_journal(self) -> object:
        """What differs when somebody has committed; ``None`` when it cannot be told."""
        with contextlib.suppress(OSError, ValueError):
            last = max(self.directory.glob("journal-*.jsonl"))
            return (last, last.stat().st_size)
        return None

    def compact_lock(self) -> FileLock:
        """A new handle on the lock that compactors and replacers hold."""
        return FileLock(self.directory / COMPACT_LOCK_NAME, self.disk)

    def close(self) -> None:
        """Release everything, after whoever is writing."""
        with self._gate:
            self._refusal = f"the store {self.directory} is closed"
            self._close_segment()
            self._lock.close()

    # -- catching up --------------------------------------------------------

    def _catch_up(self, *, only_grown: bool, indexed: bool) -> None:
        """Take in what others did; if it has ``only_grown``, the last segment has more commits
        and nothing else has changed."""
        # Until it has succeeded, nothing that is remembered may be relied on.
        self._lock.seen = None
        if indexed and self.index is None and self.loaded is not None:
            self.last = Position(0)
            (self.index, self.place), self.loaded = self.loaded, None

        def attempt(number: int) -> None:
            if number > 1:
                # What looks damaged may be a place that is no longer what it was.
                self.index = None
            known = only_grown and number == 1
            self._in_company |= known
            self._follow(self.layout if known else self._found(), indexed=indexed)
            if self._sync and not (known and self._lock.synced == self.place.offset):
                self._sync_others()

        try:
            settled(self.directory, attempt)
        except BaseException:
            # The index may have taken in half a commit.
            self.index = self._lock.seen = None
            raise
        if self._lock.generation % 2:
            self._lock.settle()
        self._lock.seen = self._lock.generation

    def _follow(self, layout: Layout, *, indexed: bool) -> None:
        """Read what others wrote since the place, to the end, and be there."""
        last_commit = Position(0)
        if self.index is not None and layout.holds(self.place):
            index, place, last_commit = self.index, self.place, self.last
        elif indexed:
            index = Index()
            _, place = load(layout, strict=False, index=index)
        else:
            index, place = None, layout.start_of(layout.segments[-1])
        walk = SegmentReader(layout, place)
        for found in walk:
            last_commit = Position(found.line.last, found.line.commit)
            if index is not None:
                index.replay(found.line)
        last = layout.segments[-1]
        if walk.place.first != last.first:
            raise CorruptStoreError(str(last.path), "does not continue the journal", offset=0)
        self._open_segment(last)
        end = walk.place.offset
        if last.path.stat().st_size > end:
            with self._lock.changing():
                self.notices.append(cut_tail(self.disk, self._descriptor, last.path, end))
        self.layout, self.place, self.index = layout, walk.place, index
        self.last = last_commit

    def _found(self) -> Layout:
        """Look through the directory; begin a ledger where there is none, clear up where one is."""
        layout = read_layout(self.directory)
        if layout.fresh and self.layout.segments:
            reason = f"the files of the store {self.directory} are gone"
            raise StoreUnavailableError(reason, hint="put them back, or open it again")
        if not layout.fresh:
            self._clear_up(layout)
            return layout
        path = self.directory / segment_name(1)
        begun = prepare_segment(self.disk, path, Identity(uuid.uuid4().hex, 1), at=0)
        self.disk.publish(begun, path)
        return read_layout(self.directory)

    def _clear_up(self, layout: Layout) -> None:
        """Remove what killed writers and compactors left, unless a compactor is at work."""
        leftovers = list(self.directory.glob(f"*{TEMPORARY}"))
        self.disk.remove_all(path for path in leftovers if path.name.startswith("journal-"))
        others = [path for path in leftovers if path.name.startswith("snapshot-")]
        if not others and not layout.void:
            return
        # A compactor that is at work clears up after itself.
        with contextlib.suppress(StoreBusyError), self.compact_lock().held(0, "a compactor"):
            # What is void stands in a header that nobody has checked yet.
            check_newest(layout)
            self.disk.remove_all([*layout.void, *others])
            self.disk.sync_directory(self.directory)

    def _open_segment(self, segment: SegmentFile) -> None:
        if self._descriptor >= 0 and os.fstat(self._descriptor).st_ino != segment.inode:
            self._close_segment()
        if self._descriptor < 0:
            self._descriptor = self.disk.open(segment.path, os.O_RDWR)

    def _sync_others(self) -> None:
        """Sync what others wrote, or cut.

        One of them may have died between writing and syncing.  With a line of
        ours behind it, nobody would tolerate that its line is torn.
        """
        try:
            self.disk.sync_data(self._descriptor)
        except OSError as error:
            self._refuse("syncing what others wrote", error)
            raise

    def _refuse(self, what: str, error: BaseException) -> str:
        """Refuse everything from now on, since only reopening can judge the files; says so."""
        self._refusal = (
            f"the store {self.directory} refuses writes until it is reopened: "
            f"{what} failed: {error}"
        )
        return self._refusal

    def _close_segment(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self.disk.close(descriptor)

    # -- changing -----------------------------------------------------------

    def commit(self, steps: Sequence[Step], count: int, entries: bytes, clock: Clock) -> Commit:
        """Check a batch of ``count`` changes and append it.  Under the lock."""
        index, place = self.index, self.place
        assert index is not None
        conflicts = find_conflicts(steps, index.revisions, index.deleted, index.by_dedup_key)
        if conflicts and any(conflict.deleted for conflict in conflicts):
            # Perhaps the journal does not hold the deletion any more.
            index.forget_deletions(
                settled(self.directory, lambda _: read_layout(self.directory).floor)
            )
            conflicts = find_conflicts(steps, index.revisions, index.deleted, index.by_dedup_key)
        if conflicts:
            raise ConflictError(conflicts)
        seq = place.seq
        commit = Commit(seq + 1, seq + count, max(clock(), place.at), new_commit_id())
        line = encode_commit(commit, entries)
        written = False
        try:
            self.disk.write_at(self._descriptor, line, place.offset)
            written = True
            if self._sync:
                self.disk.sync_data(self._descriptor)
        except BaseException as error:
            self._take_back(error, written=written)
            raise
        # It is committed.  Interrupted from here on, the index is built anew.
        self.index = None
        index.commit(steps, commit.first_seq)
        end = place.offset + len(line)
        stamp = line[:STAMP_BYTES]
        self.place = JournalOffset(
            place.first, commit.last_seq, commit.at, end, place.inode, place.offset, stamp
        )
        self.last = Position(commit.last_seq, commit.commit_id)
        self.index = index
        if self._sync and self._in_company:
            self._lock.note_synced(end)
        return commit

    def _take_back(self, error: BaseException, *, written: bool) -> None:
        """Truncate a line that failed; refuse further writes if what is on disk is unknown."""
        syncing = written and isinstance(error, OSError)
        what = "syncing" if syncing else "taking back"
        try:
            with self._lock.changing():  # somebody may have read it without the lock
                self.disk.truncate(self._descriptor, self.place.offset)
                if self._sync:
                    # Or a power loss could bring it back, or mix it with the next line.
                    self.disk.sync_data(self._descriptor)
        except OSError:
            kind = OutcomeUnknownError if written else StoreUnavailableError
            raise kind(self._refuse(what, error), hint=_REOPEN) from error
        if syncing:
            raise StoreUnavailableError(self._refuse(what, error), hint=_REOPEN) from error

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Whatever goes wrong in the body leaves files that only reopening can judge."""
        try:
            yield
        except BaseException as error:
            self.index = None
            refusal = self._refuse(what, error)
            if isinstance(error, OSError):
                raise OutcomeUnknownError(refusal, hint=_REOPEN) from error
            raise

    def roll(self) -> Layout:
        """Begin a new segment unless the last one is empty; returns the files.  Under the lock."""
        if self.place.seq >= self.place.first:
            path = self.directory / segment_name(self.place.seq + 1)
            temporary = prepare_segment(self.disk, path, self.layout.identity, at=self.place.at)
            with self._refusing("beginning a segment"), self._lock.changing():
                # Others may have written without syncing; once the segment is
                # no longer the last, nobody would tolerate that it is torn.
                self.disk.sync_file(self._descriptor)
                self.disk.publish(temporary, path)
                self._move_to(path)
        return self.layout

    def _move_to(self, path: Path) -> None:
        """Be at the start of the newest segment, which is empty."""
        self.layout = read_layout(self.directory)
        last = self.layout.segments[-1]
        assert last.path == path, "a new segment is the last one"
        self._open_segment(last)
        self.place = self.layout.start_of(last)

    def settle(self, floor: int) -> None:
        """Tell everybody that a compaction has moved the floor.  Under the lock."""
        self._lock.settle()
        self.layout = read_layout(self.directory)
        if self.index is not None:
            self.index.forget_deletions(floor)

    def replace(self, snapshot: Snapshot, payloads: Iterable[bytes]) -> None:
        """Make a snapshot the whole content.  Under both locks."""
        head, at = self.place.seq, max(snapshot.at, self.place.at)
        if head and snapshot.seq <= head:
            raise ConflictError([], f"the snapshot is at seq {snapshot.seq}, the head at {head}")
        known = self.layout.identity
        identity = Identity(known.ledger, known.timeline + 1) if head else known
        path = self.directory / snapshot_name(snapshot.seq)
        floor, ledger, timeline = snapshot.seq + 1, identity.ledger, identity.timeline
        header = SnapshotHeader(snapshot.seq, at, ledger, timeline, floor)
        blocks = codec.write_snapshot(header, payloads, snapshot.quarantined)
        temporary = self.disk.write_temporary(path, blocks)
        try:
            segment = self.directory / segment_name(snapshot.seq + 1)
            begun = prepare_segment(self.disk, segment, identity, at=at, base=True)
            # Of no use from here on, whatever interrupts.
            self.last, self.index, self.loaded = Position(0), None, None
            with self._refusing("replacing the content"), self._lock.changing():
                self.disk.publish(begun, segment)
                self.disk.publish(temporary, path)
                layout = read_layout(self.directory)
                self.disk.remove_all(layout.void)
                self.disk.sync_directory(self.directory)
                self._move_to(segment)
        finally:
            with contextlib.suppress(OSError):
                self.disk.remove_all([temporary])
