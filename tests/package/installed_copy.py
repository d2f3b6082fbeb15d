"""What the tests of the distribution work with."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Distribution:
    """What ``python -m build`` makes of the checkout."""

    sdist: Path
    wheel: Path


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel in it, and an empty directory to work in."""

    bin: Path
    cwd: Path

    @property
    def python(self) -> Path:
        return self.bin / "python"

    def run(
        self, *command: str | Path, status: int | None = 0, env: Mapping[str, str] | None = None
    ) -> str:
        """Run a command of the environment; return its standard output."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PYTEST", "TASKSTORE", "COV_", "VIRTUAL_ENV"))
        }
        done = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.cwd,
            env={**clean, "HOME": str(self.cwd), "XDG_STATE_HOME": str(self.cwd), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert status in (None, done.returncode), (command, done.stdout, done.stderr)
        return done.stdout
