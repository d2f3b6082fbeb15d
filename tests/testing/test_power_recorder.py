"""The failpoints of the recorded disk: which call of an operation fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from taskstore.testing.powerloss import Failpoint, KilledError, RecordedDisk, Recorder

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(tmp_path: Path) -> RecordedDisk:
    return Recorder(tmp_path).disk()


def successes(call: Callable[[], object]) -> int:
    """Return how many calls succeed before a call fails."""
    for count in range(5):
        try:
            call()
        except OSError:
            return count
    raise AssertionError("no call failed")


@pytest.mark.parametrize("step", ["pwrite", "sync_data"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_the_first_calls_succeed_and_the_next_call_fails(step, after, disk, tmp_path):
    descriptor = disk.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    calls = {
        "pwrite": lambda: disk.pwrite(descriptor, b"abc", 0),
        "sync_data": lambda: disk.sync_data(descriptor),
    }
    disk.failpoint = Failpoint(step, FULL, after=after)
    assert successes(calls[step]) == after
    calls[step]()  # a failpoint fails once
    disk.close(descriptor)


def test_a_write_that_fails_first_writes_a_part(disk, tmp_path):
    descriptor = disk.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    disk.failpoint = Failpoint("pwrite", KilledError(), after=1, written=2)
    assert disk.pwrite(descriptor, b"abc", 0) == 3
    with pytest.raises(KilledError):
        disk.pwrite(descriptor, b"def", 3)
    assert (tmp_path / "file").read_bytes() == b"abcde"
    disk.close_all()
