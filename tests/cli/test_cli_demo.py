"""``taskstore demo``: it shows what it says, and notices when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import CLI, Say

from taskstore.cli.demo import NotAsPromised, _restart, jobs


def test_the_demo_from_end_to_end(cli: CLI, tmp_path: Path) -> None:
    place = tmp_path / "demo"
    done = cli("demo", "--dir", str(place), timeout=900)  # when it has hung
    out = done.stdout.decode()
    assert done.returncode == 0, (out, done.stderr)
    count = len(jobs(tmp_path))
    assert f"{count} acknowledged, {count} found" in out
    assert "its recorder, pid " in out
    assert "compacted at seq " in out
    assert f"whole: {count} records" in out
    assert "== Everything as promised: " in out
    ledger = CLI(f"sqlite:///{place / 'tasks.db'}")
    ended = {task["label"]: task["status"] for task in ledger.tasks()}
    assert ended == {job.label: job.ends for job in jobs(tmp_path)}
    assert b"not empty" in cli("demo", "--dir", str(place)).stderr


def test_a_lost_record_is_noticed(tmp_path: Path, url: str, say: Say) -> None:
    say("run", "--", "true")
    work = jobs(tmp_path)
    with pytest.raises(NotAsPromised, match="task an-id-that-is-not-there is gone"):
        _restart(url, work, {job.label: "an-id-that-is-not-there" for job in work})
