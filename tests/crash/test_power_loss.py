"""[4] [7] Power loss at any moment: every crash state contains all acknowledged changes.

``TASKSTORE_POWER_STATES`` limits the states that are opened for one crash point
(default 12); ``make soak`` sets a high limit.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from taskstore.stores import jsonfile
from taskstore.testing.factories import make_put
from taskstore.testing.powerloss import RecordedDisk, survey
from taskstore.testing.powerloss.jsonfile import JSON_SCENARIOS, open_json, open_unsynced

STATES = int(os.environ.get("TASKSTORE_POWER_STATES", "12"))

STORE = Path(jsonfile.__file__).parent

UNNEEDED = {
    # The removed files are obsolete; if one reappears, it is removed again.
    "writing.py: _remove_leftovers: sync_directory",
    "writing.py: Writer.replace: sync_directory",
}
"""Syncs that no acknowledged change needs."""


@pytest.fixture(scope="module")
def result():
    return survey(open_json, scenarios=JSON_SCENARIOS, max_states=STATES)


def test_no_acknowledged_change_is_lost(result, report):
    report("power loss, the JSON store", result)
    assert not result.problems
    assert result.opened > 500


def test_every_step_of_the_disk_was_covered(result):
    assert result.uncovered_steps == []


def calls_of_the_disk() -> dict[tuple[str, int], str]:
    """Return the name of every call of the disk in the store, by file and line."""
    calls = {}
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
                    if isinstance(call, ast.Call) and is_disk(call.func):
                        name = f"{path.name}: {prefix}{function.name}: {call.func.attr}"
                        calls |= {
                            (str(path), line): name
                            for line in range(call.lineno, call.end_lineno + 1)
                        }
    return calls


def is_disk(called: ast.expr) -> bool:
    if not isinstance(called, ast.Attribute):
        return False
    owner = called.value
    name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
    return name in ("disk", "_disk")


def test_every_call_of_the_disk_in_the_store_was_covered(result):
    reached = {(file, line) for _, file, line in result.sites}
    calls = calls_of_the_disk()
    assert len(set(calls.values())) > 20
    assert {name for site, name in calls.items() if site in reached} == set(calls.values())


def test_the_store_changes_files_only_through_the_disk():
    """Otherwise the trace would be incomplete.  (The queue file of the lock is in another
    package; it is empty and no data depends on it.)"""
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
                assert is_disk(called), f"{path.name}:{call.lineno}"


def test_without_syncs_the_ledger_is_intact_or_reported_as_corrupt():
    """``durability="process"`` may lose commits, but never returns part of one."""
    found = survey(
        lambda directory, disk, *, read_only: (
            open_unsynced if isinstance(disk, RecordedDisk) else open_json
        )(directory, disk, read_only=read_only),
        scenarios=(unsynced,),
        max_states=STATES,
    )
    assert found.opened > 30
    corrupt = [problem for problem in found.problems if "does not match its checksum" in problem]
    assert found.problems == corrupt


def unsynced(workload):
    store = workload.open()
    for size in (0, 2_000, 0, 2_000):
        workload.apply(store, make_put(error="x" * size or None), durable=False)
    store.close()


def test_each_sync_is_needed(result, report):
    """The survey finds a problem for each sync that a store leaves out."""
    names = calls_of_the_disk()
    syncs = {site for site in result.sites if site[0].startswith("sync")}
    syncs = {site for site in syncs if Path(site[1]).parent == STORE}
    assert len(syncs) > 15
    caught, lines = set(), []
    for site in sorted(syncs):
        found = survey(
            open_json,
            scenarios=JSON_SCENARIOS,
            max_states=24,
            stop=True,
            omits=lambda step, call_site, site=site: (step, *call_site) == site,
        )
        name = names[site[1:]]
        caught |= {name} if found.problems else set()
        verdict = f"caught by state {found.opened}" if found.problems else "no problem found"
        lines.append(f"{name:<52} {site[0]:<15} omitted: {verdict}")
    report("power loss, the JSON store without one of its syncs", "\n".join(lines))
    assert {names[site[1:]] for site in syncs} - caught == UNNEEDED
