"""Typical user code, which mypy --strict must accept."""

from collections.abc import Mapping
from pathlib import Path
from typing import assert_type

from taskstore import (
    Compactor,
    Event,
    JournalEntry,
    Page,
    Snapshot,
    SupportsJournal,
    TaskRecord,
    TaskRegistry,
    TaskRegistryStore,
    TaskStatus,
    TaskStoreError,
    Upserted,
    open_store,
)
from taskstore.aio import AsyncTaskRegistry
from taskstore.model.codec import decode_snapshot, encode_snapshot


def record_work(url: str) -> TaskRecord:
    with TaskRegistry.open(url, durability="process") as registry:
        assert_type(registry, TaskRegistry)
        task = registry.create(runtime="cli", owner_key="me", task="Sweep", metadata={"n": 1})
        assert_type(task, TaskRecord)
        assert_type(registry.mark_running(task.task_id), TaskRecord)
        done = registry.finish(task.task_id, "succeeded", if_revision=2)
        assert_type(done.status, TaskStatus)
        assert_type(done.ended_at, int | None)
        assert_type(registry.find("run-1"), TaskRecord | None)
        assert_type(registry.delete(task.task_id), bool)
        return done


def read_back(registry: TaskRegistry) -> list[str]:
    page = registry.list(status=[TaskStatus.QUEUED, "running"], limit=10)
    assert_type(page, Page)
    assert_type(page.next_cursor, str | None)
    snapshot = registry.as_of(registry.seq)
    assert_type(snapshot, Snapshot)
    assert_type(snapshot.records, Mapping[str, TaskRecord])
    for entry in registry.changes(after=0, wait=0.1):
        assert_type(entry, JournalEntry)
        assert_type(entry.record, TaskRecord | None)
    assert_type(registry.run("run-1").cancel("no longer wanted"), list[TaskRecord])
    with registry.batch() as batch:
        assert_type(batch, TaskRegistry)
    return [record.task_id for record in page]


def misspell(registry: TaskRegistry, awaited: AsyncTaskRegistry) -> None:
    """Each line must be a type error."""
    registry.finish("id", "failed", eror="why")  # type: ignore[call-arg]
    registry.record_progress("id")  # type: ignore[call-arg]
    registry.run("run-1").finish("failed", eror="why")  # type: ignore[call-arg]
    registry.run("run-1").record_progress(3)  # type: ignore[arg-type]
    awaited.finish("id", "failed", eror="why")  # type: ignore[call-arg, unused-coroutine]


async def record_on_a_loop(url: str) -> None:
    async with AsyncTaskRegistry.open(url) as registry:
        task = await registry.create(runtime="cli", task="Sweep", run_id="run-1")
        assert_type(task, TaskRecord)
        token = await registry.take_lease(task.task_id, 30)
        assert_type(token, str)
        assert_type(await registry.record_progress(task.task_id, "half", fence=token), TaskRecord)
        assert_type(await registry.run("run-1").finish("succeeded"), list[TaskRecord])
        assert_type(await registry.delete(task.task_id), bool)


def watch(event: Event) -> None:
    if isinstance(event, Upserted):
        assert_type(event.record, TaskRecord)
        assert_type(event.previous, TaskRecord | None)


def attach(url: str) -> int:
    store = open_store(url, read_only=True)
    assert_type(store, TaskRegistryStore)
    registry = TaskRegistry(store, hooks=[watch])
    remove = registry.hooks.add(Compactor(store))
    remove()
    if isinstance(store, SupportsJournal):
        assert_type(store.head(), int)
        return store.floor()
    return 0


class FileStore(TaskRegistryStore):
    """A backend of a user."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def load_snapshot(self) -> Snapshot:
        self._check_open()
        return decode_snapshot(self.path.read_bytes()) if self.path.exists() else Snapshot(0)

    def save_snapshot(self, snapshot: Snapshot) -> None:
        self._check_writable()
        self.path.write_bytes(encode_snapshot(snapshot))


def explain(error: TaskStoreError) -> str:
    return error.hint or error.message
