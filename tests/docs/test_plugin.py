"""The backend of docs/writing-a-backend.md, packaged and installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import ROOT, BlockRunner, blocks_of

GUIDE = ROOT / "docs" / "writing-a-backend.md"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files of the guide."""
    monkeypatch.chdir(tmp_path)
    runner = BlockRunner()
    for block in blocks_of(GUIDE):
        if block.remark == "file":
            runner.run(block)
    return tmp_path


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_scheme_works_once_it_is_installed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    run(*build, str(project))
    [wheel] = (project / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", "--target", "site", str(wheel))
    (project / "onefile.py").unlink()
    monkeypatch.setenv("PYTHONPATH", str(project / "site"))
    run(sys.executable, "use_it.py")
    ledger = (project / "ledger.json").read_text()
    assert ledger.startswith('{"format":"taskstore-snapshot/1"')
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    proof = run("bash", "-e", "prove.sh")
    assert proof.startswith("core\tkept\t"), proof
    assert "4 passed" in proof, proof
    assert "memory equals disk" in run("bash", "-e", "faults.sh")
    assert (project / "ledger.json").read_text() == ledger


def test_the_smallest_backend_is_small(project: Path) -> None:
    lines = [line for line in (project / "onefile.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 60
