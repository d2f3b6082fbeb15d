"""Functions that run as another user, for tests of owners and modes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from taskstore import TaskRegistry, compact
from taskstore.testing.crash.processes import Child

SERVICE, COLLEAGUE, STRANGER = 12345, 12346, 12347
"""User ids.  No such user need exist; each has a group of the same number."""
TEAM = 23456
"""A group id."""


def require_root() -> None:
    """Skip the test without root; in CI, fail."""
    if os.geteuid():
        reason = "only root can become another user"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def run_as(
    uid: int, work: Callable[[], Any], *, groups: Sequence[int] = (), umask: int = 0o077
) -> None:
    """Call a function in a forked child as another user; the child's error is raised here."""

    def as_other(_: object) -> None:
        os.setgroups(groups)
        os.setgid(uid)
        os.setuid(uid)
        os.umask(umask)
        work()

    assert Child(as_other).finish() == []


def import_everything() -> None:
    """Import what the stores import late, which another user cannot always read."""
    with tempfile.TemporaryDirectory() as folder:
        for url in (f"sqlite:///{folder}/t.db", f"json:///{folder}/ledger"):
            with TaskRegistry.open(url) as registry:
                registry.create(runtime="cli", task="x")
                compact(registry.store)


def scratch_directory() -> Path:
    """Return a new directory that every user can enter."""
    path = Path(tempfile.mkdtemp(prefix="taskstore-users-", dir="/var/tmp"))
    path.chmod(0o755)
    return path
