"""``taskstore demo`` succeeds, and its checks detect a missing task."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import CLI, Invoke

from taskstore.cli.demo import DemoFailed, _restart, jobs


def test_the_demo_from_end_to_end(cli: CLI, tmp_path: Path) -> None:
    root = tmp_path / "demo"
    done = cli("demo", "--dir", str(root), timeout=900)  # a hang
    out = done.stdout.decode()
    assert done.returncode == 0, (out, done.stderr)
    count = len(jobs(tmp_path))
    assert f"{count} tasks acknowledged, {count} tasks found" in out
    assert "its recorder, pid " in out
    assert "compacted at seq " in out
    assert f"whole: {count} records" in out
    assert "== All checks passed in " in out
    ledger = CLI(f"sqlite:///{root / 'tasks.db'}")
    ended = {task["label"]: task["status"] for task in ledger.tasks()}
    assert ended == {job.label: job.status for job in jobs(tmp_path)}
    assert b"not empty" in cli("demo", "--dir", str(root)).stderr


def test_a_lost_record_is_noticed(tmp_path: Path, url: str, invoke: Invoke) -> None:
    invoke("run", "--", "true")
    demo_jobs = jobs(tmp_path)
    with pytest.raises(DemoFailed, match="task an-id-that-is-not-there is missing"):
        _restart(url, demo_jobs, {job.label: "an-id-that-is-not-there" for job in demo_jobs})
