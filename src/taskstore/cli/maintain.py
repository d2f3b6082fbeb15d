"""Commands that look after a ledger: compact, verify, backends."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint
from typing import Annotated, Any, get_type_hints

import typer
from msgspec.structs import asdict, replace

from taskstore import backends as registry_of_backends
from taskstore.cli import ledger, render
from taskstore.cli.options import AsJson, Misuse, Url, url_of
from taskstore.cli.read import reading
from taskstore.compaction import compact as compact_store
from taskstore.errors import UnsupportedError
from taskstore.policy import CompactionPolicy
from taskstore.store import (
    SupportsCompaction,
    SupportsExclusive,
    SupportsHistory,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    TaskRegistryStore,
)

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
