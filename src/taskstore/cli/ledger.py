"""Common options of the commands, and access to a ledger's single records.

A command reads or changes a few records and ends, so it uses the store directly.
A :class:`~taskstore.TaskRegistry` would first load the whole ledger, which takes
longer for a larger ledger.  The commands apply the same pure lifecycle functions as
:class:`~taskstore.TaskRegistry`.  The store's compare-and-set detects changes by other
writers.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

import typer

from taskstore.cli import render
from taskstore.errors import TaskNotFound, TaskStoreError
from taskstore.model.query import SESSION_KEY, Page, Summary, TaskQuery, evaluate, ids_with_ending
from taskstore.model.records import ACTIVE_STATUSES, MIN_UNIX_MS, TaskRecord
from taskstore.store.interface import (
    SupportsIdSearch,
    SupportsQuery,
    SupportsStreaming,
    SupportsSummary,
    TaskRegistryStore,
)
from taskstore.store.opening import default_url, open_store, password_note, shell_command

URL_VARIABLE = "TASKSTORE_URL"
"""The environment variable whose value is the ledger's URL if ``--url`` is missing."""

PAGE_RECORDS = 1000
"""The number of records per page when a command reads all records."""

MIN_ENDING = 4
"""The minimum length of an ending of a task id that names the task on the command line."""

SHOWN_ENDING = 8
"""The minimum length of a shortened task id in a list.  With this length, few ids of later tasks
have the same ending."""

MAX_CANDIDATES = 5
"""The maximum number of task ids that an error names as candidates."""

MAX_SHORTENED = 1000
"""A list shows whole task ids if the list has more ids than this number, or if at least this
number of other ids have the same endings."""

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])?\Z")

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help=f"The URL of the ledger, such as sqlite:///tasks.db. Default: {URL_VARIABLE}, "
        "or else an SQLite file in your state directory.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=render.prepare_json)]
TaskReference = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="A task id, its last characters (at least four), a run id or a session key.",
        show_default=False,
    ),
]


class UsageError(TaskStoreError):
    """Wrong usage of a command; the message gives the reason, and ``hint`` shows the correct
    usage."""


class LedgerURL(NamedTuple):
    """The URL of the ledger that a command uses.

    ``given_by`` says where the command found the URL: ``option``, ``environment`` or ``default``.
    """

    url: str
    given_by: str


_LEDGER_URL = "taskstore.ledger_url"
"""The key of a command's :class:`LedgerURL` in the ``meta`` of its Typer context."""


def url_of(ctx: typer.Context, url: str | None) -> str:
    """Return the ledger's URL from ``--url``, else from the environment, else the default."""
    found = _find_url(ctx, url)
    ctx.meta[_LEDGER_URL] = found
    return found.url


def url_option(ctx: typer.Context, url: str | None) -> str | None:
    """Return the value of the option ``--url``, or ``None`` if the option is missing.

    The option can stand before or after the name of the command.
    """
    found = _find_url(ctx, url)
    return found.url if found.given_by == "option" else None


def _find_url(ctx: typer.Context, url: str | None) -> LedgerURL:
    if url is not None:
        return LedgerURL(url, "option")
    root = ctx.find_root()
    url = root.params.get("url")
    if url is None:
        return LedgerURL(default_url(), "default")
    source = root.get_parameter_source("url")
    from_environment = source is not None and source.name == "ENVIRONMENT"
    return LedgerURL(url, "environment" if from_environment else "option")


def ledger_url(ctx: typer.Context) -> LedgerURL | None:
    """Return the URL that :func:`url_of` found for this command; ``None`` before a call of
    ``url_of``."""
    found: LedgerURL | None = ctx.meta.get(_LEDGER_URL)
    return found


def suggested_command(ctx: typer.Context, *arguments: str) -> str:
    """Return a ``taskstore`` command for the ledger of this command, quoted for the shell.

    If the user gave ``--url`` to this command, the returned command contains ``--url``.
    Otherwise, the returned command finds the same ledger by the environment variable, or uses the
    same default ledger.
    """
    where = ledger_url(ctx)
    url = where.url if where is not None and where.given_by == "option" else ""
    note = password_note(url)
    return shell_command(*arguments, url=url) + (f" ({note})" if note else "")


def parse_duration(text: str) -> float:
    """Parse a duration into seconds: ``90``, ``1.5s``, ``5m``, ``2h``, ``3d`` or ``1w``."""
    match = _DURATION.match(text.strip())
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is not a duration such as '90', '1.5s', '5m', '2h' or '3d'"
        )
    return float(match[1]) * _UNITS[match[2] or "s"]


def parse_positive_duration(text: str) -> float:
    """Parse a duration that is greater than zero."""
    value = parse_duration(text)
    if not 0 < value < 10**9:
        raise typer.BadParameter(f"{text!r} is not a positive duration below 10^9 seconds")
    return value


def parse_time(text: str) -> int:
    """Parse a time into Unix milliseconds.

    The text is ISO 8601 (in UTC if it has no zone), Unix milliseconds, or an age such
    as ``2h``.  A date before ``MIN_UNIX_MS`` (March 1973) becomes 0.
    """
    text = text.strip()
    if text.isdecimal():
        given = int(text)
        if 0 < given < MIN_UNIX_MS:
            advice = f"for an age, add a unit: '{text}h'"
            if given * 1000 >= MIN_UNIX_MS:
                advice = f"if it is a time in seconds, use {given * 1000}"
            raise typer.BadParameter(f"{text!r} is not a time in Unix milliseconds; {advice}")
        return given
    if _DURATION.match(text):
        age_s = min(parse_duration(text), time.time())
        at = time.time_ns() // 1_000_000 - round(age_s * 1000)
        return at if at >= MIN_UNIX_MS else 0
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a time: use '2026-01-31T14:00Z', '2h', '3d' or Unix milliseconds"
        ) from None
    at = int(parsed.replace(tzinfo=parsed.tzinfo or UTC).timestamp() * 1000)
    return at if at >= MIN_UNIX_MS else 0


@contextmanager
def reporting(store: TaskRegistryStore) -> Iterator[TaskRegistryStore]:
    """Yield an open store; then print its report, also after an error, and close it."""
    with store:
        try:
            yield store
        finally:
            render.print_report(store)


def open_reader(url: str) -> TaskRegistryStore:
    """Open a ledger read-only; the call creates and changes nothing."""
    return open_store(url, read_only=True, migrate="never")


def open_existing(url: str) -> TaskRegistryStore:
    """Open an existing ledger for changes; raise an error if the ledger does not exist."""
    open_reader(url).close()
    return open_store(url, migrate="never")


def run_query(store: TaskRegistryStore, query: TaskQuery) -> Page:
    """Return the page of a query.

    If the store does not support queries, the function loads a snapshot and evaluates the query.
    """
    if isinstance(store, SupportsQuery):
        return store.query(query)
    snapshot = store.load_snapshot()
    return evaluate(query, snapshot.records.values(), snapshot.seq)


def get(store: TaskRegistryStore, task_id: str) -> TaskRecord:
    """Return one record; raise :class:`~taskstore.TaskNotFound` if the task does not exist."""
    page = run_query(store, TaskQuery(task_id=task_id, limit=1))
    if not page:
        raise TaskNotFound(task_id)
    return page[0]


class TaskMatch(NamedTuple):
    """A record, the field that equals the reference, and whether other records also match."""

    record: TaskRecord
    field: str
    ambiguous: bool

    def list_arguments(self, reference: str) -> tuple[str, ...]:
        """Return the arguments of the command that lists all tasks that the reference names."""
        option = "--run" if self.field == "run_id" else "--session"
        return (
            ("list", f"{option}={reference}")
            if reference.startswith("-")
            else ("list", option, reference)
        )


def find(store: TaskRegistryStore, reference: str) -> TaskMatch:
    """Return the task that a reference names.

    The function first calls :func:`find_exactly`.  If no task matches, the function calls
    :func:`find_by_ending`.  If neither function finds a task, the call raises
    :class:`~taskstore.TaskNotFound`.
    """
    match = find_exactly(store, reference)
    if match is not None:
        return match
    return TaskMatch(get(store, find_by_ending(store, reference)), "task_id", ambiguous=False)


def find_by_ending(store: TaskRegistryStore, reference: str, *, deleted: bool = False) -> str:
    """Return the id of the only task whose id ends with a reference.

    The function searches the stored tasks, or with ``deleted`` the deleted tasks.  A reference of
    fewer than :data:`MIN_ENDING` characters matches no id.  Raises
    :class:`~taskstore.TaskNotFound` if no id matches, and :class:`UsageError` with the candidates
    if several ids match.
    """
    if len(reference) < MIN_ENDING:
        error = TaskNotFound(reference)
        error.hint = f"the end of an id needs at least {MIN_ENDING} characters"
        raise error
    ids = _ids_with_ending(store, [reference], MAX_CANDIDATES + 1, deleted=deleted)
    if not ids:
        raise TaskNotFound(reference)
    if len(ids) > 1:
        shown = ", ".join(ids[:MAX_CANDIDATES])
        more = " and others" if len(ids) > MAX_CANDIDATES else ""
        raise UsageError(
            f"several task ids end with {reference!r}",
            hint=f"give more characters; did you mean one of {shown}{more}?",
        )
    return ids[0]


def short_ids(store: TaskRegistryStore, ids: Sequence[str]) -> dict[str, str]:
    """Return, for each id, its shortest ending that names only this task on the command line.

    An ending does not begin with ``-``, and has at least :data:`SHOWN_ENDING` characters if the id
    is that long.  One search in the store finds all ids that can have one of these endings.
    """
    whole = {task_id: task_id for task_id in ids}
    if len(ids) > MAX_SHORTENED:
        return whole
    limit = len(ids) + MAX_SHORTENED
    similar = _ids_with_ending(store, {task_id[-SHOWN_ENDING:] for task_id in ids}, limit)
    if len(similar) == limit:
        return whole
    short = {task_id: _shortest_ending(task_id, similar) for task_id in ids}
    # A reference that is a run id or a session key does not name the task whose id ends with it.
    for field in ("run_id", SESSION_KEY):
        filters: dict[str, Any] = {field: set(short.values())}
        if run_query(store, TaskQuery(**filters, limit=1)):
            return whole
    return short


def _shortest_ending(task_id: str, ids: Collection[str]) -> str:
    for size in range(SHOWN_ENDING, len(task_id)):
        ending = task_id[-size:]
        if not ending.startswith("-") and sum(other.endswith(ending) for other in ids) == 1:
            return ending
    return task_id


def _ids_with_ending(
    store: TaskRegistryStore, endings: Collection[str], limit: int, *, deleted: bool = False
) -> Sequence[str]:
    if isinstance(store, SupportsIdSearch):
        return store.find_ids(endings, limit, deleted=deleted)
    return () if deleted else ids_with_ending(store.load_snapshot().records, endings, limit)


def find_exactly(store: TaskRegistryStore, reference: str) -> TaskMatch | None:
    """Return the task whose task id, else run id, else session key equals the reference.

    If several tasks of a run or session match, the function returns the newest active
    task, or the newest task if no task is active.
    """
    for field in ("task_id", "run_id", SESSION_KEY):
        filters: dict[str, Any] = {field: reference}
        newest = run_query(store, TaskQuery(**filters, limit=2))
        if not newest:
            continue
        if len(newest) == 1:
            return TaskMatch(newest[0], field, ambiguous=False)
        active = run_query(store, TaskQuery(**filters, status=ACTIVE_STATUSES, limit=1))
        return TaskMatch((active or newest)[0], field, ambiguous=True)
    return None


def stream_query(store: TaskRegistryStore, query: TaskQuery) -> Iterator[Page]:
    """Yield the page of a query in parts, all as of one seq.

    If the store cannot return a page in parts, the function yields one part.

    The caller must read all parts without a pause, or close the iterator, because a store can keep
    a read transaction open until then.
    """
    if isinstance(store, SupportsStreaming):
        yield from store.stream(query, PAGE_RECORDS)
    else:
        yield run_query(store, query)


def count(store: TaskRegistryStore) -> Summary:
    """Return the number of tasks by status and by runtime.

    If the store supports queries but cannot count, the function queries all records page by page.
    ``seq`` is then the head at the start of the count, and tasks created during the count are not
    included.
    """
    if isinstance(store, SupportsSummary):
        return store.summary()
    if not isinstance(store, SupportsQuery):
        snapshot = store.load_snapshot()
        return Summary.from_records(snapshot.records.values(), snapshot.seq)
    statuses, runtimes = Counter[str](), Counter[str]()
    page = run_query(store, TaskQuery(limit=PAGE_RECORDS))
    seq = page.seq
    while True:
        statuses.update(str(record.status) for record in page)
        runtimes.update(record.runtime for record in page)
        if page.next_cursor is None:
            return Summary.from_counts(statuses, runtimes, seq)
        page = run_query(store, TaskQuery(limit=PAGE_RECORDS, after=page.next_cursor))
