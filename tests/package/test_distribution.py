"""The contents of the wheel and the sdist, and tests of the installed copy."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from installed_copy import ROOT, Distribution, Installed

import taskstore

EXAMPLE = """\
from taskstore import TaskRegistry

with TaskRegistry.open("{url}") as registry:
    task = registry.create(runtime="subagent", owner_key="agent:main", run_id="run-1", task="Summarise the inbox")
    registry.mark_running(task.task_id)
    registry.record_progress(task.task_id, "3 of 10 mails read")
    registry.finish(task.task_id, "succeeded", summary="10 mails read")
    registry.get(task.task_id).status            # TaskStatus.SUCCEEDED
"""  # noqa: E501 (the text of the README)
SECOND_PROCESS = """
from taskstore import TaskRegistry

with TaskRegistry.open("{url}", read_only=True) as registry:
    print(registry.find("run-1").status)
"""


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_contains_the_package_and_nothing_else(distribution: Distribution) -> None:
    names = names_in(distribution.wheel)
    assert {"taskstore/py.typed", "taskstore/migrations/env.py"} <= names
    assert "taskstore/migrations/script.py.mako" in names
    revisions = {path.name for path in (ROOT / "migrations" / "versions").glob("*.py")}
    assert revisions
    assert {f"taskstore/migrations/versions/{name}" for name in revisions} <= names
    modules = {
        str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "taskstore").rglob("*.py")
    }
    assert modules <= names
    unexpected = {
        name
        for name in names
        if "__pycache__" in name
        or not name.startswith(("taskstore/", "taskstore-", "taskstore_pytest.py"))
    }
    assert not unexpected


def test_the_metadata_of_the_wheel(distribution: Distribution) -> None:
    with zipfile.ZipFile(distribution.wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        declared = archive.read(entry_points).decode()
    assert metadata["Version"] == taskstore.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"postgres", "testing", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    assert str(metadata.get_payload()).startswith("# taskstore")
    for scheme in ("memory", "json", "sqlite", "postgresql+psycopg"):
        assert re.search(rf"^{re.escape(scheme)} = ", declared, re.MULTILINE)


def test_the_sdist_is_enough_to_build_and_test(distribution: Distribution) -> None:
    with tarfile.open(distribution.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for expected in ("alembic.ini", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        assert expected in names
    for folder in ("migrations/versions/", "tests/package/", "docs/", "src/taskstore/"):
        assert any(name.startswith(folder) for name in names)
    assert not any(name.startswith((".venv", ".git/", "dist")) for name in names)


def test_the_installed_copy_runs(installed: Installed, environment: Path) -> None:
    origin = installed.run("python", "-c", "import taskstore; print(taskstore.__file__)")
    assert Path(origin.strip()).is_relative_to(environment)
    version = installed.run("taskstore", "--version")
    assert taskstore.__version__ in version


def test_importing_taskstore_is_cheap(installed: Installed) -> None:
    heavy = {
        "alembic", "asyncio", "click", "filelock", "platformdirs", "psycopg", "pysqlite3",
        "pytest", "rich", "sqlalchemy", "sqlite3", "typer",
    }  # fmt: skip
    script = "import sys, taskstore; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(installed.run("python", "-c", script).split())
    assert "taskstore" in loaded
    assert not loaded & heavy


def urls(tmp_path: Path, request: pytest.FixtureRequest, backend: str) -> str:
    if backend == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return {
        "json": "json:///ledger",
        "sqlite": "sqlite:///tasks.db",
        "odd": f"sqlite:///{tmp_path}/a b%20c%d@e.db",
    }[backend]


@pytest.mark.parametrize("backend", ["json", "sqlite", "odd", "postgresql"])
def test_the_example_of_the_readme(
    installed: Installed, request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    url = urls(tmp_path, request, backend)
    installed.run("python", "-c", EXAMPLE.format(url=url))
    second = installed.run("python", "-c", SECOND_PROCESS.format(url=url))
    assert second.strip() == "succeeded"


def test_the_readme_contains_the_example() -> None:
    assert EXAMPLE.format(url="sqlite:///tasks.db") in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("backend", ["sqlite", "odd", "postgresql"])
def test_the_schema_commands(
    installed: Installed, request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    env = {"TASKSTORE_URL": urls(tmp_path, request, backend)}
    installed.run("taskstore", "db", "upgrade", env=env)
    installed.run("taskstore", "db", "check", env=env)
    assert "0001" in installed.run("taskstore", "db", "current", env=env)
    assert "0001" in installed.run("taskstore", "db", "history", env=env)
    installed.run("taskstore", "run", "--", "true", env=env)
    [task] = json.loads(installed.run("taskstore", "list", "--json", env=env))["tasks"]
    assert task["status"] == "succeeded"
    installed.run("taskstore", "verify", env=env)
    installed.run("taskstore", "db", "downgrade", "base", env=env, status=2)
    installed.run("taskstore", "db", "downgrade", "base", "--yes", env=env)
    installed.run("taskstore", "db", "check", env=env, status=1)
    installed.run("taskstore", "db", "upgrade", env=env)
    installed.run("taskstore", "db", "check", env=env)


def test_the_types_for_users(installed: Installed, tmp_path: Path) -> None:
    user = tmp_path / "user_typing.py"
    user.write_text((Path(__file__).parent / "user_typing.py").read_text())
    checked = installed.run(
        "python", "-m", "mypy", "--strict", "--config-file=", "--cache-dir", tmp_path, user
    )
    assert "Success" in checked
