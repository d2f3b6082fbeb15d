"""URLs, entry points, and the files in the wheel."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from importlib.resources import files

import pytest
from taskstore import SupportsQuery, TaskRegistry, ValidationError, open_store
from taskstore.store.opening import installed_backends
from taskstore.testing import create
from taskstore.testing.scratch import scratch

from taskstore_redis import RedisStore
from taskstore_redis.urls import Target, parse


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", ("localhost", 6379, 0, "taskstore", None, None, False)),
        ("redis://h", ("h", 6379, 0, "taskstore", None, None, False)),
        ("REDIS://h:1/2", ("h", 1, 2, "taskstore", None, None, False)),
        ("redis://[::1]:7/3?namespace=a%20b", ("::1", 7, 3, "a b", None, None, False)),
        ("rediss://u:p%40%2F@h/", ("h", 6379, 0, "taskstore", "u", "p@/", True)),
        ("redis://:p@h", ("h", 6379, 0, "taskstore", None, "p", False)),
    ],
)
def test_urls(url: str, expected: tuple[object, ...]) -> None:
    target = parse(url)
    host, port, db, namespace, username, password, tls = expected
    assert target == Target(host, port, db, namespace, username, password, tls)  # type: ignore[arg-type]
    assert password is None or f":{password}" not in f"{target!r}{target.location}"


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:hunter2@h:port/0",
        "redis://u:hunter2@h/db",
        "redis://u:hunter2@h/-1",
        "redis://u:hunter2@h/0/1",
        "redis://u:hunter2@h/0?namespace=",
        "redis://u:hunter2@h/0?namespace=a{b}",
        "redis://u:hunter2@h/0?namespace=a%00b",
        "redis://u:hunter2@h/0?namespace=" + "x" * 201,
        "redis://u:hunter2@h/0?namespace=a&namespace=b",
        "redis://u:hunter2@h/0?name=a",
        "redis://u:hunter2@h/0#fragment",
        "redis://u:hunter2@[::1/0",
    ],
)
def test_invalid_urls(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        open_store(url)
    assert "hunter2" not in f"{caught.value}{caught.value.__cause__}{caught.value.__context__}"


def test_the_backend_is_found_by_its_scheme(url: str) -> None:
    with TaskRegistry.open(url) as registry:
        task = registry.create(runtime="cli", task="Try a backend")
        registry.finish(task.task_id, "succeeded")
        assert isinstance(registry.store, RedisStore)
        assert isinstance(registry.store, SupportsQuery)
    with TaskRegistry.open(url, read_only=True) as registry:
        assert registry.get(task.task_id).status == "succeeded"
        assert [entry.kind for entry in registry.history(task.task_id)] == ["upserted", "upserted"]
        assert registry.as_of(1).records[task.task_id].status == "queued"
    assert {"redis", "rediss"} <= installed_backends().keys()


def test_namespaces_are_separate(url: str) -> None:
    with open_store(url) as one, open_store(url) as same:
        create(one)
        with scratch(url) as open_other:
            other = open_other()
            assert other.load_snapshot().seq == 0
            create(other)
            create(other)
            other.close()
        assert same.load_snapshot().seq == 1


def test_a_scratch_ledger_is_deleted(url: str) -> None:
    from taskstore_redis.layout import Keys

    with scratch(url) as open_other:
        other = open_other()
        create(other)
        keys: Keys = other._reader.keys  # type: ignore[attr-defined]
        other.close()
    with open_store(url) as store:
        assert isinstance(store, RedisStore)
        assert store._link.call("EXISTS", keys["head"], keys["rows"], keys["journal"]) == 0


def test_the_scripts_are_in_the_package() -> None:
    names = {item.name for item in (files("taskstore_redis") / "lua").iterdir()}
    assert {"common.lua", "apply.lua", "copy.lua"} <= names
    assert entry_points(group="taskstore.scratch", name="redis")


def test_importing_taskstore_does_not_import_redis() -> None:
    code = "import sys, taskstore; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
