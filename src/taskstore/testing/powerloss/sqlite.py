"""What a power loss may leave of an SQLite file in WAL mode, as far as SQLite's protocol tells.

SQLite makes no door of its file operations, so there is no log of them.  A
writer is stopped after each acknowledged commit, while its database and log
are copied; at some commit it is killed on the way.  What differs between the
last copy and the files of the dead process was written since then, and what of
it has reached the disk depends on what SQLite had synced (``wal.c``,
https://www.sqlite.org/wal.html and atomiccommit.html, ``synchronous=FULL``):

- Frames are appended to the log and synced once, at the commit.  Until then
  each block of 512 bytes of them is there or not, torn or zeros, or, as the
  log's own checksums have to find them out, garbage; the file may have any
  length from the old one on.
- When all frames were copied back into the database, the next writer begins
  the log anew: it writes a new header and syncs it before any frame.  So there
  is the old log as it was; or the new header, and of the new frames whatever.
- A checkpoint syncs the log first, then writes pages into the database, syncs
  that, and only after this the log may begin anew.  So if the database
  differs, all of the log is on disk, and of the database each block holds
  the old or the new.
- The shared memory (``-shm``) is lost always; it is made anew from the log.

Needs a single writer whose every commit is acknowledged, and nobody who
reads: a reader would keep checkpoints from ending.
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
from taskstore.testing.powerloss.model import BLOCK
from taskstore.testing.powerloss.survey import fast_directory
from taskstore.testing.powerloss.survival import Known, check

NAME = "tasks.db"
CHECKPOINT_PAGES = 40
"""How long the log may get before it is copied back, in pages."""

WAL_HEADER = 32
"""The length of the log's header, in bytes."""


class Files(NamedTuple):
    """A database and its log at one moment."""

    database: bytes
    log: bytes

    @classmethod
    def of(cls, path: Path) -> Files:
        """Copy them.  In a process that has not opened them: see the module's docstring."""
        log = path.with_name(path.name + "-wal")
        return cls(path.read_bytes(), log.read_bytes() if log.exists() else b"")

    def put(self, path: Path) -> None:
        """Write them, without shared memory."""
        path.write_bytes(self.database)
        if self.log:
            path.with_name(path.name + "-wal").write_bytes(self.log)


class Left(NamedTuple):
    """One state that a power loss may leave: of what kind, and what it lacks in words."""

    files: Files
    kind: str
    missing: str = "nothing"


class SQLiteSurvey(Struct):
    """What was done: commits, how many states of each kind were opened, and what was wrong."""

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


def states(before: Files, after: Files, *, most: int, chance: random.Random) -> Iterator[Left]:
    """States that a power loss may leave between one acknowledged commit and the next.

    Either may also be where the writer was killed.  At most ``most`` states
    of the log and as many of the database, drawn by ``chance``: single blocks
    missing or alone, what was written first, and combinations.
    """
    yield Left(after, "all that was written")
    if after.log != before.log:
        yield Left(before, "nothing since the last commit")
        base = before.log
        if after.log[:WAL_HEADER] != base[:WAL_HEADER]:
            # A new header is synced before any frame that belongs to it.
            base = after.log[:WAL_HEADER] + base[WAL_HEADER:]
            yield Left(Files(before.database, base), "a new log without its frames")
        for log, missing in _mixed(base, after.log, most, chance, garbage=True):
            yield Left(Files(before.database, log), "parts of a commit in the log", missing)
    if after.database != before.database:
        for database, missing in _mixed(before.database, after.database, most, chance):
            yield Left(Files(database, after.log), "parts of a checkpoint in the database", missing)


def _mixed(
    old: bytes, new: bytes, most: int, chance: random.Random, *, garbage: bool = False
) -> Iterator[tuple[bytes, str]]:
    """Mixtures of the blocks of two images of a file, the second no shorter than the first."""
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
    choices = chance.sample(choices, min(len(choices), most * 2 // 3))
    choices += [chance.sample(blocks, chance.randrange(len(blocks))) for _ in range(most // 3)]
    for there in choices:
        image = bytearray(old.ljust(len(new), b"\0"))
        if garbage and chance.random() < 0.3:
            image[len(old) :] = chance.randbytes(len(new) - len(old))
        for block in there:
            image[block * BLOCK : (block + 1) * BLOCK] = _block(new, block)
        shortest = max([len(old), *((block + 1) * BLOCK for block in there)])
        ends = [len(new), *(block * BLOCK for block in blocks if block * BLOCK >= shortest)]
        missing = [block for block in blocks if block not in there]
        yield bytes(image[: chance.choice(ends)]), f"the blocks {missing}"


def _block(image: bytes, number: int) -> bytes:
    return image[number * BLOCK : (number + 1) * BLOCK]


# -- the writer -------------------------------------------------------------


def engine_of(path: Path) -> sa.Engine:
    """An engine that checkpoints after every few commits, synced as ``durability="full"`` asks."""
    engine = sa.create_engine(f"sqlite:///{path}", module=sqlite_module())

    @sa.event.listens_for(engine, "connect")
    def configure(raw: Any, _record: object) -> None:
        raw.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")

    return engine


def open_sqlite(directory: Path, disk: Disk, *, read_only: bool) -> TaskRegistryStore:
    """Open the database in a directory; SQLite has a disk of its own."""
    del disk
    return open_store(f"sqlite:///{directory / NAME}", read_only=read_only)


def plan(chance: random.Random, commits: int) -> list[list[Change]]:
    """What a writer is going to commit, from an empty ledger."""
    model, batches = Model(), list[list[Change]]()
    for _ in range(commits):
        choice, live = chance.random(), list(model.records.values())
        batch: list[Change] = [make_put(error="x" * chance.choice([0, 500, 9_000]) or None)]
        if live and choice < 0.5:
            batch = [next_of(chance.choice(live), label=f"{choice}")]
        elif live and choice < 0.7:
            batch.append(removal_of(chance.choice(live)))
        model.commit(batch)
        batches.append(batch)
    return batches


def survey_sqlite(
    scratch: Path, *, rounds: int, commits: int = 12, most: int = 6, seed: int = 20261122
) -> SQLiteSurvey:
    """Let writers commit, kill them, and open what power losses leave of each commit.

    ``scratch`` is an empty directory on a disk: how long syncing takes decides
    where a kill finds the writer.
    """
    started = time.monotonic()
    found = SQLiteSurvey()
    chance = random.Random(seed)  # noqa: S311 - choices, not secrets
    for number in range(rounds):
        (directory := scratch / f"{number}").mkdir()
        for before, after, allowed in _lived(directory / NAME, plan(chance, commits), chance):
            found.commits += before is not after
            for left in states(before, after, most=most, chance=chance):
                found.opened[left.kind] += 1
                if (problem := look(left.files, allowed)) is not None:
                    found.problems.append(f"{left.kind}, missing {left.missing}: {problem}")
        found.killed += 1
    found.seconds = time.monotonic() - started
    return found


def look(files: Files, allowed: Sequence[Known]) -> str | None:
    """Open what is left, and say what is wrong, if it is."""
    with fast_directory() as place:
        files.put(place / NAME)
        return check(open_sqlite, place, allowed)


def _lived(
    path: Path, batches: Sequence[list[Change]], chance: random.Random
) -> Iterator[tuple[Files, Files, tuple[Known, ...]]]:
    """The files before and after each commit, and what may be found; the last one is killed."""
    open_store(f"sqlite:///{path}").close()
    gate, opening = os.pipe()

    def work(report: Report) -> None:
        os.close(opening)
        engine = engine_of(path)
        store = SQLStore(engine)
        report("ready")
        for batch in batches:
            os.read(gate, 1)
            store.apply(batch)
            report("acknowledged")

    child = Child(work)
    os.close(gate)
    child.line()
    known, files, lasted = Known(Model()), Files.of(path), 0.0
    for batch in batches:
        (model := Model()).states.update(known.content.states)
        model.head, model.entries = known.content.head, list(known.content.entries)
        model.commit(batch)
        begun = time.monotonic()
        os.write(opening, b"1")
        if batch is batches[-1]:
            time.sleep(chance.uniform(0, lasted))
            child.kill()
            told = child.finish()
        else:
            told = [child.line()]
            lasted = time.monotonic() - begun
        after = Files.of(path)
        yield files, after, (known, Known(model))
        known, files = Known(model), after
        if told:  # it has to be there, also without the shared memory
            yield files, files, (known,)
    os.close(opening)
