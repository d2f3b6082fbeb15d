"""Every fault at every step: the caller gets a named error or success, and memory equals disk.

``TASKSTORE_FAULT_STEPS`` sets at how many steps of a scenario each fault is injected
(default: a few); each fault starts at a different step.  0, as in ``make soak``, is all steps.
"""

from __future__ import annotations

import os

import pytest

from taskstore.testing.faults import problems, render, run_matrix

STEPS = {"json": 3, "sqlite": 2, "postgres": 1, "mariadb": 1}
"""The default number of steps; each backend then takes about the same time."""


def steps_of(scheme: str) -> int | None:
    return int(os.environ.get("TASKSTORE_FAULT_STEPS", STEPS[scheme])) or None


def url_of(scheme: str, request) -> str:
    if scheme in ("postgres", "mariadb"):
        url = request.getfixturevalue(f"{scheme}_server").new_database()
        return url + ("?ssl_disabled=true" if scheme == "mariadb" else "")
    return f"{scheme}:///{request.getfixturevalue('memory_path')}/ledger"


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("scheme", STEPS)
def test_every_fault_raises_a_named_error_and_memory_equals_disk(scheme, request, report):
    cells = run_matrix(url_of(scheme, request), steps=steps_of(scheme))
    report(f"every fault at every step, {scheme}", render(cells))
    assert not problems(cells), render(cells)
    assert len({cell.scenario for cell in cells}) == 11
    faulted = [cell for cell in cells if cell.number]
    # Some faults were handled, and some were reported.
    assert {"ok", "StoreUnavailableError"} <= {cell.outcome for cell in faulted}
    if STEPS[scheme] > 1:
        assert any("OutcomeUnknownError" in cell.outcome for cell in faulted)
