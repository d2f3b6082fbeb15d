"""Killed at any step: the old content or the new one remains, and writers continue.

A forked child runs one operation and kills itself with SIGKILL right before the n-th
time that it opens, renames, removes or truncates a file, for every n.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from itertools import count

import pytest
from jsonfiles import FOLD, FOLD_AND_TRIM, segments, snapshots, state_of

from taskstore import CompactionPolicy, ConflictError, StoreUnavailableError
from taskstore.model.journal import Snapshot
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing.factories import create, delete, make_put, make_record, next_of, update

PART = CompactionPolicy(force=True, history_s=0, history_entries=3)
"""A policy that moves the floor to seq 4 of the ledger, where no segment begins."""

STEPS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir"}


def killed_at(step: int, work) -> bool:
    """Run ``work`` in a child that is killed before its n-th step; return whether it was."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.waitstatus_to_exitcode(status) == 0, "the child failed"
        return False
    try:
        steps = count(1)

        def hook(event: str, _: object) -> None:
            if event in STEPS and next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def content(directory) -> dict[str, int]:
    """Return the revisions by task id, as a read-only store returns them."""
    with JSONStore(directory, read_only=True) as store:
        records = store.load_snapshot().records
        assert store.verify().problems == ()
        return {task_id: record.revision for task_id, record in records.items()}


def history(directory) -> list[tuple[int, int]]:
    with JSONStore(directory, read_only=True) as store:
        entries = store.read_journal(store.floor() - 1, 1000)
        assert store.floor() == 1 or store.read_snapshot(store.floor() - 1) is not None
        return [(entry.seq, entry.revision) for entry in entries]


@pytest.fixture
def ledger(fast_path):
    """Records, deletions, two snapshots and commits after them."""
    path = fast_path / "template"
    with JSONStore(path, durability="process") as store:
        task, gone = create(store), create(store)
        store.compact(FOLD)
        task = update(store, task)
        delete(store, gone)
        store.compact(FOLD)
        update(store, task)
        create(store)
    return path


def works_on(directory, before: int) -> None:
    """Check that two new writers can write, and that no temporary file remains."""
    for store in (JSONStore(directory), JSONStore(directory)):
        with store:
            assert store.load_snapshot().seq >= before
            create(store)
            assert store.verify().problems == ()
    assert not list(directory.glob("*.tmp"))


def test_replacing_the_content(ledger, fast_path):
    old = content(ledger)
    fresh = make_record(revision=9)
    new = {fresh.task_id: 9}
    seen = []
    for step in count(1):
        directory = fast_path / str(step)
        shutil.copytree(ledger, directory)
        with JSONStore(directory) as live, JSONStore(directory, read_only=True) as reader:
            live.load_snapshot()
            reader.head()
            again = killed_at(
                step,
                lambda: JSONStore(directory).save_snapshot(Snapshot(40, {fresh.task_id: fresh})),  # noqa: B023
            )
            found = content(directory)
            seen.append(found == new)
            assert found in (old, new)
            assert set(reader.load_snapshot().records) == set(found)
            # A store that was open all the time continues from the current content.
            if found == new:
                assert (live.floor(), live.head(), len(history(directory))) == (41, 40, 0)
                update(live, fresh)
                with pytest.raises(ConflictError):
                    live.save_snapshot(Snapshot(40))
            else:
                assert live.head() == 6
                assert [seq for seq, _ in history(directory)] == [1, 2, 3, 4, 5, 6]
                create(live)
            assert reader.head() == live.head()
        works_on(directory, live_seq := 41 if found == new else 7)
        with JSONStore(directory) as store:
            store.compact(FOLD_AND_TRIM)
            assert store.head() == live_seq + 2
            assert (len(segments(directory)), len(snapshots(directory))) == (1, 1)
        if not again:
            break
    assert step > 15
    assert seen == sorted(seen), "it changed back"
    assert seen[-1]
    assert not seen[0]


@pytest.mark.parametrize(
    "policy",
    [FOLD, FOLD_AND_TRIM, PART, CompactionPolicy(erase_deleted=True)],
    ids=["fold", "trim", "part", "erase"],
)
def test_compacting(policy, ledger, fast_path):
    before, entries = content(ledger), history(ledger)
    floors = []
    for step in count(1):
        directory = fast_path / str(step)
        shutil.copytree(ledger, directory)
        with JSONStore(directory) as live:
            live.load_snapshot()
            again = killed_at(step, lambda: JSONStore(directory).compact(policy))  # noqa: B023
            assert content(directory) == before
            found = history(directory)
            assert found == entries[len(entries) - len(found) :]
            floors.append(7 - len(found))
            create(live)
        works_on(directory, 7)
        if not again:
            break
        with JSONStore(directory) as store:
            store.compact(FOLD_AND_TRIM)
            assert (len(segments(directory)), len(snapshots(directory))) == (1, 1)
    assert step > 15
    assert floors == sorted(floors)
    assert floors[-1] == (1 if policy is FOLD else 4 if policy is PART else 7)


def test_opening_for_the_first_time(fast_path):
    for step in count(1):
        directory = fast_path / str(step) / "ledger"
        again = killed_at(step, lambda: JSONStore(directory))  # noqa: B023
        if again and not segments(directory):
            with pytest.raises(StoreUnavailableError):
                JSONStore(directory, read_only=True)
        works_on(directory, 0)
        if not again:
            break
    assert step > 5


def test_cutting_a_torn_line(ledger, fast_path):
    before = content(ledger)
    with segments(ledger)[-1].open("ab") as file:
        file.write(b'{"crc":"torn')
    for step in count(1):
        directory = fast_path / str(step)
        shutil.copytree(ledger, directory)
        again = killed_at(step, lambda: JSONStore(directory))  # noqa: B023
        assert content(directory) == before
        works_on(directory, 6)
        assert b'{"crc":"torn' in {path.read_bytes() for path in directory.glob("*.torn")}
        if not again:
            break
    assert step > 5


def test_removing_the_leftovers_of_a_killed_replacement(ledger, fast_path):
    """The first process dies in the replacement, the second while it removes leftovers."""
    fresh = make_record(revision=9)
    for first in range(10, 40, 3):
        template = fast_path / f"template {first}"
        shutil.copytree(ledger, template)
        killed_at(
            first,
            lambda: JSONStore(template).save_snapshot(Snapshot(40, {fresh.task_id: fresh})),  # noqa: B023
        )
        found = content(template)
        for second in range(3, 30, 4):
            directory = fast_path / f"{first} {second}"
            shutil.copytree(template, directory)
            killed_at(second, lambda: create(JSONStore(directory)))  # noqa: B023
            assert content(directory).items() >= found.items()
            works_on(directory, 6)


@pytest.fixture
def directory(fast_path):
    return fast_path / "ledger"


def write_for_ever(directory, durability: str, acknowledge: int) -> None:
    """Commit without end beside a running compactor, and report each acknowledged commit."""
    store = JSONStore(directory, durability=durability)
    policy = CompactionPolicy(force=True, history_s=0, history_entries=20, keep_snapshots=1)

    def compact_for_ever() -> None:
        while True:
            store.compact(policy)

    threading.Thread(target=compact_for_ever, daemon=True).start()
    task = create(store)
    os.write(acknowledge, f"{task.task_id}\n".encode())
    while True:
        task = update(store, task, label=str(task.revision))
        batch = [make_put() for _ in range(3)]
        store.apply(batch)
        os.write(acknowledge, f"{task.revision} {batch[2].task_id}\n".encode())


@pytest.mark.parametrize("durability", ["full", "process"])
def test_nothing_acknowledged_is_lost_when_a_writer_and_its_compactor_are_killed(
    durability, directory
):
    chance = random.Random(20261122)
    acknowledged = 0
    for _ in range(10):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                write_for_ever(directory, durability, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as reports:
            task_id = reports.readline().strip()
            time.sleep(chance.uniform(0.01, 0.15))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            complete = [line.split() for line in reports if line.endswith("\n")]
        found = content(directory)
        # The last acknowledged revision, or the one in progress.
        revision = int(complete[-1][0]) if complete else 1
        assert found[task_id] in (revision, revision + 1)
        assert {batch for _, batch in complete} <= found.keys()
        acknowledged += len(complete)
    assert acknowledged > 20
    with JSONStore(directory) as store:
        assert store.floor() > 1
        create(store)


def test_reading_after_a_kill_changes_nothing(ledger, fast_path):
    for step in (5, 15, 25):
        directory = fast_path / str(step)
        shutil.copytree(ledger, directory)
        killed_at(step, lambda: JSONStore(directory).compact(FOLD_AND_TRIM))  # noqa: B023
        before = state_of(directory)
        content(directory)
        history(directory)
        assert state_of(directory) == before


def test_a_commit_that_was_written_but_not_acknowledged_exists(directory, open_):
    store = open_()
    task = create(store)
    pid = os.fork()
    if not pid:
        other = open_()
        commit = other._writer.commit
        other._writer.commit = lambda *step: (commit(*step), os.kill(os.getpid(), signal.SIGKILL))
        update(other, task)
    os.waitpid(pid, 0)
    assert store.load_snapshot().records[task.task_id].revision == 2
    with pytest.raises(ConflictError):
        update(store, task)
    update(store, next_of(task).record)
