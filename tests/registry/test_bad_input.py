"""Bad input: refused before anything is written, the same on every backend."""

from __future__ import annotations

import enum

import pytest

from taskstore import (
    BackendNotFoundError,
    Put,
    ReadOnlyError,
    StoreClosedError,
    TaskRegistry,
    ValidationError,
)
from taskstore.model.journal import Commit, entries_of
from taskstore.testing import make_record

GOOD = {"runtime": "cli", "task": "x"}
BAD = [
    ("status", {"status": "done"}),
    ("status", {"status": 1}),
    ("runtime", {"runtime": "CLI"}),
    ("runtime", {"runtime": ""}),
    ("runtime", {"runtime": None}),
    ("task", {"task": None}),
    ("task", {"task": b"bytes"}),
    ("task", {"task": "a\0b"}),
    ("task", {"task": "\ud800"}),
    ("task", {"task": "x" * (1024 * 1024 + 1)}),
    ("label", {"label": "é" * 128}),
    ("run_id", {"run_id": ""}),
    ("task_id", {"task_id": "x" * 256}),
    ("task_id", {"task_id": 5}),
    ("owner_key", {"scope_kind": "session"}),
    ("owner_key", {"requester_session_key": "s"}),
    ("scope_kind", {"scope_kind": "galaxy"}),
    ("notify_policy", {"notify_policy": "always"}),
    ("delivery_status", {"delivery_status": "lost"}),
    ("requester_origin", {"requester_origin": "mail"}),
    ("requester_origin", {"requester_origin": {"town": "x"}}),
    ("requester_origin.to", {"requester_origin": {"to": "a\0"}}),
    ("created_at", {"created_at": 1.5}),
    ("created_at", {"created_at": -1}),
    ("created_at", {"created_at": 2**53}),
    ("created_at", {"created_at": True}),
    ("cleanup_after", {"cleanup_after": "tomorrow"}),
    ("metadata", {"metadata": [1]}),
    ("metadata.a", {"metadata": {"a": float("nan")}}),
    ("metadata.a[0]", {"metadata": {"a": [float("inf")]}}),
    ("metadata.a", {"metadata": {"a": b"x"}}),
    ("metadata.a", {"metadata": {"a": 2**64}}),
    ("metadata.a.b", {"metadata": {"a": {"b": "\ud800"}}}),
    ("metadata key", {"metadata": {1: 2}}),
    ("metadata", {"metadata": {"a": "x" * 65536}}),
    ("progress_summary", {"progress_summary": "x" * 4097}),
    ("ended_at", {"ended_at": 5}),
    ("revision", {"revision": 5}),
    ("run_digest", {"run_digest": "mine"}),
    ("colour", {"colour": "red"}),
]


@pytest.mark.parametrize(
    ("field", "bad"), BAD, ids=[f"{field}-{n}" for n, (field, _) in enumerate(BAD)]
)
def test_an_invalid_record_is_refused_with_the_field_name(registry, field, bad):
    with pytest.raises(ValidationError) as raised:
        registry.create(**{**GOOD, **bad})
    assert raised.value.field == field
    assert raised.value.reason
    assert registry.seq == 0
    assert registry.store.load_snapshot().seq == 0
    assert registry.create(**GOOD).revision == 1
    assert registry.seq == 1


def test_changes_refuse_the_same_values(registry):
    task = registry.create(**GOOD, status="running")
    refused = [
        lambda: registry.record_progress("a\0", "half"),
        lambda: registry.record_progress(task.task_id, None),
        lambda: registry.finish(task.task_id, "failed", error=b"x"),
        lambda: registry.finish(task.task_id, "failed", fence="\udfff"),
        lambda: registry.finish(task.task_id, "failed", ended_at="now"),
        lambda: registry.finish(task.task_id, "succeeded", outcome="great"),
        lambda: registry.cancel(task.task_id, 5),
        lambda: registry.set_delivery_status(task.task_id, "sent"),
        lambda: registry.set_notify_policy(task.task_id, None),
        lambda: registry.set_cleanup_after(task.task_id, 1.5),
        lambda: registry.link_flow(task.task_id, "x" * 300),
        lambda: registry.update_metadata(task.task_id, {"a": float("nan")}),
        lambda: registry.update_metadata(task.task_id, {"a": object()}),
        lambda: registry.mark_running(task.task_id, if_revision="1"),
        lambda: registry.mark_running(None),
        lambda: registry.delete(b"x"),
        lambda: registry.run(""),
    ]
    for refuse in refused:
        with pytest.raises(ValidationError):
            refuse()
    assert registry.get(task.task_id) == task
    assert registry.seq == 1


def test_a_closed_registry_raises(open_ledger):
    registry = open_ledger()
    task = registry.create(**GOOD)
    registry.close()
    registry.close()
    for use in (
        lambda: registry.get(task.task_id),
        registry.list,
        lambda: registry.create(**GOOD),
        lambda: registry.mark_running(task.task_id),
        registry.refresh,
        registry.changes,
        lambda: registry.history(task.task_id),
        lambda: registry.as_of(1),
        registry.summary,
        lambda: registry.run("r").cancel(),
        lambda: registry.batch().__enter__(),
    ):
        with pytest.raises(StoreClosedError):
            use()


def test_a_closed_store_raises_through_the_registry(open_ledger):
    registry = open_ledger()
    registry.store.close()
    with pytest.raises(StoreClosedError):
        registry.create(**GOOD)
    assert registry.summary().total == 0


def test_a_read_only_registry_reads_and_refuses_to_write(open_ledger):
    task = open_ledger().create(**GOOD)
    reader = open_ledger(read_only=True)
    assert reader.get(task.task_id) == task
    for write in (
        lambda: reader.create(**GOOD),
        lambda: reader.mark_running(task.task_id),
        lambda: reader.delete(task.task_id),
    ):
        with pytest.raises(ReadOnlyError):
            write()


@pytest.mark.parametrize("url", ["redis-cluster://x", "nothing:"])
def test_an_unknown_scheme_lists_what_is_installed(url):
    with pytest.raises(BackendNotFoundError) as raised:
        TaskRegistry.open(url)
    assert {"json", "memory", "sqlite", "postgresql+psycopg"} <= set(raised.value.installed)
    assert "sqlite:" in str(raised.value)


def test_a_scheme_without_its_driver_is_pointed_to_the_right_one():
    with pytest.raises(BackendNotFoundError, match=r"postgresql\+psycopg"):
        TaskRegistry.open("postgresql://user:secret@host/db")


@pytest.mark.parametrize("url", ["tasks.db", "", 7])
def test_what_is_not_a_url_is_refused(url):
    with pytest.raises(ValidationError, match="url"):
        TaskRegistry.open(url)


@pytest.mark.parametrize("option", [{"durability": "some"}, {"migrate": "yes"}])
def test_an_unknown_option_value_is_refused(option):
    with pytest.raises(ValidationError):
        TaskRegistry.open("memory:", **option)


def test_invalid_arguments_are_reported_whatever_the_task(registry):
    ended = registry.create(**GOOD, run_id="r")
    registry.finish(ended.task_id, "failed")
    running = registry.create(**GOOD, status="running")
    run = registry.run("r")
    for refuse in (
        lambda: run.finish("sucess"),
        lambda: run.finish("failed", error=OSError("a")),
        lambda: run.record_progress(5),
        lambda: run.update_metadata([1]),
        lambda: registry.run("unknown").set_notify_policy("often"),
        lambda: registry.finish("nobody", "nope"),
        lambda: registry.record_progress("nobody", 5),
        lambda: registry.update_metadata("nobody", [1]),
        lambda: registry.set_delivery_status("nobody", "zz"),
        lambda: registry.mark_running(running.task_id, started_at="x"),
        lambda: registry.recover(running.task_id, "lost"),
        lambda: registry.find({}),
        lambda: registry.find_by_run(5),
        lambda: registry.list(5),
        lambda: registry.changes(wait="x"),
        lambda: registry.changes(wait=-1),
        lambda: registry.changes(wait=float("nan")),
    ):
        with pytest.raises(ValidationError):
            refuse()


def test_enums_in_metadata_are_stored_by_their_value(registry):
    class Colour(str, enum.Enum):  # noqa: UP042 (the kind whose str() is its name)
        RED = "red"

    task = registry.create(**GOOD, metadata={Colour.RED: Colour.RED})
    assert registry.get(task.task_id).metadata == {"red": "red"}


def test_an_end_at_the_largest_time_is_kept_until_then(registry):
    task = registry.create(**GOOD)
    assert registry.finish(task.task_id, "failed", ended_at=2**53 - 1).cleanup_after == 2**53 - 1


class Text(str):
    """A subclass of ``str`` that encoders do not support."""

    __slots__ = ()


class Odd(float):
    """A float whose product is another value."""

    def __mul__(self, other):
        return -1e300


def test_text_in_an_origin_becomes_plain(registry):
    task = registry.create(**GOOD, requester_origin={"channel": Text("chat"), "to": "Ann"})
    assert type(task.requester_origin.channel) is str
    assert (task.requester_origin.channel, task.requester_origin.to) == ("chat", "Ann")


def test_a_lease_of_odd_length_is_refused(registry):
    task = registry.create(**GOOD)
    with pytest.raises(ValidationError, match="lease_s"):
        registry.take_lease(task.task_id, Odd(5))
    assert registry.get(task.task_id) == task


@pytest.mark.parametrize("told", [1.5, "now", None, -1, 2**53, True])
def test_an_invalid_clock_value_is_refused(registry, told):
    task = registry.create(**GOOD)
    registry.store.clock = lambda: told
    for refuse in (
        lambda: registry.create(**GOOD),
        lambda: registry.mark_running(task.task_id),
        lambda: registry.run("r").cancel(),
        lambda: registry.take_lease(task.task_id),
    ):
        with pytest.raises(ValidationError, match="clock"):
            refuse()
    assert registry.get(task.task_id) == task


def test_no_revision_follows_the_largest(registry):
    registry.store.apply([Put(make_record(task_id="a", revision=1))])
    registry.refresh()
    last = make_record(task_id="a", revision=2**53 - 1)
    registry._cache._apply_entries(entries_of([Put(last)], Commit(2, 2, 0)), local=True)
    with pytest.raises(ValidationError, match="revision"):
        registry.cancel("a")
