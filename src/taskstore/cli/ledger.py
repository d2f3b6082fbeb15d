"""The ledger as single commands use it: one question or one change, nothing loaded.

A command asks or changes a handful of records and ends; a
:class:`~taskstore.TaskRegistry`, which mirrors the whole ledger first, would
make that cost as much as the ledger is large.  The rules of a task's life
are the same pure functions that the registry uses, and the store's
compare-and-set is what makes them hold against other writers.
"""

from __future__ import annotations

import re
import shlex
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

import typer

from taskstore.errors import TaskNotFound, TaskStoreError
from taskstore.model.query import SESSION_KEY, Page, Summary, TaskQuery, evaluate
from taskstore.model.records import ACTIVE_STATUSES, TaskRecord
from taskstore.registry.history import EARLIEST_TIME
from taskstore.store.interface import SupportsQuery, TaskRegistryStore
from taskstore.store.opening import default_url, open_store

PAGE_RECORDS = 1000
"""How many records are read at a time where all of them count."""


def open_reader(url: str) -> TaskRegistryStore:
    """Open a ledger to read it; nothing is created or changed."""
    return open_store(url, read_only=True, migrate="never")


def open_existing(url: str) -> TaskRegistryStore:
    """Open a ledger to change it; a mistyped URL creates nothing."""
    open_reader(url).close()
    return open_store(url, migrate="never")


def ask(store: TaskRegistryStore, query: TaskQuery) -> Page:
    """Answer a query: by the store itself, or over its snapshot where it cannot."""
    if isinstance(store, SupportsQuery):
        return store.query(query)
    snapshot = store.load_snapshot()
    return evaluate(query, snapshot.records.values(), snapshot.seq)


def get(store: TaskRegistryStore, task_id: str) -> TaskRecord:
    """Return one record; raises :class:`~taskstore.TaskNotFound`."""
    page = ask(store, TaskQuery(task_id=task_id, limit=1))
    if not page:
        raise TaskNotFound(task_id)
    return page[0]


class Match(NamedTuple):
    """What a token names: a record, the field that it matched, and whether others match too."""

    record: TaskRecord
    field: str
    others: bool

    def listing(self, token: str) -> str:
        """The command that lists all that the token names."""
        option = "--run" if self.field == "run_id" else "--session"
        return f"taskstore list {option} {shlex.quote(token)}"


def find(store: TaskRegistryStore, token: str) -> Match:
    """Return the task with this id, or else of this run, or else of this session.

    Of a run's or session's tasks the newest active one, or the newest.
    Raises :class:`~taskstore.TaskNotFound`.
    """
    for field in ("task_id", "run_id", SESSION_KEY):
        named: dict[str, Any] = {field: token}
        newest = ask(store, TaskQuery(**named, limit=2))
        if not newest:
            continue
        if len(newest) == 1:
            return Match(newest[0], field, others=False)
        active = ask(store, TaskQuery(**named, status=ACTIVE_STATUSES, limit=1))
        return Match((active or newest)[0], field, others=True)
    raise TaskNotFound(token)


def count(store: TaskRegistryStore) -> Summary:
    """Count the tasks by status and runtime, a page at a time.

    Tasks created while counting are not counted; ``seq`` is where it began.
    """
    statuses, runtimes = Counter[str](), Counter[str]()
    page = ask(store, TaskQuery(limit=PAGE_RECORDS))
    seq = page.seq
    while True:
        statuses.update(str(record.status) for record in page)
        runtimes.update(record.runtime for record in page)
        if page.next_cursor is None:
            return Summary.of(statuses, runtimes, seq)
        page = ask(store, TaskQuery(limit=PAGE_RECORDS, after=page.next_cursor))


URL_VARIABLE = "TASKSTORE_URL"
"""The environment variable that names the ledger when ``--url`` does not."""

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])?\Z")

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help=f"The ledger, such as sqlite:///tasks.db; otherwise {URL_VARIABLE}, "
        "otherwise SQLite in your state directory.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Token = Annotated[
    str,
    typer.Argument(metavar="TOKEN", help="A task id, run id or session key.", show_default=False),
]


class Misuse(TaskStoreError):
    """The command cannot be meant like this; the message says why, ``hint`` what would do."""


def url_of(ctx: typer.Context, url: str | None) -> str:
    """The ledger's URL: after the command, before it, the environment, the default."""
    if url is None:
        url = ctx.find_root().params.get("url")
    return default_url() if url is None else url


def seconds(text: str) -> float:
    """Read a duration: ``90``, ``1.5s``, ``5m``, ``2h``, ``3d`` or ``1w``, as seconds."""
    match = _DURATION.match(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a duration such as 90, 1.5s, 5m, 2h or 3d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def positive_seconds(text: str) -> float:
    """Read a duration that is not nothing."""
    value = seconds(text)
    if not 0 < value < 10**9:
        raise typer.BadParameter(f"{text!r} is not a time that can be waited for")
    return value


def moment(text: str) -> int:
    """Read a time, as Unix milliseconds.

    ISO 8601 (UTC where it names no zone), Unix milliseconds, or so long ago: ``2h``.
    """
    text = text.strip()
    if text.isdecimal():
        if int(text) < EARLIEST_TIME:
            raise typer.BadParameter(
                f"{text!r} is not Unix milliseconds; for so long ago write a unit, as in {text}h"
            )
        return int(text)
    if _DURATION.match(text):
        return max(0, time.time_ns() // 1_000_000 - round(seconds(text) * 1000))
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a time: give 2026-01-31T14:00Z, 2h, 3d or Unix milliseconds"
        ) from None
    return int(when.replace(tzinfo=when.tzinfo or UTC).timestamp() * 1000)
