"""Writers that are killed, and the check that nothing acknowledged is lost.

A writer process works on a ledger and reports each change *after* it was
acknowledged; :func:`kill_round` kills it with SIGKILL at a random moment,
opens the ledger again and compares.  What was acknowledged has to be there;
of what was under way, all or nothing.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing

from msgspec import Struct

from taskstore.backends import open_store
from taskstore.compaction import Compactor
from taskstore.journal import Snapshot
from taskstore.policy import CompactionPolicy
from taskstore.records import TaskRecord
from taskstore.registry import TaskRegistry
from taskstore.store import SupportsCompaction, SupportsIntegrity

READY = "ready"
"""The first line of a writer: it has opened the ledger."""

BATCH_SIZE = 5
"""How many tasks a writer creates in one batch."""

EAGER = CompactionPolicy(
    min_entries=40, ratio=0.1, history_s=0, history_entries=50, keep_snapshots=1
)
"""Compacts all the time, so that kills fall into compactions too."""


class Acknowledged(Struct):
    """What a writer was told is stored: revisions by task id, and deletions."""

    revisions: dict[str, int]
    deleted: set[str]
    lines: int = 0


def kill_round(url: str, *, after_s: float, seed: int = 0) -> list[str]:
    """Let a writer work on the ledger at ``url``, kill it, and check.

    ``after_s`` is how long it may work after it opened the ledger (seconds).
    Returns what is wrong as sentences, none when all is well.
    """
    before = _load(url)
    writer = subprocess.Popen(  # noqa: S603 (our own interpreter and module)
        [sys.executable, "-m", __name__, url, str(seed)], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    with closing(writer.stdout) as reports:
        first = reports.readline()
        if first.decode().strip() != READY:
            writer.kill()
            return [f"the writer did not start: exit status {writer.wait()}"]
        time.sleep(after_s)
        writer.send_signal(signal.SIGKILL)
        lines = reports.read().decode().splitlines()
    writer.wait()
    return _problems(url, _acknowledged(before, lines))


def _acknowledged(before: Snapshot, lines: list[str]) -> Acknowledged:
    acknowledged = Acknowledged(
        {task_id: record.revision for task_id, record in before.records.items()}, set()
    )
    for line in lines:
        if not line.endswith("."):
            continue  # the report itself was cut off by the kill
        for change in line[:-1].split():
            task_id, _, revision = change.partition("=")
            if revision == "0":
                acknowledged.revisions.pop(task_id, None)
                acknowledged.deleted.add(task_id)
            else:
                acknowledged.revisions[task_id] = int(revision)
        acknowledged.lines += 1
    return acknowledged


def _problems(url: str, acknowledged: Acknowledged) -> list[str]:
    after = _load(url)
    found = {task_id: record.revision for task_id, record in after.records.items()}
    problems = [
        f"{task_id} was deleted and is back at revision {found[task_id]}"
        for task_id in acknowledged.deleted & found.keys()
    ]
    unreported = sum(task_id not in acknowledged.revisions for task_id in found)
    for task_id, revision in acknowledged.revisions.items():
        now = found.get(task_id)
        if now is None:
            # The one change that was under way may have been its deletion.
            unreported += 1
        elif now < revision:
            problems.append(f"{task_id} was acknowledged at revision {revision}, found at {now}")
        else:
            unreported += now - revision
    # One commit can be stored and not yet reported: a change, or a whole batch.
    if unreported not in (0, 1, BATCH_SIZE):
        problems.append(f"{unreported} changes differ from what was reported")
    with closing(open_store(url)) as store:
        if isinstance(store, SupportsIntegrity):
            problems += store.verify().problems
    return problems


def _load(url: str) -> Snapshot:
    with closing(open_store(url)) as store:
        return store.load_snapshot()


def write_for_ever(url: str, seed: int) -> None:
    """Open the ledger and change it without end, reporting each acknowledged commit."""
    chance = random.Random(seed)  # noqa: S311 (choices, not secrets)
    with TaskRegistry.open(url) as registry:
        if isinstance(registry.store, SupportsCompaction):
            registry.hooks.add(Compactor(registry.store, EAGER))
        _report([READY])
        for changes in _work(registry, chance):
            _report([*changes[:-1], changes[-1] + "."])


def _work(registry: TaskRegistry, chance: random.Random) -> Iterator[list[str]]:
    while True:
        active = registry.active()
        choice = chance.random()
        if not active or choice < 0.3:
            yield [_told(registry.create(runtime="cli", task="work", owner_key="crash-kit"))]
        elif choice < 0.4:
            with registry.batch():
                made = [registry.create(runtime="cli", task="batch") for _ in range(BATCH_SIZE)]
            yield [_told(record) for record in made]
        else:
            yield [_change(registry, chance.choice(active), chance)]


def _change(registry: TaskRegistry, task: TaskRecord, chance: random.Random) -> str:
    choice = chance.random()
    if choice < 0.6:
        return _told(registry.record_progress(task.task_id, f"step {chance.random()}"))
    if choice < 0.8:
        return _told(registry.finish(task.task_id, "succeeded"))
    registry.delete(task.task_id)
    return f"{task.task_id}=0"


def _told(record: TaskRecord) -> str:
    return f"{record.task_id}={record.revision}"


def _report(words: list[str]) -> None:
    # Past Python's buffers: what was reported is out, whatever happens next.
    os.write(sys.stdout.fileno(), (" ".join(words) + "\n").encode())


if __name__ == "__main__":
    write_for_ever(sys.argv[1], int(sys.argv[2]))
