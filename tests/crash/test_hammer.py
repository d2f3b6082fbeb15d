"""[1] [2] [3] [6] Processes on the same few tasks: everything adds up, and nobody sees an error.

That nobody waits for longer than five seconds is asserted; how the slowest
compare with a lone writer is printed, here and by ``benchmarks/contention.py``.
``TASKSTORE_HAMMER_CHANGES`` sets how many changes each process makes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from taskstore import TaskRecord, TaskRegistry, open_store
from taskstore.errors import InvalidTransition, TaskNotFound
from taskstore.testing.crash.hammer import WAIT_S, describe, hammer
from taskstore.testing.crash.processes import Report, Work, together

CHANGES = int(os.environ.get("TASKSTORE_HAMMER_CHANGES", "80"))
RACES = 10


@pytest.fixture(params=["json", "sqlite", "postgresql", "mariadb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    servers = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}
    if request.param in servers:
        return request.getfixturevalue(servers[request.param])
    return f"{request.param}:///{tmp_path / 'ledger'}"


def test_four_processes_on_five_tasks(url, report):
    result = hammer(url, processes=4, tasks=5, changes=CHANGES, rounds=2)
    report(f"four processes on five tasks, {url.partition(':')[0]}", "\n".join(describe(result)))
    assert result.problems == []
    assert result.revisions == result.changes + 5
    assert result.longest < WAIT_S


def test_threads_in_processes_beside_one_that_holds_on(url):
    def hold() -> None:
        with open_store(url) as store:
            for _ in range(3):
                with store.exclusive():
                    time.sleep(0.2)

    result = hammer(url, processes=2, tasks=5, changes=CHANGES, threads=4, rounds=1, beside=hold)
    assert result.problems == []
    assert result.revisions == result.changes + 5
    assert result.longest < WAIT_S


# -- races ------------------------------------------------------------------

Move = Callable[[TaskRegistry, str], str]


def race(url: str, *moves: Move) -> list[list[str]]:
    """Let each move be made by a process of its own, all at once, task by task.

    Returns for each task what the processes were told, in the order of the moves.
    """
    with TaskRegistry.open(url) as registry:
        tasks = [
            registry.create(runtime="cli", task=str(number), status="running").task_id
            for number in range(RACES)
        ]

    def work(move: Move) -> Work:
        def run(report: Report) -> None:
            with TaskRegistry.open(url) as registry:
                for task_id in tasks:
                    report(move(registry, task_id))

        return run

    told = zip(*together([work(move) for move in moves]), strict=True)
    return [[task_id, *answers] for task_id, answers in zip(tasks, told, strict=True)]


def cancel(registry: TaskRegistry, task_id: str) -> str:
    try:
        return str(registry.cancel(task_id).status)
    except InvalidTransition:
        return "too late"


def succeed(registry: TaskRegistry, task_id: str) -> str:
    try:
        return str(registry.finish(task_id, "succeeded").status)
    except InvalidTransition:
        return "too late"


def test_a_cancel_is_never_overwritten_by_a_late_success(url):
    outcomes = race(url, cancel, succeed, cancel, succeed)
    with TaskRegistry.open(url) as registry:
        for task_id, *told in outcomes:
            task = registry.get(task_id)
            # Ended once, by one of them, and everybody was told how.
            assert task.revision == 2
            cancelled = ["cancelled", "too late"] * 2
            succeeded = ["too late", "succeeded"] * 2
            assert told == (cancelled if task.status == "cancelled" else succeeded)


def delete(registry: TaskRegistry, task_id: str) -> str:
    return "deleted" if registry.delete(task_id) else "gone"


def update(registry: TaskRegistry, task_id: str) -> str:
    task = registry.create(runtime="cli", task="another")
    try:
        return str(registry.update_metadata(task_id, {task.task_id: 1}).revision)
    except TaskNotFound:
        return "gone"


def test_what_is_deleted_stays_deleted_whoever_changes_it(url):
    outcomes = race(url, update, delete, update, delete)
    with TaskRegistry.open(url) as registry:
        for task_id, *told in outcomes:
            assert registry.find(task_id) is None
            assert sorted([told[1], told[3]]) == ["deleted", "gone"]
            revisions = sorted(int(each) for each in (told[0], told[2]) if each != "gone")
            # Whoever got through did so before it was deleted.
            assert revisions == list(range(2, 2 + len(revisions)))
            entries = registry.history(task_id)
            assert [entry.revision for entry in entries] == list(range(1, 3 + len(revisions)))
            assert [entry.kind for entry in entries][-1] == "deleted"


def test_a_run_that_four_processes_create_at_once_is_one_task(url):
    def book(registry: TaskRegistry, task_id: str) -> str:
        task: TaskRecord = registry.create(runtime="cli", task="the same", run_id=task_id)
        return task.task_id

    outcomes = race(url, book, book, book, book)
    with TaskRegistry.open(url) as registry:
        for run_id, *told in outcomes:
            [task] = registry.list(run_id=run_id)
            assert set(told) == {task.task_id}
            assert task.revision == 1
