"""Commands that look after a ledger: compact, verify, backends."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from msgspec.structs import asdict, replace

from taskstore.cli import ledger, render
from taskstore.cli.ledger import AsJson, Misuse, Url, url_of
from taskstore.cli.read import reading
from taskstore.errors import UnsupportedError
from taskstore.model.policies import CompactionPolicy
from taskstore.registry.compactor import compact as compact_store
from taskstore.store import opening as registry_of_backends
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsExclusive,
    SupportsHistory,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    TaskRegistryStore,
)
from taskstore.store.opening import redacted

ABILITIES: dict[str, type] = {
    "journal": SupportsJournal,
    "exclusive": SupportsExclusive,
    "history": SupportsHistory,
    "query": SupportsQuery,
    "compaction": SupportsCompaction,
    "integrity": SupportsIntegrity,
}


def compact(
    ctx: typer.Context,
    *,
    if_due: Annotated[
        bool, typer.Option("--if-due", help="Only when the policy finds that it is due.")
    ] = False,
    keep_days: Annotated[
        float | None,
        typer.Option(
            min=0, help="Keep this much history, instead of 7 days and at least 10,000 entries."
        ),
    ] = None,
    erase_deleted: Annotated[
        bool,
        typer.Option(
            "--erase-deleted", help="Keep no history, so that the text of deleted tasks is gone."
        ),
    ] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Fold the journal into a snapshot and trim what is older than the history to keep."""
    if erase_deleted and (if_due or keep_days is not None):
        raise Misuse("--erase-deleted keeps nothing and does not wait until it is due")
    policy = CompactionPolicy()
    if keep_days is not None:
        policy = replace(policy, history_s=keep_days * 86400, history_entries=0)
    if not if_due:
        policy = policy.forced()
    with ledger.open_existing(url_of(ctx, url)) as store:
        report = compact_store(store, policy, erase_deleted=erase_deleted)
        render.tell_report(store)
    if as_json:
        render.print_json(asdict(report))
    elif report.compacted:
        render.print_line(
            f"compacted at seq {report.seq} ({report.reason}): {report.records} records in the "
            f"snapshot, {report.trimmed} entries trimmed, the journal begins at seq "
            f"{report.floor}, {report.duration_s:.2f}s"
        )
    else:
        render.print_line(
            f"nothing to do: {report.reason}; the journal begins at seq {report.floor}"
        )


def verify(ctx: typer.Context, *, as_json: AsJson = False, url: Url = None) -> int:
    """Check the ledger: no gaps, checksums right, folding the journal gives the records."""
    with reading(ctx, url) as store:
        if not isinstance(store, SupportsIntegrity):
            raise UnsupportedError(f"{store.location} cannot verify itself")
        report = store.verify()
    whole = "whole" if report.ok else f"NOT whole: {len(report.problems)} problems"
    counts = f"{report.records} records, {report.entries} journal entries, seq {report.seq}"
    return render.verdict(as_json, {"ok": report.ok, **asdict(report)}, f"{whole}: {counts}")


def backends(*, as_json: AsJson = False) -> None:
    """List the backends that are installed, and whether they can be used."""
    found = [
        _described(entry)
        for _, entries in sorted(registry_of_backends.installed_backends().items())
        for entry in entries
    ]
    rows = (
        (
            f"{backend['scheme']}:",
            backend["package"] or render.NOTHING,
            backend["version"] or render.NOTHING,
            render.NOTHING if backend["abilities"] is None else " ".join(backend["abilities"]),
            "yes" if backend["usable"] else f"no: {backend['problem']}",
        )
        for backend in found
    )
    columns = ("SCHEME", "PACKAGE", "VERSION", "ABILITIES", "USABLE")
    render.answer(as_json, {"backends": found}, columns, rows)


def _described(entry: EntryPoint) -> dict[str, Any]:
    """A declared backend, with what importing it and its driver tells."""
    abilities, problem = None, None
    try:
        abilities = _abilities(entry.load())
        _, _, driver = entry.name.partition("+")  # as in postgresql+psycopg
        if driver:
            importlib.import_module(driver)
    except Exception as error:  # noqa: BLE001 (somebody else's module: anything may happen)
        problem = f"{type(error).__name__}: {error}"
    return {
        "scheme": entry.name,
        "package": entry.dist.name if entry.dist is not None else None,
        "version": entry.dist.version if entry.dist is not None else None,
        "abilities": abilities,
        "usable": problem is None,
        "problem": problem,
    }


def _abilities(opener: Any) -> list[str] | None:
    """What the store can that a callable says it returns, or ``None`` if it does not say."""
    returned = get_type_hints(opener).get("return")
    if not isinstance(returned, type) or returned is TaskRegistryStore:
        return None
    return [name for name, protocol in ABILITIES.items() if issubclass(returned, protocol)]


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
        withheld = any("does not guarantee" in (clause["reason"] or "") for clause in clauses)
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
