"""Commands for maintenance: compact, verify, backends, contract."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import tempfile
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from msgspec.structs import asdict, replace

from taskstore.cli import ledger, render
from taskstore.cli.ledger import AsJson, Url, UsageError, url_of
from taskstore.cli.read import open_for_reading
from taskstore.errors import UnsupportedError
from taskstore.model.compaction_policy import CompactionPolicy, CompactionReport
from taskstore.registry.compactor import compact as compact_store
from taskstore.store import opening
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsExclusive,
    SupportsHistory,
    SupportsIdSearch,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    SupportsStreaming,
    SupportsSummary,
    TaskRegistryStore,
)
from taskstore.store.opening import redacted

ABILITIES: dict[str, type] = {
    "journal": SupportsJournal,
    "exclusive": SupportsExclusive,
    "history": SupportsHistory,
    "query": SupportsQuery,
    "streaming": SupportsStreaming,
    "summary": SupportsSummary,
    "ids": SupportsIdSearch,
    "compaction": SupportsCompaction,
    "integrity": SupportsIntegrity,
}


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\Z", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the number of bytes that a size such as ``500MiB``, ``2GB`` or ``1000`` names."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size: write for example 500MiB, 2GB or 100000")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    size = float(number) * base ** "_KMGT".index(unit.upper() or "_")
    if size == math.inf:
        raise typer.BadParameter(f"a size of {len(text)} characters is too large")
    return int(size)


def compact(
    ctx: typer.Context,
    *,
    if_due: Annotated[
        bool, typer.Option("--if-due", help="Compact only if compaction is due.")
    ] = False,
    keep_days: Annotated[
        float | None,
        typer.Option(
            min=0, help="Days of history to keep. Default: 7 days and at least 10,000 entries."
        ),
    ] = None,
    keep_entries: Annotated[
        int | None,
        typer.Option(
            min=0, help="Entries to keep. With --keep-days, the option that keeps more counts."
        ),
    ] = None,
    keep_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="The most bytes of entries to keep, for example 500MiB, whatever the other "
            "options keep. Default: 1GiB.",
        ),
    ] = None,
    erase_deleted: Annotated[
        bool,
        typer.Option(
            "--erase-deleted", help="Keep no history; this erases the text of deleted tasks."
        ),
    ] = False,
    vacuum: Annotated[
        bool,
        typer.Option(
            "--vacuum",
            help="First rebuild an SQLite file so that it can shrink. Close the ledger in every "
            "other process; the directory needs free space for twice the content.",
        ),
    ] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Fold the journal into a snapshot, and trim the entries that are not to be kept."""
    keep = (keep_days, keep_entries, keep_bytes)
    if erase_deleted and (if_due or any(value is not None for value in keep)):
        raise UsageError("--erase-deleted cannot be combined with --if-due or a --keep option")
    policy = _policy_of(*keep, forced=not if_due)
    where = url_of(ctx, url)
    rebuilt = _vacuum(where, as_json=as_json) if vacuum else {}
    with ledger.open_existing(where) as store:
        report = compact_store(store, policy, erase_deleted=erase_deleted)
        render.print_report(store)
    if as_json:
        members = {name: value for name, value in asdict(report).items() if name != "stats"}
        render.print_json(members | rebuilt)
    else:
        _print_compaction(report)


def _policy_of(
    keep_days: float | None, keep_entries: int | None, keep_bytes: int | None, *, forced: bool
) -> CompactionPolicy:
    """Return the policy that the options of ``compact`` describe."""
    policy = CompactionPolicy()
    if keep_days is not None or keep_entries is not None:
        # A wrong clock must not make ``--keep-days`` alone trim the entries of the last minutes.
        policy = replace(
            policy,
            history_s=(keep_days or 0) * 86400,
            history_entries=keep_entries or 0,
            ageless_entries=policy.history_entries if keep_entries is None else 0,
        )
    if keep_bytes is not None:
        policy = replace(policy, history_bytes=keep_bytes)
    return policy.forced() if forced else policy


def _print_compaction(report: CompactionReport) -> None:
    """Print what a compaction did, and where the ledger's history begins."""
    if report.compacted:
        render.print_line(
            f"compacted at seq {report.seq} ({report.reason}): {report.records} records in the "
            f"snapshot, {report.trimmed} entries trimmed, {report.duration_s:.2f}s"
        )
    else:
        render.print_line(f"nothing to do: {report.reason}")
    render.print_line(_history_of(report))


def _history_of(report: CompactionReport) -> str:
    """Return the sentence that says where the ledger's history begins, and why it begins there."""
    reach = f"history reaches back to seq {report.floor}"
    if report.floor == 1:
        reach = "history reaches back to the first entry"
    elif report.floor_at is not None:
        reach += f", to changes after {render.iso_time(report.floor_at)}"
    return f"{reach}: {report.floor_reason}" if report.floor_reason else reach


def _vacuum(url: str, *, as_json: bool) -> dict[str, Any]:
    """Rebuild an SQLite file; return the result for JSON, or print the result."""
    ledger.open_reader(url).close()  # an unknown backend or a missing ledger raises here
    from taskstore.stores.sql import vacuum

    done = vacuum(url)
    if not as_json:
        render.print_line(
            f"rebuilt the file: {done.before_bytes:,} bytes before, {done.after_bytes:,} bytes "
            f"after; this needed up to {done.needed_bytes:,} free bytes beside the file"
        )
    return {"vacuum": done._asdict()}


def verify(ctx: typer.Context, *, as_json: AsJson = False, url: Url = None) -> int:
    """Check that seqs are contiguous, checksums match, and the folded journal equals the
    records."""
    with open_for_reading(ctx, url) as store:
        if not isinstance(store, SupportsIntegrity):
            raise UnsupportedError(f"{store.location}: this backend has no integrity check")
        report = store.verify()
    verdict = "whole" if report.ok else f"NOT whole: {len(report.problems)} problems"
    counts = f"{report.records} records, {report.entries} journal entries, seq {report.seq}"
    return render.print_check(as_json, {"ok": report.ok, **asdict(report)}, f"{verdict}: {counts}")


def backends(*, as_json: AsJson = False) -> None:
    """List the installed backends, and show whether each backend is usable."""
    members = [
        _describe(entry)
        for _, entries in sorted(opening.installed_backends().items())
        for entry in entries
    ]
    rows = (
        (
            f"{backend['scheme']}:",
            backend["package"] or render.EMPTY,
            backend["version"] or render.EMPTY,
            render.EMPTY if backend["abilities"] is None else " ".join(backend["abilities"]),
            "yes" if backend["usable"] else f"no: {backend['problem']}",
        )
        for backend in members
    )
    columns = ("SCHEME", "PACKAGE", "VERSION", "ABILITIES", "USABLE")
    render.print_result(as_json, {"backends": members}, columns, rows)


def _describe(entry: EntryPoint) -> dict[str, Any]:
    """Import a declared backend and its driver; return a description of the backend."""
    abilities, problem = None, None
    try:
        abilities = _abilities(entry.load())
        _, _, driver = entry.name.partition("+")  # a scheme such as postgresql+psycopg
        if driver:
            importlib.import_module(driver)
    except Exception as error:  # noqa: BLE001 (a third-party module can raise anything)
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
    """Return the abilities of the store class that ``opener`` is annotated to return.

    Returns ``None`` if the annotation is not a class, or is the base class of all stores.
    """
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
"""The levels of the contract suite, in output order."""

OUTCOMES = ("passed", "failed", "skipped")


def contract(
    ctx: typer.Context,
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="The URL of a backend; its existing data does not change."
        ),
    ],
    *,
    level: Annotated[
        list[str] | None, typer.Option("--level", help="Run only this level; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Run the contract suite against a backend, in a separate namespace."""
    for name in level or ():
        if name not in LEVELS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(LEVELS)}")
    clauses = _run_suite(url_of(ctx, url), level or [])
    by_level = {name: [c for c in clauses if c["level"] == name] for name in LEVELS}
    verdicts = {name: _level_verdict(group) for name, group in by_level.items() if group}
    failed = [clause for clause in clauses if clause["outcome"] == "failed"]
    members = {"url": redacted(url), "ok": not failed, "levels": verdicts, "clauses": clauses}
    rows = [
        (
            name,
            verdict["verdict"],
            *(str(verdict[outcome]) for outcome in OUTCOMES),
            "; ".join(verdict["reasons"]),
        )
        for name, verdict in verdicts.items()
    ]
    columns = ("LEVEL", "VERDICT", "PASSED", "FAILED", "SKIPPED", "WHY")
    render.print_result(as_json, members, columns, rows)
    if not as_json:
        _print_failed(failed)
    return 1 if failed else 0


def _run_suite(url: str, levels: list[str]) -> list[dict[str, Any]]:
    """Run the contract suite with pytest, without output; return one dict per clause."""
    try:
        import hypothesis  # noqa: F401 - the suite imports hypothesis
        import pytest
    except ImportError as error:
        raise UnsupportedError(
            f"the contract suite needs {error.name}, which is not installed",
            hint="pip install 'taskstore[testing]'",
        ) from error
    from taskstore.testing.scratch import scratch

    with scratch(url) as open_store:  # an invalid URL raises here, before pytest runs
        open_store().close()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        (Path(directory) / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        arguments = [
            # ``-p taskstore`` loads the plugin even if pytest loads no plugins by itself; the
            # name of the entry point prevents a second load.
            *("-p", "taskstore", "-p", "no:cacheprovider"),
            *("--pyargs", "taskstore.testing.suite", "-q"),
            *("-c", str(Path(directory) / "pytest.ini"), "--rootdir", directory),
            *("--taskstore-url", url, "--taskstore-report", str(report)),
            *(f"--taskstore-level={name}" for name in levels),
        ]
        with Path(os.devnull).open("w", encoding="utf-8") as devnull, redirect_stdout(devnull):
            status = pytest.main(arguments)
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise UnsupportedError(f"the contract suite did not run: pytest ended with {status!r}")
        clauses: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))
    return clauses


def _level_verdict(clauses: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {
        outcome: sum(clause["outcome"] == outcome for clause in clauses) for outcome in OUTCOMES
    }
    if counts["failed"]:
        verdict = "broken"
    elif counts["passed"]:
        # A clause that was skipped because of a missing ability does not change the verdict.
        unsupported = any("does not guarantee" in (clause["reason"] or "") for clause in clauses)
        verdict = "kept in part" if unsupported else "kept"
    else:
        verdict = "not claimed"
    reasons = sorted({clause["reason"] for clause in clauses if clause["outcome"] == "skipped"})
    return {"verdict": verdict, **counts, "reasons": reasons}


def _print_failed(failed: list[dict[str, Any]]) -> None:
    """Print the guarantee of each failed clause and the error of its first failed case."""
    for (level, clause), cases in groupby(
        failed, key=lambda c: (c["level"], c["clause"].partition("[")[0])
    ):
        first = next(cases)
        render.print_line(f"\n{level}: {clause}: {first['promise']}")
        render.print_line(render.escape_controls(first["reason"].strip().splitlines()[-1]))
