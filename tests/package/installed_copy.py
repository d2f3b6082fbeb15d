"""Helpers for the tests of the distribution."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Distribution:
    """The files that ``python -m build`` creates from the checkout."""

    sdist: Path
    wheel: Path


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel, and an empty working directory."""

    bin: Path
    cwd: Path

    @property
    def python(self) -> Path:
        return self.bin / "python"

    def run(
        self, *command: str | Path, status: int | None = 0, env: Mapping[str, str] | None = None
    ) -> str:
        """Run a command of the environment and return its standard output."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PYTEST", "TASKSTORE", "COV_", "VIRTUAL_ENV"))
        }
        home = str(self.cwd)
        result = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.cwd,
            env={**inherited, "HOME": home, "XDG_STATE_HOME": home, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert status in (None, result.returncode), (command, result.stdout, result.stderr)
        return result.stdout
