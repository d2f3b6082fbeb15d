"""Power loss on an SQLite file in WAL mode: the crash states of SQLite's protocol.

The file operations of SQLite cannot be recorded.  Instead, a writer process pauses after
each acknowledged commit, and the database and the WAL are copied.  The writer is killed during
its final commit.  A power loss can lose only changes that were made since the most recent
copy.  The fsyncs of SQLite determine which of these changes are on disk (``wal.c``, https://www.sqlite.org/wal.html
and atomiccommit.html, ``synchronous=FULL``):

- A commit appends frames to the WAL and flushes the frames to disk with one fsync.
  Before this fsync, each 512-byte block of the frames can be present, missing, torn,
  zeros or garbage; the checksums of the WAL must detect every bad block.  The WAL can have
  its old length or any greater length.
- When all frames are copied to the database, the next writer restarts the WAL: the writer writes a
  new WAL header, and flushes the header to disk before the first new frame.  So after a power loss,
  the WAL is the old WAL, or has the new header and any part of the new frames.
- A checkpoint flushes the WAL to disk, writes pages to the database and flushes the database.  A
  writer can restart the WAL only after this checkpoint.  So if the database has changed since the
  copy, the whole WAL is on disk, and each block of the database has the old or the new content.
- A power loss always loses the shared memory (``-shm``); SQLite rebuilds this file from the WAL.

This model is valid only for a single writer.  All commits of the writer except the final commit
must be acknowledged.  No reader may have the database open, because a reader can prevent the end of
a checkpoint.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from msgspec import Struct, field

from taskstore.model.journal import Change
from taskstore.store.disk import Disk
from taskstore.store.interface import TaskRegistryStore
from taskstore.store.opening import open_store
from taskstore.stores.sql import SQLStore
from taskstore.stores.sql.sqlite_library import sqlite_module
from taskstore.testing.crash.processes import Child, Report
from taskstore.testing.factories import Model, make_put, next_of, removal_of
from taskstore.testing.powerloss.expected import Expected, check
from taskstore.testing.powerloss.model import BLOCK
from taskstore.testing.powerloss.survey import fast_directory

NAME = "tasks.db"
CHECKPOINT_PAGES = 40
"""The length of the WAL, in pages, at which SQLite starts a checkpoint."""

WAL_HEADER = 32
"""The length of the WAL header, in bytes."""


class Files(NamedTuple):
    """The bytes of a database and its WAL."""

    database: bytes
    wal: bytes

    @classmethod
    def of(cls, path: Path) -> Files:
        """Return a copy of the files; this process must not have the database open."""
        wal = path.with_name(path.name + "-wal")
        return cls(path.read_bytes(), wal.read_bytes() if wal.exists() else b"")

    def write(self, path: Path) -> None:
        """Write the database and the WAL, but no shared memory file."""
        path.write_bytes(self.database)
        if self.wal:
            path.with_name(path.name + "-wal").write_bytes(self.wal)


class CrashState(NamedTuple):
    """The files that a power loss can leave.

    ``kind`` says which writes are present, and ``missing`` names the missing blocks.
    """

    files: Files
    kind: str
    missing: str = "nothing"


class SQLiteSurvey(Struct):
    """The result of a survey: counts of commits and opened crash states, and the problems."""

    commits: int = 0
    killed: int = 0
    opened: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = "\n".join(f"  {count:>6} {kind}" for kind, count in sorted(self.opened.items()))
        return (
            f"commits        {self.commits}, {self.killed} of them killed\n"
            f"states opened  {self.opened.total()} in {self.seconds:.1f} s\n{kinds}\n"
            f"problems       {len(self.problems) or 'none'}"
        )


def crash_states(
    before: Files, after: Files, *, max_states: int, rng: random.Random
) -> Iterator[CrashState]:
    """Yield states that a power loss can leave between two acknowledged commits.

    ``before`` or ``after`` can be the files that a killed writer left.  ``rng`` draws at most
    ``max_states`` states of the WAL, and at most ``max_states`` states of the database.  In each of
    these states, the blocks on disk are one of these sets: all changed blocks except one; only one
    changed block; a prefix of the changed blocks; a random subset.
    """
    yield CrashState(after, "all writes")
    if after.wal != before.wal:
        yield CrashState(before, "no write since the last commit")
        base = before.wal
        if after.wal[:WAL_HEADER] != base[:WAL_HEADER]:
            # SQLite flushes a new header to disk before it writes frames.
            base = after.wal[:WAL_HEADER] + base[WAL_HEADER:]
            yield CrashState(Files(before.database, base), "a new WAL header without its frames")
        for wal, missing in _mixed(base, after.wal, max_states, rng, garbage=True):
            yield CrashState(Files(before.database, wal), "part of a commit in the WAL", missing)
    if after.database != before.database:
        for database, missing in _mixed(before.database, after.database, max_states, rng):
            yield CrashState(
                Files(database, after.wal), "part of a checkpoint in the database", missing
            )


def _mixed(
    old: bytes, new: bytes, max_states: int, rng: random.Random, *, garbage: bool = False
) -> Iterator[tuple[bytes, str]]:
    """Yield mixtures of blocks of ``old`` and ``new``, each with a text that lists missing blocks.

    ``new`` must not be shorter than ``old``.
    """
    blocks = [
        number
        for number in range(-(-len(new) // BLOCK))
        if _block(old, number) != _block(new, number)
    ]
    if not blocks:
        return
    choices = [[block] for block in blocks]
    choices += [[other for other in blocks if other != block] for block in blocks]
    choices += [blocks[:count] for count in range(1, len(blocks))]
    choices = rng.sample(choices, min(len(choices), max_states * 2 // 3))
    choices += [rng.sample(blocks, rng.randrange(len(blocks))) for _ in range(max_states // 3)]
    for present in choices:
        image = bytearray(old.ljust(len(new), b"\0"))
        if garbage and rng.random() < 0.3:
            image[len(old) :] = rng.randbytes(len(new) - len(old))
        for block in present:
            image[block * BLOCK : (block + 1) * BLOCK] = _block(new, block)
        shortest = max([len(old), *((block + 1) * BLOCK for block in present)])
        ends = [len(new), *(block * BLOCK for block in blocks if block * BLOCK >= shortest)]
        missing = [block for block in blocks if block not in present]
        yield bytes(image[: rng.choice(ends)]), f"blocks {missing}"


def _block(image: bytes, number: int) -> bytes:
    return image[number * BLOCK : (number + 1) * BLOCK]


# -- the writer -------------------------------------------------------------


def make_engine(path: Path) -> sa.Engine:
    """Return an engine with frequent checkpoints and the fsyncs of ``durability="full"``."""
    engine = sa.create_engine(f"sqlite:///{path}", module=sqlite_module())

    @sa.event.listens_for(engine, "connect")
    def configure(raw: Any, _record: object) -> None:
        raw.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")

    return engine


def open_sqlite(directory: Path, disk: Disk, *, read_only: bool) -> TaskRegistryStore:
    """Open the database in a directory; the parameter ``disk`` is ignored."""
    del disk
    return open_store(f"sqlite:///{directory / NAME}", read_only=read_only)


def plan_commits(rng: random.Random, commits: int) -> list[list[Change]]:
    """Return random batches of changes that a writer can commit to an empty ledger."""
    model, batches = Model(), list[list[Change]]()
    for _ in range(commits):
        choice, live = rng.random(), list(model.records.values())
        batch: list[Change] = [make_put(error="x" * rng.choice([0, 500, 9_000]) or None)]
        if live and choice < 0.5:
            batch = [next_of(rng.choice(live), label=f"{choice}")]
        elif live and choice < 0.7:
            batch.append(removal_of(rng.choice(live)))
        model.commit(batch)
        batches.append(batch)
    return batches


def survey_sqlite(
    scratch: Path, *, rounds: int, commits: int = 12, max_states: int = 6, seed: int = 20261122
) -> SQLiteSurvey:
    """Run and kill ``rounds`` writers, and check the crash states of each of their commits.

    ``scratch`` must be an empty directory on a real disk, not in memory, because the
    duration of an fsync determines where a kill interrupts the writer.
    """
    started = time.monotonic()
    result = SQLiteSurvey()
    rng = random.Random(seed)  # noqa: S311 - choices, not secrets
    for number in range(rounds):
        (directory := scratch / f"{number}").mkdir()
        for before, after, allowed in _run_writer(
            directory / NAME, plan_commits(rng, commits), rng
        ):
            result.commits += before is not after
            for state in crash_states(before, after, max_states=max_states, rng=rng):
                result.opened[state.kind] += 1
                if (problem := check_files(state.files, allowed)) is not None:
                    result.problems.append(f"{state.kind}, missing {state.missing}: {problem}")
        result.killed += 1
    result.seconds = time.monotonic() - started
    return result


def check_files(files: Files, allowed: Sequence[Expected]) -> str | None:
    """Open the ledger in ``files``; return a problem, or ``None`` if the ledger is valid."""
    with fast_directory() as directory:
        files.write(directory / NAME)
        return check(open_sqlite, directory, allowed)


def _run_writer(
    path: Path, batches: Sequence[list[Change]], rng: random.Random
) -> Iterator[tuple[Files, Files, tuple[Expected, ...]]]:
    """Run a writer; yield the files before and after each commit, and the allowed content.

    The writer is killed during the commit of the final batch.
    """
    open_store(f"sqlite:///{path}").close()
    gate, gate_writer = os.pipe()

    def work(report: Report) -> None:
        os.close(gate_writer)
        engine = make_engine(path)
        store = SQLStore(engine)
        report("ready")
        for batch in batches:
            os.read(gate, 1)
            store.apply(batch)
            report("acknowledged")

    child = Child(work)
    os.close(gate)
    child.line()
    acknowledged, files, duration_s = Expected(Model()), Files.of(path), 0.0
    for batch in batches:
        (model := Model()).states.update(acknowledged.content.states)
        model.head, model.entries = acknowledged.content.head, list(acknowledged.content.entries)
        model.commit(batch)
        start = time.monotonic()
        os.write(gate_writer, b"1")
        if batch is batches[-1]:
            time.sleep(rng.uniform(0, duration_s))
            child.kill()
            reports = child.finish()
        else:
            reports = [child.line()]
            duration_s = time.monotonic() - start
        after = Files.of(path)
        yield files, after, (acknowledged, Expected(model))
        acknowledged, files = Expected(model), after
        if reports:  # an acknowledged commit must survive the loss of shared memory
            yield files, files, (acknowledged,)
    os.close(gate_writer)
