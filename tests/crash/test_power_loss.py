"""[4] [7] The power is lost at any moment: what was acknowledged is there, in every state left.

``TASKSTORE_POWER_STATES`` sets how many states of one moment are opened at
most (default 12); ``make soak`` sets many.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from taskstore.stores import jsonfile
from taskstore.testing.factories import make_put
from taskstore.testing.powerloss import RecordedDisk, survey
from taskstore.testing.powerloss.jsonfile import JSON_LIVES, open_json, open_unsynced

STATES = int(os.environ.get("TASKSTORE_POWER_STATES", "12"))

STORE = Path(jsonfile.__file__).parent

UNNEEDED = {
    # What it removes does not count any more; if it is back, it is removed again.
    "writing.py: Writer._clear_up: sync_directory",
    "writing.py: Writer.replace: sync_directory",
}
"""Syncs without which nothing is lost."""


@pytest.fixture(scope="module")
def surveyed():
    return survey(open_json, lives=JSON_LIVES, most=STATES)


def test_nothing_acknowledged_is_lost_to_power(surveyed, report):
    report("power loss, the JSON store", surveyed)
    assert not surveyed.problems
    assert surveyed.opened > 500


def test_every_operation_of_the_disk_was_among_them(surveyed):
    assert surveyed.missing == []


def calls_of_the_disk() -> dict[tuple[str, int], str]:
    """Every place in the store that goes through the door, and what it is called."""
    places = {}
    for path in sorted(STORE.glob("*.py")):
        for parent in ast.walk(ast.parse(path.read_text())):
            if isinstance(parent, ast.ClassDef):
                prefix, functions = f"{parent.name}.", parent.body
            elif isinstance(parent, ast.Module):
                prefix, functions = "", parent.body
            else:
                continue
            for function in functions:
                for call in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
                    if isinstance(call, ast.Call) and is_door(call.func):
                        name = f"{path.name}: {prefix}{function.name}: {call.func.attr}"
                        places |= {
                            (str(path), line): name
                            for line in range(call.lineno, call.end_lineno + 1)
                        }
    return places


def is_door(called: ast.expr) -> bool:
    if not isinstance(called, ast.Attribute):
        return False
    owner = called.value
    name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
    return name in ("disk", "_disk")


def test_every_place_in_the_store_that_changes_files_was_among_them(surveyed):
    reached = {(file, line) for _, file, line in surveyed.sites}
    places = calls_of_the_disk()
    assert len(set(places.values())) > 20
    assert {name for place, name in places.items() if place in reached} == set(places.values())


def test_nothing_changes_files_beside_the_door():
    """Or the record would not be the truth.  (The waiting room of the fair lock lies elsewhere, and
    is an empty file on which nothing relies.)"""
    changing = {"fsync", "fdatasync", "pwrite", "ftruncate", "rename", "unlink", "mkdir", "touch"}
    changing |= {
        "writelines",
        "write_bytes",
        "write_text",
        "rmdir",
        "symlink_to",
        "link",
        "truncate",
        "write",
    }
    for path in STORE.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            called = call.func if isinstance(call, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in changing:
                assert is_door(called), f"{path.name}:{call.lineno}"


def test_without_syncing_the_ledger_is_whole_or_told_to_be_corrupt():
    """``durability="process"`` promises nothing here, but it never passes off half a commit."""
    found = survey(
        lambda directory, disk, *, read_only: (
            open_unsynced if isinstance(disk, RecordedDisk) else open_json
        )(directory, disk, read_only=read_only),
        lives=(unsynced,),
        most=STATES,
    )
    assert found.opened > 30
    corrupt = [problem for problem in found.problems if "does not match its checksum" in problem]
    assert found.problems == corrupt


def unsynced(life):
    store = life.open()
    for size in (0, 2_000, 0, 2_000):
        life.apply(store, make_put(error="x" * size or None), durable=False)
    store.close()


def test_each_sync_is_needed(surveyed, report):
    """A store that leaves out any single sync loses something, and the enumeration sees it."""
    names = calls_of_the_disk()
    syncs = {site for site in surveyed.sites if site[0].startswith("sync")}
    syncs = {site for site in syncs if Path(site[1]).parent == STORE}
    assert len(syncs) > 15
    caught, lines = set(), []
    for site in sorted(syncs):
        found = survey(
            open_json,
            lives=JSON_LIVES,
            most=24,
            stop=True,
            omits=lambda step, place, site=site: (step, *place) == site,
        )
        name = names[site[1:]]
        caught |= {name} if found.problems else set()
        verdict = f"caught by state {found.opened}" if found.problems else "makes no difference"
        lines.append(f"{name:<52} {site[0]:<15} left out: {verdict}")
    report("power loss, the JSON store without one of its syncs", "\n".join(lines))
    assert {names[site[1:]] for site in syncs} - caught == UNNEEDED
