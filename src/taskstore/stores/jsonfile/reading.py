"""Reading without a lock: a consistent prefix, whatever writers and compactors do meanwhile.

A reader looks through the directory once and again only when the generation
in the lock file has changed.  When a file vanishes under it, or something
looks damaged that may just be changing, it looks again, a few times.
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
    read_layout,
    settled,
)
from taskstore.stores.jsonfile.lines import decode_commit, id_needle, journal_entry
from taskstore.stores.jsonfile.locks import read_generation
from taskstore.stores.jsonfile.segments import CommitLocation, SegmentReader, lines_of, torn

_T = TypeVar("_T")
_SPARSE_BYTES = 256 * 1024
_PLACES = 1024
_APPENDING_S = 0.01
_seq_of = operator.attrgetter("seq")


class Reader:
    """Reads one directory, remembering where what lies.  Safe for any number of threads."""

    def __init__(self, directory: Path, *, strict: bool) -> None:
        self.directory = directory
        self.strict = strict
        self._guard = threading.Lock()
        self._layout: Layout | None = None
        self._generation: tuple[int, int] | None = None
        self._places: list[JournalOffset] = []

    def settled(self, work: Callable[[Layout], _T]) -> _T:
        """Do ``work`` over a layout, again with a fresh one while files change under it."""

        def attempt(number: int) -> _T:
            if number > 1:
                self._forget()
            return work(self.layout())

        return settled(self.directory, attempt)

    def layout(self) -> Layout:
        """The files as of now."""
        # The generation is read first: a change in between is then seen next time.
        generation = read_generation(self.directory / LOCK_NAME)
        known = self._layout
        changing = generation is None or generation != self._generation
        if known is not None and not changing:
            return known
        layout = read_layout(self.directory)
        if layout.fresh:
            raise StoreUnavailableError(
                f"there is no ledger in {self.directory}", hint="check the path"
            )
        with self._guard:
            if known is not None and not _continues(known, layout):
                self._places = []
            self._layout, self._generation = layout, generation
        return layout

    def sign(self) -> tuple[object, ...]:
        """What differs whenever somebody has committed: the generation of the files, and
        which is the last segment and how long it is.  Costs one small file and one stat."""
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
    def lost(self) -> str | None:
        """What the last look through the directory found missing."""
        layout = self._layout
        return layout.lost if layout is not None else None

    def _forget(self) -> None:
        """Remember nothing of what was read."""
        with self._guard:
            self._places = []
            self._layout = None

    def end(self, layout: Layout) -> JournalOffset:
        """The place after the last commit."""
        known = self._nearest(layout, MAX_INT)
        size = layout.segments[-1].path.stat().st_size
        if size == known.offset:
            return known
        if size < known.offset:
            self._forget()
            known = self._nearest(layout, MAX_INT)
        walk = SegmentReader(layout, known)
        for found in walk:
            self._note(found, walk.place)
        self._remember(walk.place)
        return walk.place

    def torn(self) -> str | None:
        """What is to be said of bytes at the end of the last segment that are no commit."""

        def look(layout: Layout) -> str | None:
            offset, path = self.end(layout).offset, layout.segments[-1].path
            size = path.stat().st_size - offset
            return f"{path}: {torn(size, offset)}; it is left out" if size > 0 else None

        with contextlib.suppress(OSError, TaskStoreError):
            found = self.settled(look)
            if found is not None:
                time.sleep(_APPENDING_S)  # a writer may just be writing it
                return found if self.settled(look) == found else None
        return None

    def read(self, layout: Layout, after: int, limit: int) -> Sequence[JournalEntry]:
        """The entries after a seq, at most ``limit``."""
        if after < layout.floor - 1:
            raise CursorExpiredError(after, layout.floor)
        entries: list[JournalEntry] = []
        if limit <= 0:
            return ()
        before = place = self._nearest(layout, after)
        walk = SegmentReader(layout, place)
        for found in walk:
            before, place, line = place, walk.place, found.line
            self._note(found, place)
            begin = max(after + 1 - line.seq, 0)
            entries += [
                journal_entry(line, index, found.where, strict=self.strict)
                for index in range(begin, min(len(line.entries), begin + limit - len(entries)))
            ]
            if len(entries) == limit:
                break
        # A reader that goes on may ask for the last entry once more.
        self._remember(before, place)
        return tuple(entries)

    def history(self, layout: Layout, task_id: str) -> Sequence[JournalEntry]:
        """The entries of one task: only lines that name it are looked at."""
        needle = id_needle(task_id)
        entries = []
        for segment in layout.segments:
            last = segment is layout.segments[-1]
            for offset, raw in lines_of(segment, segment.start, last=last, naming=needle):
                line = decode_commit(raw, str(segment.path), offset)
                where = CommitLocation(segment, offset, raw, line).where
                entries += [
                    journal_entry(line, index, where, strict=self.strict)
                    for index, entry in enumerate(line.entries)
                    if entry.task_id == task_id
                ]
        return tuple(entries)

    def _nearest(self, layout: Layout, after: int) -> JournalOffset:
        """The last known place at or before a seq."""
        best = layout.before(after + 1)
        with self._guard:
            position = bisect.bisect_right(self._places, after, key=_seq_of)
            place = self._places[position - 1] if position else best
        there = place.first in [segment.first for segment in layout.segments]
        # At a boundary the start of the later segment is as good.
        return place if there and place.first >= best.first and place.seq >= best.seq else best

    def _note(self, found: CommitLocation, place: JournalOffset) -> None:
        """Remember a place in every quarter of a megabyte."""
        if found.offset // _SPARSE_BYTES != place.offset // _SPARSE_BYTES:
            self._remember(place)

    def _remember(self, *places: JournalOffset) -> None:
        """Remember where to read on; when there are too many places, every other one goes."""
        with self._guard:
            for place in places:
                position = bisect.bisect_left(self._places, place.seq, key=_seq_of)
                end = bisect.bisect_right(self._places, place.seq, key=_seq_of)
                self._places[position:end] = [place]
            if len(self._places) > _PLACES:
                del self._places[:-1:2]


def _continues(known: Layout, layout: Layout) -> bool:
    """Whether places in the known layout still mean the same in the new one."""
    inodes = {segment.first: segment.inode for segment in layout.segments}
    last = known.segments[-1]
    return known.identity == layout.identity and inodes.get(last.first) == last.inode
