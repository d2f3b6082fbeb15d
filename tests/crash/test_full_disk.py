"""Ledgers on a full disk: a file system of a few MB that a test fills and frees.

The tests need the permission to mount a file system.  Without it, for example in most
containers, tests with a file size limit cover the same errors
(tests/stores/jsonfile/test_failed_writes.py, tests/stores/sql/test_failures.py).
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from taskstore import StoreUnavailableError, TaskRegistry, open_store
from taskstore.registry.compactor import compact

SIZE_KB = 4096


@pytest.fixture
def small_disk(tmp_path):
    """A directory with its own file system of a few megabytes."""
    mount = shutil.which("mount")
    directory = tmp_path / "disk"
    directory.mkdir()
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={SIZE_KB}k", "none", str(directory)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here: root is required")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory, leaving: int = 0):
    """Fill the disk except for ``leaving`` bytes; return the file that fills it."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        file.truncate(max(file.tell() - leaving, 0))
    return ballast


def memory_equals_disk(registry, url: str) -> bool:
    with open_store(url, read_only=True) as store:
        stored = store.load_snapshot()
        memory = {record.task_id: record for record in registry.list()}
        return store.verify().ok and registry.seq == stored.seq and memory == dict(stored.records)


@pytest.mark.parametrize("scheme", ["json", "sqlite"])
@pytest.mark.parametrize("leaving", [0, 8192, 40_960])
def test_writes_fail_while_the_disk_is_full_and_succeed_afterwards(small_disk, scheme, leaving):
    url = f"{scheme}:///{small_disk}/ledger"
    acknowledged = {}
    with TaskRegistry.open(url) as registry:

        def create(size: int) -> None:
            task = registry.create(runtime="cli", task="x" * size)
            acknowledged[task.task_id] = task

        create(100)
        ballast = fill(small_disk, leaving)
        failures: list[StoreUnavailableError] = []
        for attempt in range(200):
            try:
                create(100 + 97 * attempt % 9000)
            except StoreUnavailableError as error:
                failures.append(error)
            assert {task.task_id: task for task in registry.list()} == acknowledged
            if len(failures) == 20:
                break
        assert len(failures) == 20
        for failure in failures:
            assert str(small_disk) in str(failure)
            assert "space" in str(failure)
            assert failure.retryable
        ballast.unlink()
        # The same instance continues without reopening.
        for size in (100, 5000, 20_000):
            create(size)
        assert memory_equals_disk(registry, url)
    with TaskRegistry.open(url) as registry:
        assert {task.task_id: task for task in registry.list()} == acknowledged


@pytest.mark.parametrize("scheme", ["json", "sqlite"])
def test_a_compaction_on_a_full_disk_changes_no_answer(small_disk, scheme):
    url = f"{scheme}:///{small_disk}/ledger"
    with TaskRegistry.open(url) as registry:
        for number in range(30):
            registry.create(runtime="cli", task="x" * 3000, label=str(number))
        before = [entry.task_id for entry in registry.changes()]
        ballast = fill(small_disk, 16_384)
        with pytest.raises(StoreUnavailableError, match=str(small_disk)):
            compact(registry.store, erase_deleted=True)
        assert [entry.task_id for entry in registry.changes()] == before
        assert memory_equals_disk(registry, url)
        ballast.unlink()
        assert compact(registry.store, erase_deleted=True).compacted
        assert memory_equals_disk(registry, url)
        registry.create(runtime="cli", task="after")


@pytest.mark.parametrize("scheme", ["json", "sqlite"])
def test_a_ledger_cannot_be_created_on_a_full_disk_but_later(small_disk, scheme):
    ballast = fill(small_disk)
    url = f"{scheme}:///{small_disk}/new/ledger"
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match=str(small_disk)):
            TaskRegistry.open(url)
    ballast.unlink()
    with TaskRegistry.open(url) as registry:
        registry.create(runtime="cli", task="there at last")
        assert memory_equals_disk(registry, url)


@pytest.mark.parametrize("scheme", ["json", "sqlite"])
def test_a_full_disk_can_be_read(small_disk, scheme):
    url = f"{scheme}:///{small_disk}/ledger"
    with TaskRegistry.open(url) as registry:
        task = registry.create(runtime="cli", task="to be read")
        fill(small_disk)
        assert memory_equals_disk(registry, url)
        with open_store(url, read_only=True) as store:
            assert store.load_snapshot().records == {task.task_id: task}
