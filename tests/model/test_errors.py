"""Errors say what happened, where, and what to do next."""

from __future__ import annotations

import concurrent.futures
import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
import typing
from collections.abc import Iterable

import pytest

import taskstore
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
from taskstore.model.compaction_policy import CompactionReport
from taskstore.model.journal import (
    Commit,
    EntryKind,
    JournalEntry,
    Position,
    Put,
    Quarantined,
    Remove,
)
from taskstore.model.records import TaskStatus
from taskstore.model.validation import check_key
from taskstore.store.interface import StoreReport, VerifyReport
from taskstore.testing import make_record

EVERY = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, Exception)
]

CONFLICTS = [
    Conflict("a", 1, 2),
    Conflict("b", 0, 0, existing_task_id="c"),
    Conflict("d", 3, 0, deleted=True),
    Conflict("e", 1, 1, leased=LeaseConflict("mine", 5)),
    Conflict("f", 1, 1, leased=LeaseConflict(None, None)),
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


# -- copies ------------------------------------------------------------------

EXAMPLES = {
    str: "text",
    str | None: "more text",
    int: 3,
    int | None: 7,
    bool: True,
    Iterable[str]: ["b", "a"],
    Iterable[Conflict]: CONFLICTS,
}
"""A value for each type of a constructor's parameter."""


def every_exception():
    """Return the exception classes that the package defines, in all its modules."""
    for module in pkgutil.walk_packages(taskstore.__path__, "taskstore."):
        if ".migrations." not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(kind):
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    ours = {kind for kind in below(BaseException) if kind.__module__.startswith("taskstore.")}
    return sorted(ours, key=lambda kind: (kind.__module__, kind.__qualname__))


def examples_of(kind):
    """Return errors of a class: with the required arguments, and with all arguments."""
    if not inspect.isfunction(kind.__init__):
        return [kind("text", 5)]
    hints = typing.get_type_hints(kind.__init__)
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    return [build(kind, hints, chosen) for chosen in (required, parameters)]


def build(kind, hints, parameters):
    arguments, options = [], {}
    for parameter in parameters:
        value = EXAMPLES[hints[parameter.name]]
        if parameter.kind is parameter.KEYWORD_ONLY:
            options[parameter.name] = value
        else:
            arguments.append(value)
    return kind(*arguments, **options)


COPIES = {
    **{
        f"pickle {protocol}": lambda error, protocol=protocol: pickle.loads(
            pickle.dumps(error, protocol)
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def check_copies(error):
    error.add_note("seen by worker 7")
    for name, make in COPIES.items():
        found = make(error)
        assert type(found) is type(error), name
        assert found is not error, name
        assert (found.args, vars(found)) == (error.args, vars(error)), name
        assert (str(found), repr(found)) == (str(error), repr(error)), name
        assert found.__notes__ == ["seen by worker 7"], name
        if isinstance(error, TaskStoreError):
            assert (found.hint, found.retryable) == (error.hint, error.retryable), name


@pytest.mark.parametrize("kind", every_exception())
def test_every_error_survives_a_copy(kind):
    for error in examples_of(kind):
        check_copies(error)


class EngineBusyError(StoreBusyError):
    """As the author of a backend would write it: with parameters and state of its own."""

    __slots__ = ("attempts", "node")

    def __init__(self, *, host: str, port: int) -> None:
        super().__init__(f"{host}:{port} is busy", hint="wait", owners=[host])
        self.address = (host, port)
        self.attempts = 3  # the second slot stays empty


class EngineValueError(ValidationError):
    def __init__(self, limit: int) -> None:
        super().__init__("label", f"is over {limit}")
        self.args = (limit, "other arguments than the message")
        self.retryable = True


class EngineHandleError(StoreUnavailableError):
    """An error with an attribute that no other process can have."""

    def __init__(self, handle) -> None:
        super().__init__("the engine is gone")
        self.handle = handle

    def __getstate__(self):
        return {**vars(self), "handle": None}


def test_the_errors_of_a_backend_survive_a_copy():
    busy = EngineBusyError(host="db", port=5)
    check_copies(busy)
    for make in COPIES.values():
        found = make(busy)
        assert (found.attempts, found.address, found.owners) == (3, ("db", 5), ("db",))
        assert not hasattr(found, "node")
    check_copies(EngineValueError(9))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        error = EngineHandleError(lambda: None)
        found = pickle.loads(pickle.dumps(error, protocol))
        assert (str(found), found.handle) == (str(error), None)


RECORD = make_record(run_id="r", metadata={"a": [1]}, status=TaskStatus.FAILED, error="no")


@pytest.mark.parametrize(
    "value",
    [
        *CONFLICTS,
        RECORD,
        Put(RECORD),
        Remove("a", 2),
        Commit(1, 2, 3, "id"),
        Position(1, "id"),
        Quarantined(b"{", "line 3", "is damaged", task_id="a", revision=2),
        JournalEntry(1, 2, EntryKind.UPSERTED, "a", 1, RECORD),
        StoreReport((Quarantined(b"{", "line 3", "is damaged"),), ("a notice",)),
        VerifyReport(1, 2, 3, ("a problem",)),
        CompactionReport(compacted=False, reason="not due", seq=5, floor=1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_values_beside_an_error_survive_a_copy(value):
    for name, make in COPIES.items():
        assert make(value) == value, name
        assert type(make(value)) is type(value), name


def test_a_deep_copy_shares_no_state():
    error = EngineHandleError(["a"])
    error.extra = {"a": []}
    found = copy.deepcopy(error)
    found.extra["a"].append(1)
    assert error.extra == {"a": []}


def test_an_error_does_not_break_a_process_pool():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        with pytest.raises(ValidationError) as raised:
            pool.submit(check_key, "runtime", "NOT A TOKEN").result()
        assert raised.value.field == "runtime"
        assert pool.submit(check_key, "runtime", "cli").result() == "cli"
