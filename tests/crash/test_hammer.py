"""[1] [2] [3] [6] Stress tests and races of processes on the same few tasks.

The tests assert that no change takes longer than five seconds.  They print the p99 latency
relative to a single writer, as does ``benchmarks/contention.py``.
``TASKSTORE_HAMMER_CHANGES`` sets the number of changes of each process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from taskstore import TaskRecord, TaskRegistry, open_store
from taskstore.errors import InvalidTransition, TaskNotFound
from taskstore.testing.crash.hammer import MAX_LATENCY_S, describe, run_stress_test
from taskstore.testing.crash.processes import Report, Work, run_processes

CHANGES = int(os.environ.get("TASKSTORE_HAMMER_CHANGES", "80"))
RACES = 10


@pytest.fixture(params=["json", "sqlite", "postgresql", "mariadb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    servers = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}
    if request.param in servers:
        return request.getfixturevalue(servers[request.param])
    return f"{request.param}:///{tmp_path / 'ledger'}"


def test_four_processes_on_five_tasks(url, report):
    result = run_stress_test(url, processes=4, tasks=5, changes=CHANGES, rounds=2)
    report(f"four processes on five tasks, {url.partition(':')[0]}", "\n".join(describe(result)))
    assert result.problems == []
    assert result.revisions == result.changes + 5
    assert result.longest < MAX_LATENCY_S


def test_threads_in_processes_with_a_long_exclusive_lock(url):
    def hold() -> None:
        with open_store(url) as store:
            for _ in range(3):
                with store.exclusive():
                    time.sleep(0.2)

    result = run_stress_test(
        url, processes=2, tasks=5, changes=CHANGES, threads=4, rounds=1, background=hold
    )
    assert result.problems == []
    assert result.revisions == result.changes + 5
    assert result.longest < MAX_LATENCY_S


# -- races ------------------------------------------------------------------

Action = Callable[[TaskRegistry, str], str]


def race(url: str, *actions: Action) -> list[list[str]]:
    """Run each action in its own process, all at once, task by task.

    Returns for each task its id and the results, in the order of the actions.
    """
    with TaskRegistry.open(url) as registry:
        tasks = [
            registry.create(runtime="cli", task=str(number), status="running").task_id
            for number in range(RACES)
        ]

    def work(action: Action) -> Work:
        def run(report: Report) -> None:
            with TaskRegistry.open(url) as registry:
                for task_id in tasks:
                    report(action(registry, task_id))

        return run

    results = zip(*run_processes([work(action) for action in actions]), strict=True)
    return [[task_id, *answers] for task_id, answers in zip(tasks, results, strict=True)]


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
        for task_id, *results in outcomes:
            task = registry.get(task_id)
            # One action ended the task, and all actions returned the same end.
            assert task.revision == 2
            cancelled = ["cancelled", "too late"] * 2
            succeeded = ["too late", "succeeded"] * 2
            assert results == (cancelled if task.status == "cancelled" else succeeded)


def delete(registry: TaskRegistry, task_id: str) -> str:
    return "deleted" if registry.delete(task_id) else "gone"


def update(registry: TaskRegistry, task_id: str) -> str:
    task = registry.create(runtime="cli", task="another")
    try:
        return str(registry.update_metadata(task_id, {task.task_id: 1}).revision)
    except TaskNotFound:
        return "gone"


def test_a_deleted_task_stays_deleted_under_concurrent_updates(url):
    outcomes = race(url, update, delete, update, delete)
    with TaskRegistry.open(url) as registry:
        for task_id, *results in outcomes:
            assert registry.find(task_id) is None
            assert sorted([results[1], results[3]]) == ["deleted", "gone"]
            revisions = sorted(int(each) for each in (results[0], results[2]) if each != "gone")
            # Successful updates came before the deletion.
            assert revisions == list(range(2, 2 + len(revisions)))
            entries = registry.history(task_id)
            assert [entry.revision for entry in entries] == list(range(1, 3 + len(revisions)))
            assert [entry.kind for entry in entries][-1] == "deleted"


def test_four_processes_create_one_task_for_a_run(url):
    def create_run(registry: TaskRegistry, task_id: str) -> str:
        task: TaskRecord = registry.create(runtime="cli", task="the same", run_id=task_id)
        return task.task_id

    outcomes = race(url, create_run, create_run, create_run, create_run)
    with TaskRegistry.open(url) as registry:
        for run_id, *results in outcomes:
            [task] = registry.list(run_id=run_id)
            assert set(results) == {task.task_id}
            assert task.revision == 1
