"""The owners of a file lock, as the system reports them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import pytest

from taskstore.stores.common import locks
from taskstore.stores.common.locks import command_of, describe_owners, lock_owners

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
if sys.argv[2] == "whole":
    fcntl.flock(file, fcntl.LOCK_EX)
else:
    fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "holder.py"
    path.write_text(HOLD)
    return path


@pytest.fixture
def locked(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 200)
    return path


def hold(script, path, what, *more):
    process = subprocess.Popen(
        [sys.executable, str(script), str(path), what, *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/locks is Linux's")
@pytest.mark.parametrize("what", ["whole", "120"])
def test_the_process_and_its_command(script, locked, what):
    with hold(script, locked, what) as process:
        [holder] = lock_owners(locked)
        assert holder.startswith(f"pid {process.pid}, {sys.executable} {script}"[:80])
        assert lock_owners(locked, byte=120) == (holder,)
        assert lock_owners(locked, byte=7) == ((holder,) if what == "whole" else ())
        assert lock_owners(script) == ()
        process.communicate()
    assert lock_owners(locked) == ()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/locks is Linux's")
def test_this_process(locked):
    with locked.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock_owners(locked) == (f"pid {os.getpid()}, this process",)
        fcntl.flock(file, fcntl.LOCK_SH)
        assert lock_owners(locked) == (), "a shared lock does not exclude readers"


def test_a_system_that_does_not_report_owners(locked, monkeypatch, tmp_path):
    monkeypatch.setattr(locks, "_LOCKS", tmp_path / "absent")
    assert lock_owners(locked) == ()
    assert lock_owners(tmp_path / "absent") == ()
    assert "does not report" in describe_owners(())


def test_lines_of_every_kind(locked, monkeypatch, tmp_path):
    found = locked.stat()
    file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    lines = tmp_path / "locks"
    lines.write_text(
        f"1: POSIX  ADVISORY  WRITE 999999001 {file} 120 120\n"
        f"1: -> POSIX  ADVISORY  WRITE 999999002 {file} 120 120\n"
        f"2: POSIX  ADVISORY  READ 999999003 {file} 123 123\n"
        f"3: OFDLCK ADVISORY  WRITE -1 {file} 0 EOF\n"
        f"4: FLOCK  ADVISORY  WRITE 999999004 {file} 0 EOF\n"
        "5: LEASE  ACTIVE    READ 5 00:00:0 0 EOF\n"
        "nonsense\n"
    )
    monkeypatch.setattr(locks, "_LOCKS", lines)
    assert lock_owners(locked) == ("pid 999999001", "pid 999999004")
    assert lock_owners(locked, byte=7) == ("pid 999999004",)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_command_line_shows_no_secret(script, locked):
    for secret in ("--password=s3cret", "postgresql://me:s3cret@host/db", "--token"):
        with hold(script, locked, "whole", secret, "s3cret") as process:
            command = command_of(process.pid)
            assert str(script)[:20] in command
            assert "s3cret" not in command
            process.communicate()
