"""Faults at every step of a store, and what became of memory, disk and the caller.

    python -m taskstore.testing.faults URL

:func:`run_matrix` plays scenarios (create, batch, compact, open and more) with
a :class:`~taskstore.TaskRegistry`, finds the steps by which the store reaches
its storage, and lets every fault strike before and after each of them.  Each
time the caller has to get a success or one of our errors, the change has to be
there as a whole or not at all as it was told, memory and hooks have to agree
with what a fresh instance loads, and work has to go on.  :func:`render` prints
it all as a table.
"""

from __future__ import annotations

from taskstore.testing.faults.door import Door, Fault, Step
from taskstore.testing.faults.matrix import Cell, run_matrix
from taskstore.testing.faults.seam import FaultyStore
from taskstore.testing.faults.table import problems, render

__all__ = ["Cell", "Door", "Fault", "FaultyStore", "Step", "problems", "render", "run_matrix"]
