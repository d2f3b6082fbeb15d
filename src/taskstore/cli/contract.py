"""``taskstore contract``: prove a backend with the contract suite.

The suite is run by pytest, and nothing else: this command starts it, reads
its report and prints a table.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from taskstore.backends import redacted
from taskstore.cli import render
from taskstore.cli.options import AsJson
from taskstore.errors import UnsupportedError

LEVELS = (
    "core",
    "journal",
    "compaction",
    "query",
    "integrity",
    "shared",
    "crash-safe",
)
"""What a store can be proved to do, in the order in which it is worth knowing."""

OUTCOMES = ("passed", "failed", "skipped")


def contract(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="A URL of the backend; what is there stays.")
    ],
    *,
    level: Annotated[
        list[str] | None, typer.Option("--level", help="This level only; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Run the contract suite against a backend, in a namespace of its own."""
    for name in level or ():
        if name not in LEVELS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(LEVELS)}")
    clauses = _run(url, level or [])
    levels = {
        name: found for name in LEVELS if (found := [c for c in clauses if c["level"] == name])
    }
    verdicts = {name: _verdict(found) for name, found in levels.items()}
    failed = [clause for clause in clauses if clause["outcome"] == "failed"]
    members = {"url": redacted(url), "ok": not failed, "levels": verdicts, "clauses": clauses}
    rows = [
        (
            name,
            found["verdict"],
            *(str(found[outcome]) for outcome in OUTCOMES),
            "; ".join(found["reasons"]),
        )
        for name, found in verdicts.items()
    ]
    columns = ("LEVEL", "VERDICT", "PASSED", "FAILED", "SKIPPED", "WHY")
    render.answer(as_json, members, columns, rows)
    if not as_json:
        _print_failed(failed)
    return 1 if failed else 0


def _run(url: str, levels: list[str]) -> list[dict[str, Any]]:
    """Let pytest run the suite, quietly and without the configuration of whatever is here."""
    try:
        import hypothesis  # noqa: F401 - the suite needs it
        import pytest
    except ImportError as error:
        raise UnsupportedError(
            f"the contract suite needs what is not installed: {error.name}",
            hint="pip install 'taskstore[testing]'",
        ) from error
    from taskstore.testing.scratch import scratch

    with scratch(url) as open_store:  # a wrong URL is told here, once
        open_store().close()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        (Path(directory) / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        arguments = [
            # By the name of its entry point, so that it is not loaded twice; autoload may be off.
            *("-p", "taskstore", "-p", "no:cacheprovider"),
            *("--pyargs", "taskstore.testing.suite", "-q"),
            *("-c", str(Path(directory) / "pytest.ini"), "--rootdir", directory),
            *("--taskstore-url", url, "--taskstore-report", str(report)),
            *(f"--taskstore-level={name}" for name in levels),
        ]
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            status = pytest.main(arguments)
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise UnsupportedError(f"the contract suite did not run: pytest ended with {status!r}")
        clauses: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))
    return clauses


def _verdict(clauses: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {
        outcome: sum(clause["outcome"] == outcome for clause in clauses) for outcome in OUTCOMES
    }
    if counts["failed"]:
        verdict = "broken"
    elif counts["passed"]:
        # A clause for an ability that the store does not have takes nothing from the rest.
        withheld = any("withholds" in (clause["reason"] or "") for clause in clauses)
        verdict = "kept in part" if withheld else "kept"
    else:
        verdict = "not claimed"
    reasons = sorted({clause["reason"] for clause in clauses if clause["outcome"] == "skipped"})
    return {"verdict": verdict, **counts, "reasons": reasons}


def _print_failed(failed: list[dict[str, Any]]) -> None:
    """Print of each clause that failed what it promises and what went wrong first."""
    for (level, clause), cases in groupby(
        failed, key=lambda c: (c["level"], c["clause"].partition("[")[0])
    ):
        first = next(cases)
        render.print_line(f"\n{level}: {clause}: {first['promise']}")
        render.print_line(render.visible(first["reason"].strip().splitlines()[-1]))
