"""The public surface: every name is there, and every name is explained."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from types import FunctionType

import pytest

import taskstore

PROMISED = """
TaskRegistry TaskRegistryStore TaskRecord TaskStatus DeliveryStatus DeliveryContext NotifyPolicy
ScopeKind TerminalOutcome TaskQuery Page Put Remove Commit JournalEntry Snapshot fold open_store
compact Compactor CompactionPolicy CompactionReport Restored Upserted Deleted SupportsJournal
SupportsCompaction SupportsQuery SupportsIntegrity TaskStoreError ValidationError TaskNotFound
InvalidTransition ConflictError CorruptStoreError StoreBusyError StoreUnavailableError
StoreReplacedError OutcomeUnknownError SchemaMismatchError ReadOnlyError StoreClosedError
BackendNotFoundError
CursorExpiredError UnsupportedError
"""


@pytest.mark.parametrize("name", PROMISED.split())
def test_what_others_build_on_is_there(name: str) -> None:
    assert name in taskstore.__all__
    assert hasattr(taskstore, name)


def test_all_is_sorted_and_true() -> None:
    assert taskstore.__all__ == sorted(taskstore.__all__)
    assert all(hasattr(taskstore, name) for name in taskstore.__all__)


def test_one_root_of_errors() -> None:
    errors = [
        value
        for name in taskstore.__all__
        if inspect.isclass(value := getattr(taskstore, name)) and issubclass(value, BaseException)
    ]
    assert errors
    assert all(issubclass(error, taskstore.TaskStoreError) for error in errors)


def public_members(cls: type) -> Iterator[tuple[str, object]]:
    ours = [base for base in cls.__mro__ if base.__module__.startswith("taskstore")]
    for name, member in chain.from_iterable(vars(base).items() for base in ours):
        if name.startswith("_"):
            continue
        if isinstance(member, classmethod | staticmethod):
            yield name, member.__func__
        elif isinstance(member, FunctionType | property):
            yield name, member


def explained_aliases() -> set[str]:
    """Names in the package that are assigned and followed by a string, as type aliases are."""
    explained = set()
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
                explained.add(target.id)
    return explained


@pytest.mark.parametrize("name", taskstore.__all__)
def test_every_public_name_is_explained(name: str) -> None:
    value = getattr(taskstore, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        assert name in explained_aliases()
        return
    assert (vars(value) if inspect.isclass(value) else {"__doc__": value.__doc__}).get("__doc__")
    if inspect.isclass(value):
        for member, what in public_members(value):
            assert inspect.getdoc(what) or inspect.getdoc(getattr(value, member)), member
