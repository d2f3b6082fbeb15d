"""Changing a ledger: commits, and replacing everything.

One script does a whole commit, so that it happens or not.  When its answer
is lost, the next question is how it came out; asking that also sees to it
that a command which is still on its way comes too late.
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
    Position,
    Step,
    base_not_found,
    encode_record,
    new_commit_id,
    plan,
    validated_snapshot,
)

from taskstore_redis.layout import CONTENT, FORMAT, facts_of, image_of
from taskstore_redis.link import AnswerLostError
from taskstore_redis.reading import Reader, wrong_format

TRIES = 4
"""How often a commit is sent whose connection breaks each time, having done nothing."""
VOID_MS = 24 * 60 * 60 * 1000
"""For how long a commit that was given up must not happen any more, in milliseconds."""
STAGING_MS = 10 * 60 * 1000
"""For how long what is staged lies untouched before others clear it, in milliseconds."""
STAGED_ROWS = 64
STAGED_BYTES = 256 * 1024
"""What is staged at a time; one record more may make it larger."""
MAX_BATCH_BYTES = 256 * 1024 * 1024
"""The longest batch: well below what a server takes as one command."""

APPLY_KEYS = (
    "head", "rows", "facts", "index", "bookings", "journal", "commits", "deleted", "aside",
    "aside_ids", "lease", "cut", "saved",
)  # fmt: skip


class Batch:
    """A batch of changes, as the script wants them."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.steps = plan(changes)
        self.count = len(changes)
        over = changes.base if isinstance(changes, ChangeSet) else Position(0)
        self.base = over if over.commit_id else Position(0)
        self._arguments: list[Any] = []
        last: dict[str, int] = {}
        size = 0
        for place, change in enumerate(changes, 1):
            image = image_of(encode_record(change.record)) if isinstance(change, Put) else b""
            kind = b"u" if isinstance(change, Put) else b"d"
            self._arguments += (change.task_id, kind, change.revision, image)
            last[change.task_id] = place
            size += len(image)
        if size > MAX_BATCH_BYTES:
            raise ValidationError(
                "changes",
                f"hold {size} bytes, and one commit takes {MAX_BATCH_BYTES} at most on Redis",
            )
        for step in self.steps:
            facts = b"" if step.record is None else facts_of(step.record)
            self._arguments += (last[step.task_id], step.base, facts)

    def arguments(self, commit_id: str, now: int) -> list[Any]:
        """What the script is called with."""
        ledger = secrets.token_hex(16)
        counts = [self.count, len(self.steps)]
        over = (self.base.seq, self.base.commit_id)
        return [FORMAT, commit_id, now, ledger, *counts, *over, *self._arguments]


class Writer:
    """Changes one ledger."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._link = reader.link
        self._keys = reader.keys

    def commit(self, changes: Sequence[Change], clock: Clock) -> Commit:
        """Commit a batch; see ``TaskRegistryStore.apply``."""
        batch = Batch(changes)
        keys = self._keys.named(*APPLY_KEYS)

        def send(commit_id: str) -> Any:
            keys_of_this = [*keys, self._keys.void(commit_id)]
            return self._link.run_once("apply", keys_of_this, *batch.arguments(commit_id, clock()))

        known = self._reader.trail.newest
        commit_id, reply = self._decided(send)
        match reply[0]:
            case b"ok":
                first, last, at = map(int, reply[1:4])
                if first <= known:
                    self._reader.trail.lost(known, first - 1)
                self._reader.trail.saw(last, commit_id)
                return Commit(first, last, at, commit_id)
            case b"conflict":
                raise ConflictError(_conflicts(batch.steps, reply[1:]))
            case b"elsewhere":
                raise base_not_found(batch.base)
            case b"damaged":
                task_id = reply[1].decode("utf-8", "replace")
                where = f"{self._reader.location}: facts, field {task_id!r}"
                raise CorruptStoreError(where, "is damaged")
        raise self._refusal(reply)

    def _decided(self, send: Callable[[str], Any]) -> tuple[str, Any]:
        """Send a commit until it is known how it came out: its id and the script's answer."""
        lost: AnswerLostError | None = None
        for _ in range(TRIES):
            commit_id = new_commit_id()
            known = self._reader.trail.newest
            try:
                return commit_id, send(commit_id)
            except AnswerLostError as error:
                lost = error
                reply = self._settle(commit_id, known, error)
                if reply[0] == b"ok":
                    return commit_id, reply
        raise StoreUnavailableError(
            f"{self._reader.location}: the connection breaks at every commit: {lost}"
        ) from lost

    def _settle(self, commit_id: str, known: int, lost: AnswerLostError) -> Any:
        """Find out about a commit whose answer was lost, or forbid it."""
        keys = [self._keys["commits"], self._keys.void(commit_id)]
        try:
            reply = self._link.run("settle", keys, commit_id, VOID_MS, known)
        except TaskStoreError as error:
            raise self._unknown(f"{lost}; {error.message}") from lost
        if reply[0] == b"unknown":
            raise self._unknown(f"{lost}; too much was committed since") from lost
        return reply

    def _unknown(self, reason: str) -> OutcomeUnknownError:
        return OutcomeUnknownError(
            f"{self._reader.location}: the connection broke during a commit, and whether it "
            f"happened cannot be read back: {reason}",
            hint="read the store again when it can be reached",
        )

    def _refusal(self, reply: Sequence[bytes]) -> TaskStoreError:
        """The error for an answer that is neither success nor conflict."""
        location = self._reader.location
        if reply[0] == b"format":
            return wrong_format(location, reply[1])
        if reply[0] == b"headless":
            return CorruptStoreError(
                location,
                "the head of the ledger is gone, and the rest is still there",
                hint="was it evicted? see maxmemory-policy; restore a backup",
            )
        return StoreBusyError(
            f"{location}: what was staged was cleared before it was complete",
            hint="it took longer than ten minutes between two steps: try again",
        )

    # -- everything ---------------------------------------------------------------

    def replace(self, snapshot: Snapshot) -> None:
        """Make a snapshot the whole content; see ``TaskRegistryStore.save_snapshot``."""
        snapshot = validated_snapshot(snapshot)
        head = self._reader.state().head
        if head and snapshot.seq <= head:
            raise _behind(snapshot, head)

        given_up: list[str] = []

        def send(token: str) -> Any:
            while given_up:
                self.forget(given_up.pop())
            given_up.append(token)
            chunks = self._stage(token, snapshot)
            return [b"gone"] if chunks is None else self._switch(token, snapshot, chunks)

        try:
            token, reply = self._decided(send)
        except OutcomeUnknownError:
            raise
        except BaseException:
            self._forget_quietly(given_up)
            raise
        if reply[0] != b"ok":
            self._forget_quietly(given_up)
        if reply[0] == b"behind":
            raise _behind(snapshot, int(reply[1]))
        if reply[0] != b"ok":
            raise self._refusal(reply)
        self._reader.trail.saw(snapshot.seq, token)

    def _switch(self, token: str, snapshot: Snapshot, chunks: int) -> Any:
        """Put what was staged in the place of the live content, once."""
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
        """Build content beside the live one; returns its number of chunks, ``None`` if cleared."""
        staging, snap = self._keys["staging"], self._keys.snapshot(token)
        staged = self._keys.staged(token)
        seconds = int(self._link.call("TIME")[0])
        self._link.call("HSET", staging, token, seconds * 1000 + STAGING_MS)
        chunks = 0
        keys = [staging, *staged[:4], snap]
        for rows in _portions(snapshot):
            reply = self._link.run("stage", keys, token, STAGING_MS, chunks, *rows)
            if reply[0] != b"ok":
                return None
            chunks += 1
        if snapshot.quarantined:
            ids: dict[str, list[str]] = {}
            values = [msgspec.json.encode(item) for item in snapshot.quarantined]
            for number, item in enumerate(snapshot.quarantined):
                task_id = item.occupies
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

    def forget(self, token: str) -> None:
        """Throw away what was staged, if it did not become anything."""
        keys = [self._keys["staging"], *self._keys.staged(token), self._keys.snapshot(token)]
        self._link.run("forget", keys, token)

    def _forget_quietly(self, tokens: Sequence[str]) -> None:
        """As :meth:`forget`; where that fails too, the next compaction clears them."""
        with suppress(TaskStoreError):
            for token in tokens:
                self.forget(token)


def _portions(snapshot: Snapshot) -> Iterator[list[Any]]:
    """The records in portions: id, facts and image of each, one after the other."""
    rows: list[Any] = []
    size = 0
    for task_id in sorted(snapshot.records):
        record = snapshot.records[task_id]
        rows += _row(record)
        size += len(rows[-1])
        if size >= STAGED_BYTES or len(rows) >= 3 * STAGED_ROWS:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _row(record: TaskRecord) -> tuple[str, bytes, bytes]:
    return (record.task_id, facts_of(record), image_of(encode_record(record)))


def _behind(snapshot: Snapshot, head: int) -> ConflictError:
    return ConflictError([], f"the snapshot is at seq {snapshot.seq}, the head at {head}")


def _conflicts(steps: Sequence[Step], facts: Sequence[Any]) -> list[Conflict]:
    """The conflicts of a reply: the number of the step, what was found, by whom it is booked."""
    conflicts = []
    rest = iter(facts)
    while lot := tuple(islice(rest, 4)):
        number, found, deleted, holder = lot
        step = steps[int(number) - 1]
        conflicts.append(
            Conflict(
                step.task_id,
                step.base,
                int(found),
                existing_task_id=holder.decode() if holder else None,
                deleted=deleted == b"1",
            )
        )
    return conflicts
