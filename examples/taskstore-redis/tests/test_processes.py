"""Several processes: concurrent writers of the same tasks, and killed compactors."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from taskstore import TaskRegistry
from taskstore.testing.crash import kill_round

from taskstore_redis import open_redis

PROCESSES = 4
TASKS = 5
ROUNDS = 40

WRITER = """
import sys
from taskstore import TaskRegistry

url, name, rounds, *tasks = sys.argv[1:]
with TaskRegistry.open(url) as registry:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(rounds)):
        for task in tasks:
            registry.update_metadata(task, {f"{name}": number + 1})
"""

COMPACT = """
import sys
from taskstore import CompactionPolicy, StoreBusyError
from taskstore.testing import create, next_of
from taskstore_redis import compaction, open_redis
compaction.STEP_ROWS = 3
policy = CompactionPolicy(force=True, history_entries=20, history_s=0, keep_snapshots=1)
with open_redis(sys.argv[1]) as store:
    print("ready", flush=True)
    while True:
        records = [create(store) for _ in range(3)]
        store.apply([next_of(record) for record in records])
        store.compact(policy)
        print(store.head(), flush=True)
"""


def test_four_processes_on_five_tasks(url: str) -> None:
    """[3] Each process changes each task, and no change is lost."""
    with TaskRegistry.open(url) as registry:
        tasks = [registry.create(runtime="cli", task=f"{n}").task_id for n in range(TASKS)]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, f"writer-{n}", str(ROUNDS), *tasks],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(PROCESSES)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    with open_redis(url) as store:
        records = store.load_snapshot().records
        for task in tasks:
            assert records[task].metadata == {f"writer-{n}": ROUNDS for n in range(PROCESSES)}
            assert records[task].revision == 1 + PROCESSES * ROUNDS
        assert store.head() == TASKS * (1 + PROCESSES * ROUNDS)
        assert store.verify().problems == ()


@pytest.mark.parametrize("seed", range(6))
def test_killed_while_compacting(url: str, seed: int) -> None:
    """[7] After each SIGKILL, acknowledged commits exist, and the next writer continues."""
    rng = random.Random(seed)
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", COMPACT, url], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            heads = [int(writer.stdout.readline()) for _ in range(rng.randrange(1, 8))]
            writer.kill()
            heads += [int(line) for line in writer.stdout.read().splitlines()]
        with open_redis(url) as store:
            assert store.head() >= heads[-1]
            assert store.verify().problems == ()


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment(url: str, seed: int) -> None:
    """[4] The kill harness of taskstore.testing finds no problem while a compactor runs."""
    rng = random.Random(seed)
    for _ in range(2):
        assert kill_round(url, after_s=rng.uniform(0.05, 0.5), seed=seed) == []
