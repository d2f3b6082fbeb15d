"""The text table of fault results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from taskstore.testing.faults.matrix import REFUSES, Cell

_SHORT = {
    "StoreUnavailableError": "unavail",
    "OutcomeUnknownError": "unknown",
    "StoreBusyError": "busy",
    "CorruptStoreError": "corrupt",
    "ConflictError": "conflict",
    "SchemaMismatchError": "schema",
}

LEGEND = (
    "A cell shows the result with the fault before the step / after the step: ok or "
    + ", ".join(f"{short} = {name}" for name, short in _SHORT.items())
    + f". {REFUSES.strip()}: the instance then refuses writes until the ledger is reopened. "
    "WRONG: see the lines below. Blank: the fault cannot occur or was not tried."
)


def render(cells: Sequence[Cell]) -> str:
    """Return the text table: a block per scenario, a row per step, a column per fault."""
    columns = list(dict.fromkeys(cell.fault for cell in cells if cell.number))
    lines = []
    for scenario, group in groupby(cells, key=lambda cell: cell.scenario):
        rows: dict[tuple[int, str], dict[str, dict[str, str]]] = {}
        for cell in group:
            if cell.number:
                row = rows.setdefault((cell.number, cell.step), {})
                row.setdefault(cell.fault, {})[cell.timing] = _short_outcome(cell)
        table = [(scenario, *columns)]
        for (number, step), row in sorted(rows.items()):
            outcomes = (_both_sides(row.get(column, {})) for column in columns)
            table.append((f"{number:3} {step}", *outcomes))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.append("")
    return "\n".join([*lines, LEGEND, *problems(cells), counts(cells)])


def problems(cells: Sequence[Cell]) -> list[str]:
    """Return one line of text for each problem in the cells."""
    return [
        f"WRONG: {cell.scenario}, {cell.fault} {cell.timing} step {cell.number} ({cell.step}), "
        f"the caller got {cell.outcome}: {problem}"
        for cell in cells
        for problem in cell.problems
    ]


def counts(cells: Sequence[Cell]) -> str:
    """Return a line with the number of injected faults and the number of wrong results."""
    faulted = [cell for cell in cells if cell.number]
    wrong = sum(bool(cell.problems) for cell in cells)
    scenarios = len({cell.scenario for cell in cells})
    steps = len({(cell.scenario, cell.number) for cell in faulted})
    return (
        f"{len(faulted)} faults at {steps} steps of {scenarios} scenarios: "
        f"{f'{wrong} WRONG' if wrong else 'a named error for each fault, and memory equals disk'}"
    )


def _short_outcome(cell: Cell) -> str:
    if cell.problems:
        return "WRONG"
    outcome = cell.outcome
    for name, short in _SHORT.items():
        outcome = outcome.replace(name, short)
    return outcome.replace(" + ", "+").replace(REFUSES, "!")


def _both_sides(sides: dict[str, str]) -> str:
    if not {"before", "after"} & sides.keys():
        return sides.get("", "")
    return f"{sides.get('before', '')}/{sides.get('after', '')}".removesuffix("/")
