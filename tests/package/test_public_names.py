"""The public names: all are exported and have a docstring."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from types import FunctionType

import pytest

import taskstore

REQUIRED = """
TaskRegistry TaskRegistryStore TaskRecord TaskStatus DeliveryStatus DeliveryContext NotifyPolicy
ScopeKind TerminalOutcome TaskQuery Page Put Remove Commit JournalEntry Snapshot fold open_store
compact Compactor CompactionPolicy CompactionReport Restored Upserted Deleted SupportsJournal
SupportsCompaction SupportsQuery SupportsIntegrity TaskStoreError ValidationError TaskNotFound
InvalidTransition ConflictError CorruptStoreError StoreBusyError StoreUnavailableError
StoreReplacedError OutcomeUnknownError SchemaMismatchError ReadOnlyError StoreClosedError
BackendNotFoundError
CursorExpiredError UnsupportedError
"""


@pytest.mark.parametrize("name", REQUIRED.split())
def test_every_required_name_is_exported(name: str) -> None:
    assert name in taskstore.__all__
    assert hasattr(taskstore, name)


def test_all_is_sorted_and_complete() -> None:
    assert taskstore.__all__ == sorted(taskstore.__all__)
    assert all(hasattr(taskstore, name) for name in taskstore.__all__)


def test_every_error_is_a_task_store_error() -> None:
    errors = [
        value
        for name in taskstore.__all__
        if inspect.isclass(value := getattr(taskstore, name)) and issubclass(value, BaseException)
    ]
    assert errors
    assert all(issubclass(error, taskstore.TaskStoreError) for error in errors)


def public_members(cls: type) -> Iterator[tuple[str, object]]:
    bases = [base for base in cls.__mro__ if base.__module__.startswith("taskstore")]
    for name, member in chain.from_iterable(vars(base).items() for base in bases):
        if name.startswith("_"):
            continue
        if isinstance(member, classmethod | staticmethod):
            yield name, member.__func__
        elif isinstance(member, FunctionType | property):
            yield name, member


def documented_aliases() -> set[str]:
    """Return the assigned names of the package that a string follows, as with aliases."""
    documented = set()
    for path in Path(taskstore.__file__).parent.rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for node, following in pairwise(body):
            if (
                isinstance(node, ast.Assign)
                and isinstance(target := node.targets[0], ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                documented.add(target.id)
    return documented


@pytest.mark.parametrize("name", taskstore.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = getattr(taskstore, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        assert name in documented_aliases()
        return
    assert (vars(value) if inspect.isclass(value) else {"__doc__": value.__doc__}).get("__doc__")
    if inspect.isclass(value):
        for member, what in public_members(value):
            assert inspect.getdoc(what) or inspect.getdoc(getattr(value, member)), member
