"""The contract suite for store backends, and factories for test data.

A backend author subclasses :class:`StoreContract` and overrides one fixture::

    class TestMyStore(StoreContract):
        @pytest.fixture
        def make_store(self, tmp_path):
            return lambda *, read_only=False: MyStore(tmp_path / "ledger", read_only=read_only)

The fixture returns a callable.  Each call of the callable opens a new store on the same storage.
If a clause needs an ability that the store lacks, pytest skips the clause, and the skip message
names the ability.  The docstring of each clause begins with numbers in brackets: the numbers of the
promises in ``docs/concepts.md`` that the clause proves.

The suite needs the extra ``testing``: ``pip install 'taskstore[testing]'``.
"""

from __future__ import annotations

import pytest

# Pytest must rewrite assertions before the imports; failing clauses then show compared values.
pytest.register_assert_rewrite("taskstore.testing.contract", "taskstore.testing.threads")

from taskstore.testing.contract.apply import ApplyContract
from taskstore.testing.contract.base import ContractBase, Ledger, as_of, needs
from taskstore.testing.contract.compaction import CompactionContract, RetentionContract
from taskstore.testing.contract.core import CoreContract
from taskstore.testing.contract.crash import CrashContract
from taskstore.testing.contract.exclusive import ExclusiveContract
from taskstore.testing.contract.integrity import IntegrityContract
from taskstore.testing.contract.journal import JournalContract
from taskstore.testing.contract.machine import (
    ModelContract,
    StoreMachine,
    run_store_machine,
)
from taskstore.testing.contract.processes import ProcessesContract
from taskstore.testing.contract.query import (
    IdSearchContract,
    QueryContract,
    StreamingContract,
    SummaryContract,
)
from taskstore.testing.contract.shared import SharedContract
from taskstore.testing.contract.values import ValuesContract
from taskstore.testing.factories import (
    EPOCH_MS,
    Model,
    create,
    delete,
    make_put,
    make_record,
    next_of,
    play,
    removal_of,
    update,
)
from taskstore.testing.types import OpenStore
from taskstore.testing.values import NASTY, Nasty

__all__ = [
    "EPOCH_MS",
    "NASTY",
    "ContractBase",
    "Ledger",
    "Model",
    "Nasty",
    "OpenStore",
    "StoreContract",
    "StoreMachine",
    "as_of",
    "create",
    "delete",
    "make_put",
    "make_record",
    "needs",
    "next_of",
    "play",
    "removal_of",
    "run_store_machine",
    "update",
]


class StoreContract(
    CoreContract,
    ApplyContract,
    ValuesContract,
    JournalContract,
    CompactionContract,
    RetentionContract,
    QueryContract,
    StreamingContract,
    SummaryContract,
    IdSearchContract,
    IntegrityContract,
    SharedContract,
    ExclusiveContract,
    ProcessesContract,
    CrashContract,
    ModelContract,
):
    """All clauses of the contract.  Subclass this class and override ``make_store``."""
