"""The writer: commits, and replacement of the whole content.

One script runs a whole commit, so a commit is atomic.  If the answer of this script is lost, a
second script looks up the outcome of the commit.  If the commit is missing, the second script also
voids the commit id: if the server receives the lost command later, the command has no effect.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import msgspec
from taskstore import (
    Change,
    Commit,
    Conflict,
    ConflictError,
    CorruptStoreError,
    OutcomeUnknownError,
    Put,
    Snapshot,
    StoreBusyError,
    StoreUnavailableError,
    TaskRecord,
    TaskStoreError,
    ValidationError,
)
from taskstore.store import (
    ChangeSet,
    Clock,
    NetChange,
    Position,
    base_not_found_error,
    encode_record,
    new_commit_id,
    plan,
    validated_snapshot,
)

from taskstore_redis.layout import CONTENT, FORMAT, facts_of, image_of
from taskstore_redis.link import AnswerLostError
from taskstore_redis.reading import Reader, wrong_format

COMMIT_ATTEMPTS = 4
"""The maximum number of attempts to commit.  A new attempt follows if the connection broke and
nothing was committed."""
VOID_MS = 24 * 60 * 60 * 1000
"""How long a void key exists, in milliseconds."""
STAGING_TIMEOUT_MS = 10 * 60 * 1000
"""How long staged content may be idle before a compaction removes it, in milliseconds."""
STAGE_ROWS = 64
STAGE_BYTES = 256 * 1024
"""The limits of one staged chunk in records and bytes; the last record of a chunk may exceed the
byte limit."""
MAX_BATCH_BYTES = 256 * 1024 * 1024
"""The size of the largest commit in bytes, well below the server's limit for one command."""

APPLY_KEYS = (
    "head", "rows", "facts", "index", "bookings", "journal", "commits", "deleted", "aside",
    "aside_ids", "lease", "cut", "saved",
)  # fmt: skip


class CommitRequest:
    """The arguments of ``apply.lua`` for a batch of changes."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.net_changes = plan(changes)
        self.count = len(changes)
        base = changes.base if isinstance(changes, ChangeSet) else Position(0)
        self.base = base if base.commit_id else Position(0)
        self._arguments: list[Any] = []
        last: dict[str, int] = {}
        size = 0
        for number, change in enumerate(changes, 1):
            image = image_of(encode_record(change.record)) if isinstance(change, Put) else b""
            kind = b"u" if isinstance(change, Put) else b"d"
            self._arguments += (change.task_id, kind, change.revision, image)
            last[change.task_id] = number
            size += len(image)
        if size > MAX_BATCH_BYTES:
            raise ValidationError(
                "changes",
                f"contain {size} bytes; on Redis, one commit takes {MAX_BATCH_BYTES} at most",
            )
        for net in self.net_changes:
            facts = b"" if net.record is None else facts_of(net.record)
            self._arguments += (last[net.task_id], net.expected_revision, facts)

    def arguments(self, commit_id: str, now: int) -> list[Any]:
        """Return the arguments of the script (see ``apply.lua``)."""
        ledger = secrets.token_hex(16)
        counts = [self.count, len(self.net_changes)]
        base = (self.base.seq, self.base.commit_id)
        return [FORMAT, commit_id, now, ledger, *counts, *base, *self._arguments]


class Writer:
    """The writer of one ledger."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._link = reader.link
        self._keys = reader.keys

    def commit(self, changes: Sequence[Change], clock: Clock) -> Commit:
        """Commit a batch; see ``TaskRegistryStore.apply``."""
        request = CommitRequest(changes)
        keys = self._keys.named(*APPLY_KEYS)

        def send(commit_id: str) -> Any:
            arguments = request.arguments(commit_id, clock())
            return self._link.run_once("apply", [*keys, self._keys.void(commit_id)], *arguments)

        known_seq = self._reader.known_commits.newest_seq
        commit_id, reply = self._send_with_retry(send)
        match reply[0]:
            case b"ok":
                first, last, at = map(int, reply[1:4])
                if first <= known_seq:
                    self._reader.known_commits.mark_lost(known_seq, first - 1)
                self._reader.known_commits.add(last, commit_id)
                return Commit(first, last, at, commit_id)
            case b"conflict":
                raise ConflictError(_conflicts(request.net_changes, reply[1:]))
            case b"elsewhere":
                raise base_not_found_error(request.base)
            case b"damaged":
                task_id = reply[1].decode("utf-8", "replace")
                where = f"{self._reader.location}: facts, field {task_id!r}"
                raise CorruptStoreError(where, "is damaged")
        raise self._reply_error(reply)

    def _send_with_retry(self, send: Callable[[str], Any]) -> tuple[str, Any]:
        """Send a commit until its outcome is known; returns the commit id and the script's
        reply."""
        lost: AnswerLostError | None = None
        for _ in range(COMMIT_ATTEMPTS):
            commit_id = new_commit_id()
            known_seq = self._reader.known_commits.newest_seq
            try:
                return commit_id, send(commit_id)
            except AnswerLostError as error:
                lost = error
                reply = self._resolve_outcome(commit_id, known_seq, error)
                if reply[0] == b"ok":
                    return commit_id, reply
        raise StoreUnavailableError(
            f"{self._reader.location}: the connection broke in {COMMIT_ATTEMPTS} attempts "
            f"to commit: {lost}",
            hint="nothing was committed: check the server and the network, and try again",
        ) from lost

    def _resolve_outcome(self, commit_id: str, known_seq: int, lost: AnswerLostError) -> Any:
        """Look up the outcome of a commit whose answer was lost; void a missing commit."""
        keys = [self._keys["commits"], self._keys.void(commit_id)]
        try:
            reply = self._link.run("settle", keys, commit_id, VOID_MS, known_seq)
        except TaskStoreError as error:
            raise self._outcome_unknown(f"{lost}; {error.message}") from lost
        if reply[0] == b"unknown":
            raise self._outcome_unknown(f"{lost}; too many commits were made since") from lost
        return reply

    def _outcome_unknown(self, reason: str) -> OutcomeUnknownError:
        return OutcomeUnknownError(
            f"{self._reader.location}: the connection broke during a commit, and the outcome "
            f"of the commit cannot be read back: {reason}",
            hint="read the store again when the server can be reached",
        )

    def _reply_error(self, reply: Sequence[bytes]) -> TaskStoreError:
        """The error for a reply that is neither success nor conflict."""
        location = self._reader.location
        if reply[0] == b"format":
            return wrong_format(location, reply[1])
        if reply[0] == b"headless":
            return CorruptStoreError(
                location,
                "the head of the ledger is missing, but its other keys exist",
                hint="restore a backup; if the server evicted the key, see maxmemory-policy",
            )
        return StoreBusyError(
            f"{location}: the staged content was removed before it was complete",
            hint="more than ten minutes passed between two steps: try again",
        )

    # -- replacement --------------------------------------------------------------

    def replace(self, snapshot: Snapshot) -> None:
        """Replace the content by a snapshot; see ``TaskRegistryStore.save_snapshot``."""
        snapshot = validated_snapshot(snapshot)
        head = self._reader.state().head
        if head and snapshot.seq <= head:
            raise _behind_head(snapshot, head)

        abandoned: list[str] = []

        def send(token: str) -> Any:
            while abandoned:
                self.discard_staged(abandoned.pop())
            abandoned.append(token)
            chunks = self._stage(token, snapshot)
            return [b"gone"] if chunks is None else self._switch(token, snapshot, chunks)

        try:
            token, reply = self._send_with_retry(send)
        except OutcomeUnknownError:
            raise
        except BaseException:
            self._try_discard(abandoned)
            raise
        if reply[0] != b"ok":
            self._try_discard(abandoned)
        if reply[0] == b"behind":
            raise _behind_head(snapshot, int(reply[1]))
        if reply[0] != b"ok":
            raise self._reply_error(reply)
        self._reader.known_commits.add(snapshot.seq, token)

    def _switch(self, token: str, snapshot: Snapshot, chunks: int) -> Any:
        """Replace the live content by the staged content; the script is sent once."""
        return self._link.run_once(
            "switch",
            [
                *self._keys.named("head", "staging", "snapshots", "commits"),
                self._keys.void(token),
                *self._keys.named("journal", "deleted", "cut", "saved", *CONTENT),
                *self._keys.staged(token),
            ],
            FORMAT,
            token,
            secrets.token_hex(16),
            snapshot.seq,
            snapshot.at,
            len(snapshot.records) + len(snapshot.quarantined),
            chunks,
            self._keys.snapshot(""),
        )

    def _stage(self, token: str, snapshot: Snapshot) -> int | None:
        """Stage the content; returns the number of chunks, or ``None`` if the staged content was
        removed."""
        staging, snap = self._keys["staging"], self._keys.snapshot(token)
        staged = self._keys.staged(token)
        seconds = int(self._link.call("TIME")[0])
        self._link.call("HSET", staging, token, seconds * 1000 + STAGING_TIMEOUT_MS)
        chunks = 0
        keys = [staging, *staged[:4], snap]
        for rows in _chunks_of(snapshot):
            reply = self._link.run("stage", keys, token, STAGING_TIMEOUT_MS, chunks, *rows)
            if reply[0] != b"ok":
                return None
            chunks += 1
        if snapshot.quarantined:
            ids: dict[str, list[str]] = {}
            values = [msgspec.json.encode(item) for item in snapshot.quarantined]
            for number, item in enumerate(snapshot.quarantined):
                task_id = item.occupied_task_id
                if task_id is not None:
                    ids.setdefault(task_id, ["0"]).append(str(number))
                    ids[task_id][0] = str(item.revision or 0)
            for key, fields in (
                (staged[4], {str(n): value for n, value in enumerate(values)}),
                (staged[5], {task_id: "\0".join(parts) for task_id, parts in ids.items()}),
                (snap, {"aside": b"\n".join(values)}),
            ):
                flat = [part for pair in fields.items() for part in pair]
                if self._link.run("stage_fields", [staging, key], token, *flat)[0] != b"ok":
                    return None
        return chunks

    def discard_staged(self, token: str) -> None:
        """Delete the content that was staged under a token, unless the content was published."""
        keys = [self._keys["staging"], *self._keys.staged(token), self._keys.snapshot(token)]
        self._link.run("forget", keys, token)

    def _try_discard(self, tokens: Sequence[str]) -> None:
        """Try to delete staged content; after a failure, a later compaction deletes it."""
        with suppress(TaskStoreError):
            for token in tokens:
                self.discard_staged(token)


def _chunks_of(snapshot: Snapshot) -> Iterator[list[Any]]:
    """Yield the records in chunks; a chunk is a flat list of id, facts and image of each record."""
    rows: list[Any] = []
    size = 0
    for task_id in sorted(snapshot.records):
        record = snapshot.records[task_id]
        rows += _row(record)
        size += len(rows[-1])
        if size >= STAGE_BYTES or len(rows) >= 3 * STAGE_ROWS:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _row(record: TaskRecord) -> tuple[str, bytes, bytes]:
    return (record.task_id, facts_of(record), image_of(encode_record(record)))


def _behind_head(snapshot: Snapshot, head: int) -> ConflictError:
    return ConflictError([], f"the snapshot is at seq {snapshot.seq}, the head at {head}")


def _conflicts(net_changes: Sequence[NetChange], facts: Sequence[Any]) -> list[Conflict]:
    """The conflicts in a reply.

    The reply has four values per conflict: the number of the net change, the stored revision,
    whether the task was deleted, and the id of the task that has the dedup key.
    """
    conflicts = []
    rest = iter(facts)
    while fields := tuple(islice(rest, 4)):
        number, stored, deleted, owner = fields
        net = net_changes[int(number) - 1]
        conflicts.append(
            Conflict(
                net.task_id,
                net.expected_revision,
                int(stored),
                existing_task_id=owner.decode() if owner else None,
                deleted=deleted == b"1",
            )
        )
    return conflicts
