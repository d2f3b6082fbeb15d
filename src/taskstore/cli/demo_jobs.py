"""The work that ``taskstore demo`` records: real, and done with Python alone."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

HASH = """
import hashlib, pathlib, sys
files = sorted(pathlib.Path(sys.argv[1]).rglob("*.py"))[:3000]
total = hashlib.sha256()
for number, path in enumerate(files, 1):
    total.update(hashlib.sha3_512(path.read_bytes() * 8).digest())
    if number % 20 == 0:
        print(f"{number} of {len(files)} files hashed", flush=True)
print(f"{len(files)} files: sha256 {total.hexdigest()[:16]}")
"""

PARSE = """
import json
print("reading the configuration", flush=True)
json.loads('{"port": 8080,}')
"""

PRIMES = """
import itertools
found = 0
for number in itertools.count(2):
    if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
        found += 1
        if found % 2000 == 0:
            print(f"{found} primes found, the last is {number}", flush=True)
"""


class Job(NamedTuple):
    """A command to record, and how it is to end.

    ``ends`` is the status that the ledger must show, ``exit_status`` what the
    recorder must exit with (negative: killed by that signal).
    """

    label: str
    argv: tuple[str, ...]
    ends: str = "succeeded"
    exit_status: int = 0
    options: tuple[str, ...] = ()


CANCELLED, ORPHANED = "cancelled", "orphaned"
"""The labels of the jobs that the demo itself ends."""


def jobs(directory: Path) -> list[Job]:
    """The jobs, working on this Python's standard library and in a directory.

    Their scripts are written into the directory.
    """
    python, library = sys.executable, sysconfig.get_path("stdlib")
    for name, text in (("hash", HASH), ("parse", PARSE), ("primes", PRIMES)):
        (directory / f"{name}.py").write_text(text.lstrip(), encoding="utf-8")
    archive = ("-m", "tarfile", "-v", "-c", str(directory / "json.tar"), f"{library}/json")
    primes = (python, str(directory / "primes.py"))
    return [
        Job("hash", (python, str(directory / "hash.py"), library)),
        Job("archive", (python, *archive)),
        Job("parse", (python, str(directory / "parse.py")), "failed", 1),
        Job("too long", primes, "timed_out", 124, ("--timeout", "4s")),
        Job(CANCELLED, primes, "cancelled", 143),
        Job(ORPHANED, primes, "lost", -9),
    ]
