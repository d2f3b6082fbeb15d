"""Errors say what happened, where, and what to do next."""

from __future__ import annotations

import pytest

from taskstore import errors
from taskstore.errors import (
    BackendNotFoundError,
    Conflict,
    ConflictError,
    CorruptStoreError,
    CursorExpiredError,
    InvalidTransition,
    LeaseConflict,
    SchemaMismatchError,
    StoreBusyError,
    StoreUnavailableError,
    TaskNotFound,
    TaskStoreError,
    ValidationError,
)

EVERY = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, Exception)
]


def test_there_is_one_base_class():
    assert len(EVERY) == 16
    assert all(issubclass(error, TaskStoreError) for error in EVERY)


def test_retryable_errors():
    assert {error.__name__ for error in EVERY if error.retryable} == {
        "ConflictError",
        "StoreBusyError",
        "StoreUnavailableError",
    }


@pytest.mark.parametrize(
    ("conflict", "retryable"),
    [
        (Conflict("a", 1, 2), True),
        (Conflict("a", 0, 0, existing_task_id="b"), True),
        (Conflict("a", 1, 1, leased=LeaseConflict(None, 5)), True),
        (Conflict("a", 1, 1, leased=LeaseConflict("mine", 5)), False),
        (Conflict("a", 0, 0, deleted=True), False),
    ],
)
def test_a_final_conflict_is_not_retryable(conflict, retryable):
    assert ConflictError([Conflict("z", 1, 2), conflict]).retryable is retryable


def test_a_hint_is_part_of_the_message():
    assert str(StoreBusyError("locked", hint="wait")) == "locked (wait)"
    assert str(StoreUnavailableError("gone")) == "gone"
    assert StoreBusyError("locked", hint="wait").message == "locked"


def test_validation_names_the_field():
    error = ValidationError("label", "is too long")
    assert (error.field, error.reason, str(error)) == ("label", "is too long", "label: is too long")
    assert isinstance(error, ValueError)


def test_not_found_is_a_lookup_error():
    error = TaskNotFound("x")
    assert isinstance(error, LookupError)
    assert error.task_id == "x"
    assert "'x'" in str(error)


def test_a_transition_names_the_current_status():
    error = InvalidTransition("x", "failed", "cancel it")
    assert str(error) == "task 'x' is failed: cannot cancel it"


@pytest.mark.parametrize(
    ("conflict", "text"),
    [
        (Conflict("x", 2, 3), "task 'x': expected revision 2, found 3"),
        (Conflict("x", 2, 0), "task 'x': expected revision 2, found 0"),
        (
            Conflict("x", 2, 0, deleted=True),
            "task 'x': expected revision 2, but the task is deleted",
        ),
        (Conflict("x", 0, 0, existing_task_id="y"), "task 'x': task 'y' has the same dedup key"),
    ],
)
def test_a_conflict_names_its_cause(conflict, text):
    assert str(conflict) == text
    both = ConflictError([conflict, Conflict("z", 1, 2)])
    assert str(both) == f"{text}; task 'z': expected revision 1, found 2"
    assert both.conflicts == (conflict, Conflict("z", 1, 2))


def test_a_conflict_over_the_whole_ledger():
    error = ConflictError([], "the snapshot is behind")
    assert (error.conflicts, str(error)) == ((), "the snapshot is behind")


def test_corruption_has_a_location_and_a_hint():
    error = CorruptStoreError("/x/journal.jsonl", "is damaged", offset=17)
    assert str(error).startswith("/x/journal.jsonl at offset 17: is damaged")
    assert "restore a backup" in str(error)
    assert (error.where, error.reason, error.offset) == ("/x/journal.jsonl", "is damaged", 17)
    assert "offset" not in str(CorruptStoreError("/x", "y"))
    assert str(CorruptStoreError("/x", "y", hint="z")) == "/x: y (z)"


def test_a_missing_backend_lists_the_installed_ones():
    error = BackendNotFoundError("redis", ["sqlite", "json"], hint="install it")
    assert error.installed == ("json", "sqlite")
    assert str(error) == (
        "no backend for the URL scheme 'redis' is installed; "
        "installed schemes: json:, sqlite: (install it)"
    )
    assert "installed schemes: none" in str(BackendNotFoundError("redis", []))


def test_an_expired_cursor_says_where_the_journal_begins():
    error = CursorExpiredError(4, 9)
    assert (error.after, error.floor) == (4, 9)
    assert "seq 9" in str(error)
    assert error.hint


def test_a_schema_mismatch_has_both_revisions():
    error = SchemaMismatchError("the schema is old", found="0001", needed="0002", hint="upgrade")
    assert (error.found, error.needed, str(error)) == (
        "0001",
        "0002",
        "the schema is old (upgrade)",
    )
