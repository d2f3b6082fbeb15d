"""Fault injection at every storage step of a store, and checks of the result.

    python -m taskstore.testing.faults URL

:func:`run_matrix` runs scenarios (create, batch, compact, open and more) with
a :class:`~taskstore.TaskRegistry`, records the steps by which the store reaches
its storage, and injects every fault before and after each step.  Each time,
the caller must get a success or a ``TaskStoreError``; the change must be stored
whole or not at all, as reported; memory and hooks must agree with what a fresh
instance loads; and the next write must work.  :func:`render` prints a table.
"""

from __future__ import annotations

from taskstore.testing.faults.faulty_store import FaultyStore
from taskstore.testing.faults.injection import Fault, InjectionPoint, Step
from taskstore.testing.faults.matrix import Cell, run_matrix
from taskstore.testing.faults.table import problems, render

__all__ = [
    "Cell",
    "Fault",
    "FaultyStore",
    "InjectionPoint",
    "Step",
    "problems",
    "render",
    "run_matrix",
]
