"""Fault injection at every storage step of a store, and checks of the result.

    python -m taskstore.testing.faults URL

:func:`run_matrix` runs scenarios (create, batch, compact, open and more) with a
:class:`~taskstore.TaskRegistry`, records the steps (the calls of the store to its
storage), and injects every fault before and after each step.  After each fault, the
caller must have got a result or a ``TaskStoreError``.  The change must be stored
completely or not at all, and the caller's outcome must say so.  The registry's memory and
the hooks must have the same records as a newly opened instance.  The next write must
succeed.  :func:`render` prints a table.
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
