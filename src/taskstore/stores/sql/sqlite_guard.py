"""Detection of cut and replaced SQLite files, and of orphaned logs."""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from taskstore.errors import CorruptStoreError, StoreReplacedError, StoreUnavailableError

_NO_INODE = (0, 0)

_OPEN_LOG_QUERY = "SELECT count(*) FROM sqlite_master"
"""A minimal query.  A connection opens the write-ahead log at its first query."""

_JOURNAL_MAGIC = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"
"""The first bytes of a valid rollback journal.  Bytes 16 to 20 are the number of pages that the
file had before the transaction (from SQLite's format)."""

_WAL_MAGIC = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
"""The first bytes of a write-ahead log: one value for each byte order of its checksums."""

_WAL_HEADER = struct.Struct("> 4s 4x I 4x 8s 8x")
"""The header of a write-ahead log: magic, page size, salts."""

_WAL_FRAME = struct.Struct("> I I 8s 8x")
"""The header of a frame: page number, number of pages after the commit (0 if the frame does not end
a commit), salts."""

_FILE_MAGIC = b"SQLite format 3\0"
_FILE_HEADER = struct.Struct("> 16s H 6x I I 60x I 4x")
"""The header of a database file: magic, page size, change counter, number of pages, and the change
counter for which the number of pages is valid."""

_LOCK_OFFSET = 0x40000000
"""The offset of the bytes that SQLite locks.  No content is ever written to the page at this
offset."""

WAS_CUT = "was cut: its last pages are missing"
"""The state of a file for which :func:`lacks_pages` is true."""

_MTIME_GRANULARITY_NS = 20_000_000
"""The largest interval in which two changes of a directory can get the same mtime."""


def inode_of(path: str) -> tuple[int, int]:
    """Return the inode and device of the file at a path; (0, 0) if the file is not accessible."""
    try:
        status = os.stat(path)  # noqa: PTH116 - faster than Path.stat
    except OSError:
        return _NO_INODE
    return (status.st_ino, status.st_dev)


def _directory_state(directory: str) -> tuple[int, int] | None:
    """Return the mtime and inode of a directory.  After a change or a move of the directory, at
    least one of the two values is different."""
    try:
        status = os.stat(directory)  # noqa: PTH116 - faster than Path.stat
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ino)


def is_empty(status: os.stat_result) -> bool:
    """Return whether SQLite uses a file as an empty database.

    SQLite takes a file of one byte for an empty file too (``unixFileSize`` in its source code).
    """
    return status.st_size <= 1


def check_logs(path: Path, problem_of: Callable[[], str | None]) -> None:
    """Raise :class:`~taskstore.CorruptStoreError` if a log with content lies beside a file that is
    missing or empty, or with which ``problem_of()`` finds a problem.

    The function must be called before SQLite opens the file, because SQLite removes a log that lies
    beside such a file, or writes the log into the file and then removes the log.
    """
    # The log is checked before the file: a file whose log has content is never empty.
    log = next(filter(_has_content, (f"{path}-wal", f"{path}-journal")), None)
    if log is None:
        return
    state: str | None
    try:
        status = path.stat()
    except FileNotFoundError:
        state = "does not exist"
    except OSError:
        return  # the caller reports this error
    else:
        if not stat.S_ISREG(status.st_mode):
            return
        state = "is empty" if is_empty(status) else problem_of()
    if state is None:
        return
    raise CorruptStoreError(
        str(path),
        f"the file {state}, but its log {log} contains changes that SQLite would remove",
        hint=f"nothing was changed; copy all files whose names begin with {path} to a safe place; "
        "if the complete file is in another place, move it back beside its log; to restore a "
        f"backup instead, first remove {log} and {path}-shm",
    )


def _has_content(log: str) -> bool:
    """Return whether a log has content.

    A write-ahead log has content if it is not empty.  A rollback journal has content if its
    database file was not empty before the transaction.
    """
    if log.endswith("-journal"):
        return _original_pages(log) > 0
    try:
        return os.stat(log).st_size > 0  # noqa: PTH116 - as in inode_of
    except OSError:
        return False


def _original_pages(journal: str) -> int:
    """Return the number of pages that a file had before the transaction of its rollback journal;
    0 if the journal has no valid header.

    The journal of a transaction that creates a database has the original size 0.
    """
    try:
        with open(journal, "rb") as file:  # noqa: PTH123 - SQLite does not lock a journal
            header = file.read(20)
    except OSError:
        return 0
    return int.from_bytes(header[16:20]) if header.startswith(_JOURNAL_MAGIC) else 0


def lacks_pages(path: Path) -> bool:
    """Return whether a file was cut: the file and its log together have fewer pages than the header
    of the file counts.

    A crash can leave a file that is shorter than its header says: a checkpoint writes the first
    page before it writes the last pages.  SQLite then reads the last pages from the log, so such a
    file was not cut.  The function can be called while this process has the file open.
    """
    try:
        header = _read_header(path)
        if len(header) < _FILE_HEADER.size:
            return True
        magic, page_size, change_counter, pages, valid_for = _FILE_HEADER.unpack(header)
        page_size = 65536 if page_size == 1 else page_size
        if magic != _FILE_MAGIC or change_counter != valid_for or not page_size:
            return False
        logged, pages_after = _logged_pages(f"{path}-wal", page_size)
        restored, pages_before = _journal_pages(f"{path}-journal", page_size)
        # The size is read after the log: a log loses its content only when the file is complete.
        complete = path.stat().st_size // page_size
        if _read_header(path) != header:
            return False  # a checkpoint or a commit changes the file now
    except OSError:
        return False
    # A commit in the log can have made the database smaller, and so can a rollback.
    needed = min(pages, pages_after or pages, pages_before or pages)
    logged.add(_LOCK_OFFSET // page_size + 1)
    missing = (page for page in range(complete + 1, needed + 1) if page not in logged)
    return next(islice(missing, restored, None), None) is not None


def _read_header(path: Path) -> bytes:
    """Return the header of a database file; fewer bytes if the file is shorter than a header.

    If this process opened the file and closed it again, the process would lose the locks that
    SQLite has on the file.  If the process has the file open, the function therefore reads through
    the descriptor that is open.
    """
    file_id = inode_of(str(path))
    for entry in Path("/dev/fd").iterdir():
        descriptor = int(entry.name)
        try:
            status = os.fstat(descriptor)
        except OSError:
            continue  # the descriptor was closed after it was listed
        if (status.st_ino, status.st_dev) == file_id:
            return os.pread(descriptor, _FILE_HEADER.size, 0)
    with path.open("rb") as file:
        return file.read(_FILE_HEADER.size)


def _logged_pages(log: str, page_size: int) -> tuple[set[int], int]:
    """Return the numbers of the pages in the commits of a write-ahead log, and the number of pages
    of the database after the last commit; 0 if the log has no commit."""
    committed: set[int] = set()
    transaction: set[int] = set()
    pages = 0
    try:
        file = open(log, "rb")  # noqa: PTH123, SIM115 - SQLite locks the -shm instead of the log
    except FileNotFoundError:
        return committed, pages
    with file:
        header = file.read(_WAL_HEADER.size)
        if len(header) < _WAL_HEADER.size:
            return committed, pages
        magic, logged_page_size, salts = _WAL_HEADER.unpack(header)
        if magic not in _WAL_MAGIC or logged_page_size != page_size:
            return committed, pages
        frame_size = _WAL_FRAME.size + page_size
        size = os.fstat(file.fileno()).st_size
        for offset in range(_WAL_HEADER.size, size - frame_size + 1, frame_size):
            frame = os.pread(file.fileno(), _WAL_FRAME.size, offset)
            page, pages_after, frame_salts = _WAL_FRAME.unpack(frame)
            if not page or frame_salts != salts:
                break  # the other frames are from an earlier use of the log
            transaction.add(page)
            if pages_after:
                committed |= transaction
                transaction.clear()
                pages = pages_after
    return committed, pages


def _journal_pages(journal: str, page_size: int) -> tuple[int, int]:
    """Return the largest number of pages that a rollback journal can contain, and the number of
    pages of the database before the transaction; 0 and 0 if the journal has no content."""
    pages = _original_pages(journal)
    return (os.stat(journal).st_size // page_size if pages else 0), pages  # noqa: PTH116


class FileGuard:
    """Raises an error if a database file was moved, removed or replaced after it was opened.

    If an open database file or an open log is unlinked, its commits are lost when the last process
    closes this file or log.  The store therefore checks the directory's mtime before each commit
    and after each read.  If a program creates, removes or replaces a file in the directory, the
    mtime changes; the guard checks the files only after the mtime has changed.  The guard calls
    only ``os.stat``: if this process opened and closed the database file outside SQLite, SQLite
    would lose its locks.

    The guard keeps one connection, the anchor, open from the start.  Only the guard runs
    statements on the anchor.  While the anchor is open, SQLite does not remove the open
    ``-wal`` and ``-shm``; only another program can remove these files.
    """

    def __init__(
        self, path: Path, open_one: Callable[[], Any], set_up: Callable[[Any], object]
    ) -> None:
        """``open_one`` opens a connection, and ``set_up`` configures it."""
        self._path = str(path)
        self._directory = str(path.parent)
        self._open_one = open_one
        self._set_up = set_up
        self._inode = inode_of(self._path)
        # The inodes of the -wal and -shm that the anchor has open, by name.
        self._logs: dict[str, tuple[int, int]] = {}
        self._anchor: Any = None
        # The directory's state at the most recent successful check of the files.
        self._checked_state: tuple[int, int] | None = None
        self._replaced = ""  # after a replacement, the replaced part: "file" or "log"

    def start(self) -> None:
        """Open the anchor, the guard's own connection, before any other connection.

        Raises the driver's errors.
        """
        self._anchor = self.connect()
        self.record_logs()

    def record_logs(self) -> None:
        """Record the inodes of the ``-wal`` and ``-shm`` of the database file, if they exist."""
        if self._anchor is not None and not self._logs:
            self._anchor.execute(_OPEN_LOG_QUERY).fetchall()
            [mode] = self._anchor.execute("PRAGMA journal_mode").fetchone()
            if mode == "wal":
                # If the -wal or -shm is missing here, another program removed it while it was open.
                names = (f"{self._path}-wal", f"{self._path}-shm")
                self._logs = {name: inode_of(name) for name in names}
        self.check_fully()

    def connect(self) -> Any:
        """Return a new connection that uses the guarded file and its recorded logs."""
        raw = None
        try:
            raw = self._open_one()
            self.check_fully()  # before the first query, which could open a foreign log
            self._set_up(raw)
            raw.execute(_OPEN_LOG_QUERY).fetchall()
            self.check_fully()  # the first query can create a new log
        except BaseException as error:
            if raw is not None:
                raw.close()
            if isinstance(error, Exception):
                self.check_fully()  # raises a StoreReplacedError instead if a file was replaced
            raise
        return raw

    def check(self) -> None:
        """Raise :class:`~taskstore.StoreReplacedError` if the file or a log was removed, moved
        or replaced after it was opened."""
        try:
            status = os.stat(self._directory)  # noqa: PTH116 - faster than Path.stat
        except OSError:
            self._check_files(None)
            return
        state = (status.st_mtime_ns, status.st_ino)
        if state != self._checked_state:
            self._check_files(state)

    def check_fully(self) -> None:
        """Check the files even if the directory did not change."""
        self._check_files(_directory_state(self._directory))

    def _check_files(self, state: tuple[int, int] | None) -> None:
        """Check the files.

        The caller must read ``state``, the directory's mtime and inode, before this check.  The
        next check can then detect every change that was made after ``state`` was read.
        """
        files = () if self._replaced else ((self._path, self._inode), *self._logs.items())
        for name, inode in files:
            try:
                status = os.stat(name)  # noqa: PTH116 - faster than Path.stat
            except OSError:
                current = _NO_INODE
            else:
                current = (status.st_ino, status.st_dev)
            if current != inode or inode == _NO_INODE:
                self._replaced = "file" if name == self._path else "log"
                break
        if self._replaced:
            self._checked_state = None
            self._raise_replaced()
        # A directory that changed just before can change again and keep the same mtime.
        settled = state is not None and time.time_ns() - state[0] > _MTIME_GRANULARITY_NS
        self._checked_state = state if settled else None

    def close(self) -> None:
        """Close the anchor."""
        anchor, self._anchor = self._anchor, None
        if anchor is not None:
            anchor.close()

    def _raise_replaced(self) -> NoReturn:
        refused = "this store refuses all further reads and writes"
        if self._replaced == "log":
            raise StoreReplacedError(
                f"the -wal or -shm of {self._path} was removed while it was open: {refused}",
                hint="do not open the ledger in a new process; close the ledger in every process "
                "(closing saves the committed data); then open the ledger again",
            )
        refused = f"{self._path} was moved, removed or replaced while it was open: {refused}"
        left = [name for name, log in self._logs.items() if inode_of(name) == log != _NO_INODE]
        if left and inode_of(self._path) != _NO_INODE:
            # SQLite would replay the old log over the new file and so corrupt the new file.
            raise StoreReplacedError(
                f"{refused}; {' and '.join(left)} still belong to the previous file",
                hint="stop every process that has the ledger open, remove "
                f"{self._path}-wal and {self._path}-shm, and open the ledger again",
            )
        raise StoreReplacedError(
            refused, hint="restore the file if it is missing; then open the ledger again"
        )


class ImmutableGuard:
    """Detects a change of a file that was opened as immutable.

    SQLite reads an immutable file without locks and ignores its ``-wal``, so reads
    are correct only while no process writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened_state = self._state()

    def _state(self) -> tuple[object, ...]:
        status = self._path.stat()
        log = inode_of(f"{self._path}-wal")
        return (status.st_ino, status.st_size, status.st_mtime_ns, log)

    def check(self) -> None:
        """Raise :class:`~taskstore.StoreUnavailableError` if the file has changed."""
        try:
            unchanged = self._state() == self._opened_state
        except OSError:
            unchanged = False
        if not unchanged:
            raise StoreUnavailableError(
                f"{self._path} was changed by a writer while this store read it without locks",
                hint="open the ledger again; to read the ledger with locks, make "
                f"{self._path.parent} writable",
            )

    check_fully = check
