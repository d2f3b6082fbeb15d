"""The lock-free reader, which is consistent while other processes change files.

The reader lists the directory once.  The reader lists the directory again only when the generation
in the lock file has changed or is unknown.  If a file disappears or seems damaged, another process
is possibly changing the files.  In this case the reader retries the read a few times.
"""

from __future__ import annotations

import bisect
import contextlib
import operator
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from taskstore.errors import (
    CorruptStoreError,
    CursorExpiredError,
    StoreUnavailableError,
    TaskStoreError,
)
from taskstore.model.journal import JournalEntry
from taskstore.model.records import MAX_INT
from taskstore.stores.jsonfile.layout import (
    LOCK_NAME,
    JournalOffset,
    Layout,
    alias_notice,
    commit_id_before_floor,
    read_layout,
    retry_while_changing,
)
from taskstore.stores.jsonfile.lines import (
    Line,
    decode_commit,
    journal_entry,
    task_id_pattern,
)
from taskstore.stores.jsonfile.locks import check_not_removed, read_generation
from taskstore.stores.jsonfile.segments import (
    CommitReader,
    LocatedCommit,
    read_lines,
    torn_line_text,
)

_T = TypeVar("_T")
_POSITION_INTERVAL_BYTES = 256 * 1024
_MAX_POSITIONS = 1024
_APPEND_GRACE_S = 0.01
_seq_of = operator.attrgetter("seq")


class Reader:
    """Reads the files of one ledger, and caches journal positions.  Any number of threads can use
    the reader.

    ``ledger_found`` is true if the caller has already found a ledger in the directory.
    """

    def __init__(self, directory: Path, *, strict: bool, ledger_found: bool) -> None:
        self.directory = directory
        self.strict = strict
        self._lock = threading.Lock()
        self._layout: Layout | None = None
        self._ledger_found = ledger_found
        self._generation: tuple[int, int] | None = None
        self._positions: list[JournalOffset] = []

    def with_layout(self, work: Callable[[Layout], _T]) -> _T:
        """Return ``work(layout)``; if files change during the call, call ``work`` with a new
        layout."""

        def attempt(number: int) -> _T:
            if number > 1:
                self._clear()
            return work(self.layout())

        return retry_while_changing(self.directory, attempt)

    def layout(self) -> Layout:
        """Return the current layout."""
        # The generation is read before the files: the next call detects a change between the two
        # reads.
        generation = read_generation(self.directory / LOCK_NAME)
        known = self._layout
        changing = generation is None or generation != self._generation
        if known is not None and not changing:
            return known
        layout = read_layout(self.directory)
        if layout.is_empty:
            if not self._ledger_found:
                check_not_removed(self.directory)
            raise StoreUnavailableError(
                f"there is no ledger in {self.directory}", hint="check the path"
            )
        self._ledger_found = True
        with self._lock:
            if known is not None and not _keeps_positions(known, layout):
                self._positions = []
            self._layout, self._generation = layout, generation
        return layout

    def version(self) -> tuple[object, ...]:
        """Return a value that changes with every commit: the generation of the files, and the inode
        and the size of the last segment.  The method is cheap: it reads one small file and calls
        ``stat`` once."""
        known = self._layout
        generation = read_generation(self.directory / LOCK_NAME)
        if known is None:
            return (generation, None)
        try:
            last = known.segments[-1].path.stat()
        except FileNotFoundError:
            return (generation, None)
        return (generation, last.st_ino, last.st_size)

    @property
    def missing_history(self) -> str | None:
        """Return the notice about missing segments that the most recent listing of the directory
        gave."""
        layout = self._layout
        return layout.missing_history if layout is not None else None

    def _clear(self) -> None:
        """Drop the cached layout and all cached positions."""
        with self._lock:
            self._positions = []
            self._layout = None

    def end(self, layout: Layout) -> JournalOffset:
        """Return the position after the last commit."""
        position = self._nearest_position(layout, MAX_INT)
        size = layout.segments[-1].path.stat().st_size
        if size == position.offset:
            return position
        if size < position.offset:
            self._clear()
            position = self._nearest_position(layout, MAX_INT)
        reader = CommitReader(layout, position)
        for location in reader:
            self._cache_sparsely(location, reader.position)
        self._cache(reader.position)
        return reader.position

    def alias_notice(self) -> str | None:
        """Return a notice if the newest segment can also have another path, otherwise ``None``."""
        with contextlib.suppress(OSError, TaskStoreError):
            return self.with_layout(lambda layout: alias_notice(layout.segments[-1].path))
        return None

    def torn_line_notice(self) -> str | None:
        """Return a notice about the bytes after the last commit; ``None`` if there are no such
        bytes."""

        def check(layout: Layout) -> str | None:
            offset, path = self.end(layout).offset, layout.segments[-1].path
            size = path.stat().st_size - offset
            text = torn_line_text(size, offset)
            return f"{path}: {text}; the line is ignored" if size > 0 else None

        with contextlib.suppress(OSError, TaskStoreError):
            notice = self.with_layout(check)
            if notice is not None:
                time.sleep(_APPEND_GRACE_S)  # a writer is possibly writing this line now
                return notice if self.with_layout(check) == notice else None
        return None

    def read(self, layout: Layout, after: int, limit: int) -> Sequence[JournalEntry]:
        """Return the journal entries after a seq, at most ``limit`` entries."""
        if after < layout.floor - 1:
            raise CursorExpiredError(after, layout.floor)
        entries: list[JournalEntry] = []
        if limit <= 0:
            return ()
        before = position = self._nearest_position(layout, after)
        reader = CommitReader(layout, position)
        for location in reader:
            before, position, line = position, reader.position, location.line
            self._cache_sparsely(location, position)
            begin = max(after + 1 - line.seq, 0)
            entries += [
                journal_entry(line, index, location.where, strict=self.strict)
                for index in range(begin, min(len(line.entries), begin + limit - len(entries)))
            ]
            if len(entries) == limit:
                break
        # The next call can begin at the last entry of this page.
        self._cache(before, position)
        return tuple(entries)

    def commit_of(self, layout: Layout, seq: int) -> Line:
        """Return the commit that contains the entry at ``seq``, a seq from the floor to the
        head."""
        reader = CommitReader(layout, self._nearest_position(layout, seq - 1))
        for location in reader:
            self._cache_sparsely(location, reader.position)
            if location.line.last >= seq:
                return location.line
        raise CorruptStoreError(str(self.directory), f"the entry with seq {seq} is missing")

    def commit_id(self, layout: Layout, seq: int) -> str:
        """Return the id of the commit that contains the entry at ``seq``, a retained entry or the
        entry at floor - 1.  Return an empty text if the id is unknown or there is no such entry."""
        if seq == layout.floor - 1:
            return commit_id_before_floor(layout)
        if not layout.floor <= seq <= self.end(layout).seq:
            return ""
        return self.commit_of(layout, seq).commit_id

    def history(self, layout: Layout, task_id: str) -> Sequence[JournalEntry]:
        """Return the journal entries of one task; decode only lines that contain the task id."""
        pattern = task_id_pattern(task_id)
        entries = []
        for segment in layout.segments:
            last = segment is layout.segments[-1]
            for offset, raw in read_lines(segment, segment.start, last=last, containing=pattern):
                line = decode_commit(raw, str(segment.path), offset)
                where = LocatedCommit(segment, offset, raw, line).where
                entries += [
                    journal_entry(line, index, where, strict=self.strict)
                    for index, entry in enumerate(line.entries)
                    if entry.task_id == task_id
                ]
        return tuple(entries)

    def _nearest_position(self, layout: Layout, after: int) -> JournalOffset:
        """Return the last known journal position that is at or before the seq ``after``."""
        start = layout.segment_start(after + 1)
        with self._lock:
            index = bisect.bisect_right(self._positions, after, key=_seq_of)
            cached = self._positions[index - 1] if index else start
        live = cached.first in [segment.first for segment in layout.segments]
        # If the position is the end of a segment, the start of the next segment is equivalent.
        return cached if live and cached.first >= start.first and cached.seq >= start.seq else start

    def _cache_sparsely(self, location: LocatedCommit, end: JournalOffset) -> None:
        """Cache ``end``, the byte offset at which a commit ends.

        The cache gets at most one offset for each ``_POSITION_INTERVAL_BYTES`` of a segment.
        """
        if location.offset // _POSITION_INTERVAL_BYTES != end.offset // _POSITION_INTERVAL_BYTES:
            self._cache(end)

    def _cache(self, *positions: JournalOffset) -> None:
        """Cache positions; if the cache has too many positions, drop every second position."""
        with self._lock:
            for position in positions:
                start = bisect.bisect_left(self._positions, position.seq, key=_seq_of)
                end = bisect.bisect_right(self._positions, position.seq, key=_seq_of)
                self._positions[start:end] = [position]
            if len(self._positions) > _MAX_POSITIONS:
                del self._positions[:-1:2]


def _keeps_positions(known: Layout, layout: Layout) -> bool:
    """Return whether journal positions that are valid in ``known`` are also valid in ``layout``."""
    inodes = {segment.first: segment.inode for segment in layout.segments}
    last = known.segments[-1]
    return known.identity == layout.identity and inodes.get(last.first) == last.inode
