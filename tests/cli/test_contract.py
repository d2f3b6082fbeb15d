"""``taskstore contract`` and the suite under pytest give the same verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SUITE_TIMEOUT_S = 900
"""The timeout of a run of the suite, enough for a busy machine."""

NEVER_CLOSED = """
from taskstore.stores.memory import MemoryStorage, MemoryStore

class NeverClosed(MemoryStore):
    def _check_open(self):
        pass

def open_never_closed(url, **options):
    raise NotImplementedError

from contextlib import contextmanager

@contextmanager
def scratch(url):
    storage = MemoryStorage()
    yield lambda *, read_only=False: NeverClosed(storage, read_only=read_only)
"""
ENTRY_POINTS = """
[taskstore.backends]
forever = forever:open_never_closed

[taskstore.scratch]
forever = forever:scratch
"""


@pytest.fixture
def outside(tmp_path):
    """A directory outside the checkout, and an environment with an additional backend."""
    site = tmp_path / "site"
    installed = site / "forever-1.0.dist-info"
    installed.mkdir(parents=True)
    (site / "forever.py").write_text(NEVER_CLOSED)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: forever\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    work = tmp_path / "work"
    work.mkdir()
    return work, {**os.environ, "PYTHONPATH": str(site)}


def contract(outside, *arguments):
    work, environment = outside
    return subprocess.run(
        [sys.executable, "-m", "taskstore", "contract", *arguments],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SUITE_TIMEOUT_S,
        check=False,
    )


def suite(outside, *arguments):
    work, environment = outside
    return subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(work)),
            *("--pyargs", "taskstore.testing.suite", *arguments),
        ],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SUITE_TIMEOUT_S,
        check=False,
    )


def test_a_correct_backend_keeps_the_contract(outside):
    done = contract(outside, "memory:")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = dict(line.split("\t")[:2] for line in done.stdout.splitlines() if line)
    assert rows == {
        "core": "kept",
        "journal": "kept",
        "compaction": "kept",
        "query": "kept",
        "integrity": "kept",
        "shared": "kept in part",
        "crash-safe": "not claimed",
    }
    assert "the storage is the memory of one process" in done.stdout
    assert suite(outside, "--taskstore-url", "memory:").returncode == 0


def test_a_broken_backend_fails_the_matching_clauses(outside):
    done = contract(outside, "forever:x", "--level", "core", "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    assert set(answer["levels"]) == {"core"}
    broken = [clause for clause in answer["clauses"] if clause["outcome"] == "failed"]
    assert {clause["clause"] for clause in broken} == {
        "a_closed_store_refuses_every_call",
        "a_store_is_a_context_manager",
    }
    assert all(clause["promise"].startswith("[") for clause in broken)
    done = suite(outside, "--taskstore-url", "forever:x", "--taskstore-level", "core")
    assert done.returncode == 1
    assert "test_a_closed_store_refuses_every_call" in done.stdout


def test_the_data_at_the_url_is_not_changed(outside):
    work, _ = outside
    (work / "ledger").mkdir()
    (work / "ledger" / "precious.txt").write_text("do not touch")
    done = contract(outside, "json:///ledger", "--level", "integrity", "--level", "crash-safe")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in work.iterdir()] == ["ledger"]
    assert [path.name for path in (work / "ledger").iterdir()] == ["precious.txt"]


def test_wrong_usage_prints_one_line(outside):
    unknown = contract(outside, "nothing:x")
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (2, 1)
    assert "installed schemes:" in unknown.stderr
    level = contract(outside, "memory:", "--level", "heroic")
    assert level.returncode == 2
    nowhere = contract(outside, "postgresql+psycopg://me:geheim@127.0.0.1:1/db")
    assert nowhere.returncode == 3
    assert "geheim" not in nowhere.stderr
    missing = suite(outside)
    assert missing.returncode == 4
    assert "--taskstore-url" in missing.stdout + missing.stderr


def test_the_unused_plugin_imports_no_heavy_module(outside):
    work, environment = outside
    (work / "test_light.py").write_text(
        "import sys\ndef test_light():\n"
        "    assert 'taskstore_pytest' in sys.modules\n"
        "    assert not {'taskstore', 'hypothesis', 'sqlalchemy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:hypothesispytest",
        ],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SUITE_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
