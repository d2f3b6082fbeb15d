"""A right store in a file, and wrong ones that only a second process or a kill finds out.

:class:`LogStore` keeps the memory store's state as a log: a line per commit,
replayed under a lock before each use.  It writes a line in two halves, as a
disk may, so that a kill tears it.
"""

from __future__ import annotations

import base64
import fcntl
import os
import pickle
from contextlib import contextmanager
from types import MappingProxyType

from taskstore.errors import CorruptStoreError
from taskstore.model.codec import decode_record, decode_snapshot, encode_record, encode_snapshot
from taskstore.model.journal import Put, Remove, plan
from taskstore.stores.memory import MemoryStorage, MemoryStore


class LogStore(MemoryStore):
    """The right one."""

    unsupported_guarantees = MappingProxyType({})
    durability = "process"
    compact = None
    exclusive = None

    def __init__(self, path, *, read_only=False):
        super().__init__(MemoryStorage(), read_only=read_only)
        self.location = str(path)
        self.path = path
        self.offset = 0
        self.entered = 0  # what reads locks too, also in the middle of a commit
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with self.locked():
            self.catch_up()

    # -- the file -----------------------------------------------------------

    @contextmanager
    def locked(self):
        with self.storage.changed:
            self._check_open()
            if self.entered == 0:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX)
            self.entered += 1
            try:
                yield
            finally:
                self.entered -= 1
                if self.entered == 0:
                    fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def catch_up(self):
        rest = os.pread(self.descriptor, 1 << 30, self.offset)
        whole, newline, torn = rest.rpartition(b"\n")
        if torn:
            self.meet(torn, self.offset + len(whole) + len(newline))
        for line in whole.splitlines():
            self.replay(line)
        self.offset += len(whole) + len(newline)

    def meet(self, torn, offset):
        if not self.read_only:
            os.ftruncate(self.descriptor, offset)

    def replay(self, line):
        try:
            commit, content = pickle.loads(base64.b64decode(line, validate=True))
        except Exception as error:
            raise CorruptStoreError(self.location, "a line is damaged") from error
        if commit is None:
            MemoryStore.save_snapshot(self.writable(), decode_snapshot(content))
        else:
            changes = [
                Put(decode_record(change)) if isinstance(change, bytes) else Remove(*change)
                for change in content
            ]
            self._take_in(changes, plan(changes), commit)

    def writable(self):
        return MemoryStore(self.storage)

    def append(self, commit, content):
        self.write(base64.b64encode(pickle.dumps((commit, content))) + b"\n")

    def write(self, line):
        half = len(line) // 2
        os.pwrite(self.descriptor, line[:half], self.offset)
        os.pwrite(self.descriptor, line[half:], self.offset + half)
        os.fdatasync(self.descriptor)
        self.offset += len(line)

    # -- the store ------------------------------------------------------------

    def apply(self, changes):
        self._check_writable()
        plan(changes)
        with self.locked():
            self.catch_up()
            commit = super().apply(changes)
            self.append(commit, [self.written(change) for change in changes])
            return commit

    def written(self, change):
        if isinstance(change, Put):
            return encode_record(change.record)
        return (change.task_id, change.revision)

    def save_snapshot(self, snapshot):
        self._check_writable()
        with self.locked():
            self.catch_up()
            super().save_snapshot(snapshot)
            self.append(None, encode_snapshot(snapshot))

    def close(self):
        if not self._closed:
            super().close()
            with self.storage.changed:
                os.close(self.descriptor)

    def wait_for(self, after, timeout):
        import time

        deadline = time.monotonic() + timeout
        while self.head() <= after:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


def reading(name):
    """A read that catches up first."""
    right = getattr(MemoryStore, name)

    def read(self, *args):
        self._check_open()
        with self.locked():
            self.catch_up()
        return right(self, *args)

    return read


for _name in (
    "load_snapshot",
    "head",
    "floor",
    "read_journal",
    "read_history",
    "read_snapshot",
    "query",
    "verify",
):
    setattr(LogStore, _name, reading(_name))


class LeavesTheTornTailAndAppendsAfterIt(LogStore):
    def meet(self, torn, offset):
        pass

    def write(self, line):
        self.offset = os.fstat(self.descriptor).st_size
        super().write(line)


class KeepsHalfOfABatchWhoseLineWasTorn(LogStore):
    def append(self, commit, content):
        if commit is None:
            super().append(commit, content)
            return
        for number, change in enumerate(content):
            seq = commit.first_seq + number
            part = type(commit)(seq, seq, commit.at, commit.commit_id)
            super().append(part, [change])


class AcknowledgesBeforeItIsWritten(LogStore):
    pending = b""

    def write(self, line):
        pending, self.pending = self.pending, line
        if pending:
            super().write(pending)

    def close(self):
        if not self._closed and self.pending:
            self.write(b"")
        super().close()


class SavesInPlace(LogStore):
    """Empties the file before it writes the snapshot."""

    def save_snapshot(self, snapshot):
        with self.locked():
            self.catch_up()
            MemoryStore.save_snapshot(self, snapshot)
            os.ftruncate(self.descriptor, 0)
            self.offset = 0
            self.append(None, encode_snapshot(snapshot))


class ForgetsTheLock(LogStore):
    @contextmanager
    def locked(self):
        with self.storage.changed:
            yield


class ComparesBeforeItHasTheLock(LogStore):
    def apply(self, changes):
        with self.locked():
            self.catch_up()
            self._check(plan(changes))
        right, self._check = self._check, lambda steps: None
        try:
            return super().apply(changes)
        finally:
            self._check = right


class ChecksBookingsInItsOwnMemoryOnly(LogStore):
    """Knows of a run what it had seen when it was opened."""

    def apply(self, changes):
        known = dict(self.storage.by_dedup_key)
        right = self._check

        def check(steps):
            bookings, self.storage.by_dedup_key = self.storage.by_dedup_key, known
            try:
                right(steps)
            finally:
                self.storage.by_dedup_key = bookings

        self._check = check
        try:
            return super().apply(changes)
        finally:
            self._check = right


class HearsOfItsOwnCommitsOnly(LogStore):
    wait_for = MemoryStore.wait_for
