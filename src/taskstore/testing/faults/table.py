"""The matrix as a table."""

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
    "Cells: what the caller got, the fault struck before/after the step: ok or "
    + ", ".join(f"{short} = {name}" for name, short in _SHORT.items())
    + f". {REFUSES.strip()} the instance then takes no more writes until it is reopened. "
    "WRONG: see below. Blank: cannot happen there, or was not tried."
)


def render(cells: Sequence[Cell]) -> str:
    """One block for each scenario: steps are rows, faults are columns."""
    columns = list(dict.fromkeys(cell.fault for cell in cells if cell.number))
    lines = []
    for scenario, found in groupby(cells, key=lambda cell: cell.scenario):
        rows: dict[tuple[int, str], dict[str, dict[str, str]]] = {}
        for cell in found:
            if cell.number:
                row = rows.setdefault((cell.number, cell.step), {})
                row.setdefault(cell.fault, {})[cell.side] = _word(cell)
        table = [(scenario, *columns)]
        for (number, step), row in sorted(rows.items()):
            told = (_both(row.get(column, {})) for column in columns)
            table.append((f"{number:3} {step}", *told))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.append("")
    return "\n".join([*lines, LEGEND, *problems(cells), counts(cells)])


def problems(cells: Sequence[Cell]) -> list[str]:
    """What is wrong, a line for each."""
    return [
        f"WRONG: {cell.scenario}, {cell.fault} {cell.side} step {cell.number} ({cell.step}), "
        f"the caller got {cell.got}: {problem}"
        for cell in cells
        for problem in cell.problems
    ]


def counts(cells: Sequence[Cell]) -> str:
    """How many cells there are, and how many of them are wrong."""
    struck = [cell for cell in cells if cell.number]
    wrong = sum(bool(cell.problems) for cell in cells)
    scenarios = len({cell.scenario for cell in cells})
    steps = len({(cell.scenario, cell.number) for cell in struck})
    return (
        f"{len(struck)} faults at {steps} steps of {scenarios} scenarios: "
        f"{f'{wrong} WRONG' if wrong else 'each told by name, memory equals disk'}"
    )


def _word(cell: Cell) -> str:
    if cell.problems:
        return "WRONG"
    told = cell.got
    for name, short in _SHORT.items():
        told = told.replace(name, short)
    return told.replace(" + ", "+").replace(REFUSES, "!")


def _both(sides: dict[str, str]) -> str:
    if not {"before", "after"} & sides.keys():
        return sides.get("", "")
    return f"{sides.get('before', '')}/{sides.get('after', '')}".removesuffix("/")
