"""The validation of records; the table of nasty values has more cases."""

from __future__ import annotations

import enum
import math

import pytest
from msgspec import Raw
from msgspec.structs import fields

from taskstore.errors import ValidationError
from taskstore.model.records import (
    ACTIVE_STATUSES,
    KEY_BYTES,
    MAX_INT,
    NO_METADATA,
    TERMINAL_STATUSES,
    DeliveryContext,
    TaskRecord,
    TaskStatus,
)
from taskstore.model.validation import (
    check_enum,
    check_int,
    check_key,
    check_origin,
    check_text,
    encode_metadata,
    validated,
)
from taskstore.testing import NASTY, make_record
from taskstore.testing.contract.values import root_of, unchecked


@pytest.mark.parametrize("row", NASTY, ids=lambda row: row.name)
def test_the_table_of_nasty_values(row):
    if row.refused is None:
        record = validated(make_record(**row.fields))
        assert validated(record) is record
        return
    try:
        record = unchecked(row.fields)
    except TypeError:
        with pytest.raises(ValidationError):
            make_record(**row.fields)
        return
    with pytest.raises(ValidationError) as caught:
        validated(record)
    assert root_of(caught.value.field) == row.refused
    assert str(caught.value).startswith(row.refused)


def test_the_table_is_large_and_its_names_are_unique():
    names = [row.name for row in NASTY]
    assert len(names) == len(set(names)) >= 100


def test_a_record_is_frozen():
    record = make_record()
    with pytest.raises(AttributeError):
        record.label = "x"
    with pytest.raises(AttributeError):
        del record.label


def test_a_valid_record_is_returned_as_it_is():
    record = make_record(owner_key="o", scope_kind="system", metadata={"a": 1})
    record = validated(record)
    assert validated(record) is record


def test_enums_become_members():
    record = validated(
        make_record(
            status="running",
            scope_kind="session",
            owner_key="o",
            delivery_status="failed",
            notify_policy="silent",
            terminal_outcome="blocked",
            requester_origin={"to": "Ann"},
        )
    )
    assert record.status is TaskStatus.RUNNING
    for name in ("scope_kind", "delivery_status", "notify_policy", "terminal_outcome"):
        assert isinstance(getattr(record, name), enum.Enum)
    assert record.requester_origin == DeliveryContext(to="Ann")


@pytest.mark.parametrize("value", [None, {}, "record", 5, DeliveryContext()])
def test_values_that_are_not_records(value):
    with pytest.raises(ValidationError) as caught:
        validated(value)
    assert caught.value.field == "record"


@pytest.mark.parametrize("field", [f.name for f in fields(TaskRecord)])
@pytest.mark.parametrize("wrong", [b"bytes", 5.5, object(), ["x"], {"x": {1}}])
def test_every_field_checks_its_type(field, wrong):
    with pytest.raises(ValidationError) as caught:
        validated(TaskRecord(**{**BASE, field: wrong}))
    assert root_of(caught.value.field) == field.removesuffix("_json").replace(
        "unknown", "unknown_json"
    )


BASE = {
    "task_id": "t",
    "revision": 1,
    "runtime": "cli",
    "task": "x",
    "status": TaskStatus.QUEUED,
    "created_at": 1,
}


def test_terminal_and_active_are_all():
    assert set(TaskStatus) == ACTIVE_STATUSES | TERMINAL_STATUSES
    assert not ACTIVE_STATUSES & TERMINAL_STATUSES
    for status in TaskStatus:
        assert status.is_terminal is (status in TERMINAL_STATUSES)
        assert make_record(status=status).is_terminal is status.is_terminal


def test_sort_key_and_hash():
    record = make_record(task_id="t", created_at=5)
    assert record.sort_key == (5, "t")
    assert len({record, make_record(task_id="t", created_at=5)}) == 1


# -- the checks -------------------------------------------------------------


def test_text_is_measured_in_bytes():
    assert check_text("f", "é" * 5, 10) == "é" * 5
    with pytest.raises(ValidationError, match="11 bytes"):
        check_text("f", "é" * 5 + "x", 10)


def test_text_is_converted_to_str():
    class Text(str):
        __slots__ = ()

        def __str__(self):
            return "something else"

    checked = check_text("f", Text("é"), 10)
    assert type(checked) is str
    assert checked == "é"
    assert type(check_text("f", TaskStatus.LOST, 10)) is str


def test_keys():
    assert check_key("label", "") == ""
    assert check_key("label", "x" * KEY_BYTES)
    for field in ("task_id", "runtime", "owner_key", "run_id", "run_digest"):
        with pytest.raises(ValidationError, match=r"empty|token"):
            check_key(field, "")


@pytest.mark.parametrize("runtime", ["a", "subagent", "a.b-c_d", "x9", "a" * 255])
def test_runtimes(runtime):
    assert check_key("runtime", runtime) == runtime


@pytest.mark.parametrize("runtime", ["9x", "_a", "-a", "A", "a b", "a\n", "é", "a:b", "a/b"])
def test_invalid_runtimes(runtime):
    with pytest.raises(ValidationError, match="token"):
        check_key("runtime", runtime)


@pytest.mark.parametrize("wrong", [True, 1.0, "1", None, -1, MAX_INT + 1, math.nan])
def test_invalid_ints(wrong):
    with pytest.raises(ValidationError):
        check_int("f", wrong)


def test_ints():
    assert check_int("f", 0) == 0
    assert check_int("f", MAX_INT) == MAX_INT
    with pytest.raises(ValidationError, match="from 2"):
        check_int("f", 1, 2)


def test_an_enum_error_lists_the_members():
    with pytest.raises(ValidationError, match="queued, running, succeeded"):
        check_enum("status", "paused", TaskStatus)
    with pytest.raises(ValidationError, match="is of type int"):
        check_enum("status", 5, TaskStatus)


def test_origins():
    assert check_origin("requester_origin", None) is None
    assert check_origin("requester_origin", {}) == DeliveryContext()
    with pytest.raises(ValidationError, match="colour"):
        check_origin("requester_origin", {"colour": 1})
    with pytest.raises(ValidationError) as caught:
        check_origin("requester_origin", {"to": 5})
    assert caught.value.field == "requester_origin.to"


# -- metadata ---------------------------------------------------------------


def test_metadata_is_canonical():
    assert bytes(encode_metadata({"b": 1, "a": [1, 2.5, "é", None, True]})) == (
        '{"a":[1,2.5,"é",null,true],"b":1}'.encode()
    )
    assert encode_metadata({}) is NO_METADATA
    assert encode_metadata({"a": (1, 2)}) == encode_metadata({"a": [1, 2]})


def test_metadata_is_a_fresh_dict_each_time():
    record = make_record(metadata={"a": {"b": []}})
    record.metadata["a"]["b"].append(1)
    assert record.metadata == {"a": {"b": []}}
    assert make_record().metadata == {}


def test_metadata_is_copied():
    given = {"a": [1]}
    record = make_record(metadata=given)
    given["a"].append(2)
    assert record.metadata == {"a": [1]}


class Colour(enum.IntEnum):
    RED = 1


def test_metadata_of_subclasses_is_converted():
    assert bytes(encode_metadata({"a": Colour.RED, "b": TaskStatus.LOST})) == b'{"a":1,"b":"lost"}'


@pytest.mark.parametrize(
    "value", [{"x": object()}, {"x": 1j}, {"x": [set()]}, {b"x": 1}, {None: 1}]
)
def test_values_that_are_not_json(value):
    with pytest.raises(ValidationError, match="metadata"):
        encode_metadata(value)


def test_metadata_that_contains_itself():
    value = {}
    value["self"] = value
    with pytest.raises(ValidationError, match="nested"):
        encode_metadata(value)


def test_an_error_has_the_path_of_the_value():
    with pytest.raises(ValidationError) as caught:
        encode_metadata({"a": [{"b": math.inf}]})
    assert caught.value.field == "metadata.a[0].b"


def test_unknown_fields_are_checked():
    newer = Raw(b'{"v":"1.9","colour":"red"}')
    assert validated(make_record(unknown_json=newer)).unknown_json is newer
    for wrong in (b"[]", b"5", b'{"v":"2.0"}', b'{"v":5}', b'{"metadata":{}}', b"\xff"):
        with pytest.raises(ValidationError) as caught:
            validated(make_record(unknown_json=Raw(wrong)))
        assert caught.value.field == "unknown_json"
