"""A correct store in a file, and defective ones that need a second process or a kill.

:class:`LogStore` logs the commits of a memory store, one line each, and replays the
log under a lock before each use.  It writes a line in two halves, as a disk may, so
that a kill tears the line.
"""

from __future__ import annotations

import base64
import fcntl
import os
import pickle
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType

from taskstore.errors import CorruptStoreError
from taskstore.model.codec import decode_record, decode_snapshot, encode_record, encode_snapshot
from taskstore.model.journal import Put, Remove, plan
from taskstore.stores.memory import MemoryStorage, MemoryStore


class LogStore(MemoryStore):
    """The correct store."""

    unsupported_guarantees = MappingProxyType({})
    durability = "process"
    compact = None
    exclusive = None

    def __init__(self, path, *, read_only=False):
        super().__init__(MemoryStorage(), read_only=read_only)
        self.location = str(path)
        self.path = path
        self.offset = 0
        self.lock_depth = 0  # reads also lock, even during a commit
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with self.locked():
            self.catch_up()
        self._release_when_dropped(partial(os.close, self.descriptor))

    # -- the file -----------------------------------------------------------

    @contextmanager
    def locked(self):
        with self.storage.changed:
            self._check_open()
            if self.lock_depth == 0:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX)
            self.lock_depth += 1
            try:
                yield
            finally:
                self.lock_depth -= 1
                if self.lock_depth == 0:
                    fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def catch_up(self):
        data = os.pread(self.descriptor, 1 << 30, self.offset)
        complete, newline, torn = data.rpartition(b"\n")
        if torn:
            self.handle_torn_line(torn, self.offset + len(complete) + len(newline))
        for line in complete.splitlines():
            self.replay(line)
        self.offset += len(complete) + len(newline)

    def handle_torn_line(self, torn, offset):
        if not self.read_only:
            os.ftruncate(self.descriptor, offset)

    def replay(self, line):
        try:
            commit, content = pickle.loads(base64.b64decode(line, validate=True))
        except Exception as error:
            raise CorruptStoreError(self.location, "a line is damaged") from error
        if commit is None:
            MemoryStore.save_snapshot(self.writable_view(), decode_snapshot(content))
        else:
            changes = [
                Put(decode_record(change)) if isinstance(change, bytes) else Remove(*change)
                for change in content
            ]
            self._commit(changes, plan(changes), commit)

    def writable_view(self):
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
            self.append(commit, [self.encode_change(change) for change in changes])
            return commit

    def encode_change(self, change):
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


def catching_up(name):
    """Return a read method that catches up first."""
    original = getattr(MemoryStore, name)

    def read(self, *args):
        self._check_open()
        with self.locked():
            self.catch_up()
        return original(self, *args)

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
    setattr(LogStore, _name, catching_up(_name))


class AppendsAfterTheTornLine(LogStore):
    def handle_torn_line(self, torn, offset):
        pass

    def write(self, line):
        self.offset = os.fstat(self.descriptor).st_size
        super().write(line)


class KeepsPartOfATornBatch(LogStore):
    def append(self, commit, content):
        if commit is None:
            super().append(commit, content)
            return
        for number, change in enumerate(content):
            seq = commit.first_seq + number
            part = type(commit)(seq, seq, commit.at, commit.commit_id)
            super().append(part, [change])


class AcknowledgesBeforeWriting(LogStore):
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


class SkipsTheLock(LogStore):
    @contextmanager
    def locked(self):
        with self.storage.changed:
            yield


class ComparesBeforeLocking(LogStore):
    def apply(self, changes):
        with self.locked():
            self.catch_up()
            self._check(plan(changes))
        original, self._check = self._check, lambda net_changes: None
        try:
            return super().apply(changes)
        finally:
            self._check = original


class ChecksDedupKeysInMemoryOnly(LogStore):
    """Checks only the dedup keys that were stored when the instance was opened."""

    def apply(self, changes):
        keys_at_start = dict(self.storage.by_dedup_key)
        original = self._check

        def check(net_changes):
            dedup_keys, self.storage.by_dedup_key = self.storage.by_dedup_key, keys_at_start
            try:
                original(net_changes)
            finally:
                self.storage.by_dedup_key = dedup_keys

        self._check = check
        try:
            return super().apply(changes)
        finally:
            self._check = original


class WakesOnOwnCommitsOnly(LogStore):
    wait_for = MemoryStore.wait_for
