"""Fault injection at every storage step of a store, and checks of the result.

    python -m taskstore.testing.faults URL

:func:`run_matrix` runs scenarios (create, batch, compact, open and more) with a
:class:`~taskstore.TaskRegistry`.  Each call of the store to its storage is a step.  The function
records the steps, and injects every fault before and after each step.  Each scenario call under a
fault must succeed or raise a ``TaskStoreError``.  If the call succeeds, its whole change must be
stored.  If the call raises an error other than ``OutcomeUnknownError``, its change must not be
stored.  After ``OutcomeUnknownError``, the change can be stored as a whole or not at all.  After
the fault, the registry's memory and the hooks must have the records that a newly opened store
instance returns.  The next write must succeed, either at once or after the ledger is reopened.
:func:`render` returns a table of results.
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
